# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes the checkpoint that test_loading.py expects from another transformers release: run on 4.57."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import aware, pixels, prompts, tiny_model
from safetensors.torch import save_file


directory = Path(__file__).parent / "saved_on_4.57"
model = tiny_model(aware(question_start_token_ids=None, question_end_token_ids=None), train_merger=True)
model.save_pretrained(directory)
for code in directory.glob("*.py"):
    code.unlink()
batch = prompts([1, 2, 0], 9)
logits = model(**batch, pixel_values=pixels(3), question_mask=batch["attention_mask"].bool()).logits
save_file({"logits": logits.detach()}, directory / "expected.safetensors")
