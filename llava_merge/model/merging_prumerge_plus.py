# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""PruMerge+: patches that CLS attends to and evenly spread ones, each with what is like it."""

from operator import index

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import (
    cosine_similarity,
    gather_patches,
    in_raster_order,
    keep_patches,
    largest,
    nearest_members,
    one_hot,
    other_patches,
    top_patches,
    weighted_mean,
)


IMPORTANT_RATIO = 0.25  # the spread patches are three times as many
NEIGHBOURS = 1 / 18  # of all patches: 32 of 576


def prumerge_plus(
    features: Tensor,
    cls_attention: Tensor,
    keys: Tensor,
    num_tokens: int,
    important_ratio: float = IMPORTANT_RATIO,
    faithful: bool = False,
    return_source: bool = False,
) -> MergeOutput:
    """Keeps the patches that CLS looks at and evenly spread ones of the rest, and adds to each those most like it.

    Args:
        features: (I, N, dim).
        cls_attention: (I, N), attention of CLS to each patch: the weight of a patch that is added.
        keys: (I, N, any), of all heads side by side, by whose cosine patches are alike.
        num_tokens: M; `important_ratio` of them, but at least one, are chosen by attention.
        faithful: Whether a token is the sum of its patches, as in the released code, where the division is commented
            out, or their mean. `source` holds shares that sum to 1.
    """
    num_patches, num_important = index(features.shape[1]), max(1, round(num_tokens * important_ratio))
    if num_tokens == num_patches:  # nothing is lost that would have to be added
        return keep_patches(features, top_patches(cls_attention, num_patches), return_source)
    important = top_patches(cls_attention, num_important)
    spread = evenly_spread(other_patches(important, num_patches), num_tokens - num_important)
    indices = in_raster_order(torch.cat((important, spread), dim=1), num_patches)
    own = one_hot(indices, num_patches)  # (I, M, N)
    similarity = cosine_similarity(gather_patches(keys, indices), keys).masked_fill(own.bool(), -torch.inf)
    num_neighbours = min(num_patches - 1, max(1, round(num_patches * NEIGHBOURS)))
    weights = own + largest(similarity, num_neighbours) * cls_attention.float()[:, None]
    merged, source = weighted_mean(features, weights, as_sum=faithful)
    sizes = nearest_members(keys, indices).sum(dim=-1)
    return MergeOutput(merged, source if return_source else None, indices, sizes)


def evenly_spread(patches: Tensor, count: int) -> Tensor:
    """`count` of the `patches` (I, n), from the middle of equal stretches: (I, count)."""
    places = torch.arange(count, device=patches.device)
    return patches[:, (2 * places + 1) * patches.shape[1] // (2 * max(1, count))]


@register_merging_method("prumerge_plus")
class PruMergePlus(MergingMethod):
    """Keeps patches that CLS attends to and evenly spread ones, and merges into each the most similar, by attention.

    PruMerge+ (arXiv 2403.15388), with a fixed budget: the paper takes as many as stand out, over the whole batch.
    Training-free. Attention is the mean over the heads, as for the other methods here. `MergerConfig.faithful` and
    `important_ratio`.
    """

    needs_grid = False
    training_free = True
    requires = frozenset({"cls_attention", "keys"})
    options = ("faithful", "important_ratio")
    paper = "PruMerge+, 2403.15388"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        ratio = self.config.important_ratio
        return prumerge_plus(
            features,
            context.cls_attention,
            context.keys,
            context.num_tokens,
            IMPORTANT_RATIO if ratio is None else ratio,
            self.config.faithful,
            context.return_source,
        )
