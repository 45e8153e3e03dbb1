# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every n-th patch, a baseline."""

from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_grid import slot_places
from .merging_selection import keep_patches


def strided_tokens(
    features: Tensor, grid: tuple[int, int], num_tokens: int, return_source: bool = False
) -> MergeOutput:
    """Keeps the patch of (I, N, dim) nearest the centre of each of M = `num_tokens` equal windows of the `grid`."""
    places = slot_places(grid, num_tokens, features.device)
    return keep_patches(features, places.expand(len(features), -1), return_source)


@register_merging_method("strided")
class StridedTokens(MergingMethod):
    """Keeps every n-th patch of the grid, the one at the centre of each window, and loses the others.

    Training-free.
    """

    training_free = True

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        return strided_tokens(features, context.grid, context.num_tokens, context.return_source)
