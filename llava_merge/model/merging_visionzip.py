# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""VisionZip: patches that CLS attends to, and the rest merged by their keys."""

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import (
    gather_patches,
    keep_patches,
    nearest_members,
    one_hot,
    order_of,
    other_patches,
    top_patches,
    weighted_mean,
)


DOMINANT_RATIO = 54 / 64  # of the released settings


def visionzip(
    features: Tensor,
    cls_attention: Tensor,
    keys: Tensor,
    num_tokens: int,
    num_heads: int = 1,
    dominant_ratio: float = DOMINANT_RATIO,
    faithful: bool = False,
    return_source: bool = False,
) -> MergeOutput:
    """Keeps the patches that CLS looks at, and merges the rest into evenly spread ones of the rest by their keys.

    Args:
        features: (I, N, dim).
        cls_attention: (I, N), attention of CLS to each patch.
        keys: (I, N, heads × head_dim), compared by their mean over the heads.
        num_tokens: M; `dominant_ratio` of them are kept as they are, the others are merged ones.
        faithful: Whether a merged token is its own patch *plus* the mean of those that merge into it, as in the
            released code, which about doubles its norm, or the mean of both. `source` holds shares that sum to 1.
    """
    num_patches, num_dominant = features.shape[1], max(1, round(num_tokens * dominant_ratio))
    dominant = top_patches(cls_attention, num_dominant)
    num_merged = num_tokens - num_dominant
    if not num_merged:
        return keep_patches(features, dominant, return_source)

    rest = other_patches(dominant, num_patches)  # (I, R)
    stride = rest.shape[1] // num_merged
    targets = rest[:, : stride * num_merged : stride]  # (I, M - dominant)
    metric = keys.float().unflatten(-1, (num_heads, -1)).mean(dim=-2)
    own = one_hot(targets, num_patches)  # (I, M - dominant, N)
    assigned = nearest_members(metric, targets) - own
    assigned = assigned.scatter(2, dominant[:, None].expand(-1, num_merged, -1), 0.0)
    count = assigned.sum(dim=-1, keepdim=True)

    kept = torch.cat((dominant, targets), dim=1)
    order = order_of(kept)
    anchors = kept.gather(1, order)
    mean_of_assigned = assigned / count.clamp(min=1)
    weights = torch.cat((one_hot(dominant, num_patches), own + mean_of_assigned), dim=1)
    weights = gather_patches(weights, order)
    merged, source = weighted_mean(features, weights, as_sum=faithful)
    sizes = torch.cat((torch.ones_like(dominant, dtype=torch.float32), 1 + count[:, :, 0]), dim=1).gather(1, order)
    return MergeOutput(merged, source if return_source else None, anchors, sizes)


@register_merging_method("visionzip")
class VisionZip(MergingMethod):
    """Keeps the patches that CLS attends to, and merges the rest by their keys into evenly spread ones of the rest.

    VisionZip (arXiv 2412.04467). Training-free. The CLS token, which the released code keeps as one of the M, is no
    patch and not kept here. `MergerConfig.faithful` and `important_ratio`.
    """

    needs_grid = False
    training_free = True
    requires = frozenset({"cls_attention", "keys"})
    options = ("faithful", "important_ratio")
    paper = "VisionZip, 2412.04467"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        ratio = self.config.important_ratio
        return visionzip(
            features,
            context.cls_attention,
            context.keys,
            context.num_tokens,
            context.num_heads,
            DOMINANT_RATIO if ratio is None else ratio,
            self.config.faithful,
            context.return_source,
        )
