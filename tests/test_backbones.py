# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The guides' table of what works: vision towers and language models of other kinds, tiny and with random weights."""

import re
from pathlib import Path

import pytest
import torch
from conftest import EOS_ID, IMAGE_ID, NUM_PATCHES, PAD_ID, WORDS, pixels, prompts, scale_up
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration


GUIDE = (Path(__file__).parents[1] / "examples" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
TOWERS = {
    "CLIP": ("clip_vision_model", "default"),
    "DINOv2": ("dinov2", "default"),
    "ViT": ("vit", "default"),
    "SigLIP": ("siglip_vision_model", "full"),
    "AIMv2": ("aimv2_vision_model", "full"),
    "I-JEPA": ("ijepa", "full"),
}
REFUSED_TOWERS = {
    "DINOv2 with registers": ("dinov2_with_registers", "default", {}, "4 are no patches: towers with registers"),
    "Pixtral": ("pixtral", "full", {"image_sizes": [(84, 84)]}, "image_sizes: towers with images of several sizes"),
}
LANGUAGE_MODELS = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Phi-3": "phi3",
    "Gemma": "gemma",
    "GPT-NeoX": "gpt_neox",
}
MIXED = {"Gemma 2": "gemma2"}  # layers with a window and without


def make_stock(tower: str = "clip_vision_model", text: str = "llama", strategy: str = "default"):
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    vision = CONFIG_MAPPING[tower](**sizes, num_hidden_layers=3, image_size=84, patch_size=14)
    ids = {"pad_token_id": PAD_ID, "bos_token_id": 1, "eos_token_id": EOS_ID, "vocab_size": len(WORDS) + 8}
    sizes |= {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2, "num_key_value_heads": 2}
    language = CONFIG_MAPPING[text](**sizes, **ids, max_position_embeddings=1024)
    lengths = {"image_token_index": IMAGE_ID, "image_seq_length": NUM_PATCHES}
    config = LlavaConfig(vision_config=vision, text_config=language, vision_feature_select_strategy=strategy, **lengths)
    return scale_up(LlavaForConditionalGeneration(config))


def with_merger(stock, **merger_config) -> LlavaMergeForConditionalGeneration:
    fields = stock.config.to_dict()
    fields.pop("model_type")
    model = LlavaMergeForConditionalGeneration(LlavaMergeConfig(merger_config=merger_config, **fields)).eval()
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not missing and not [name for name in unexpected if "vision_tower" not in name]
    return model


@torch.no_grad()
def check(stock, attention_mass: float):
    """The stock model bit for bit without merging; merged, greedy answers in a batch are those of one forward."""
    batch = {**prompts([1, 2], NUM_PATCHES), "pixel_values": pixels(3)}
    assert torch.equal(stock(**batch).logits, with_merger(stock, merger_type="none")(**batch).logits)
    model = with_merger(stock, merger_type="tome", num_merged_tokens=9, attention_mass=attention_mass)
    batch = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
    answers = model.generate(
        **batch, max_new_tokens=6, do_sample=False, eos_token_id=None, suppress_tokens=[IMAGE_ID], min_new_tokens=6
    )
    length = batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    logits = model(**{**batch, "input_ids": answers, "attention_mask": mask}).logits[:, length - 1 : -1]
    logits[..., IMAGE_ID] = -torch.inf
    assert torch.equal(logits.argmax(dim=-1), answers[:, length:])
    row = batch["attention_mask"][0].bool()
    alone = model(input_ids=batch["input_ids"][:1, row], pixel_values=batch["pixel_values"][:1]).logits[0]
    torch.testing.assert_close(model(**batch).logits[0, row], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_vision_tower(name):
    tower, strategy = TOWERS[name]
    check(make_stock(tower, strategy=strategy), attention_mass=1.0)


@pytest.mark.parametrize("name", REFUSED_TOWERS)
def test_vision_tower_that_is_refused(name):
    tower, strategy, given, message = REFUSED_TOWERS[name]
    model = with_merger(make_stock(tower, strategy=strategy), merger_type="tome", num_merged_tokens=9)
    with pytest.raises(ValueError, match=message):
        model(**prompts([1], 9), pixel_values=pixels(1), **given)


@pytest.mark.parametrize("attention_mass", [0.0, 1.0])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model(name, attention_mass):
    check(make_stock(text=LANGUAGE_MODELS[name]), attention_mass)


@pytest.mark.parametrize("name", MIXED)
def test_language_model_with_and_without_windows(name):
    check(make_stock(text=MIXED[name]), attention_mass=0.0)
    check(make_stock(text=MIXED[name]), attention_mass=None)
    with pytest.raises(ValueError, match="attention_mass and packed rows need one attention mask for all layers"):
        check(make_stock(text=MIXED[name]), attention_mass=1.0)


def test_the_guide_s_table_is_of_these():
    works, refused = {}, {}
    for line in GUIDE.split("## What works")[1].split("\n## ")[0].splitlines():
        if line.startswith(("| vision tower", "| language model")):
            _, kind, first, second, _ = line.split("|")
            works[kind.strip()], refused[kind.strip()] = first, second
    names = {"vision tower": [*TOWERS], "language model": [*LANGUAGE_MODELS]}
    for kind, expected in names.items():
        listed = re.sub(r"\(.*?\)|;.*", "", works[kind]).replace(" and ", ", ").split(",")
        assert [name.strip() for name in listed] == expected
    assert all(name in refused["vision tower"] for name in REFUSED_TOWERS)
    assert all(name in refused["language model"] for name in MIXED)
