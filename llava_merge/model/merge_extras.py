# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What merging methods may ask of the model besides the tower's features.

The query of CLS and the keys of one layer are projected once more, from the input of that layer: no hook that calls of
other threads would meet, no second pass of the tower, no attention implementation that returns its weights.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .merging_base import full_precision
from .merging_selection import cosine_similarity
from .placeholders import ALL_TOKENS
from .question_turns import Question


KINDS = ("cls_attention", "keys", "layers", "relevance", "word_relevance")
HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}  # towers that can be asked


@dataclass(frozen=True)
class MergeExtras:
    """What a method asked for; keys and attention are of the layer that makes the features.

    Attributes:
        cls_attention: (I, N) float32, attention of CLS to each patch, mean over the heads. CLS looks at itself too, so
            that rows sum to less than 1. In a tower without CLS, the mean attention that a patch receives from all.
        keys: (I, N, hidden size of the tower), of all heads side by side.
        num_heads: Heads of the keys.
        layers: Hidden states (I, N, hidden size of the tower) that `MergerConfig.feature_layers` names.
        relevance: (I, N) float32, how much each patch matters for its image's question.
        word_relevance: (I, N, T) float32, for each token of it; -inf throughout where a token is none.
    """

    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    num_heads: int = 1
    layers: tuple[Tensor, ...] = ()
    relevance: Tensor | None = None
    word_relevance: Tensor | None = None

    @property
    def kinds(self) -> set[str]:
        """Names of what is there."""
        return {name for name in KINDS if getattr(self, name) is not None and len(getattr(self, name))}

    def of_kinds(self, kinds: frozenset[str]) -> "MergeExtras":
        """Without what is not in `kinds`."""
        return replace(self, **{name: getattr(MergeExtras, name) for name in self.kinds - kinds})

    def of_images(self, images: Tensor) -> "MergeExtras":
        """Those of some of the images, by index: (n,)."""
        return self._each(lambda tensor: tensor[images.to(tensor.device)])

    def first(self, number: int) -> "MergeExtras":
        """Copies of those of the first images."""
        return self._each(lambda tensor: tensor[:number].clone())

    @classmethod
    def joined(cls, parts: list["MergeExtras"]) -> "MergeExtras":
        """Those of the images of all `parts`, one after the other."""
        first = parts[0]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in first._tensors}
        layers = tuple(torch.cat(states) for states in zip(*(part.layers for part in parts), strict=True))
        return replace(first, **tensors, layers=layers)

    def to(self, device: torch.device) -> "MergeExtras":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """What is there besides `layers`, by name."""
        tensors = {name: getattr(self, name) for name in KINDS if name != "layers"}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _each(self, change) -> "MergeExtras":
        changed = {name: change(tensor) for name, tensor in self._tensors.items()}
        return replace(self, **changed, layers=tuple(map(change, self.layers)))

    def check_shapes(self, features: Tensor):
        """Compares them with `features` (I, N, vision_dim).

        Raises:
            ValueError: They are of another number of images or patches.
        """
        named = self._tensors | {f"layers[{index}]": layer for index, layer in enumerate(self.layers)}
        for name, tensor in named.items():
            if tensor.shape[:2] != features.shape[:2]:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; for features of shape {tuple(features.shape)} it has to "
                    f"begin with {tuple(features.shape[:2])}. Take both from the same images."
                )


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


def projected_relevance(features: Tensor, question: Question, projector: nn.Module) -> Tensor:
    """Relevance of each patch of `features` (I, N, vision_dim) for its question: (I, N) float32, a cosine.

    [`projected_similarity`] with the mean embedding of the question; 0 where there is none.
    """
    mask = question.mask.float()  # (I, B·T)
    words = normalize(question.embeds.flatten(0, 1).float(), dim=-1)
    wanted = mask @ words / mask.sum(dim=1, keepdim=True).clamp(min=1)  # (I, text_dim)
    return projected_similarity(features, wanted[:, None], projector)[:, :, 0]


def projected_word_relevance(features: Tensor, question: Question, projector: nn.Module) -> Tensor:
    """Relevance of each patch of `features` (I, N, vision_dim) for each token of its row: (I, N, T) float32, a cosine.

    [`projected_similarity`] with the token's embedding; -inf where it is no question's.
    """
    rows, is_question = question.rows_of_images()
    similarity = projected_similarity(features, question.embeds[rows], projector)
    return similarity.masked_fill(~is_question[:, None], -torch.inf)


def projected_similarity(features: Tensor, wanted: Tensor, projector: nn.Module) -> Tensor:
    """Cosine of each patch of `features` (I, N, vision_dim) with what is `wanted` (I, n, text_dim): (I, N, n) float32.

    Between the patch, seen from the mean of its image, and the direction in which `projector` leads from that mean to
    `wanted`: its gradient there. It costs the projection of n tokens and its way back; to project all patches would say
    nearly the same.
    """
    mean = features.mean(dim=1, keepdim=True)  # (I, 1, vision_dim)
    directions = lead_back(projector, mean.expand(-1, wanted.shape[1], -1), wanted)
    with full_precision(features.device):
        return cosine_similarity(features - mean, directions)


def lead_back(projector: nn.Module, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Gradient of the product of `projector(tokens)` with `wanted`: (I, n, vision_dim), of tokens (I, n, vision_dim).

    Without a graph behind it, and also inside `torch.inference_mode()`.
    """
    if torch.compiler.is_compiling():  # which cannot trace autograd.grad; vjp crashes on quantised layers
        projected, pull = torch.func.vjp(projector, tokens.detach())
        return pull(wanted.to(projected.dtype))[0].detach()
    with torch.inference_mode(False), torch.enable_grad():
        tokens, wanted = tokens.detach().clone().requires_grad_(), wanted.detach().clone()
        product = (projector(tokens) * wanted).sum()
        return torch.autograd.grad(product, tokens)[0]
