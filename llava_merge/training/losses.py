# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Losses of a merger, as sums over answer tokens or images, in float32. Pure functions."""

import torch.nn.functional as F
from torch import Tensor


def answer_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of `logits` (A, vocabulary) at the A answer tokens with the ids `targets` (A,): ()."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence from the teacher's distribution at each of A answer tokens, times temperature²: ().

    The square keeps gradients as large at every temperature (arXiv 1503.02531).

    Args:
        logits: (A, vocabulary), with merged tokens.
        teacher_logits: (A, vocabulary), at the same answer tokens behind unmerged images.
    """
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    wanted = (teacher_logits.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * F.kl_div(log_probs, wanted, reduction="sum", log_target=True)


def reconstruction(features: Tensor, merged_features: Tensor, source: Tensor) -> Tensor:
    """Share of the features' variance that is lost where each patch is rebuilt from the tokens it went into: ().

    A patch is the mean of those tokens, weighted by how much of it is in each; there is nothing to train in that, so it
    cannot hide what the tokens do not hold.

    Args:
        features: (I, N, vision_dim), of the tower.
        merged_features: (I, M, vision_dim).
        source: (I, M, N), how much of each token came from each patch.

    Returns:
        Sum over images.
    """
    features = features.float()
    shares = source.float() / source.float().sum(dim=1, keepdim=True).clamp(min=1e-6)  # of each patch
    rebuilt = shares.transpose(1, 2) @ merged_features.float()  # (I, N, vision_dim)
    lost = (features - rebuilt).square().sum(dim=(1, 2))
    variance = (features - features.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    return (lost / variance.clamp(min=1e-6)).sum()
