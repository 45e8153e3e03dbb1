# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Calls that a LLaVA and its processor take, and that ours have to take the same way."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from conftest import (
    BOS_ID,
    EOS_ID,
    agnostic,
    aware,
    make_processor,
    pixels,
    prompts,
    tiny_config,
    tiny_model,
    tiny_stock,
)
from test_tracing import METHODS, merger

from llava_merge import LlavaMergeConfig, LlavaMergeProcessor


M = 9


class TestAttentionImplementation:
    """The tower is built without its last layer, from a copy of its configuration."""

    @pytest.mark.parametrize("part", ["whole", "headless"])
    @pytest.mark.parametrize(
        "asked",
        [
            "eager",
            {"vision_config": "eager"},
            {"text_config": "eager"},
            {"": "eager"},
            {"vision_config": "eager", "text_config": "sdpa"},
        ],
        ids=str,
    )
    def test_it_reaches_the_parts_that_it_reaches_in_stock(self, asked, part, caplog):
        found = []
        for model in (tiny_stock(), tiny_model(agnostic(M))):
            parts = model, model.model.vision_tower, model.model.language_model
            assert {each.config._attn_implementation for each in parts} == {"sdpa"}
            target = model if part == "whole" else model.model
            target.set_attn_implementation(asked)
            found.append([each.config._attn_implementation for each in parts])
        assert found[0] == found[1]
        assert model.config.vision_config._attn_implementation == found[1][1]
        assert "without finding the associated sub-model" not in caplog.text

    def test_the_tower_s_layers_run_it_and_others_stay(self):
        model = tiny_model(agnostic(M))
        model.set_attn_implementation({"vision_config": "eager"})
        inputs = {**prompts([1], M), "pixel_values": pixels(1)}
        eager = model.model.vision_tower(pixels(1), output_attentions=True).attentions
        assert eager and eager[0] is not None
        assert model.config.vision_config.num_hidden_layers == 3 and model(**inputs).logits.isfinite().all()
        model.set_attn_implementation({"text_config": "eager"})
        assert model.model.vision_tower.config._attn_implementation == "eager"

    def test_what_is_refused_leaves_the_configuration(self):
        model = tiny_model(agnostic(M))
        with pytest.raises(ValueError, match="no_such_attention"):
            model.set_attn_implementation({"vision_config": "no_such_attention"})
        assert model.config.vision_config.num_hidden_layers == 3


@pytest.mark.parametrize("mask", ["none", "padding", "bool", "float"])
def test_attention_mass_in_float64(mask):
    """As gradient checks use it."""
    model = tiny_model(agnostic(M, attention_mass=1.0), train_merger=True)
    inputs = {**prompts([1, 1], M), "pixel_values": pixels(2)}
    length = inputs["input_ids"].shape[1]
    if mask in ("bool", "float"):
        seen = torch.ones(2, 1, length, length).tril().bool()
        lowest = torch.zeros(2, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        inputs["attention_mask"] = seen if mask == "bool" else lowest
    elif mask == "none":
        del inputs["attention_mask"]
    single = model(**inputs).logits
    double = copy.deepcopy(model).double()(**{**inputs, "pixel_values": inputs["pixel_values"].double()}).logits
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_in_float64(name):
    model = tiny_model(merger(name, question_aware=METHODS[name].question_aware)).double()
    inputs = {**prompts([1], 36 if name == "none" else M), "pixel_values": pixels(1).double()}
    model(**inputs).logits.sum().backward()
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


class TestFeatureLayers:
    @pytest.mark.parametrize("layer", [-5, 4, [1, 7]])
    def test_one_that_the_tower_does_not_have(self, layer):
        message = r"vision_feature_layer=.*: this tower has hidden states 0 to 3, .* -1 to -4. Choose one"
        fields = tiny_config().to_dict() | {"vision_feature_layer": layer}
        fields.pop("model_type")
        with pytest.raises(ValueError, match=message):
            LlavaMergeConfig(merger_config=agnostic(M), **fields)
        model = tiny_model(agnostic(M))
        with pytest.raises(ValueError, match=message):
            model.get_image_features(pixels(1), vision_feature_layer=layer)

    def test_one_that_was_not_built_is_to_be_loaded(self):
        model = tiny_model(agnostic(M))
        with pytest.raises(ValueError, match=r"vision_feature_layer=-1: .* Load the model with from_pretrained"):
            model.get_image_features(pixels(1), vision_feature_layer=-1)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        *(("eos_token_id", ids) for ids in (-1, [-1], [-1, EOS_ID], 10**6)),
        ("bos_token_id", -1),
        ("bos_token_id", 10**6),
    ],
)
def test_ids_that_are_no_token_s(name, ids):
    """A question-aware merger looks for the marks of turns among embeddings."""
    model = tiny_model(aware(M), train_merger=True)
    setattr(model.config.text_config, name, ids)
    inputs = {**prompts([1], M), "pixel_values": pixels(1)}
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    by_embeds = model(inputs_embeds=embeds, **inputs).logits
    torch.testing.assert_close(by_embeds, model(**prompts([1], M), pixel_values=inputs["pixel_values"]).logits)


