# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""On the newest transformers nothing that a user does through us is already announced to go away there."""

import logging
import warnings

import pytest
import torch
from conftest import IMAGE_ID, agnostic, aware, make_processor, pixels, prompts, tiny_model
from packaging.version import Version
from transformers import Trainer, TrainingArguments, pipeline

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.model.compat import TRANSFORMERS_VERSION


NEWEST = Version("5.24")
OF_TRANSFORMERS_OWN_DRAFTS = "Passing `generation_config` together"  # assisted decoding of any model says so
CACHE = "cache" if TRANSFORMERS_VERSION >= NEWEST else "past_key_values"

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(TRANSFORMERS_VERSION < NEWEST, reason="what is announced there is still the only way here"),
]


@pytest.fixture(autouse=True)
def nothing_is_deprecated():
    """Fails a test in which transformers announces by a warning or a log record that something goes away."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    logger.removeHandler(handler)
    said = [str(warning.message) for warning in caught] + [record.getMessage() for record in records]
    announced = [text for text in said if "deprecat" in text.lower() or "will be removed" in text.lower()]
    assert not [text for text in announced if not text.startswith(OF_TRANSFORMERS_OWN_DRAFTS)]


@pytest.fixture
def model():
    return tiny_model(aware(), train_merger=True)


@pytest.fixture
def inputs():
    return {**prompts([1, 2], 9), "pixel_values": pixels(3)}


@pytest.mark.parametrize("options", [{}, {"return_dict": False}, {"output_hidden_states": True}], ids=str)
def test_forward(model, inputs, options):
    model(**inputs, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 7}],
    ids=str,
)
def test_generate(model, inputs, options):
    model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE_ID], **options)


def test_assisted_decoding(model):
    inputs = {**prompts([1], 9), "pixel_values": pixels(1)}
    model.generate(**inputs, max_new_tokens=4, do_sample=False, assistant_model=tiny_model(agnostic()))


def test_a_second_turn(model):
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE_ID], "return_dict_in_generate": True}
    first = model.generate(**prompts([1], 9), pixel_values=pixels(1), **options)
    second = torch.cat((first.sequences, torch.tensor([[IMAGE_ID] * 9 + [7]])), dim=1)
    cache = {CACHE: first[CACHE]}
    model.generate(input_ids=second, attention_mask=torch.ones_like(second), pixel_values=pixels(1), **cache, **options)


def test_image_features(model):
    model.get_image_features(pixels(1))
    model.get_vision_features(pixels(1))


def test_saving_and_loading(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.save_merger(tmp_path / "merger")
    again = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    again.load_merger(tmp_path / "merger")


def test_pipeline(model, picture):
    processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what color is the star ?"}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    pipe(text=[{"role": "user", "content": content}], max_new_tokens=2, do_sample=False)


def test_a_trainer_step(model, tmp_path):
    row = {name: tensor[0] for name, tensor in prompts([1], 9).items()}
    labels = row["input_ids"].clone()
    labels[:-2] = -100
    rows = [{**row, "labels": labels, "pixel_values": pixels(1)[0]}] * 2
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False)
    Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows).train()
