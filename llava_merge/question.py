# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Checks of a prompt with images, and the order of images when rows are repeated. Pure functions on tensors."""

import torch
from torch import Tensor


def as_row_mask(name: str, mask, shape: torch.Size) -> Tensor | None:
    """A mask (B, L or more) of a prompt of `shape` (B, L), if any; with a filled cache it also covers what is in there.

    Raises:
        ValueError: It is not (batch, tokens), so that padding or answers cannot be told from the question.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask[:, -shape[1] :]
    if not isinstance(mask, Tensor) or mask.shape != shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} is {found}, but a question-aware merger reads the text where it is true and needs it as "
            f"(batch, tokens)={tuple(shape)}. Pass the 2-D mask that the processor returns."
        )
    return mask.bool()


def check_each_image(is_right: Tensor, rows: Tensor, message: str):
    """Raises `message` with the {rows} of the images that are not right; both (I,).

    Under torch.compile the check is an assertion on the device, so that it neither breaks the graph nor waits.

    Raises:
        ValueError: There is one.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(is_right.all(), message)
    elif not is_right.all():
        raise ValueError(message.format(rows=", ".join(map(str, rows[~is_right].unique().tolist()))))


def check_placeholders(
    image_mask: Tensor, num_features: int, num_images: int | None = None, num_patches: int | None = None
):
    """Compares the placeholders (B, L) with the features that go there; row by row where `num_images` is given.

    Under torch.compile the check is an assertion on the device, so that it neither breaks the graph nor waits.

    Args:
        num_patches: Visual tokens N of an image before merging, which a stock processor writes placeholders for.

    Raises:
        ValueError: There are images too many or too few, or the prompts were made for another number of tokens.
    """
    fits = image_mask.sum() == num_features
    if num_images:
        fits = fits & (image_mask.sum(dim=1) % (num_features // num_images) == 0).all()
    if torch.compiler.is_compiling():
        torch._assert_async(fits, "Image placeholders and merged tokens do not match.")
    elif not fits:
        per_row = image_mask.sum(dim=1).tolist()
        raise ValueError(explain_placeholders(per_row, num_features, num_images, num_patches))


def explain_placeholders(per_row: list[int], num_features: int, num_images: int | None, num_patches: int | None) -> str:
    """What is wrong with prompts that have `per_row` placeholders for these features, and what to do."""
    total = sum(per_row)
    if not num_images:
        return (
            f"The prompts hold {total} image placeholders (per row: {per_row}) for {num_features} image features. "
            f"Encode as many images as the prompts have, with the budget that they were made for."
        )
    each = num_features // num_images
    found = (
        f"The prompts hold {total} image placeholders (per row: {per_row}), but {num_images} images give {each} tokens"
    )
    if total != num_images * (num_patches or 0) and all(count % each == 0 for count in per_row):
        images = [count // each for count in per_row]
        return (
            f"{found} each, {num_features} in all: the prompts are for {sum(images)} images (per row: {images}), and "
            f"{num_images} are given. Pass one image for each <image> of the prompts, in reading order."
        )
    return (
        f"{found} each, {num_features} in all: the prompts were made for another number of tokens per image. Make them "
        f"with this model's: `LlavaMergeProcessor.from_pretrained(..., num_merged_tokens=M)` or "
        f"`processor.num_merged_tokens = M`, with M = `model.config.merger_config.num_merged_tokens` (None for all "
        f"tokens)."
    )


def last_images_of_rows(counts: Tensor, last: Tensor) -> Tensor:
    """Indices of the last `last` (B,) images of each row, where the rows have `counts` (B,) images.

    Of rows with 3 and 2 images, the last 1 and 2: 2, 3, 4.
    """
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    rank = torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]
    return (rank >= (counts - last)[rows]).nonzero()[:, 0]


def repeat_rows_together(image_counts: Tensor, times: int) -> Tensor:
    """Order of the images when each row is repeated `times` times in place: all images of a row, then all again.

    Rows with 2 and 1 images, twice: 0, 1, 0, 1, 2, 2. Repeating single images would give 0, 0, 1, 1, 2, 2.
    """
    counts = image_counts.repeat_interleave(times)  # of each repeated row
    first_image = (image_counts.cumsum(0) - image_counts).repeat_interleave(times)
    row_start = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=counts.device) + (first_image - row_start).repeat_interleave(counts)
