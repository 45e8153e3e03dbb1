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


def check_placeholders(image_mask: Tensor, num_features: int, num_images: int | None = None):
    """Compares the placeholders (B, L) with the features that go there; row by row where `num_images` is given.

    Under torch.compile the check is an assertion on the device, so that it neither breaks the graph nor waits.

    Raises:
        ValueError: The prompt was made for another number of tokens per image.
    """
    fits = image_mask.sum() == num_features
    if num_images:
        fits = fits & (image_mask.sum(dim=1) % (num_features // num_images) == 0).all()
    if torch.compiler.is_compiling():
        torch._assert_async(fits, "Image placeholders and merged tokens do not match.")
    elif not fits:
        per_row = image_mask.sum(dim=1).tolist()
        images = (
            f"{num_images} images give {num_features // num_images} tokens each" if num_images else "the images give"
        )
        raise ValueError(
            f"The prompts hold {sum(per_row)} image placeholders (per row: {per_row}), but {images}, {num_features} in "
            f"all. Make the prompts with the number of tokens that this model merges an image into: "
            f"`LlavaMergeProcessor.from_pretrained(..., num_merged_tokens=M)` or `processor.num_merged_tokens = M`, "
            f"with M = `model.config.merger_config.num_merged_tokens` (None for all tokens)."
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
