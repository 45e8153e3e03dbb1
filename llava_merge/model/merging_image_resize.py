# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Nothing merged: a picture so small that the tower makes M tokens of it."""

from torch import Tensor
from torch.nn.functional import interpolate

from .configuration_llava_merge import MergerConfig
from .merging_base import MergeContext, MergeOutput, MergingMethod, register_merging_method
from .merging_grid import slots_per_row


def makes_picture(num_tokens: int) -> bool:
    """Whether M = `num_tokens` patches lie in rows of equal length."""
    return len({*slots_per_row(num_tokens)}) == 1


def grid_of_budget(num_tokens: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture of M = `num_tokens` patches, as square as it can be.

    Raises:
        ValueError: M makes no rows of equal length.
    """
    lengths = slots_per_row(num_tokens)
    if not makes_picture(num_tokens):
        fewer, more = len(lengths) * min(lengths), len(lengths) * max(lengths)
        raise ValueError(
            f"num_merged_tokens={num_tokens}: image_resize needs rows of patches of equal length, which {num_tokens} "
            f"are not, since a picture is rectangular. Choose {fewer} or {more}, or another method."
        )
    return len(lengths), lengths[0]


def resize_pictures(pixel_values: Tensor, num_tokens: int, patch_shape: tuple[int, int]) -> Tensor:
    """Pictures (I, 3, H, W) of M = `num_tokens` patches of `patch_shape`: (I, 3, rows × height, columns × width).

    Bilinear, with the means over what a pixel covers where pictures become smaller (antialiasing).
    """
    size = tuple(number * length for number, length in zip(grid_of_budget(num_tokens), patch_shape, strict=True))
    if size == tuple(pixel_values.shape[-2:]):
        return pixel_values
    smaller = interpolate(pixel_values.float(), size=size, mode="bilinear", antialias=True)
    return smaller.to(pixel_values.dtype)


@register_merging_method("image_resize")
class ImageResize(MergingMethod):
    """Makes the image smaller before the tower, which then makes M tokens of it, with its places interpolated.

    The baseline that papers leave out, though it is ahead of many (VTC-Bench, arXiv 2510.07143): the only method that
    also saves time in the tower. M has to be rows × columns of patches. Training-free; for towers of CLIP and SigLIP.
    """

    training_free = True
    sits_on_slots = True
    resizes_pictures = True
    paper = "VTC-Bench, 2510.07143"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        if config.num_merged_tokens is not None:
            grid_of_budget(config.num_merged_tokens)

    @staticmethod
    def resized(pixel_values: Tensor, num_tokens: int, patch_shape: tuple[int, int]) -> Tensor:
        """See [`resize_pictures`]."""
        return resize_pictures(pixel_values, num_tokens, patch_shape)

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        raise ValueError(
            "merger_type='image_resize' makes pictures smaller before the tower, and has nothing to merge behind it. "
            "Call the model, or encode_images, with pixel_values."
        )
