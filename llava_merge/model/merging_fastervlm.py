# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""FasterVLM: patches that CLS attends to."""

from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import keep_patches, top_patches


def fastervlm(features: Tensor, cls_attention: Tensor, num_tokens: int, return_source: bool = False) -> MergeOutput:
    """Keeps the M = `num_tokens` patches of (I, N, dim) with the most `cls_attention` (I, N), in raster order."""
    return keep_patches(features, top_patches(cls_attention, num_tokens), return_source)


@register_merging_method("fastervlm")
class FasterVLM(MergingMethod):
    """Keeps the patches that CLS attends to most; the others are lost.

    FasterVLM (arXiv 2412.01818, first version). Training-free.
    """

    needs_grid = False
    training_free = True
    requires = frozenset({"cls_attention"})
    paper = "FasterVLM, 2412.01818v1"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        return fastervlm(features, context.cls_attention, context.num_tokens, context.return_source)
