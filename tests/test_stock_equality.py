# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A LLaVA whose merger is the identity does bit for bit what stock LLaVA does, on every supported release."""

import copy
import inspect

import pytest
import torch
from conftest import IMAGE_ID, NUM_PATCHES, image_features, pixels, prompts, tiny_model, tiny_stock
from packaging.version import Version
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import ModelOutput

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeModel
from llava_merge.model.compat import TRANSFORMERS_V5, TRANSFORMERS_VERSION


pytestmark = pytest.mark.core

NONE = {"merger_type": "none", "num_heads": 4}
CACHE = "cache" if TRANSFORMERS_VERSION >= Version("5.24") else "past_key_values"
# Before, stock repeats single images for beams, so that rows with several get each other's.
STOCK_KEEPS_IMAGES_OF_A_ROW_TOGETHER = TRANSFORMERS_VERSION >= Version("5.18")


@pytest.fixture
def pair():
    return stock_without_the_last_tower_layer(), tiny_model(NONE)


def stock_without_the_last_tower_layer() -> LlavaForConditionalGeneration:
    """Its features are those of the layer before, so that it is not built here; stock runs it and shows its output."""
    stock = tiny_stock()
    encoder = next(
        module
        for name, module in stock.named_modules()
        if name.endswith("vision_tower.encoder") or name.endswith("vision_model.encoder")
    )
    encoder.layers = encoder.layers[:-1]
    stock.model.vision_tower.config.num_hidden_layers = 2
    stock.config.vision_feature_layer = -1
    return stock


def same(stock, ours):
    """Whether two outputs are of one class and equal in all their tensors."""
    assert type(stock) is type(ours)
    if isinstance(stock, torch.Tensor):
        return torch.equal(stock, ours)
    if isinstance(stock, ModelOutput):
        assert stock.keys() == ours.keys()
        return all(same(stock[key], ours[key]) for key in stock)
    if isinstance(stock, list | tuple):
        return len(stock) == len(ours) and all(same(*two) for two in zip(stock, ours, strict=True))
    return True  # a cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True},
        {"use_cache": False},
    ],
    ids=str,
)
def test_outputs_of_forward(pair, dtype, pad, headless, asked):
    inputs = {**prompts([1, 2, 0], NUM_PATCHES, pad), "pixel_values": pixels(3).to(dtype), **asked}
    models = [(model.model if headless else model).to(dtype) for model in pair]
    assert same(*(model(**inputs) for model in models))


def test_output_attentions():
    stock, ours = stock_without_the_last_tower_layer(), tiny_model(NONE)
    for model in (stock, ours):
        model.set_attn_implementation("eager")
    inputs = {**prompts([1], NUM_PATCHES), "pixel_values": pixels(1), "output_attentions": True}
    assert same(stock(**inputs), ours(**inputs))


def test_arguments_by_position_and_labels(pair):
    batch = prompts([1, 2], NUM_PATCHES)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, -100)
    arguments = (batch["input_ids"], pixels(3), batch["attention_mask"])
    stock, ours = (model(*arguments, labels=labels, logits_to_keep=0) for model in pair)
    assert stock.loss.isfinite() and same(stock, ours)
    with pytest.raises(TypeError):
        pair[1](*([None] * 40))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("counts", [[1, 2, 0], [2, 2], [1]], ids=str)
def test_generated_ids_and_scores(pair, options, counts):
    if "prompt_lookup_num_tokens" in options and len(counts) > 1:
        pytest.skip("assisted decoding takes one row")
    if "num_beams" in options and max(counts) > 1 and not STOCK_KEEPS_IMAGES_OF_A_ROW_TOGETHER:
        pytest.skip("stock mixes the images of rows up; tests/test_generation.py compares with rows alone")
    inputs = {**prompts(counts, NUM_PATCHES), "pixel_values": pixels(sum(counts)), **options}
    asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    asked["suppress_tokens"] = [IMAGE_ID]  # a trained model does not write it
    stock, ours = (model.generate(**inputs, **asked) for model in pair)
    assert torch.equal(stock.sequences, ours.sequences)
    assert all(torch.equal(*two) for two in zip(stock.scores, ours.scores, strict=True))