class TestProcessor:
    TEXTS = ["USER: <image> what color ? ASSISTANT:", "USER: <image> how many circles are there ? ASSISTANT:"]

    @pytest.mark.parametrize("budget", [None, M, 4])
    def test_nested_arguments_are_heard_and_stay(self, picture, budget):
        processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=M)
        nested = {
            "text_kwargs": {"padding": True},
            "common_kwargs": {"return_tensors": "pt"},
            "images_kwargs": {"do_rescale": False},
        }
        kept = copy.deepcopy(nested)
        options = {} if budget is None else {"num_merged_tokens": budget}
        found = processor(images=[picture, picture], text=self.TEXTS, **nested, **options)
        flat = {"padding": True, "return_tensors": "pt", "do_rescale": False}
        wanted = processor(images=[picture, picture], text=self.TEXTS, **flat, **options)
        for name in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(found[name], wanted[name])
        assert nested == kept

    @pytest.mark.parametrize("budget", [None, 4])
    def test_a_template_s_bos_is_the_only_one(self, picture, budget):
        """As transformers does it in `apply_chat_template(tokenize=True)`."""
        processor = make_processor(adds_bos=True, processor_class=LlavaMergeProcessor, num_merged_tokens=M)
        options = {"images": picture, "num_merged_tokens": budget}
        (plain,) = processor(text=self.TEXTS[0], **options)["input_ids"]
        assert plain.count(BOS_ID) == 1
        for text in ("<s>" + self.TEXTS[0], ["<s> " + self.TEXTS[0]]):
            assert processor(text=text, **options)["input_ids"] == [plain]
        mixed = processor(text=[self.TEXTS[0], "<s>" + self.TEXTS[0]], **{**options, "images": [picture] * 2})
        assert [ids.count(BOS_ID) for ids in mixed["input_ids"]] == [1, 2]
        assert processor(text="<s>" + self.TEXTS[0], add_special_tokens=True, **options)["input_ids"][0].count(1) == 2
        nested = {"text_kwargs": {"add_special_tokens": True}}
        assert processor(text="<s>" + self.TEXTS[0], **nested, **options)["input_ids"][0].count(BOS_ID) == 2
        assert processor(text=self.TEXTS[0], add_special_tokens=False, **options)["input_ids"][0] == plain[1:]

    def test_saving_says_which_files(self, tmp_path):
        ours, stock = (
            make_processor(**kwargs).save_pretrained(tmp_path / "saved")
            for kwargs in ({"processor_class": LlavaMergeProcessor}, {})
        )
        assert ours == stock and all(Path(file).is_file() for file in ours)

    def test_annotations_say_what_it_takes(self):
        ours = inspect.signature(LlavaMergeProcessor.__call__).parameters
        for name in ("images", "text"):
            assert ours[name].annotation is not inspect.Parameter.empty and ours[name].default is None

    def test_no_class_has_a_budget(self):
        """Transformers 5.24 takes what the class has for defaults of the call."""
        assert not hasattr(LlavaMergeProcessor, "num_merged_tokens")
        assert make_processor(processor_class=LlavaMergeProcessor).num_merged_tokens is None
