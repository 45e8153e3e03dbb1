# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The weights of a module, whatever holds them."""

from collections.abc import Iterator

from torch import Tensor, nn


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters, or in a replica of DataParallel, which has none, the copies that stand in their places."""
    for part in module.modules():
        weights = part._parameters | getattr(part, "_former_parameters", {})
        yield from (weight for weight in weights.values() if weight is not None)
