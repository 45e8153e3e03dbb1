# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Geometry: where the M slots of a merged image lie on the unit square, and which patches each of them covers."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from .placeholders import is_recording


NUM_KEPT = 64  # results of a function that is made once, the newest
_held: ContextVar[list | None] = ContextVar("held", default=None)


@dataclass(frozen=True)
class SlotGeometry:
    """Where the M slots of a merged image lie among the N patches of its grid. Tensors in float32.

    Attributes:
        windows: (M, N), share of each slot's area that lies on each patch; rows sum to 1.
        log_windows: (M, N), their logarithms, -inf outside a window.
        blend: (M, N), how the four patches around each slot's centre blend there (bilinear); rows sum to 1.
        squared_distances: (M, N), of each slot's centre to each patch's, in units of the slot's sides.
        centres: (M, 2), x and y of each slot's centre on the square from -1 to 1.
        places: (M,) int64, the patch nearest each slot's centre, in raster order.
    """

    windows: Tensor
    log_windows: Tensor
    blend: Tensor
    squared_distances: Tensor
    centres: Tensor
    places: Tensor


@contextmanager
def holding_what_is_made_once() -> Iterator[list]:
    """Inside, all that functions [`made_once`] return goes into this list too, which outlives what they keep."""
    held = []
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


def made_once(make):
    """Decorator of a function of hashable arguments: the same objects each time it is asked for them.

    What belongs to a graph or a mode is made for it alone: tensors of torch.compile, of FakeTensorMode and its like,
    and those that a CUDA graph being recorded has its memory for.
    """
    kept = {}

    @functools.wraps(make)
    def get(*args):
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
            return make(*args)
        made = kept.get(args)
        if made is None:
            with torch.inference_mode(False):  # a later call may train
                made = make(*args)
            if not is_recording():
                kept[args] = made
                while len(kept) > NUM_KEPT:
                    kept.pop(next(iter(kept)), None)
        if _held.get() is not None:
            _held.get().append(made)
        return made

    return get


@made_once
def slot_geometry(grid: tuple[int, int], num_slots: int, device: torch.device) -> SlotGeometry:
    """The [`SlotGeometry`] of M = `num_slots` slots on `grid`."""
    windows = window_weights(grid, num_slots, device)
    return SlotGeometry(
        windows,
        windows.log(),
        blend=blend_weights(grid, num_slots, device),
        squared_distances=squared_distances(grid, num_slots, device),
        centres=slot_centres(num_slots, device),
        places=slot_places(grid, num_slots, device),
    )


