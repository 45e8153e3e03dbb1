# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""V1: a learned score chooses tokens, and the others merge into the nearest of these."""

import torch
from torch import Tensor, nn

from .configuration_llava_merge import MergerConfig
from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_selection import merge_into_nearest, nearest_members, top_patches, weighted_mean


def best_tokens(features: Tensor, scores: Tensor, num_tokens: int, return_source: bool = False) -> MergeOutput:
    """The M patches with the highest `scores` (I, N); each of the others merges into the nearest of them."""
    return merge_into_nearest(features, top_patches(scores, num_tokens), features, return_source)


def sampled_tokens(
    features: Tensor,
    scores: Tensor,
    num_tokens: int,
    temperature: Tensor | float,
    estimator: str = "gumbel",
    return_source: bool = False,
) -> MergeOutput:
    """[`best_tokens`] for training: the scores get gradients, and chance or noise explores.

    Args:
        features: (I, N, dim).
        scores: (I, N).
        temperature: Of the scores with mean 0 and deviation 1; the lower, the nearer to [`best_tokens`].
        estimator: `"gumbel"` draws the M tokens without replacement, by softmax(scores / temperature), and passes the
            gradients straight through to the soft top-k of the draw. `"soft_topk"` draws too, and mixes each token with
            as much noise, of equal variance, as its share in the soft top-k of the scores lacks (after DiffPrune): what
            was chosen by a hair can hardly be read, so that the scores have to decide.
    """
    logits = standardized(scores.float()) / temperature
    draw = logits - torch.empty_like(logits).exponential_().log()  # plus Gumbel noise
    shares = soft_topk(draw if estimator == "gumbel" else logits, num_tokens)
    straight_through = 1 + shares - shares.detach()  # 1, with the gradient of the shares
    anchors = top_patches(draw, num_tokens)
    belongs = nearest_members(features, anchors)
    merged, source = weighted_mean(features, belongs * straight_through[:, None])
    if estimator == "gumbel":
        merged = merged * straight_through.gather(1, anchors)[:, :, None].to(merged.dtype)
    else:
        merged = drowned(merged, shares.gather(1, anchors)[:, :, None])
    return MergeOutput(merged, source.detach() if return_source else None, anchors, belongs.sum(dim=-1))


def standardized(scores: Tensor) -> Tensor:
    """`scores` (I, N) with mean 0 and deviation 1 in each image, so that a temperature means the same for all."""
    deviation = scores.std(dim=1, keepdim=True) if scores.shape[1] > 1 else torch.ones_like(scores)
    return (scores - scores.mean(dim=1, keepdim=True)) / deviation.clamp(min=1e-6)


def drowned(tokens: Tensor, shares: Tensor) -> Tensor:
    """`tokens` (I, M, dim) mixed with noise of the variance of their image, as far as `shares` (I, M, 1) lack of 1."""
    noise = torch.randn_like(tokens) * tokens.detach().float().std(dim=(1, 2), keepdim=True).to(tokens.dtype)
    shares = shares.clamp(max=1)
    kept, lost = (shares + 1e-12).sqrt(), (1 - shares + 1e-12).sqrt()  # whose slopes are finite at 0
    return kept.to(tokens.dtype) * tokens + lost.to(tokens.dtype) * noise


def soft_topk(logits: Tensor, num_tokens: int) -> Tensor:
    """Shares from 0 to 1 of each of `logits` (I, N) that sum to M: sigmoid(logits + threshold), (I, N) float32.

    The threshold is found by bisection, in the middle of a gap where there is one; its gradient is that of the sum,
    which stays M.
    """
    logits = logits.float()
    if num_tokens == logits.shape[1]:
        return torch.ones_like(logits) + 0 * logits
    with torch.no_grad():
        wanted = num_tokens + logits.new_tensor([[-0.01], [0.01]])[:, None]  # (2, 1, 1), the ends of the gap
        low = (-logits.amax(dim=1, keepdim=True) - 20).expand(2, -1, -1)  # (2, I, 1), where the sum is about 0
        high = (-logits.amin(dim=1, keepdim=True) + 20).expand(2, -1, -1)  # and about N
        for _ in range(40):
            middle = (low + high) / 2
            is_low = (logits + middle).sigmoid().sum(dim=-1, keepdim=True) < wanted
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        threshold = low.mean(dim=0)
        slopes = (logits + threshold).sigmoid()
        slopes = (slopes * (1 - slopes)).sum(dim=1, keepdim=True).clamp(min=1e-12)
    total = (logits + threshold).sigmoid().sum(dim=1, keepdim=True)
    return (logits + threshold - (total - total.detach()) / slopes).sigmoid()


@register_merging_method("gumbel_topk")
class GumbelTopK(MergingMethod):
    """V1: a learned score of each token chooses M of them, and the others merge into the nearest of these.

    Training draws them by Gumbel-top-k (arXiv 1903.06059), with straight-through gradients or with noise in doubtful
    tokens (`estimator="soft_topk"`, after DiffPrune and VisionSelector); evaluation takes the best. The comparison for
    V3: fresh, its choice is arbitrary.
    """

    needs_grid = False
    options = ("estimator", "initial_temperature", "final_temperature")
    paper = "Gumbel-top-k 1903.06059"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.vision_dim)
        self.token_proj = nn.Linear(config.vision_dim, config.internal_dim)
        self.score_proj = nn.Linear(config.internal_dim, 1, bias=False)  # which would change no choice
        self.register_buffer("progress", torch.zeros(()))

    def reset_parameters(self):
        nn.init.zeros_(self.progress)

    def set_progress(self, progress: float):
        """Anneals the temperature; see [`MergingMethod.set_progress`]."""
        self.progress.fill_(progress)

    @property
    def temperature(self) -> Tensor:
        """() float32: falls from the initial to the final one, by the same factor in equal times."""
        first, last = self.config.initial_temperature, self.config.final_temperature
        return first * (last / first) ** self.progress.float()

    def score(self, features: Tensor, context: MergeContext) -> Tensor:
        """(I, N) of features (I, N, vision_dim)."""
        return self.score_proj(nn.functional.gelu(self.token_proj(self.norm(features))))[:, :, 0]

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        scores = self.score(features, context)
        if not self.training:
            return best_tokens(features, scores, context.num_tokens, context.return_source)
        return sampled_tokens(
            features, scores, context.num_tokens, self.temperature, self.config.estimator, context.return_source
        )
