# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""ToMe: the most similar tokens merge pairwise."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import gather_patches, largest, members, order_of


def tome(features: Tensor, grid: tuple[int, int], num_tokens: int, return_source: bool = False) -> MergeOutput:
    """Merges (I, N, dim) to M = `num_tokens` by bipartite soft matching, in as few rounds as halving allows.

    In a round, tokens are taken alternately for two sides; those of the first that are most like one of the second
    merge into it. Means are weighted by size. Tokens keep their order from round to round, and in the end lie in raster
    order of the patch nearest the mean row and column of their members.
    """
    merged, num_left = features.float(), features.shape[1]
    shares = None  # (I, tokens, N), 1 where a token holds a patch
    while num_left > num_tokens:
        num_merged = min(num_left // 2, num_left - num_tokens)
        num_left -= num_merged
        weights = members(match(merged, num_merged), num_left)  # (I, tokens after, tokens before)
        shares = weights if shares is None else weights @ shares
        merged = shares @ features.float() / shares.sum(dim=-1, keepdim=True)
    if shares is None:
        shares = torch.eye(num_left, device=features.device).expand(len(features), -1, -1)
    places = mean_places(shares, grid)
    order = order_of(places)
    places, shares = places.gather(1, order), gather_patches(shares, order)
    sizes = shares.sum(dim=-1)
    source = shares / sizes[:, :, None] if return_source else None
    return MergeOutput(gather_patches(merged, order).to(features.dtype), source, places, sizes)


def match(tokens: Tensor, num_merged: int) -> Tensor:
    """One round for `tokens` (I, n, dim): number of the token that each becomes, (I, n) below n - num_merged."""
    metric = normalize(tokens, dim=-1)
    num_images, count = tokens.shape[:2]
    similarity, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)).max(dim=-1)  # (I, first side)
    leaves = largest(similarity, num_merged)
    stays = torch.ones(num_images, count, dtype=torch.bool, device=tokens.device)
    stays[:, ::2] = ~leaves
    number = stays.long().cumsum(dim=1) - 1
    number[:, ::2] = number[:, 1::2].gather(1, partner).where(leaves, number[:, ::2])
    return number


def mean_places(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch nearest the mean row and the mean column of each token's patches: (I, M) int64, ties to the earlier.

    Exact: sums of whole numbers. A mean of raster indices would lie anywhere in a row.
    """
    patches = torch.arange(shares.shape[-1], device=shares.device)
    coordinates = torch.stack((patches // grid[1], patches % grid[1]), dim=-1)  # (N, 2)
    sums, sizes = (shares @ coordinates.float()).long(), shares.sum(dim=-1, keepdim=True).long()
    rows, columns = ((2 * sums + sizes - 1) // (2 * sizes)).unbind(dim=-1)
    return rows * grid[1] + columns


@register_merging_method("tome")
class ToMe(MergingMethod):
    """Merges the most similar tokens pairwise, by size-weighted means, until M are left (bipartite soft matching).

    ToMe (arXiv 2210.09461) once, between tower and projector, on the features. Training-free.
    """

    training_free = True
    paper = "ToMe, 2210.09461"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        return tome(features, context.grid, context.num_tokens, context.return_source)
