# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Average pooling: means over windows of the patch grid."""

from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, as_source, register_merging_method, weighted_sum


@register_merging_method("average_pooling")
class AveragePooling(MergingMethod):
    """Mean over equal windows of the patch grid, by area where M does not divide it.

    DeCo (arXiv 2405.20985), but before the projector. Training-free.
    """

    training_free = True
    sits_on_slots = True
    paper = "DeCo, 2405.20985"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        weights = context.geometry.windows  # (M, N)
        source = as_source(weights, features.shape[0]) if context.return_source else None
        return MergeOutput(merged_features=weighted_sum(weights, features), source=source)  # (I, M, vision_dim)
