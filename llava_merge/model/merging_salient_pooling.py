# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""V3 with its slots on what stands out in the picture, instead of on a grid."""

import math

import torch
from torch import Tensor, nn

from .configuration_llava_merge import MergerConfig
from .merging_base import MergeContext, register_merging_method
from .merging_fixed_pooling import FixedPooling, PoolingSlots, ZeroLinear
from .merging_grid import patch_distances, stretch_map
from .merging_selection import gather_patches, largest, one_hot, places_of


def centred(features: Tensor) -> Tensor:
    """What each of `features` (I, N, dim) differs in from the mean of its image, in float32."""
    features = features.float()
    return features - features.mean(dim=1, keepdim=True)


@torch.no_grad()
def salient_patches(scores: Tensor, squared_distances: Tensor, num_tokens: int) -> Tensor:
    """The M = `num_tokens` patches that stand out among those around them: (I, M) int64, in raster order.

    The `scores` (I, N) fall near a patch with a higher one, of equal ones the earlier, as in the matrix NMS of SOLOv2
    (arXiv 2003.10152): all at once, without steps. How near is told by `squared_distances` (N, N), in sides of a slot.
    """
    order = torch.arange(scores.shape[1], device=scores.device)
    ties = (scores[:, None] == scores[:, :, None]) & (order < order[:, None])
    is_higher = (scores[:, None] > scores[:, :, None]) | ties  # (I, N, N): the second than the first
    kept = torch.where(is_higher, 1 - (-2 * squared_distances).exp(), 1.0).amin(dim=2)
    return places_of(largest(scores * kept, num_tokens), num_tokens)


def relative_differences(anchors: Tensor, features: Tensor) -> Tensor:
    """Squared distance of each anchor (I, M, dim) to each of `features` (I, N, dim): (I, M, N) float32.

    In units of the mean one of two patches of the image. Both are [`centred`]: the difference of large numbers has few
    digits.
    """
    lengths = features.square().sum(dim=-1)
    products = anchors @ features.transpose(1, 2)
    squares = anchors.square().sum(dim=-1)[:, :, None] + lengths[:, None] - 2 * products
    return squares.clamp(min=0) / (2 * lengths.mean(dim=1)[:, None, None]).clamp(min=1e-12)


@register_merging_method("salient_pooling")
class SalientPooling(FixedPooling):
    """V3 with each slot on a patch that stands out; its window holds the patches near it and like it.

    A slot's patch is farther from the mean feature than those around it. The windows are shares: each patch is divided
    among the slots by likeness and distance, more sharply where there are more slots; how sharply is learned. A token
    starts as the mean of its window, sits where its patch is and counts for the patches it has got (`sizes`). The
    queries are those of V3 at that place, shifted by the patch itself. Everything else is as in `fixed_pooling`.
    """

    starts_as = "means of patches alike"
    sits_on_slots = False
    options = ("query_grid", "feature_layers")
    paper = ""

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        self.anchor_norm = nn.LayerNorm(config.vision_dim)
        self.anchor_proj = ZeroLinear(config.vision_dim, config.internal_dim, bias=False)
        self.log_sharpness = nn.Parameter(torch.empty(2))  # of likeness, for one token, and of distance

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.log_sharpness.copy_(torch.tensor([math.log(2.0), 0.0]))

    def place_slots(self, features: Tensor, context: MergeContext) -> PoolingSlots:
        """The slots of each image, with their queries."""
        num_patches, num_tokens = features.shape[1], context.num_tokens
        distances = patch_distances(context.grid, features.device) * (num_tokens / num_patches)  # in sides of a slot
        differing = centred(features)
        places = salient_patches(differing.norm(dim=-1), distances, num_tokens)
        anchors, distances = gather_patches(features, places), distances[places]
        likeness, nearness = self.log_sharpness.float().exp()
        differences = relative_differences(gather_patches(differing, places), differing)
        differences = num_tokens**0.5 * likeness * differences
        windows = (-differences - nearness * distances).log_softmax(dim=1)  # (I, M, N): a patch's shares sum to 1
        # not an index: the gradient of that adds in another order each time
        queries = one_hot(places, num_patches).to(features.dtype) @ stretch_map(self.pool_queries, context.grid)
        queries = self.ask(queries + self.anchor_proj(self.anchor_norm(anchors)), context)
        return PoolingSlots(queries, windows[:, None], distances[:, None], places, windows.exp().sum(dim=-1))
