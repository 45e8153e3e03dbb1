# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The resampler of Perceiver and Flamingo: learned queries that read the whole image, layer by layer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .configuration_llava_merge import MergerConfig
from .merging_attention import attention_weights, check_heads, join_heads, split_heads
from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_grid import default_query_grid, sample_query_map


NUM_LAYERS = 2


class ResamplerLayer(nn.Module):
    """Queries attend over the patches and themselves, then pass a feed-forward layer; both are added to them."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.feature_norm = nn.LayerNorm(dim)
        self.query_norm = nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def project(self, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries (I, M, dim) and features (I, N, dim): queries, keys and values, (I, heads, length, head_dim)."""
        queries = self.query_norm(queries)
        context = torch.cat((self.feature_norm(features), queries), dim=1)
        projected = self.q_proj(queries), self.k_proj(context), self.v_proj(context)
        return tuple(split_heads(tensor, self.num_heads) for tensor in projected)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """The queries (I, M, dim) behind this layer."""
        attended = scaled_dot_product_attention(*self.project(queries, features))
        queries = queries + self.output_proj(join_heads(attended))
        return queries + self.feed_forward(queries)

    def patch_shares(self, queries: Tensor, features: Tensor) -> Tensor:
        """How the attention of each query is shared among the patches: (I, M, N) float32."""
        queries, keys, _ = self.project(queries, features)
        weights = attention_weights(queries, keys, None).mean(dim=1)[:, :, : features.shape[1]]
        return weights / weights.sum(dim=-1, keepdim=True)


@register_merging_method("resampler")
class Resampler(MergingMethod):
    """M learned queries read the whole image in two layers of attention: the known-weak control.

    Perceiver resampler (arXiv 2103.03206; Flamingo, 2204.14198). Starts random, without windows and without pooling.
    Keys are the patches and the queries themselves; `source` is of the last layer's attention to patches. Its tokens
    have no place in the image but the slots that they are counted by. One map of queries serves every M.
    """

    sits_on_slots = True
    options = ("query_grid",)
    paper = "Perceiver 2103.03206, Flamingo 2204.14198"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        check_heads(config, "internal_dim")
        config.query_grid = default_query_grid(config)
        self.queries = nn.Parameter(torch.empty(*config.query_grid, config.internal_dim))
        self.input_proj = nn.Linear(config.vision_dim, config.internal_dim)
        self.layers = nn.ModuleList(ResamplerLayer(config.internal_dim, config.num_heads) for _ in range(NUM_LAYERS))
        self.output_norm = nn.LayerNorm(config.internal_dim)
        self.output_proj = nn.Linear(config.internal_dim, config.vision_dim)

    def reset_parameters(self):
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        features = self.input_proj(features)
        queries = sample_query_map(self.queries, context.geometry.centres).expand(len(features), -1, -1)
        for layer in self.layers:
            last, queries = queries, layer(queries, features)
        source = self.layers[-1].patch_shares(last, features) if context.return_source else None
        return MergeOutput(self.output_proj(self.output_norm(queries)), source)