def test_assisted_decoding(pair):
    draft = tiny_stock()
    with torch.no_grad():
        draft.lm_head.weight.add_(0.05 * torch.randn_like(draft.lm_head.weight))
    inputs = {**prompts([1], NUM_PATCHES), "pixel_values": pixels(1)}
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    plain = pair[0].generate(**inputs, **options)
    for model in pair:
        assert torch.equal(model.generate(**inputs, **options, assistant_model=copy.deepcopy(draft)), plain)


def test_a_draft_with_a_narrower_language_model():
    draft = tiny_stock(text_hidden_size=32)
    inputs = {**prompts([1], NUM_PATCHES), "pixel_values": pixels(1)}
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    model = tiny_model(NONE)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=draft), model.generate(**inputs, **options))


def prefilled(model, tokens: int):
    """A cache that holds the first `tokens` of the prompt, image and all."""
    inputs = prompts([1], NUM_PATCHES)
    start = {name: tensor[:, :tokens] for name, tensor in inputs.items()}
    with torch.no_grad():
        return model(**start, pixel_values=pixels(1), **{CACHE: DynamicCache()})[CACHE]


def test_forward_on_a_filled_cache(pair):
    inputs = prompts([1], NUM_PATCHES)
    rest = {"input_ids": inputs["input_ids"][:, NUM_PATCHES + 1 :], "attention_mask": inputs["attention_mask"]}
    outputs = [model(**rest, **{CACHE: prefilled(model, NUM_PATCHES + 1)}) for model in pair]
    assert torch.equal(*(output.logits for output in outputs))


def test_generate_on_a_cache_that_holds_the_image(pair):
    """With the picture passed again, as processors give it: stock 4.57 takes that, 5.x raises; ours always takes it."""
    inputs = prompts([1], NUM_PATCHES)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    fresh = pair[0].generate(**inputs, pixel_values=pixels(1), **options)
    for model in pair:
        cached = {CACHE: prefilled(model, NUM_PATCHES + 1)}
        assert torch.equal(model.generate(**inputs, **cached, **options), fresh)
    cached = {CACHE: prefilled(pair[1], NUM_PATCHES + 1)}
    assert torch.equal(pair[1].generate(**inputs, pixel_values=pixels(1), **cached, **options), fresh)


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="stock raises IndexError")
def test_a_second_turn_with_only_its_new_tokens(pair):
    inputs = prompts([1], NUM_PATCHES)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    new = torch.tensor([[7, 8, *[IMAGE_ID] * NUM_PATCHES, 9]])
    answers = []
    for model in pair:
        whole = {
            "input_ids": torch.cat((inputs["input_ids"], new), dim=1),
            "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + new.shape[1], dtype=torch.long),
        }
        cache = {CACHE: prefilled(model, inputs["input_ids"].shape[1])}
        only_new = {**whole, "input_ids": new}
        ids = model.generate(**only_new, pixel_values=pixels(1, seed=4), **cache, **options)[:, new.shape[1] :]
        both = torch.cat((pixels(1), pixels(1, seed=4)))
        assert torch.equal(ids, model.generate(**whole, pixel_values=both, **options)[:, whole["input_ids"].shape[1] :])
        answers.append(ids)
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "stock, ours",
    [(LlavaForConditionalGeneration, LlavaMergeForConditionalGeneration), (LlavaModel, LlavaMergeModel)],
)
def test_signatures_show_what_the_installed_release_takes(stock, ours):
    expected, shown = inspect.signature(stock.forward), inspect.signature(ours.forward)
    assert list(shown.parameters) == [
        *list(expected.parameters)[:-1],
        *(["mm_encoder_outputs"] if stock is LlavaModel and "mm_encoder_outputs" not in expected.parameters else []),
        "question_mask",
        "answer_mask",
        "num_merged_tokens",
        "tokens_are_placed",
        "kwargs",
    ]
    for name, parameter in expected.parameters.items():
        assert shown.parameters[name] == parameter
    if stock is LlavaForConditionalGeneration:
        prepare = inspect.signature(ours.prepare_inputs_for_generation).parameters
        assert set(inspect.signature(stock.prepare_inputs_for_generation).parameters) <= set(prepare)


def test_image_features_are_where_the_release_puts_them(pair):
    inputs = {**prompts([1, 2], NUM_PATCHES), "pixel_values": pixels(3)}
    assert torch.equal(*(image_features(model(**inputs)) for model in pair))
    assert image_features(pair[1](**inputs)).shape == (3 * NUM_PATCHES, 64)
