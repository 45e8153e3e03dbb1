# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""CDPruner: patches that are unlike each other and matter for the question."""

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import cosine_similarity, gather_patches, in_raster_order, keep_patches


def cdpruner(features: Tensor, relevance: Tensor, num_tokens: int, return_source: bool = False) -> MergeOutput:
    """Keeps M = `num_tokens` patches (I, N, dim) that are unlike each other and of high `relevance` (I, N)."""
    picks = conditional_dpp_picks(features, relevance, num_tokens)
    return keep_patches(features, in_raster_order(picks, features.shape[1]), return_source)


@torch.no_grad()
def conditional_dpp_picks(features: Tensor, relevance: Tensor, num_tokens: int) -> Tensor:
    """Greedy picks of a determinantal point process, in their order: (I, M), the earlier of equal ones.

    Each makes the determinant of the kernel of the picks, relevance × similarity × relevance, as large as it can be;
    patches that are a mixture of earlier picks come last, by relevance. `relevance` (I, N) is scaled to its range in
    each image.
    """
    low, high = relevance.aminmax(dim=1, keepdim=True)
    weight = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
    kernel = weight[:, :, None] * cosine_similarity(features, features) * weight[:, None]  # (I, N, N)
    gain = kernel.diagonal(dim1=1, dim2=2)  # by how much each patch would multiply the determinant; a view
    gain.copy_(weight.square())  # rounding would choose among equal ones, where there is no question to tell them apart
    least = 1e-5 * gain  # float32 tells no less from a mixture
    last = weight - 2  # order of the mixtures, below every gain
    picks = []
    for _ in range(num_tokens):
        is_new = gain > least
        pick = gain.where(is_new, last).argmax(dim=1, keepdim=True)  # (I, 1)
        picks.append(pick)
        row = gather_patches(kernel, pick)  # (I, 1, N)
        share = gain.reciprocal().where(is_new, 0).gather(1, pick)
        kernel.addcmul_(row.transpose(1, 2) * share[:, :, None], row, value=-1)  # what the pick explains is gone
        last.scatter_(1, pick, -torch.inf)
    return torch.cat(picks, dim=1)


@register_merging_method("cdpruner")
class CDPruner(MergingMethod):
    """Keeps patches that are unlike each other and matter for the question (conditional DPP); the others are lost.

    CDPruner (arXiv 2506.10967), on the tower's features. Training-free. How much a patch matters is its cosine, seen
    from the mean of its image, with the direction in which the *projector* leads to the embeddings of the question: its
    gradient, taken once for each image, so that no text tower is needed and the N patches are not projected. With
    `MergerConfig.text_tower` it is what CLIP's text tower says of the patch, as in the paper.
    """

    needs_grid = False
    training_free = True
    chooses_in_steps = True
    uses_question = True
    requires = frozenset({"relevance"})
    options = ("text_tower",)
    paper = "CDPruner, 2506.10967"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        return cdpruner(features, context.relevance, context.num_tokens, context.return_source)
