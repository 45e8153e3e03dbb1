# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The embedded demo: a small LLaVA and mergers that were really trained, and a drawn picture to ask it about."""

from pathlib import Path


MODEL_DIR = Path(__file__).parent / "model"
MERGERS = ("question_aware", "agnostic", "salient")  # trained for 4 to 64 tokens
SERVED = "served"  # question-aware, without attention mass, which serving engines cannot do
NUM_MERGED_TOKENS = 16  # of the demo
PICTURE = Path(__file__).parent / "picture.png"  # of a scene that no part was trained on, chosen by hand
ANSWERS = {  # the right ones to questions about it
    "What number is shown?": "314",
    "What color is the tiny diamond?": "yellow",
    "How many squares are there?": "2",
    "Is there a red square?": "yes",
    "Where is the yellow square?": "bottom left",
    "Is the green cross above the red square?": "yes",
}
QUESTIONS = tuple(ANSWERS)
KNOWS = (
    "The bundled model knows drawn shapes, colors and numbers alone. For photographs, choose a LLaVA with `--model`."
)


def find_merger(name: str) -> str:
    """The folder of a bundled merger, by its name; any other name as it is."""
    return str(Path(__file__).parent / "mergers" / name) if name in (*MERGERS, SERVED) else name
