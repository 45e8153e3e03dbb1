# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""C-Abstractor: convolutions, a mean over each slot, and convolutions again."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .configuration_llava_merge import MergerConfig
from .merging_base import (
    MergeContext,
    MergeOutput,
    MergingMethod,
    as_source,
    register_merging_method,
    weighted_sum,
)
from .merging_grid import slot_cells, stretch_map


NUM_BLOCKS = 3  # before the mean, and as many behind it
NUM_PLACES = 24  # rows, and columns, of the map of learned places


class Bottleneck(nn.Module):
    """A block of RegNet (arXiv 2003.13678): each place by itself, each channel with its neighbours, and the channels
    weighed by their means over the map."""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.SiLU())
        self.neighbours = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.neighbours_norm = nn.LayerNorm(dim)
        reduced = max(1, dim // 4)
        self.gates = nn.Sequential(nn.Linear(dim, reduced), nn.ReLU(), nn.Linear(reduced, dim), nn.Sigmoid())
        self.output = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim))

    def forward(self, maps: Tensor, is_token: Tensor) -> Tensor:
        """Of maps (I, rows, columns, dim); `is_token` (rows, columns, 1), 0 where a short row has no token."""
        mixed = (self.mix(maps) * is_token).permute(0, 3, 1, 2)
        near = silu(self.neighbours_norm(self.neighbours(mixed).permute(0, 2, 3, 1)))
        means = (near * is_token).sum(dim=(1, 2), keepdim=True) / is_token.sum()
        return silu(maps + self.output(near * self.gates(means)))


@register_merging_method("c_abstractor")
class CAbstractor(MergingMethod):
    """Convolves the patches, takes their mean over each slot, and convolves these.

    C-Abstractor of Honeybee (arXiv 2312.06742), without its last layers: the projector is behind it. Where M makes rows
    of unequal length, the shorter ones end early, as at a border. Starts random. `source` is the mean alone: what
    convolutions bring in from around a slot is not counted.
    """

    sits_on_slots = True
    paper = "C-Abstractor, 2312.06742"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        dim = config.internal_dim
        self.places = nn.Parameter(torch.empty(NUM_PLACES, NUM_PLACES, config.vision_dim))
        self.input_proj = nn.Linear(config.vision_dim, dim)
        self.patch_blocks = nn.ModuleList(Bottleneck(dim) for _ in range(NUM_BLOCKS))
        self.slot_blocks = nn.ModuleList(Bottleneck(dim) for _ in range(NUM_BLOCKS))
        self.output_proj = nn.Linear(dim, config.vision_dim)

    def reset_parameters(self):
        nn.init.normal_(self.places, std=0.02)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        patches = self.input_proj(features + stretch_map(self.places, context.grid)).unflatten(1, context.grid)
        everywhere = patches.new_ones(*context.grid, 1)
        for block in self.patch_blocks:
            patches = block(patches, everywhere)
        windows = context.geometry.windows
        slots = weighted_sum(windows, patches.flatten(1, 2))
        (rows, columns), cells = slot_cells(context.num_tokens, slots.device)
        is_slot = slots.new_zeros(rows * columns, 1).index_fill(0, cells, 1).unflatten(0, (rows, columns))
        maps = slots.new_zeros(len(slots), rows * columns, slots.shape[-1]).index_copy(1, cells, slots)
        maps = maps.unflatten(1, (rows, columns))
        for block in self.slot_blocks:
            maps = block(maps, is_slot)
        merged = self.output_proj(maps.flatten(1, 2).index_select(1, cells))
        return MergeOutput(merged, as_source(windows, len(features)) if context.return_source else None)
