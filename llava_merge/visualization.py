# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what was merged, with Pillow, NumPy and torch alone.

inputs = processor(images=image, text=prompt, return_tensors="pt")
(source,) = model.merge_sources(**inputs)
draw_merging(image, source, processor).save("merged.png")
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import ProcessorMixin


POOLING, MERGING, SELECTION = "pooling", "merging", "selection"
CAPTION_HEIGHT, GAP = 22, 8
DARK = 0.3  # of what is lost, or counts little


# --- whole pictures ---------------------------------------------------------------------------------------------------


def draw_merging(image: Image.Image, source: Tensor, processor=None, line: int = 1) -> Image.Image:
    """What merged tokens keep of a picture, drawn on it.

    Of a selection, the kept patches stay as they are, and the dropped ones are dark and grey. Where each patch went
    into one token, those of a token have their mean colour and an outline. Where tokens share patches, as in pooling,
    the picture is as bright as the patches count in all tokens together.

    Args:
        image: The picture as it was given to the processor.
        source: (M, N), how much of each token came from each patch, as `model.merge_sources(**inputs)` gives it.
        processor: Of the model, or its image processor: what it crops away is dark, and its resizing is undone. Without
            it, the picture is taken to be what the tower sees.
        line: Width of the outlines in pixels.

    Returns:
        A picture of the size of `image`.

    Raises:
        ValueError: `source` is not of one image, or its patches are not a square.
    """
    grid = square_grid(source)
    return on_picture(image, processor, lambda view: draw_merged_tokens(view, source, grid, line))


def draw_weights(image: Image.Image, source: Tensor, processor=None) -> Image.Image:
    """The picture, as bright as its patches count in all tokens together, whatever the kind of merging.

    The arguments and errors are those of [`draw_merging`].
    """
    grid = square_grid(source)
    weights = as_floats(source).sum(dim=0).reshape(grid)
    return on_picture(image, processor, lambda view: lit(view, weights))


def draw_token_maps(image: Image.Image, source: Tensor, processor=None, columns: int | None = None) -> Image.Image:
    """One small picture for each token, as bright as the patches that went into it.

    Args:
        columns: Of the table of pictures; default the most square.

    The other arguments and errors are those of [`draw_merging`].
    """
    grid, view = square_grid(source), thumbnail(tower_view(image, processor), 112)
    columns = columns or math.ceil(len(source) ** 0.5)
    maps = [lit(view, row.reshape(grid)) for row in as_floats(source)]
    rows = [side_by_side(maps[start : start + columns], gap=2) for start in range(0, len(maps), columns)]
    table = Image.new("RGB", (rows[0].width, sum(row.height + 2 for row in rows) - 2), "white")
    for index, row in enumerate(rows):
        table.paste(row, (0, index * (row.height + 2)))
    return table


def thumbnail(image: Image.Image, size: int = 336) -> Image.Image:
    """A copy of the picture in RGB, not wider or higher than `size` pixels."""
    small = image.convert("RGB")
    small.thumbnail((size, size))
    return small


def side_by_side(images: list[Image.Image], captions: list[str] | None = None, gap: int = GAP) -> Image.Image:
    """The pictures in a row on white, all as high as the first, each with its caption, of one line or more, above."""
    lines = max((caption.count("\n") + 1 for caption in captions or ()), default=0)
    height, top = images[0].height, CAPTION_HEIGHT * lines
    scaled = [image.resize((round(image.width * height / image.height), height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled) + gap * (len(scaled) - 1), height + top), "white")
    draw, left = ImageDraw.Draw(row), 0
    for index, image in enumerate(scaled):
        row.paste(image, (left, top))
        if captions:
            for line, text in enumerate(captions[index].split("\n")):
                draw.text((left, 3 + line * CAPTION_HEIGHT), text, fill="black", font=caption_font(text, image.width))
        left += image.width + gap
    return row


