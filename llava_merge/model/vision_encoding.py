# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""From pictures to tokens of the language model: the tower, what merging methods need of it, budgets, the projector."""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .merging_base import MERGING_METHODS, MergeExtras, full_precision
from .merging_grid import slot_geometry
from .placeholders import ALL_TOKENS, tokens_of_budget
from .positions import EncodedImages


_bypassed: ContextVar[frozenset[int]] = ContextVar("bypassed", default=frozenset())
_lock = threading.Lock()


class Bypassable:
    """Mixin of a module that can be asked to do nothing inside `bypassing(module)`."""

    _num_bypassing = 0  # in all threads; where it is 0, torch.compile need not look at the context

    @property
    def is_bypassed(self) -> bool:
        """Whether this thread answers without merging now."""
        return self._num_bypassing > 0 and id(self) in _bypassed.get()


@contextmanager
def bypassing(module: nn.Module):
    """Inside, `module.is_bypassed` for this thread or asyncio task, and for nobody else."""
    token = _bypassed.set(_bypassed.get() | {id(module)})
    with _lock:
        module._num_bypassing += 1
    try:
        yield
    finally:
        with _lock:
            module._num_bypassing -= 1
        _bypassed.reset(token)


class RunningCalls:
    """Of one model. A copy of it, or one in another process, has none running."""

    def __init__(self):
        self._lock = threading.RLock()  # held while the model is changed; calls that begin then wait
        self._number = 0

    @contextmanager
    def one_more(self):
        """Inside, a call runs."""
        with self._lock:
            self._number += 1
        try:
            yield
        finally:
            with self._lock:
                self._number -= 1

    @contextmanager
    def none_beside(self, change: str):
        """Inside, no call runs or begins.

        Raises:
            RuntimeError: One runs already.
        """
        with self._lock:
            if self._number:
                raise RuntimeError(
                    f"{change}: a call of this model is running, and would be answered half by the old merger and half "
                    f"by the new one. Wait till it has ended, or give each call its own num_merged_tokens."
                )
            yield

    def __reduce__(self):
        return RunningCalls, ()  # for copies too


def counted(method: Callable) -> Callable:
    """Decorator of a model's method that reads its merger: the merger does not change while it runs.

    Compiled into a graph it is not counted.
    """

    @functools.wraps(method)
    def counting(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with self.headless_model.running_calls.one_more():
            return method(self, *args, **kwargs)

    return counting


HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}  # towers that can be asked


@dataclass(frozen=True)
class TowerFeatures:
    """Images behind the vision tower, to be merged anew for each question.

    Attributes:
        features: (I, N, vision_dim).
        extras: What the merging method requires besides, if anything.
        image_shape: Height and width of the images in pixels.
    """

    features: Tensor
    extras: MergeExtras | None
    image_shape: tuple[int, int]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.features)

    def __getitem__(self, images: list[int]) -> "TowerFeatures":
        """Those of some of the images, by index; an image may come twice."""
        index = torch.tensor(images, device=self.features.device)
        extras = None if self.extras is None else self.extras.of_images(index)
        return replace(self, features=self.features[index], extras=extras)


def merge_by_budget(merge, features, question, grid, budgets: list[int | str], extras) -> list[list[Tensor]]:
    """What `merge` returns for images of one budget, as lists with one tensor (M, ...) for each image."""
    if len(set(budgets)) == 1:  # without an index, which would have to wait for the device
        extras = None if budgets[0] == ALL_TOKENS else extras
        return [list(tensors) for tensors in merge(features, question, grid, budgets[0], extras)]
    of_image = {}
    for budget in dict.fromkeys(budgets):
        images = [image for image, asked in enumerate(budgets) if asked == budget]
        index = index_on(features.device, images)
        about = None if question is None else question.of_images(index)
        extras_of_images = None if extras is None or budget == ALL_TOKENS else extras.of_images(index)
        merged = merge(features[index], about, grid, budget, extras_of_images)
        of_image |= zip(images, zip(*merged, strict=True), strict=True)
    return [list(tensors) for tensors in zip(*(of_image[image] for image in range(len(budgets))), strict=True)]


def index_on(device: torch.device, images: list[int]) -> Tensor:
    """Indices on a device, which the host does not wait for: (n,) int64."""
    pinned = device.type == "cuda" and not torch.compiler.is_compiling()
    return torch.tensor(images, device="cpu", pin_memory=pinned).to(device, non_blocking=True)


def features_of(hidden_states: tuple[Tensor, ...], layers: list[int], first_patch: int) -> Tensor:
    """The tower's features (I, N, vision_dim): hidden states of the `layers` side by side, without what is no patch."""
    states = [hidden_states[index][:, first_patch:] for index in layers]
    return states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def attention_layer_of(layers: list[int]) -> int:
    """The layer that makes the last of the features, with its keys and attention; its input has the same number."""
    return max(0, max(layers) - 1)


