# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Models to be measured: checkpoints, or random weights in the shape of one, since speed does not depend on values."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration
from llava_merge.evaluation.grid import Cell
from llava_merge.model.placeholders import ALL_TOKENS, tokens_of_budget


IMAGE_TOKEN_ID = 32000
VISION_336 = {"image_size": 336, "patch_size": 14, "projection_dim": 768}
SHAPES = {
    "llava-1.5-7b": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "0.2b": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
}


def config_of_shape(vision: dict, text: dict, image_token_index: int = IMAGE_TOKEN_ID) -> LlavaConfig:
    """A stock LLaVA's configuration with tower and language model of these sizes, as `SHAPES` has them."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, **VISION_336),
        text_config=LlamaConfig(**text, vocab_size=32064, max_position_embeddings=4096),
        image_token_index=image_token_index,
    )


def make_model(
    name: str, dtype: torch.dtype, device: str, attn_implementation: str | None = None
) -> LlavaMergeForConditionalGeneration:
    """A LLaVA that merges nothing, in eval mode on its device.

    Args:
        name: A shape of `SHAPES`, or directory or Hub repo of a LLaVA.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if name not in SHAPES:
        return LlavaMergeForConditionalGeneration.from_pretrained(name, **options).to(device).eval()
    config = config_of_shape(*SHAPES[name])
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    config = LlavaMergeConfig(merger_config={"merger_type": "none"}, **fields)
    with torch.device(device):
        return LlavaMergeForConditionalGeneration._from_config(config, **options).to(device).eval()


def make_inputs(
    model: LlavaMergeForConditionalGeneration, batch_size: int, num_image_tokens: int, text_tokens: int, seed: int
) -> dict:
    """Prompts of one picture and random words each.

    Args:
        num_image_tokens: Placeholders of the picture.
        text_tokens: Other tokens of a prompt, half of them before the picture.
    """
    generator = torch.Generator().manual_seed(seed)
    config, image_token_id = model.config, model.config.image_token_index
    vocabulary = config.get_text_config().vocab_size
    words = torch.randint(vocabulary // 2, vocabulary, (batch_size, text_tokens), generator=generator)
    words[words == image_token_id] -= 1
    image = torch.full((batch_size, num_image_tokens), image_token_id)
    half = text_tokens // 2
    input_ids = torch.cat((words[:, :half], image, words[:, half:]), dim=1)
    pixels = torch.randn(batch_size, 3, *config.image_shape, generator=generator)
    return {
        "input_ids": input_ids.to(model.device),
        "attention_mask": torch.ones_like(input_ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def tokens_of_cell(model, cell: Cell) -> int:
    """Tokens of an image in a cell."""
    return tokens_of_budget(cell.budget, model.config.num_patches)


def inputs_of_cell(model, cell: Cell, batch_size: int, settings) -> dict:
    """A batch of prompts with the placeholders of a cell, and its budget.

    Args:
        settings: A [`BenchmarkSettings`].
    """
    inputs = make_inputs(model, batch_size, tokens_of_cell(model, cell), settings.text_tokens, settings.seed)
    return inputs if cell.budget == ALL_TOKENS else {**inputs, "num_merged_tokens": cell.budget}
