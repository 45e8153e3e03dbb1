# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every method inside the whole model: precision × budget × padding, and its image features as one graph."""

import pytest
import torch
from conftest import aware, pixels, prompts, tiny_model
from test_mergers import METHODS

from llava_merge import MERGING_METHODS
from llava_merge.model.merging_base import READ_FOR_QUESTION


N = 36
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}
CASES = [
    pytest.param(name, dtype, num_tokens, pad, id=f"{name}-{str(dtype)[6:]}-{num_tokens}-{pad}")
    for name in [*METHODS, "image_resize"]
    for dtype in TOLERANCE
    for num_tokens in ((N,) if name == "none" else (1, 9, N))
    for pad in ("left", "right")
]


def model_of(name: str, dtype: torch.dtype, num_tokens: int):
    merger_type = name.split("-")[0]
    fields = {"merger_type": merger_type, "num_heads": 4, "attention_mass": 1.0, **METHODS.get(name, {})}
    fields["num_merged_tokens"] = None if name == "none" else num_tokens
    if fields.get("question_aware") or MERGING_METHODS[merger_type].requires & READ_FOR_QUESTION:
        fields = {**aware(num_tokens), **fields}
    elif MERGING_METHODS[merger_type].uses_question and merger_type not in ("fixed_pooling", "salient_pooling"):
        fields = {**aware(num_tokens), **fields, "question_aware": True}
    return tiny_model(fields, train_merger=True).to(dtype)


@pytest.mark.parametrize("name, dtype, num_tokens, pad", CASES)
def test_rows_of_a_padded_batch_are_as_alone(name, dtype, num_tokens, pad):
    """Rows with one and two images: their logits, and the image features compiled as one graph."""
    model, pictures = model_of(name, dtype, num_tokens), pixels(3).to(dtype)
    batch = prompts([1, 2], num_tokens, pad)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pictures).logits
        for row, images in enumerate((pictures[:1], pictures[1:])):
            real = batch["attention_mask"][row].bool()
            alone = model(input_ids=batch["input_ids"][row][real][None], pixel_values=images).logits[0]
            assert alone.isfinite().all() and alone.dtype == dtype
            scale = alone.float().abs().max()
            assert (logits[row][real] - alone).float().abs().max() < TOLERANCE[dtype] * scale
        if (dtype, pad, num_tokens) == (torch.bfloat16, "left", 9):  # seconds each; the others are in test_mergers
            check_one_graph(model, pictures)


def check_one_graph(model, pictures):
    torch._dynamo.reset()
    question = None
    if model.config.merger_config.question_aware:
        question = torch.randn(len(pictures), 5, 64, dtype=pictures.dtype)

    def features(pixel_values):
        return torch.stack(model.model.encode_images(pixel_values, question=question).pooler_output)

    expected = features(pictures)
    compiled = torch.compile(features, fullgraph=True, backend="eager")
    assert torch.equal(compiled(pictures), expected)
