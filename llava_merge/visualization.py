# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what was merged, with Pillow and torch alone."""

import torch
from PIL import Image
from torch import Tensor


def draw_merged_tokens(image: Image.Image, source: Tensor, grid: tuple[int, int], line: int = 1) -> Image.Image:
    """The picture as the language model gets it: each token in the mean colour of what it was made of, outlined.

    Args:
        image: The picture, cropped as the processor crops it.
        source: (M, N), how much of each token came from each patch, `MergeOutput.source` of one image.
        grid: Rows and columns of the patches.
        line: Width of the outlines in pixels.

    Returns:
        A picture of the size of `image`. A patch shared by several tokens shows their weighted mean.

    Raises:
        ValueError: `source` has not one column for each patch of `grid`.
    """
    if source.ndim != 2 or source.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"source has shape {tuple(source.shape)}; it has to be (tokens, {grid[0]} × {grid[1]} = {grid[0] * grid[1]}"
            f" patches) of one image. Take one image of MergeOutput.source and the grid of its patches."
        )
    source = source.detach().float().cpu()
    patches = patch_colors(image, grid)  # (N, 3)
    tokens = source @ patches  # (M, 3)
    share = source / source.sum(dim=0, keepdim=True).clamp(min=1e-9)  # of each token in each patch
    mosaic = (share.T @ tokens).reshape(*grid, 3)
    drawn = to_image(mosaic).resize(image.size, Image.Resampling.NEAREST)
    return outline(drawn, source.argmax(dim=0).reshape(grid), line)


def patch_colors(image: Image.Image, grid: tuple[int, int]) -> Tensor:
    """Mean colour of each patch in raster order, (N, 3) from 0 to 255."""
    small = image.convert("RGB").resize((grid[1], grid[0]), Image.Resampling.BOX)
    return torch.tensor(list(small.tobytes()), dtype=torch.float32).reshape(-1, 3)


def to_image(pixels: Tensor) -> Image.Image:
    """(H, W, 3) from 0 to 255 → picture."""
    values = pixels.round().clamp(0, 255).to(torch.uint8)
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(values.flatten().tolist()))


def outline(image: Image.Image, owner: Tensor, line: int) -> Image.Image:
    """White lines between patches (rows, columns) that belong mostly to different tokens."""
    columns = torch.arange(image.width) * owner.shape[1] // image.width
    rows = torch.arange(image.height) * owner.shape[0] // image.height
    of_pixel = owner[rows][:, columns]  # (H, W)
    edge = torch.zeros_like(of_pixel, dtype=torch.bool)
    for shift in range(1, line + 1):
        edge[shift:] |= of_pixel[shift:] != of_pixel[:-shift]
        edge[:, shift:] |= of_pixel[:, shift:] != of_pixel[:, :-shift]
    mask = Image.frombytes("L", image.size, bytes((edge * 255).to(torch.uint8).flatten().tolist()))
    image.paste((255, 255, 255), (0, 0), mask)
    return image


def side_by_side(images: list[Image.Image], gap: int = 8) -> Image.Image:
    """The pictures in a row on white, all as high as the first."""
    height = images[0].height
    scaled = [image.resize((round(image.width * height / image.height), height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled) + gap * (len(scaled) - 1), height), "white")
    left = 0
    for image in scaled:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row
