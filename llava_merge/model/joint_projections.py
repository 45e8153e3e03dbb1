# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Queries, keys and values of each attention from one matmul, gate and up of each MLP too, while kernels are recorded.

Small matmuls leave parts of a GPU idle that one of their size fills.
"""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .layer_replacement import is_plain, replaced


PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order in which they are called


class JointLinear:
    """Linear layers of the same input as one. Their weights become views of one tensor, so that none is there twice.

    For the thread that makes it: it keeps parts of an output from one call to the next.

    Args:
        layers: (out, in) each, all with a bias or none.
    """

    def __init__(self, layers: list[nn.Linear]):
        self.thread = threading.get_ident()
        self.sizes = [layer.out_features for layer in layers]
        self.weight = side_by_side([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else side_by_side([layer.bias for layer in layers])
        self.features: Tensor | None = None  # what the parts that are not asked for yet were made of
        self.parts: tuple[Tensor, ...] = ()

    def part(self, number: int, features: Tensor) -> Tensor:
        """Output of layer `number` for `features` (..., in); the last one's ends what was kept for the others."""
        if features is not self.features:
            self.features, self.parts = features, linear(features, self.weight, self.bias).split(self.sizes, dim=-1)
        part = self.parts[number]
        if number == len(self.sizes) - 1:
            self.features, self.parts = None, ()
        return part


class PartOfJoint(nn.Module):
    """One of the layers of a [`JointLinear`], in the place of `layer`, as which other threads find and call it."""

    def __init__(self, joint: JointLinear, number: int, layer: nn.Linear):
        super().__init__()
        self.joint, self.number = joint, number
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, features: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if not torch.compiler.is_compiling() and threading.get_ident() != self.joint.thread:
            return linear(features, self.weight, self.bias)
        return self.joint.part(self.number, features)


@contextmanager
def joint_projections(model: nn.Module, apart: Collection[nn.Module] = ()) -> Iterator[None]:
    """Lets the modules of a model, but those `apart`, compute all [`PROJECTIONS`] of one input at once inside.

    What is no plain layer is left alone. The weights stay views of one tensor afterwards.
    """
    modules = [module for module in model.modules() if module not in apart]
    parts = []
    for module, names in product(modules, PROJECTIONS):
        layers = [dict(module.named_children()).get(name) for name in names]
        if can_be_joined(layers):
            joint = JointLinear(layers)
            parts += [
                (module, name, PartOfJoint(joint, number, layer))
                for number, (name, layer) in enumerate(zip(names, layers, strict=True))
            ]
    with replaced(parts):
        yield


def can_be_joined(layers: list[nn.Module | None]) -> bool:
    """Whether all are plain projections, of one input, that nothing looks at."""
    if not all(is_plain(layer, nn.Linear) for layer in layers):
        return False
    kinds = {(layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in layers}
    return len(kinds) == 1


def side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    """All of them along the first dimension in one tensor, of which they are views afterwards."""
    first, size = parameters[0], sum(len(parameter) for parameter in parameters)
    if not lie_side_by_side(parameters):
        joint = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, joint.split([*map(len, parameters)]), strict=True):
            parameter.data = part
    return first.data.as_strided((size, *first.shape[1:]), first.stride(), first.storage_offset())


def lie_side_by_side(parameters: list[nn.Parameter]) -> bool:
    """Whether they are contiguous parts of one tensor already, one behind the other."""
    ends = [parameter.storage_offset() + parameter.numel() for parameter in parameters]
    starts = [parameter.storage_offset() for parameter in parameters]
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    contiguous = all(parameter.is_contiguous() for parameter in parameters)
    return contiguous and len(storages) == 1 and starts[1:] == ends[:-1]
