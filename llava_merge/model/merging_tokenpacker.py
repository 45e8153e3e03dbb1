# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""TokenPacker: patches of a smaller picture ask the finer ones under them, in several layers of the tower."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .configuration_llava_merge import MergerConfig
from .merging_attention import attention_weights, check_heads, join_heads, split_heads
from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method, weighted_sum


def two_layers(in_dim: int, dim: int) -> nn.Sequential:
    """Two linear layers with a GELU between and a norm behind."""
    return nn.Sequential(nn.Linear(in_dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))


class WindowAttention(nn.Module):
    """Queries that attend to the patches of their own slot, whose keys and values come from `feature_layers`.

    A patch that lies in several slots counts in each by the share of it that the slot covers.
    """

    def __init__(self, config: MergerConfig):
        super().__init__()
        dim, layers_dim = config.internal_dim, len(config.feature_layers) * config.tower_dim
        self.num_heads = config.num_heads
        self.keys, self.values = two_layers(layers_dim, dim), two_layers(layers_dim, dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.output_proj = nn.Linear(dim, config.vision_dim)

    def forward(self, queries: Tensor, context: MergeContext) -> MergeOutput:
        """Of queries (I, M, internal_dim): what they found, (I, M, vision_dim)."""
        layers, windows = torch.cat(context.layers, dim=-1), context.geometry.log_windows
        projected = self.q_proj(queries), self.k_proj(self.keys(layers)), self.v_proj(self.values(layers))
        queries, keys, values = (split_heads(tensor, self.num_heads) for tensor in projected)
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=windows.to(queries.dtype))
        source = attention_weights(queries, keys, windows).mean(dim=1) if context.return_source else None
        return MergeOutput(self.output_proj(join_heads(attended)), source)


@register_merging_method("tokenpacker")
class TokenPacker(MergingMethod):
    """Patches of a smaller image, resized from the features, attend to the finer patches in their windows.

    TokenPacker (arXiv 2407.02392), as the released code has it: what a query was is not added to what it found. Keys
    and values come from several layers of the tower, `feature_layers`. Starts random.
    """

    sits_on_slots = True
    requires = frozenset({"layers"})
    options = ("feature_layers",)
    paper = "TokenPacker, 2407.02392"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        check_heads(config, "internal_dim")
        self.query_proj = nn.Linear(config.vision_dim, config.internal_dim, bias=False)
        self.query_norm = nn.LayerNorm(config.internal_dim)
        self.window_attention = WindowAttention(config)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        queries = self.query_proj(weighted_sum(context.geometry.blend, features))
        return self.window_attention(self.query_norm(queries), context)
