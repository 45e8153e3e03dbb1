# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A tower's patch embedding as a matmul, while kernels are recorded: a GPU's convolution reorders pictures first."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.functional import linear

from .layer_replacement import is_plain, replaced


class ProjectedPatches(nn.Module):
    """What a convolution without overlap computes.

    Args:
        convolution: As [`has_no_overlap`] wants it.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.patch_size = convolution.kernel_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(I, channels, H, W) → (I, out, rows, columns)."""
        height, width = self.patch_size
        rows, columns = pixel_values.shape[2] // height, pixel_values.shape[3] // width
        whole = pixel_values[:, :, : rows * height, : columns * width]
        patches = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@contextmanager
def projected_patches(tower: nn.Module) -> Iterator[None]:
    """Lets the convolutions of a vision tower be [`ProjectedPatches`] inside, where they have no overlap."""
    projections = [
        (module, name, ProjectedPatches(child))
        for module in tower.modules()
        for name, child in module.named_children()
        if has_no_overlap(child)
    ]
    with replaced(projections):
        yield


def has_no_overlap(module: nn.Module) -> bool:
    """Whether it is a plain convolution that cuts pictures into patches, and that nothing looks at."""
    if not is_plain(module, nn.Conv2d):
        return False
    plain = module.dilation == (1, 1) and module.groups == 1 and module.padding in ("valid", (0, 0))
    return plain and module.stride == module.kernel_size
