# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What methods share that keep some of the patches: choosing, gathering, merging into the nearest. Pure functions.

Indices of patches are int64 and in raster order. Similarities are float32. Nothing here waits for the device.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .merging_base import MergeOutput


def top_patches(scores: Tensor, num_tokens: int) -> Tensor:
    """The M patches with the highest `scores` (I, N), the earlier of equal ones: (I, M)."""
    return places_of(largest(scores, num_tokens), num_tokens)


def other_patches(chosen: Tensor, num_patches: int) -> Tensor:
    """The patches that are not among the `chosen` (I, n), each of them once there: (I, N - n)."""
    return places_of(~are_among(chosen, num_patches), num_patches - chosen.shape[1])


def in_raster_order(indices: Tensor, num_patches: int) -> Tensor:
    """The `indices` (I, M), of which no two are equal, from the least to the greatest."""
    return places_of(are_among(indices, num_patches), indices.shape[1])


def are_among(indices: Tensor, num_patches: int) -> Tensor:
    """Whether each patch is one of the `indices` (I, M): (I, N) bool."""
    nothing = torch.zeros(len(indices), num_patches, dtype=torch.bool, device=indices.device)
    return nothing.scatter(1, indices, torch.ones_like(indices, dtype=torch.bool))  # torch.jit.trace takes no number


def largest(scores: Tensor, count: int) -> Tensor:
    """Whether each of `scores` (..., N) is one of the `count` largest of its row, of equal ones the earlier: bool.

    Without a sort, which takes inductor a minute of compilation for each size.
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, ties = scores > least, scores == least
    return above | (ties & (ties.long().cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))


def places_of(mask: Tensor, count: int) -> Tensor:
    """Where `mask` (I, N) is True, which is `count` times in each row, in order: (I, count) int64."""
    numbers = torch.arange(1, count + 1, device=mask.device)
    places = (mask.long().cumsum(dim=1)[:, None] < numbers[:, None]).sum(dim=2)  # ONNX has no searchsorted
    return places.clamp(max=mask.shape[1] - 1)  # scores of NaN are no reason to read what is no patch


def order_of(places: Tensor) -> Tensor:
    """(I, M) int64, the order in which a stable sort would put `places` (I, M); compares each with each."""
    numbers = torch.arange(places.shape[1], device=places.device)
    keys = places * len(numbers) + numbers  # no two are equal
    rank = (keys[:, None] < keys[:, :, None]).sum(dim=2)
    return torch.empty_like(rank).scatter(1, rank, numbers.expand_as(rank))


def one_hot(indices: Tensor, size: int) -> Tensor:
    """(I, n) → (I, n, size) float32."""
    return (indices[:, :, None] == torch.arange(size, device=indices.device)).float()


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Of each vector of `first` (I, n, dim) with each of `second` (I, m, dim): (I, n, m) float32; 0 of zero vectors."""
    return normalize(first.float(), dim=-1) @ normalize(second.float(), dim=-1).transpose(-1, -2)


def keep_patches(features: Tensor, indices: Tensor, return_source: bool) -> MergeOutput:
    """The patches (I, M) as they are; the others are lost, but each counts for the size of the nearest by cosine."""
    source = one_hot(indices, features.shape[1]) if return_source else None
    sizes = nearest_members(features, indices).sum(dim=-1)
    return MergeOutput(gather_patches(features, indices), source, indices, sizes)


def gather_patches(features: Tensor, indices: Tensor) -> Tensor:
    """The vectors of `features` (I, N, dim) at `indices` (I, M): (I, M, dim)."""
    return features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[-1]))


def members(owner: Tensor, num_tokens: int) -> Tensor:
    """Which patches belong to each token, of the `owner` (I, N) of each patch: (I, M, N) float32, 0 or 1."""
    return (owner[:, None] == torch.arange(num_tokens, device=owner.device)[:, None]).float()


def nearest_members(metric: Tensor, anchors: Tensor) -> Tensor:
    """[`members`] of each of the `anchors` (I, M), by the highest cosine of `metric` (I, N, any): (I, M, N) float32.

    Of equally near ones the earlier, and each anchor belongs to itself.
    """
    order = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
    owner = cosine_similarity(gather_patches(metric, anchors), metric).argmax(dim=1).scatter(1, anchors, order)
    return members(owner, anchors.shape[1])


def weighted_mean(features: Tensor, weights: Tensor, as_sum: bool = False) -> tuple[Tensor, Tensor]:
    """Means (I, M, dim) of `features` (I, N, dim), in their dtype, by `weights` (I, M, N); the weights as shares.

    Args:
        as_sum: Return weighted sums instead of means.
    """
    total = weights.sum(dim=-1, keepdim=True)
    shares = weights / total
    merged = (shares @ features.float()).to(features.dtype)
    return ((merged.float() * total).to(features.dtype) if as_sum else merged), shares


def merge_into_nearest(features: Tensor, anchors: Tensor, metric: Tensor, return_source: bool) -> MergeOutput:
    """Each patch merges into the one of the `anchors` (I, M) that is nearest by the cosine of `metric` (I, N, any)."""
    weights = nearest_members(metric, anchors)
    merged, source = weighted_mean(features, weights)
    return MergeOutput(merged, source if return_source else None, anchors, weights.sum(dim=-1))