def caption_font(text: str, width: int) -> ImageFont.ImageFont:
    """The bundled font, small enough for a line of `width` pixels."""
    for size in range(15, 8, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            break
    return font


# --- a picture as the tower sees it -----------------------------------------------------------------------------------


def draw_merged_tokens(image: Image.Image, source: Tensor, grid: tuple[int, int], line: int = 1) -> Image.Image:
    """[`draw_merging`] of a picture that is cropped as the processor crops it.

    Args:
        image: The picture.
        source: (M, N).
        grid: Rows and columns of the patches.
        line: Width of the outlines in pixels.

    Raises:
        ValueError: `source` has not one column for each patch of `grid`.
    """
    check_source(source, grid)
    source, image, kind = as_floats(source), image.convert("RGB"), kind_of_source(source)
    weights = source.sum(dim=0)
    if kind == POOLING:
        return lit(image, weights.reshape(grid))
    is_kept = weights > 0
    owner = torch.where(is_kept, source.argmax(dim=0), -1)
    kept = image
    if kind == MERGING:
        colors = source @ patch_colors(image, grid)  # (M, 3)
        kept = to_image(colors[owner].reshape(*grid, 3)).resize(image.size, Image.Resampling.NEAREST)
    drawn = Image.composite(kept, faded(image), mask_of(is_kept.reshape(grid), image.size))
    return outline(drawn, owner.reshape(grid), line)


def kind_of_source(source: Tensor) -> str:
    """What made `source` (M, N): "pooling" where tokens share a patch, "selection" where each token is one patch and
    others are lost, else "merging"."""
    if ((source > 0).sum(dim=0) > 1).any():
        return POOLING
    is_one_patch = ((source > 0).sum(dim=1) == 1).all()
    return SELECTION if is_one_patch and (source.sum(dim=0) == 0).any() else MERGING


def lit(image: Image.Image, weights: Tensor) -> Image.Image:
    """The picture as bright as `weights` (rows, columns), the largest at full brightness."""
    shares = weights / weights.max().clamp(min=1e-9)
    return Image.composite(image.convert("RGB"), faded(image), mask_of(shares**0.5, image.size))


def patch_colors(image: Image.Image, grid: tuple[int, int]) -> Tensor:
    """Mean colour of each patch in raster order, (N, 3) from 0 to 255."""
    small = image.convert("RGB").resize((grid[1], grid[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).float().reshape(-1, 3)


def faded(image: Image.Image) -> Image.Image:
    """The picture dark and grey."""
    return image.convert("L").point(lambda value: round(DARK * value)).convert("RGB")


def to_image(pixels: Tensor) -> Image.Image:
    """(H, W, 3) from 0 to 255 → picture."""
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).numpy())


def mask_of(shares: Tensor, size: tuple[int, int]) -> Image.Image:
    """Mask for a picture of this size, of `shares` (rows, columns) from 0 to 1, or bool."""
    values = (255 * shares.float()).round().to(torch.uint8).numpy()
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def outline(image: Image.Image, owner: Tensor, line: int) -> Image.Image:
    """White lines between patches (rows, columns) that belong mostly to different tokens."""
    columns = torch.arange(image.width) * owner.shape[1] // image.width
    rows = torch.arange(image.height) * owner.shape[0] // image.height
    of_pixel = owner[rows][:, columns]  # (H, W)
    edge = torch.zeros_like(of_pixel, dtype=torch.bool)
    for shift in range(1, line + 1):
        edge[shift:] |= of_pixel[shift:] != of_pixel[:-shift]
        edge[:, shift:] |= of_pixel[:, shift:] != of_pixel[:, :-shift]
    image.paste((255, 255, 255), (0, 0), mask_of(edge, image.size))
    return image


# --- crop and resize --------------------------------------------------------------------------------------------------


def tower_box(size: tuple[int, int], image_processor) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the tower sees, in pixels of a picture of `size` (width, height).

    It reaches beyond the picture where the processor pads.
    """
    width, height = size
    left = top = 0.0  # of the picture as it is now, in pixels of the original
    if image_processor.to_dict().get("do_pad"):  # LLaVA's own processor: to a square
        side = max(size)
        left, top, width, height = -((side - width) // 2), -((side - height) // 2), side, side
    scale_x = scale_y = 1.0
    new_width, new_height = width, height
    if image_processor.do_resize:
        new_width, new_height = resized(width, height, image_processor.size)
        scale_x, scale_y = width / new_width, height / new_height
    if image_processor.do_center_crop:
        crop_width, crop_height = image_processor.crop_size["width"], image_processor.crop_size["height"]
        left += (new_width - crop_width) / 2 * scale_x
        top += (new_height - crop_height) / 2 * scale_y
        new_width, new_height = crop_width, crop_height
    return left, top, left + new_width * scale_x, top + new_height * scale_y


def resized(width: int, height: int, size) -> tuple[int, int]:
    """Width and height after resizing to a processor's `size`."""
    if size.get("shortest_edge"):
        scale = size["shortest_edge"] / min(width, height)
        return int(width * scale), int(height * scale)
    return size["width"], size["height"]


def tower_view(image: Image.Image, processor=None) -> Image.Image:
    """What the tower sees of a picture, at the picture's own resolution."""
    image = image.convert("RGB")
    return image if processor is None else image.crop(whole_box(image.size, processor))


def on_picture(image: Image.Image, processor, draw) -> Image.Image:
    """The picture with `draw(view)` in the place of what the tower sees, and dark around it."""
    if processor is None:
        return draw(image.convert("RGB"))
    left, top, *_ = whole_box(image.size, processor)
    whole = faded(image)
    whole.paste(draw(tower_view(image, processor)), (left, top))
    return whole


def whole_box(size: tuple[int, int], processor) -> tuple[int, ...]:
    """[`tower_box`] in whole pixels, by a model's processor or its image processor."""
    image_processor = processor.image_processor if isinstance(processor, ProcessorMixin) else processor
    return tuple(round(value) for value in tower_box(size, image_processor))


# --- sources ----------------------------------------------------------------------------------------------------------


def as_floats(source: Tensor) -> Tensor:
    """The source on the CPU, in float32."""
    return source.detach().float().cpu()


def square_grid(source: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches that `source` (M, N) is of.

    Raises:
        ValueError: They are not a square, or `source` is not of one image.
    """
    side = math.isqrt(source.shape[-1])
    check_source(source, (side, side))
    return side, side


def check_source(source: Tensor, grid: tuple[int, int]):
    """Refuses what is not (M, rows × columns).

    Raises:
        ValueError: It is not.
    """
    if source.ndim != 2 or source.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"source has shape {tuple(source.shape)}; it has to be (tokens, {grid[0]} × {grid[1]} = {grid[0] * grid[1]}"
            f" patches) of one image. Take one image of MergeOutput.source and the grid of its patches."
        )
