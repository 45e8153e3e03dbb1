# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""MQT: learned queries in one order, of which the first M are used."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .configuration_llava_merge import MergerConfig
from .merging_attention import attention_weights, check_heads, join_heads, split_heads
from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method


NUM_QUERIES = 256


def place_waves(grid: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Fixed sines and cosines of row and column of each patch, half of the channels each: (N, dim) float32."""
    rows, columns = (torch.arange(length, device=device, dtype=torch.float32) for length in grid)
    places = torch.cartesian_prod(rows, columns)  # (N, 2)
    octaves = torch.arange((dim + 3) // 4, device=device) / ((dim + 3) // 4)
    angles = places[:, :, None] * 10000.0**-octaves  # (N, 2, dim / 4)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim]


@register_merging_method("mqt")
class MQT(MergingMethod):
    """The first M of 256 learned queries attend over the image, so that each prefix is a summary.

    Matryoshka Query Transformer (arXiv 2405.19315); train it with `budgets` drawn anew in each step, as `llava-merge
    train` does. Its released code forgets the image in the keys, which are places alone, so that each query pools the
    same places of every picture; here keys are content and place. Its tokens have no place in the image but the slots
    that they are counted by. `query_grid` is 1 × 256, or wider where it was made for more tokens.
    """

    sits_on_slots = True
    options = ("query_grid",)
    paper = "MQT, 2405.19315"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        check_heads(config, "internal_dim")
        dim = config.internal_dim
        if config.query_grid is None:  # kept, since the budget may change before it is saved
            config.query_grid = [1, max(NUM_QUERIES, config.num_merged_tokens or 0)]
        self.queries = nn.Parameter(torch.empty(math.prod(config.query_grid), dim))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.input_proj = nn.Linear(config.vision_dim, dim, bias=False)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.output_norm = nn.LayerNorm(dim)
        self.output_proj = nn.Linear(dim, config.vision_dim)

    def reset_parameters(self):
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        if context.num_tokens > len(self.queries):
            raise ValueError(
                f"num_merged_tokens={context.num_tokens}: this mqt has {len(self.queries)} queries. Ask for as many or "
                f"fewer, or make one with MergerConfig(merger_type='mqt', num_merged_tokens={context.num_tokens})."
            )
        content = self.input_proj(features)
        places = place_waves(context.grid, content.shape[-1], content.device).to(content.dtype)
        queries = self.query_norm(self.queries[: context.num_tokens]).expand(len(features), -1, -1)
        projected = (
            self.q_proj(queries),
            self.k_proj(self.key_norm(content + places)),
            self.v_proj(self.value_norm(content)),
        )
        queries, keys, values = (split_heads(tensor, self.config.num_heads) for tensor in projected)
        attended = join_heads(scaled_dot_product_attention(queries, keys, values))
        source = attention_weights(queries, keys, None).mean(dim=1) if context.return_source else None
        return MergeOutput(self.output_proj(self.output_norm(attended)), source)