def slots_per_row(num_slots: int) -> list[int]:
    """Number of slots in each row, top to bottom, that makes `num_slots` slots as square as they can be.

    The most square grid if it is at most twice as wide as high (288 → 16 × 18), else rows of nearly equal length
    (37 → 7, 6, 6, 6, 6, 6).
    """
    rows = max(r for r in range(1, math.isqrt(num_slots) + 1) if num_slots % r == 0)
    if num_slots > 2 * rows * rows:
        rows = round(math.sqrt(num_slots))
    return [num_slots // rows + (row < num_slots % rows) for row in range(rows)]


def default_query_grid(config) -> list[int]:
    """Rows and columns of a map of learned queries: those of a `MergerConfig`, or of the slots of its budget."""
    if config.query_grid is not None:
        return config.query_grid
    lengths = slots_per_row(config.num_merged_tokens or 256)
    return [len(lengths), max(lengths)]


def slot_positions(num_slots: int, device=None) -> tuple[tuple[Tensor, int], tuple[Tensor, Tensor]]:
    """Place of each slot in raster order: (row, number of rows) and (column, length of its row), as (M,) integers."""
    num_rows = len(slots_per_row(num_slots))
    short, num_long_rows = divmod(num_slots, num_rows)  # the first rows may be one slot longer
    in_long_rows = num_long_rows * (short + 1)
    slots = torch.arange(num_slots, device=device)
    is_long = slots < in_long_rows
    length = short + is_long.long()
    offset = slots - torch.where(is_long, 0, in_long_rows)
    row = offset // length + torch.where(is_long, 0, num_long_rows)
    return (row, num_rows), (offset % length, length)


def overlap(index: Tensor, count: Tensor | int, num_patches: int) -> Tensor:
    """Share of interval `index` of `count` equal ones that each of `num_patches` equal ones covers: (M, num_patches).

    Exact: in units of 1 / (count × num_patches) all borders are integers.
    """
    low = index[:, None] * num_patches
    count = count if isinstance(count, int) else count[:, None]
    patch_low = torch.arange(num_patches, device=index.device) * count  # (M or 1, num_patches)
    shared = torch.minimum(low + num_patches, patch_low + count) - torch.maximum(low, patch_low)
    return shared.clamp(min=0).float() / num_patches


def centre_distance(index: Tensor, count: Tensor | int, num_patches: int) -> Tensor:
    """Distance between the centres of the intervals of [`overlap`], in lengths of the first: (M, num_patches)."""
    count = count if isinstance(count, int) else count[:, None]
    patches = torch.arange(num_patches, device=index.device, dtype=torch.float32) + 0.5
    return index[:, None].float() + 0.5 - patches * count / num_patches


def blend_of_two(index: Tensor, count: Tensor | int, num_patches: int) -> Tensor:
    """How the two patches nearest the centre of interval `index` of `count` blend there: (M, num_patches)."""
    patches = torch.arange(num_patches, device=index.device)
    centre = ((index.float() + 0.5) * num_patches / count - 0.5).clamp(0, num_patches - 1)
    return (1 - (centre[:, None] - patches).abs()).clamp(min=0)


def window_weights(grid: tuple[int, int], num_slots: int, device=None) -> Tensor:
    """Share of each slot's area that lies on each patch: (M, N) float32, rows sum to 1, N is the size of `grid`."""
    vertical, horizontal = slot_positions(num_slots, device)
    rows, columns = overlap(*vertical, grid[0]), overlap(*horizontal, grid[1])
    return (rows[:, :, None] * columns[:, None, :]).flatten(1)


@made_once
def cell_weights(grid: tuple[int, int], num_slots: int, cells: int, device: torch.device) -> Tensor:
    """As [`window_weights`], of each of the `cells` × `cells` cells that a slot is cut into: (M × cells², N)."""
    inside = torch.arange(cells, device=device)
    (row, num_rows), (column, length) = slot_positions(num_slots, device)
    rows = overlap((row[:, None] * cells + inside).flatten(), num_rows * cells, grid[0])  # (M × cells, rows)
    lengths = (length * cells).repeat_interleave(cells)
    columns = overlap((column[:, None] * cells + inside).flatten(), lengths, grid[1])
    rows, columns = rows.view(-1, cells, 1, grid[0], 1), columns.view(-1, 1, cells, 1, grid[1])
    return (rows * columns).view(-1, grid[0] * grid[1])


def blend_weights(grid: tuple[int, int], num_slots: int, device=None) -> Tensor:
    """What makes of N patches the picture of M pixels that bilinear resizing makes: (M, N) float32, rows sum to 1."""
    vertical, horizontal = slot_positions(num_slots, device)
    rows, columns = blend_of_two(*vertical, grid[0]), blend_of_two(*horizontal, grid[1])
    return (rows[:, :, None] * columns[:, None, :]).flatten(1)


def squared_distances(grid: tuple[int, int], num_slots: int, device=None) -> Tensor:
    """Squared distance of each slot's centre to each patch's, in units of the slot's sides: (M, N) float32."""
    return distances_to_patches(slot_positions(num_slots, device), grid)


def distances_to_patches(positions: tuple, grid: tuple[int, int]) -> Tensor:
    """As [`squared_distances`], of slots whose `positions` are as [`slot_positions`] gives them."""
    vertical, horizontal = positions
    rows, columns = centre_distance(*vertical, grid[0]), centre_distance(*horizontal, grid[1])
    return (rows.square()[:, :, None] + columns.square()[:, None, :]).flatten(1)


@made_once
def patch_distances(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Squared distance of each patch to each, in sides of a patch: (N, N) float32."""
    patches = torch.arange(grid[0] * grid[1], device=device)
    return distances_to_patches(((patches // grid[1], grid[0]), (patches % grid[1], grid[1])), grid)


def slot_centres(num_slots: int, device=None) -> Tensor:
    """x and y of each slot's centre on the square from -1 to 1: (M, 2)."""
    (row, num_rows), (column, length) = slot_positions(num_slots, device)
    column, row = column.float(), row.float()
    return torch.stack(((column + 0.5) / length, (row + 0.5) / num_rows), dim=-1) * 2 - 1


@made_once
def slot_places(grid: tuple[int, int], num_slots: int, device=None) -> Tensor:
    """Raster index of the patch nearest each slot's centre: (M,) int64, never falling.

    Row and column are rounded apart, ties to the earlier patch; a rounded mean of raster indices would lie half a row
    away where a window has an even number of rows. As many slots as patches are the patches.
    """
    if num_slots == grid[0] * grid[1]:
        return torch.arange(num_slots, device=device)
    (row, num_rows), (column, length) = slot_positions(num_slots, device)
    rows, columns = nearest_interval(row, num_rows, grid[0]), nearest_interval(column, length, grid[1])
    places, slots = rows * grid[1] + columns, torch.arange(num_slots, device=device)
    # slots in more rows than the grid has share some; ONNX has no cummax
    return torch.where(slots <= slots[:, None], places, 0).amax(dim=1)


def nearest_interval(index: Tensor, count: Tensor | int, num_patches: int) -> Tensor:
    """Which of `num_patches` equal intervals has the centre nearest that of interval `index` of `count`; exact."""
    return ((2 * index + 1) * num_patches - 1) // (2 * count)


@made_once
def slot_cells(num_slots: int, device: torch.device) -> tuple[tuple[int, int], Tensor]:
    """Rows and columns of the smallest grid that holds the rows of the slots, and the cell of each slot: (M,) int64."""
    lengths = slots_per_row(num_slots)
    (row, _), (column, _) = slot_positions(num_slots, device)
    return (len(lengths), max(lengths)), row * max(lengths) + column


def stretch_map(learned_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map of vectors (rows, columns, dim) resized to `grid`, bilinear, in raster order: (N, dim)."""
    rows, columns = (
        blend_of_two(torch.arange(length, device=learned_map.device), length, size).to(learned_map.dtype)
        for length, size in zip(grid, learned_map.shape, strict=False)
    )
    return torch.einsum("ri,cj,ijd->rcd", rows, columns, learned_map).flatten(0, 1)


def sample_query_map(query_map: Tensor, centres: Tensor) -> Tensor:
    """A map of vectors (rows, columns, dim) over the square from -1 to 1, at the `centres` (M, 2): (M, dim).

    Bilinear, and exact where the centres are those of the map's own cells.
    """
    rows, columns = query_map.shape[:2]
    if slots_per_row(len(centres)) == [columns] * rows:
        return query_map.flatten(0, 1)
    sampled = torch.nn.functional.grid_sample(
        query_map.permute(2, 0, 1)[None].float(),
        centres[None, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )  # (1, dim, 1, M)
    return sampled[0, :, 0].T.to(query_map.dtype)
