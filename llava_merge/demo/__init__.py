# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The embedded demo: a small LLaVA that was really trained, and a drawn picture to ask it about."""

from pathlib import Path


MODEL_DIR = Path(__file__).parent / "model"
PICTURE = Path(__file__).parent / "picture.png"
QUESTIONS = (
    "What color is the star?",
    "What shape is the blue object?",
    "How many shapes are there?",
    "Is there a purple heart?",
    "Where is the star?",
    "What digit is shown?",
)
