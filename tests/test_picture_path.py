# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""How far a picture walks through the package: from module to module, in one `generate` of one token."""

import sys
from pathlib import Path

import pytest
from conftest import agnostic, aware, make_processor, tiny_model
from PIL import Image

import llava_merge
from llava_merge import LlavaMergeProcessor


ROOT = str(Path(llava_merge.__file__).parent)


def modules_called(call) -> list[str]:
    """The module of each call into the package, in order."""
    found = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            found.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(("fields", "most"), [(agnostic(9), 81), (aware(9), 87)], ids=["agnostic", "aware"])
def test_changes_of_module(fields, most):
    """The aim is 60; raise no figure here."""
    model = tiny_model(fields).eval()
    processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9)
    prompt = "USER: <image> what is red ? ASSISTANT:"
    inputs = processor(images=Image.new("RGB", (84, 84)), text=prompt, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=1, do_sample=False)  # what the first call prepares
    modules = modules_called(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))
    changes = sum(one != other for one, other in zip(modules, modules[1:], strict=False))
    assert len(modules) > 50 and changes <= most, changes
