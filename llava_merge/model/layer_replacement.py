# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Other layers in the place of a model's own, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def is_plain(layer: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether it is a layer of just this kind that nothing looks at."""
    return type(layer) is kind and not layer._forward_hooks and not layer._forward_pre_hooks


@contextmanager
def replaced(layers: list[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Puts new children into modules inside: (module, name of the child, new child)."""
    before = [(module, name, getattr(module, name)) for module, name, _ in layers]
    try:
        for module, name, child in layers:
            setattr(module, name, child)
        yield
    finally:
        for module, name, child in before:
            setattr(module, name, child)
