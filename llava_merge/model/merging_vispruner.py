# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""VisPruner: patches that CLS attends to and, of the rest, the least alike."""

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import (
    cosine_similarity,
    gather_patches,
    in_raster_order,
    keep_patches,
    other_patches,
    top_patches,
)


REMOVED_PER_ROUND = 8
IMPORTANT_RATIO = 0.5


def vispruner(
    features: Tensor,
    cls_attention: Tensor,
    num_tokens: int,
    important_ratio: float = IMPORTANT_RATIO,
    return_source: bool = False,
) -> MergeOutput:
    """Keeps the patches that CLS looks at, and of the rest those that are left when duplicates are removed.

    Args:
        features: (I, N, dim).
        cls_attention: (I, N), attention of CLS to each patch.
        num_tokens: M; `important_ratio` of them are chosen by attention.
    """
    num_important = int(num_tokens * important_ratio + 0.5)
    important = top_patches(cls_attention, num_important)
    rest = other_patches(important, features.shape[1])
    diverse = remove_duplicates(cosine_similarity(features, features), rest, num_tokens - num_important)
    indices = in_raster_order(torch.cat((important, diverse), dim=1), features.shape[1])
    return keep_patches(features, indices, return_source)


def remove_duplicates(similarity: Tensor, alive: Tensor, num_tokens: int) -> Tensor:
    """Those of the patches `alive` (I, n) that are left, (I, num_tokens), by `similarity` (I, N, N).

    In each round they are taken alternately for two sides, and eight of the first side that are most like one of the
    second, the later of equal ones, are removed.
    """
    if not num_tokens:
        return alive[:, :0]
    while (count := alive.shape[1]) > num_tokens:
        first, second = alive[:, ::2], alive[:, 1::2]
        rows = gather_patches(similarity, first)  # (I, first side, N)
        nearest = rows.gather(2, second[:, None].expand(-1, rows.shape[1], -1)).amax(dim=-1)
        num_left = first.shape[1] - min(REMOVED_PER_ROUND, first.shape[1], count - num_tokens)
        least_alike = top_patches(-nearest, num_left)
        alive = torch.cat((first.gather(1, least_alike), second), dim=1).sort(dim=1).values
    return alive


@register_merging_method("vispruner")
class VisPruner(MergingMethod):
    """Keeps the patches that CLS attends to and, of the rest, the least alike; the others are lost.

    VisPruner (arXiv 2412.01818). Training-free; `MergerConfig.important_ratio`.
    """

    needs_grid = False
    training_free = True
    chooses_in_steps = True
    requires = frozenset({"cls_attention"})
    options = ("important_ratio",)
    paper = "VisPruner, 2412.01818"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        ratio = self.config.important_ratio
        ratio = IMPORTANT_RATIO if ratio is None else ratio
        return vispruner(features, context.cls_attention, context.num_tokens, ratio, context.return_source)
