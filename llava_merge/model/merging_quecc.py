# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""QueCC: patches that know the question are folded into queries, which attend to their windows."""

import torch
from torch import Tensor, nn

from .configuration_llava_merge import MergerConfig
from .merging_attention import check_heads
from .merging_base import (
    MergeContext,
    MergeOutput,
    MergingMethod,
    OwnInitialization,
    register_merging_method,
    weighted_sum,
)
from .merging_fixed_pooling import QuestionModulator
from .merging_grid import cell_weights
from .merging_tokenpacker import WindowAttention, two_layers


CELLS = 4  # rows, and columns, of cells in a slot: with 36 slots of 24 × 24 patches, each cell is one


class FoldWindows(OwnInitialization, nn.Module):
    """Depthwise convolution of the patches, one step for each slot: each of its cells has weights of its own.

    Where a cell is no whole patch, it is the mean over its area, so that one set of weights serves every M.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CELLS * CELLS, dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def reset_parameters(self):
        """As torch initialises a convolution."""
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -1 / CELLS, 1 / CELLS)

    def forward(self, patches: Tensor, grid: tuple[int, int], num_tokens: int) -> Tensor:
        """Of patches (I, N, dim): (I, M, dim)."""
        cells = weighted_sum(cell_weights(grid, num_tokens, CELLS, patches.device), patches)  # (I, M × cells, dim)
        return (cells.unflatten(1, (num_tokens, -1)) * self.weight).sum(dim=2) + self.bias


@register_merging_method("quecc")
class QueCC(MergingMethod):
    """Patches, shifted by the question, are folded into one query for each window, which attends to the window.

    QueCC (arXiv 2411.03312). Keys and values come from several layers of the tower, `feature_layers`. The paper runs
    the language model on the question first; here it is read as by V3, from its embeddings, and shifts nothing before
    training. What is left starts random.
    """

    uses_question = True
    sits_on_slots = True
    requires = frozenset({"layers"})
    options = ("feature_layers",)
    paper = "QueCC, 2411.03312"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        check_heads(config, "internal_dim")
        self.query_modulator = QuestionModulator(config.text_dim, config.vision_dim) if config.question_aware else None
        self.query_proj = two_layers(config.vision_dim, config.internal_dim)
        self.fold = FoldWindows(config.internal_dim)
        self.window_attention = WindowAttention(config)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        if self.query_modulator is not None and context.question is not None:
            features = features + self.query_modulator(context.question)[:, None]
        queries = self.fold(self.query_proj(features), context.grid, context.num_tokens)
        return self.window_attention(queries, context)
