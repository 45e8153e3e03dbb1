# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""MMTok: patches that together cover the words of the question and the rest of the picture."""

import torch
from torch import Tensor

from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import cosine_similarity, gather_patches, in_raster_order, keep_patches


WORD_TEMPERATURE, PATCH_TEMPERATURE, PATCH_WEIGHT = 0.02, 0.2, 0.5


def mmtok(features: Tensor, word_relevance: Tensor, num_tokens: int, return_source: bool = False) -> MergeOutput:
    """Keeps M = `num_tokens` patches of (I, N, dim) that cover all of [`coverage_of_patches`]."""
    picks = coverage_picks(coverage_of_patches(features, word_relevance), num_tokens)
    return keep_patches(features, in_raster_order(picks, features.shape[1]), return_source)


def coverage_of_patches(features: Tensor, word_relevance: Tensor) -> Tensor:
    """How well each patch stands for each word and for each patch: (I, T + N, N) float32.

    Args:
        features: (I, N, dim).
        word_relevance: (I, N, T), -inf throughout where a token is no word of the question.
    """
    is_word = word_relevance.isfinite().all(dim=1)[:, :, None]  # (I, T, 1)
    words = (word_relevance.transpose(1, 2) / WORD_TEMPERATURE).where(is_word, 0).softmax(dim=-1)
    words = words * is_word / is_word.sum(dim=1, keepdim=True).clamp(min=1)
    patches = (cosine_similarity(features, features) / PATCH_TEMPERATURE).softmax(dim=-1)
    return torch.cat((words, patches * (PATCH_WEIGHT / features.shape[1])), dim=1)


@torch.no_grad()
def coverage_picks(coverage: Tensor, num_tokens: int) -> Tensor:
    """Greedy picks of columns of (I, rows, N) whose largest values have the highest sum over the rows, in their order.

    Returns:
        (I, M) int64; of equally good ones the earlier.
    """
    patches = coverage.transpose(1, 2).contiguous()  # (I, N, rows)
    covered = torch.zeros_like(patches[:, :1])  # by the picks so far
    barred = torch.zeros_like(patches[:, :, 0])  # -inf where a patch is picked
    picks = []
    for _ in range(num_tokens):
        gain = (patches - covered).clamp_(min=0).sum(dim=2)  # (I, N)
        pick = (gain + barred).argmax(dim=1, keepdim=True)
        picks.append(pick)
        covered = covered.maximum(gather_patches(patches, pick))
        barred.scatter_(1, pick, -torch.inf)
    return torch.cat(picks, dim=1)


@register_merging_method("mmtok")
class MMTok(MergingMethod):
    """Keeps patches that together cover the words of the question and the other patches; the others are lost.

    MMTok (arXiv 2508.18264), on the tower's features. Training-free. How much a patch has to do with a word is its
    cosine, seen from the mean of its image, with the direction in which the *projector* leads to the word's embedding:
    as in `cdpruner`, and instead of the cosine with the projected patch, so that the N patches are not projected. With
    `MergerConfig.text_tower` it is what CLIP's text tower says of the patch.
    """

    needs_grid = False
    training_free = True
    chooses_in_steps = True
    uses_question = True
    requires = frozenset({"word_relevance"})
    options = ("text_tower",)
    paper = "MMTok, 2508.18264"

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        return mmtok(features, context.word_relevance, context.num_tokens, context.return_source)
