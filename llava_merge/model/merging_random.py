# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Patches at random, a baseline."""

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import keep_patches, top_patches


def random_tokens(features: Tensor, num_tokens: int, seed: int = 0, return_source: bool = False) -> MergeOutput:
    """Keeps M = `num_tokens` of the patches (I, N, dim), drawn by `seed`, the same ones of every image.

    The same on every device and in every process; a smaller M keeps a part of what a larger keeps.
    """
    scores = scrambled(torch.arange(features.shape[1], device=features.device), seed)
    return keep_patches(features, top_patches(scores.expand(len(features), -1), num_tokens), return_source)


def scrambled(numbers: Tensor, seed: int) -> Tensor:
    """A number from 0 to 2³¹ - 1 for each of `numbers`, int64, without an order that could be seen; no two are equal.

    Constants fit 31 bits, or Triton would take them for unsigned.
    """
    mixed = (numbers + 1) * 0x1E3779B1 + (seed % 2**31) * 0x45EBCA6B
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        mixed = mixed & 0x7FFFFFFF
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed = mixed & 0x7FFFFFFF
    return mixed ^ (mixed >> 16)


@register_merging_method("random")
class RandomTokens(MergingMethod):
    """Keeps M patches at random, the same ones of every image, and loses the others.

    The baseline that every selection has to beat. Training-free; `MergerConfig.seed`.
    """

    needs_grid = False
    training_free = True
    options = ("seed",)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        return random_tokens(features, context.num_tokens, self.config.seed, context.return_source)