def read_tower(
    tower: nn.Module,
    hidden_states: tuple[Tensor, ...],
    requires: frozenset[str],
    layers: list[int],
    attention_layer: int,
    first_patch: int,
) -> MergeExtras:
    """The extras that `requires` names, of a tower's `hidden_states` (I, first_patch + N, hidden size).

    Args:
        layers: Hidden states that are extras themselves.
        attention_layer: Layer of keys and attention; its input is the hidden state of that number.
        first_patch: Tokens before the patches: 1 where the first is CLS.

    Raises:
        ValueError: Keys and attention of such a tower are not known.
    """
    states = tuple(hidden_states[index][:, first_patch:] for index in layers)
    if not requires & {"cls_attention", "keys"}:
        return MergeExtras(layers=states)
    kind = tower.config.model_type
    if kind not in HAS_CLS:
        raise ValueError(
            f"The merging method needs keys or attention of the vision tower, which are known of "
            f"{' and '.join(HAS_CLS)} only, not of {kind!r}. Choose a method that does without: see "
            f"`llava-merge mergers`."
        )
    layer, num_heads = find_layer(tower, attention_layer), tower.config.num_attention_heads
    normed = layer.layer_norm1(hidden_states[attention_layer])
    keys = layer.self_attn.k_proj(normed)
    attention = None
    if "cls_attention" in requires:
        queries = layer.self_attn.q_proj(normed[:, :1] if HAS_CLS[kind] else normed)
        attention = mean_attention(queries, keys, num_heads)[:, first_patch:]
    return MergeExtras(attention, keys[:, first_patch:] if "keys" in requires else None, num_heads, states)


def find_layer(tower: nn.Module, index: int) -> nn.Module:
    """Layer `index` of a CLIP or SigLIP tower; how deep it lies differs between transformers releases."""
    path = f"encoder.layers.{index}"
    return next(module for name, module in tower.named_modules() if name == path or name.endswith(f".{path}"))


def mean_attention(queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """Attention that each key gets, mean over heads and queries: (I, keys) float32.

    Args:
        queries: (I, queries, heads × head_dim), not scaled.
        keys: (I, keys, heads × head_dim).
    """
    queries, keys = (
        tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2).float() for tensor in (queries, keys)
    )  # (I, heads, tokens, head_dim)
    with full_precision(queries.device):
        scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    return scores.softmax(dim=-1).mean(dim=(1, 2))


class ResizesPictures:
    """Mixin of a model with a merging method that may make pictures smaller, instead of merging what the tower made."""

    @property
    def resizes_pictures(self) -> bool:
        """Whether it does, except for images that keep all their tokens."""
        return MERGING_METHODS[self.config.merger_config.merger_type].resizes_pictures

    def _encode_resized(self, pixel_values: Tensor, budgets: list[int | str], options: dict) -> EncodedImages:
        """What `encode_images` returns: pictures of one budget go through the tower together.

        Args:
            options: Of the tower.

        Raises:
            ValueError: The tower takes pictures of one size only.
        """
        self._check_resizing(pixel_values, options)
        grid = self.config.patch_grid(pixel_values.shape[-2:])
        options = {**options, "tower_outputs": None, "interpolate_pos_encoding": True}
        method = MERGING_METHODS[self.config.merger_config.merger_type]

        def encode(pixels, question, grid, budget, extras) -> tuple[Tensor, Tensor, Tensor]:
            if budget != ALL_TOKENS:
                pixels = method.resized(pixels, budget, self.config.patch_shape)
            projected = self._project(self._run_tower(pixels, **options)[0])  # (I, M, hidden)
            num_images, num_tokens = len(projected), index(projected.shape[1])  # while it is traced, a tensor
            places = slot_geometry(grid, num_tokens, projected.device).places
            sizes = torch.full((num_images, num_tokens), grid[0] * grid[1] / num_tokens, device=projected.device)
            return projected, places.expand(num_images, -1), sizes

        tokens, places, sizes = merge_by_budget(encode, pixel_values, None, grid, budgets, None)
        outputs = BaseModelOutputWithPooling(pooler_output=tokens)
        if not self.places_tokens:
            return outputs
        return EncodedImages.of(outputs, torch.cat(places), torch.cat(sizes), grid[0] * grid[1])

    def _check_resizing(self, pixel_values: Tensor, options: dict):
        self._check_image_size(pixel_values, options)
        kind = self.vision_tower.config.model_type
        if kind not in HAS_CLS:
            raise ValueError(
                f"merger_type={self.config.merger_config.merger_type!r} needs a tower that takes smaller pictures, "
                f"which is known of {' and '.join(HAS_CLS)} only, not of {kind!r}. Choose another method."
            )

    def _sources_of_resized(self, pixel_values: Tensor, budgets: list[int | str]) -> list[Tensor]:
        """How much of each token came from each patch of the picture as it was: (M, N) for each image."""
        grid = self.config.patch_grid(pixel_values.shape[-2:])
        num_tokens = [tokens_of_budget(budget, grid[0] * grid[1]) for budget in budgets]
        return [slot_geometry(grid, number, pixel_values.device).windows for number in num_tokens]
