# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""How many tokens each image of a call gets, and whether the prompts have as many placeholders. Pure functions."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import index

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(f"transformers.{__name__}")


ALL_TOKENS = "all"  # of an image that is not merged


def is_whole_number(value) -> bool:
    """Whether it is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def budget_of_each_image(num_merged_tokens: int | str | list | tuple, num_images: int) -> list[int | str]:
    """`num_merged_tokens`, one number or "all", or a list with one for each image, as such a list.

    Raises:
        ValueError: It is neither, or a list for more or fewer images.
    """
    budgets = num_merged_tokens if isinstance(num_merged_tokens, list | tuple) else [num_merged_tokens] * num_images
    for budget in budgets:
        if budget != ALL_TOKENS and not is_whole_number(budget):
            raise ValueError(
                f"num_merged_tokens={num_merged_tokens!r}: the tokens of an image are a whole number of at least 1, or "
                f"{ALL_TOKENS!r}; a list has one of them for each image."
            )
    if len(budgets) != num_images:
        raise ValueError(
            f"num_merged_tokens={num_merged_tokens!r} is for {len(budgets)} images, but there are {num_images}. Give "
            f"one number for all images, or one for each in reading order."
        )
    # index makes a constant of a number that torch.compile has taken for a variable: shapes follow from it
    return [budget if budget == ALL_TOKENS else index(budget) for budget in budgets]


def tokens_of_budget(budget: int | str, num_patches: int) -> int:
    """Tokens of an image with `num_patches` that gets `budget`."""
    return num_patches if budget == ALL_TOKENS else budget


def check_on_device(is_right: Tensor, message: str, explain: Callable[[], str]):
    """Raises what `explain` says where `is_right` () is False.

    Under torch.compile the check is an assertion on the device, with the `message` alone, so that it neither breaks the
    graph nor waits. What is recorded as a CUDA graph was checked before.

    Raises:
        ValueError: So it is.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(is_right, message)
    elif not is_recording() and not is_right:
        raise ValueError(explain())


def is_recording() -> bool:
    """Whether kernels are recorded as a CUDA graph now, so that nothing may wait for them."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_placeholders(image_mask: Tensor, num_tokens: list[int], num_patches: int | None = None):
    """Compares the placeholders (B, L) with images that get `num_tokens` each.

    Args:
        num_patches: Visual tokens N of an image before merging, which a stock processor writes placeholders for.

    Raises:
        ValueError: There are images too many or too few, or the prompts were made for another number of tokens.
    """
    per_row = image_mask.sum(dim=1)
    fits = (per_row.sum() == sum(num_tokens)) & rows_hold_whole_images(per_row, num_tokens)
    message = "Image placeholders and merged tokens do not match."
    check_on_device(fits, message, lambda: explain_placeholders(per_row.tolist(), num_tokens, num_patches))


def rows_hold_whole_images(per_row: Tensor, num_tokens: list[int]) -> Tensor:
    """Whether no image with `num_tokens` would lie in two rows that have `per_row` (B,) placeholders: () bool."""
    if len(set(num_tokens)) == 1:
        return (per_row % num_tokens[0] == 0).all()
    ends = torch.tensor([0, *accumulate(num_tokens)], device=per_row.device)
    return torch.isin(per_row.cumsum(0), ends).all()


def explain_placeholders(per_row: list[int], num_tokens: list[int], num_patches: int | None) -> str:
    """What is wrong with prompts that have `per_row` placeholders for images with `num_tokens`, and what to do."""
    total, num_images = sum(per_row), len(num_tokens)
    found = f"The prompts hold {total} image placeholders (per row: {per_row}), but {num_images} images give"
    if len(set(num_tokens)) > 1:
        return (
            f"{found} {num_tokens} tokens, {sum(num_tokens)} in all, and none may lie in two rows. Pass the images in "
            f"reading order, with the num_merged_tokens that the prompts were made with."
        )
    each = num_tokens[0] if num_tokens else 0
    found = f"{found} {each} tokens each, {sum(num_tokens)} in all:"
    if each and total != num_images * (num_patches or 0) and all(count % each == 0 for count in per_row):
        images = [count // each for count in per_row]
        found = (
            f"{found} the prompts are for {sum(images)} images (per row: {images}), and {num_images} are given. Pass "
            f"one image for each <image> of the prompts, in reading order."
        )
        if total % num_images:
            return found
        found = f"{found} Or, with {total // num_images} tokens per image,"
    return (
        f"{found} the prompts were made for another number of tokens per image. Give the model what the processor "
        f"returned for `processor(..., num_merged_tokens=M)`; or make prompts with the model's own number: "
        f"`LlavaMergeProcessor.from_pretrained(..., num_merged_tokens=M)` or `processor.num_merged_tokens = M`, with "
        f"M = `model.config.merger_config.num_merged_tokens` (None for all tokens)."
        + (" Or a max_length cut the prompts off: raise it." if total < sum(num_tokens) else "")
    )


def check_num_features(image_mask: Tensor, features: Iterable[Tensor]):
    """Compares the placeholders (B, L) with features (M, hidden) of each image that were encoded before.

    Raises:
        ValueError: There are more or fewer.
    """
    num_features, message = sum(map(len, features)), "Image placeholders and image features do not match."
    check_on_device(
        image_mask.sum() == num_features,
        message,
        lambda: (
            f"The prompts hold {int(image_mask.sum())} image placeholders (per row: {image_mask.sum(dim=1).tolist()}) "
            f"for {num_features} image features. Encode as many images as the prompts have, with the budget that they "
            f"were made for."
        ),
    )


def repeat_rows_together(image_counts: Tensor, times: int) -> Tensor:
    """Order of the images when each row is repeated `times` times in place: all images of a row, then all again.

    Rows with 2 and 1 images, twice: 0, 1, 0, 1, 2, 2. Repeating single images would give 0, 0, 1, 1, 2, 2.
    """
    counts = image_counts.repeat_interleave(times)  # of each repeated row
    first_image = (image_counts.cumsum(0) - image_counts).repeat_interleave(times)
    row_start = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=counts.device) + (first_image - row_start).repeat_interleave(counts)


def warn_of_positions(num_positions: int, num_tokens: int, limit: int, name: str = "max_position_embeddings"):
    """Warns, once for each sum of images, where a prompt with its answer takes more than `limit` positions.

    Args:
        num_positions: What it takes, of `num_tokens`.
        name: Of the limit.
    """
    skipped = num_positions - num_tokens
    if num_positions > limit and skipped > 0:
        logger.warning_once(
            f"A prompt with its answer can pass {name}={limit}, though it has fewer tokens: merged tokens keep the "
            f"positions of their patches, and those of its images skip {skipped} positions, which leaves room for "
            f"{max(0, limit - skipped)} tokens. Beyond, answers may be much worse. Give fewer images or less text, or "
            f"use merger_config={{'position_ids': 'packed'}}."
        )
