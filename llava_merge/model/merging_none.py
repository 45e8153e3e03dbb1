# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""No merging."""

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, as_source, register_merging_method


@register_merging_method("none")
class Identity(MergingMethod):
    """Keeps every visual token: stock LLaVA, bit for bit.

    The baseline of every comparison.
    """

    needs_grid = False
    training_free = True
    sits_on_slots = True

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        source = None
        if context.return_source:
            source = as_source(torch.eye(features.shape[1], device=features.device), features.shape[0])
        return MergeOutput(merged_features=features, source=source)
