# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""DivPrune: the patches that are farthest from each other."""

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import cosine_similarity, gather_patches, in_raster_order, keep_patches


def divprune(features: Tensor, num_tokens: int, return_source: bool = False) -> MergeOutput:
    """Keeps M = `num_tokens` of the patches (I, N, dim) so that the least distance between two of them is large."""
    picks = in_raster_order(max_min_picks(features, num_tokens), features.shape[1])
    return keep_patches(features, picks, return_source)


@torch.no_grad()
def max_min_picks(features: Tensor, num_tokens: int) -> Tensor:
    """Greedy picks of max-min diversity by 1 - cosine, in their order: (I, M), the earlier of equal ones.

    The first is the patch whose nearest neighbour is farthest, each other the one farthest from all before.
    """
    distance = 1 - cosine_similarity(features, features)  # (I, N, N)
    patches = torch.arange(distance.shape[1], device=distance.device)
    is_itself = patches == patches[:, None]
    to_chosen = distance.masked_fill(is_itself, torch.inf).amin(dim=1)
    picks = [to_chosen.argmax(dim=1, keepdim=True)]
    distance = distance.masked_fill(is_itself, -torch.inf)  # no patch is picked twice: nothing is below
    to_chosen = torch.full_like(to_chosen, torch.inf)
    for _ in range(num_tokens - 1):
        to_chosen = to_chosen.minimum(gather_patches(distance, picks[-1])[:, 0])
        picks.append(to_chosen.argmax(dim=1, keepdim=True))
    return torch.cat(picks, dim=1)


@register_merging_method("divprune")
class DivPrune(MergingMethod):
    """Keeps the patches that are farthest from each other (max-min diversity); the others are lost.

    DivPrune (arXiv 2503.02175), on the tower's features instead of the projected ones. Training-free.
    """

    needs_grid = False
    training_free = True
    chooses_in_steps = True
    paper = "DivPrune, 2503.02175"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        return divprune(features, context.num_tokens, context.return_source)
