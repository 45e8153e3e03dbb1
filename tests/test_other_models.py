# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""examples/other_models: merging in models that have no subclass here, tiny and random."""

import pytest
import torch
from conftest import load_example


pytestmark = pytest.mark.newest
GRIDS = [(8, 8), (6, 10), (3, 4)]
GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def example():
    return load_example("other_models/qwen2_5_vl")


@pytest.fixture(scope="module")
def model(example):
    model = example.tiny_model()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1  # so that answers differ
    return model


@pytest.mark.parametrize("merger", ["tome", "divprune"])
def test_with_all_tokens_it_answers_as_the_model_does(example, model, merger):
    inputs = example.random_prompts(model, GRIDS)
    prompt = example.merged_prompt(model, example.METHODS[merger], 64, **inputs)
    assert prompt["inputs_embeds"].shape[1] == inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, **GENERATE)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**prompt, **GENERATE), expected)
    assert len(set(map(tuple, expected.tolist()))) == len(GRIDS)


@torch.no_grad()
def test_kept_tokens_are_where_they_were_and_the_others_as_if_masked(example, model):
    inputs = example.random_prompts(model, GRIDS)
    kept = {}

    def merge(features, grid, num_tokens):
        kept[grid] = example.METHODS["divprune"](features, grid, num_tokens)
        return kept[grid]

    prompt = example.merged_prompt(model, merge, 9, **inputs)
    assert prompt["inputs_embeds"].shape[1] == 14 + 9
    mask, is_image = inputs["attention_mask"].clone(), inputs["input_ids"] == model.config.image_token_id
    for row, grid in enumerate(GRIDS):
        is_kept = torch.zeros(grid[0] * grid[1], dtype=torch.long).scatter(0, kept[grid].positions[0], 1)
        mask[row, is_image[row]] = is_kept
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    expected = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits[:, -8:]
    torch.testing.assert_close(model(**prompt).logits[:, -8:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merger", ["tome", "divprune"])
def test_rows_of_a_batch_are_as_alone(example, model, merger):
    together = example.merged_prompt(model, example.METHODS[merger], 16, **example.random_prompts(model, GRIDS))
    answers = model.generate(**together, **GENERATE)
    inputs, first = example.random_prompts(model, GRIDS), 0
    for row, grid in enumerate(GRIDS):
        number = 4 * grid[0] * grid[1]
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone["pixel_values"] = inputs["pixel_values"][first : first + number]
        first += number
        prompt = example.merged_prompt(model, example.METHODS[merger], 16, **alone)
        assert torch.equal(model.generate(**prompt, **GENERATE)[0], answers[row])


def test_it_runs_as_a_script(example, capsys):
    example.main(example.parse(["--max-new-tokens", "2"]))
    assert capsys.readouterr().out.startswith("78 tokens became 29\n")
