# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The embedded demo: a small LLaVA and mergers that were really trained, and a drawn picture to ask it about."""

from pathlib import Path


MODEL_DIR = Path(__file__).parent / "model"
MERGERS = ("question_aware", "agnostic", "salient")  # trained for 4 to 64 tokens
SERVED = "served"  # question-aware, without attention mass, which serving engines cannot do
NUM_MERGED_TOKENS = 16  # of the demo
PICTURE = Path(__file__).parent / "picture.png"
QUESTIONS = (
    "What color is the star?",
    "What shape is the blue object?",
    "How many shapes are there?",
    "Is there a purple heart?",
    "Where is the star?",
    "What digit is shown?",
)


def find_merger(name: str) -> str:
    """The folder of a bundled merger, by its name; any other name as it is."""
    return str(Path(__file__).parent / "mergers" / name) if name in (*MERGERS, SERVED) else name
