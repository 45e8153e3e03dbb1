# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Merging the visual tokens of Qwen2.5-VL, as a pattern for models that llava_merge has no subclass of.

python examples/other_models/qwen2_5_vl.py
python examples/other_models/qwen2_5_vl.py --model Qwen/Qwen2.5-VL-3B-Instruct --image photo.jpg --num-tokens 64

The merging methods are functions on tensors. What it takes besides: the model's own visual tokens and their grid; the
positions that the model gives the whole prompt, of which each merged token keeps those of its patch; and to leave out
all other placeholders. It is training-free, and behind the projector, since Qwen2.5-VL has that inside its tower. For
transformers 5. Without --model it runs a tiny model with random weights, and nothing is promised of answers.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from llava_merge import MergeOutput
from llava_merge.model.merging_divprune import divprune
from llava_merge.model.merging_tome import tome


Merge = Callable[[Tensor, tuple[int, int], int], MergeOutput]  # features (1, N, dim), grid, M
METHODS: dict[str, Merge] = {
    "tome": tome,
    "divprune": lambda features, grid, num_tokens: divprune(features, num_tokens),
}


@torch.no_grad()
def merged_prompt(
    model: Qwen2_5_VLForConditionalGeneration,
    merge: Merge,
    num_tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor,
    image_grid_thw: Tensor,
    mm_token_type_ids: Tensor,
) -> dict[str, Tensor]:
    """What `model.generate` takes for a processor's prompts (B, L), with `num_tokens` or fewer for each image.

    Returns:
        `inputs_embeds` (B, L', hidden), padded on the left, `attention_mask` (B, L') and `position_ids` (3, B, L').
    """
    embeds = model.get_input_embeddings()(input_ids)
    positions, _ = model.model.get_rope_index(
        input_ids, mm_token_type_ids=mm_token_type_ids, image_grid_thw=image_grid_thw, attention_mask=attention_mask
    )
    rows, columns = (input_ids == model.config.image_token_id).nonzero(as_tuple=True)
    stays = attention_mask.bool()
    stays[rows, columns] = False
    images, first = model.model.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output, 0
    side = model.config.vision_config.spatial_merge_size
    for features, (_, height, width) in zip(images, image_grid_thw.tolist(), strict=True):
        merged = merge(features[None], (height // side, width // side), min(num_tokens, len(features)))
        kept = first + merged.positions[0]  # among all placeholders
        embeds[rows[kept], columns[kept]] = merged.merged_features[0].to(embeds.dtype)
        stays[rows[kept], columns[kept]] = True
        first += len(features)
    order = stays.int().argsort(dim=1, stable=True)[:, -int(stays.sum(dim=1).max()) :]  # what is left out comes first
    return {
        "inputs_embeds": embeds.take_along_dim(order[:, :, None], dim=1),
        "attention_mask": stays.gather(1, order).long(),
        "position_ids": positions.gather(2, order.expand(3, -1, -1)),
    }


def tiny_model() -> Qwen2_5_VLForConditionalGeneration:
    """Random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    heads = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}
    marks = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    config = Qwen2_5_VLConfig(
        text_config={**sizes, **heads, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        **marks,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def random_prompts(model: Qwen2_5_VLForConditionalGeneration, grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    """A prompt with a picture of noise for each grid of tokens, padded on the left."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    rows = []
    for height, width in grids:
        words = torch.randint(3, 100, (12,), generator=generator).tolist()
        image = [config.vision_start_token_id, *[config.image_token_id] * (height * width), config.vision_end_token_id]
        rows.append(words[:4] + image + words[4:])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    sizes = torch.tensor([[1, height * side, width * side] for height, width in grids])
    width = 3 * config.vision_config.temporal_patch_size * patch**2
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(int(sizes.prod(dim=1).sum()), width, generator=generator),
        "image_grid_thw": sizes,
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


def main(arguments: argparse.Namespace):
    if arguments.model is None:
        model = tiny_model()
        inputs = random_prompts(model, [(8, 8), (6, 10)])
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.model, dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained(arguments.model)
        content = [{"type": "image"}, {"type": "text", "text": arguments.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[Image.open(arguments.image)], text=[text], return_tensors="pt").to(model.device)
    prompt = merged_prompt(model, METHODS[arguments.merger], arguments.num_tokens, **inputs)
    answer = model.generate(**prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(f"{inputs['input_ids'].shape[1]} tokens became {prompt['inputs_embeds'].shape[1]}")
    print(answer.tolist() if arguments.model is None else processor.batch_decode(answer, skip_special_tokens=True)[0])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hub repo of a Qwen2.5-VL")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--merger", choices=METHODS, default="tome")
    parser.add_argument("--num-tokens", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
