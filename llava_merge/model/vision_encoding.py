# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""From pictures to tokens of the language model: the tower, what merging methods need of it, budgets, the projector."""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat import asked_of, asking, hidden_states_to_keep, image_features_result, taken_by
from .configuration_llava_merge import MergerConfig
from .merging_base import (
    MERGING_METHODS,
    READ_FOR_QUESTION,
    MergeExtras,
    MergeOutput,
    full_precision,
    required_extras,
    weights_of,
)
from .merging_grid import slot_geometry
from .placeholders import (
    ALL_TOKENS,
    budget_of_each_image,
    check_num_features,
    check_placeholders,
    tokens_of_budget,
)
from .positions import EncodedImages
from .questions import Prompt, Question


try:
    from . import relevance
except ImportError:  # it travels with the methods that need it alone
    relevance = None


# Arguments of forward that are the tower's too.
TOWER_ARGUMENTS = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_sizes",
    "output_hidden_states",
    "output_attentions",
    "interpolate_pos_encoding",
)
_bypassed: ContextVar[frozenset[int]] = ContextVar("bypassed", default=frozenset())
_lock = threading.Lock()

HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}  # towers that can be asked


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


def device_of(module: nn.Module, features: Tensor) -> torch.device:
    """Where `features` meet a `module`; to an offloaded one they need not go, it comes to them."""
    weight = next(weights_of(module), features)
    return features.device if weight.is_meta else weight.device


def tower_options(vision_feature_layer, vision_feature_select_strategy) -> dict:
    """The tower's two options that stock LLaVA's functions take by position."""
    return {
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": vision_feature_select_strategy,
    }


class EncodesImages:
    """Mixin of the headless model: tower → merger → projector."""

    _num_bypassing = 0  # in all threads; where it is 0, torch.compile need not look at the context

    @property
    def headless_model(self):
        """This model itself."""
        return self

    @property
    def is_bypassed(self) -> bool:
        """Whether this thread answers without merging now."""
        return self._num_bypassing > 0 and id(self) in _bypassed.get()

    @property
    def required_extras(self) -> frozenset[str]:
        """What the merger requires besides the features: names of fields of [`MergeExtras`]."""
        return required_extras(self.config.merger_config)

    @counted
    def get_vision_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> Tensor:
        """The tower's features of each image before merging and projecting: (I, N, vision_dim).

        Args:
            pixel_values: (I, 3, H, W).
            vision_feature_layer: Hidden state to take, or several to concatenate; default the config's.
            vision_feature_select_strategy: "default" drops the CLS token, "full" keeps all; default the config's.
        """
        kwargs |= tower_options(vision_feature_layer, vision_feature_select_strategy)
        return self._run_tower(pixel_values, **kwargs)[0]

    @counted
    def get_merge_extras(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question: Question | Tensor | None = None,
        **kwargs,
    ) -> MergeExtras:
        """What the merging method requires besides the features; the other arguments are of [`get_vision_features`].

        `model.model.merger(features, extras=extras)` takes it; `forward` and `generate` fetch it in the same pass of
        the tower as the features.

        Args:
            question: See [`get_image_features`].
        """
        if not self.required_extras:
            return MergeExtras()
        if isinstance(question, Tensor):
            question = Question.of_each_image(question)
        kwargs |= tower_options(vision_feature_layer, vision_feature_select_strategy)
        features, _, extras = self._run_tower(pixel_values, with_extras=True, **kwargs)
        return self._with_relevance(extras, features, question)

    def _with_relevance(
        self, extras: MergeExtras | None, features: Tensor, question: Question | None
    ) -> MergeExtras | None:
        """The extras with the relevance of each patch, where the method asks for it.

        Raises:
            ValueError: There is no question.
        """
        requires = self.required_extras
        if extras is None or not requires & READ_FOR_QUESTION:
            return extras
        if question is None:
            raise ValueError(
                f"merger_type={self.config.merger_config.merger_type!r} merges each image for its question, and none "
                f"is given. Pass question=..., or call forward or generate, which read it from the prompt."
            )
        tower = self.find_text_tower(self.config.merger_config)
        if tower is None:
            device = device_of(self.multi_modal_projector, features)
            features, question = features.to(device), question.to(device)
        read = relevance.read_for_question(
            requires, features, question, self.multi_modal_projector, tower, self.question_tokenizer
        )
        return replace(extras, **read)

    def find_text_tower(self, merger_config: MergerConfig, **hub_kwargs):
        """The `TextTower` that `merger_config` asks for, if it does; loaded once.

        Raises:
            ValueError: It cannot be loaded, or is of another vision tower.
        """
        name = merger_config.text_tower
        if name is not None and (self.text_tower is None or self.text_tower.name != name):
            self.text_tower = relevance.TextTower(name, merger_config.vision_dim, hub_kwargs)
        return self.text_tower if name is not None else None

    def _run_tower(
        self,
        pixel_values,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        output_hidden_states=None,
        with_extras=False,
        tower_outputs=None,
        **kwargs,
    ):
        """Unprojected features (I, N, vision_dim), the tower's output, and the extras of the method or None.

        With `tower_outputs`, of these very `pixel_values`, the tower does not run again.
        """
        strategy = vision_feature_select_strategy
        strategy = self.config.vision_feature_select_strategy if strategy is None else strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy={strategy!r}: has to be 'default' (drops CLS) or 'full'.")
        self._check_image_size(pixel_values, kwargs)
        layers = self._tower_layers(vision_feature_layer)
        requires, extra_layers = self.required_extras, []
        if with_extras and requires:
            extra_layers = [*self.config.merger_layers(), attention_layer_of(layers)]
        if tower_outputs is not None and tower_outputs[0] is pixel_values:  # else an override has changed them
            outputs = tower_outputs[1]
        else:
            outputs = self.vision_tower(
                pixel_values,
                output_hidden_states=hidden_states_to_keep([*layers, *extra_layers], output_hidden_states),
                return_dict=True,
                **{name: value for name, value in kwargs.items() if value is not None},
            )
        first_patch = 1 if strategy == "default" else 0
        features = features_of(outputs.hidden_states, layers, first_patch)
        if not extra_layers:
            return features, outputs, None
        *extra_layers, attention_layer = extra_layers
        extras = read_tower(
            self.vision_tower, outputs.hidden_states, requires, extra_layers, attention_layer, first_patch
        )
        return features, outputs, extras

    def _tower_layers(self, layer: int | list[int] | None) -> list[int]:
        """Indices of hidden states, counted from the front."""
        layer = self.config.vision_feature_layer if layer is None else layer
        self.config.check_layers("vision_feature_layer", layer)
        layers = self.config.feature_layers(layer)
        self.check_built(layers, f"vision_feature_layer={layer}")
        return layers

    def check_built(self, layers: list[int], setting: str):
        """Refuses hidden states of tower layers that this model was built without, counted from the front.

        Args:
            setting: The argument of `from_pretrained` that asks for them.

        Raises:
            ValueError: There are some.
        """
        built = self.vision_tower.config.num_hidden_layers
        if not all(0 <= index <= built for index in layers):
            num_states = self.config.vision_config.num_hidden_layers + 1
            raise ValueError(
                f"{setting}: of the tower's {num_states} hidden states this model has only the first {built + 1}, "
                f"since it was built without the layers that it did not need. Load the model with from_pretrained(..., "
                f"{setting})."
            )

    def _check_image_size(self, pixel_values: Tensor, kwargs: dict):
        rows, columns = self.config.image_shape
        if kwargs.get("image_sizes") is not None:
            raise ValueError("image_sizes: towers with images of several sizes in a batch cannot be merged to one M.")
        resized = kwargs.get("interpolate_pos_encoding", False)
        if pixel_values.ndim != 4 or not resized and tuple(pixel_values.shape[-2:]) != (rows, columns):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; the tower takes images as (images, channels, "
                f"{rows}, {columns}). Use the model's own processor."
            )

    @property
    def merger_enabled(self) -> bool:
        """Whether calls of this thread merge; False inside `merger_bypassed()`."""
        return not self.is_bypassed

    def budgets(self, num_images: int, num_merged_tokens: int | str | list | None = None) -> list[int | str]:
        """Tokens of each image, "all" where it is not merged: those of the call, else the config's.

        Raises:
            ValueError: `num_merged_tokens` is not for this number of images, or there is no merger that could do it.
        """
        merger_config = self.config.merger_config
        keeps_all = not self.merger_enabled or merger_config.merger_type == "none"
        if num_merged_tokens is None or not self.merger_enabled:
            return [ALL_TOKENS if keeps_all else merger_config.num_merged_tokens] * num_images
        budgets = budget_of_each_image(num_merged_tokens, num_images)
        if keeps_all and set(budgets) - {ALL_TOKENS}:
            raise ValueError(
                f"num_merged_tokens={num_merged_tokens!r}: this model has merger_type='none', which keeps all tokens. "
                f"Load it with merger=... or merger_config=..., or leave num_merged_tokens out."
            )
        return budgets

    @counted
    def merge_features(
        self,
        features: Tensor,
        question: Question | Tensor | None = None,
        grid: tuple[int, int] | None = None,
        num_merged_tokens: int | str | None = None,
        extras: MergeExtras | None = None,
        return_source: bool = False,
    ) -> MergeOutput:
        """Merges unprojected features (I, N, vision_dim) to (I, M, vision_dim); none inside `merger_bypassed()`.

        Args:
            question: See [`get_image_features`].
            grid: Rows and columns of the patches, default a square.
            num_merged_tokens: M, or "all" to merge nothing; default the config's.
            extras: What the method requires besides; see [`get_merge_extras`].
            return_source: Also return how much of each token came from each patch, (I, M, N).
        """
        num_images, num_patches = features.shape[:2]
        budget = self.budgets(num_images, num_merged_tokens)[0]
        if budget == ALL_TOKENS:
            places = torch.arange(num_patches, device=features.device).expand(num_images, -1)
            sizes = torch.ones(num_images, num_patches, device=features.device)
            source = None
            if return_source:
                source = torch.eye(num_patches, device=features.device).expand(num_images, -1, -1)
            return MergeOutput(merged_features=features, source=source, positions=places, sizes=sizes)
        # the budget of this config: PEFT copies the merger with a config of its own
        features_there = features.to(device_of(self.merger, features))
        output = self.merger(features_there, question, budget, grid, return_source=return_source, extras=extras)
        output.merged_features = output.merged_features.to(features.dtype)
        return output

    @counted
    def encode_images(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question: Question | Tensor | None = None,
        num_merged_tokens: int | str | list | None = None,
        **kwargs,
    ) -> EncodedImages | BaseModelOutputWithPooling:
        """[`get_image_features`], with the same result on every transformers release, to be kept.

        Its `pooler_output` is the list of I tensors (M, hidden). Pass it to `forward` or `generate` as
        `mm_encoder_outputs={"image": ...}` to ask an image several questions. Of the tower's own output it keeps
        nothing but what `output_hidden_states` and `output_attentions` ask for.
        """
        kwargs |= tower_options(vision_feature_layer, vision_feature_select_strategy)
        outputs = self._call_image_features(pixel_values, question, num_merged_tokens, kwargs)
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            return outputs
        return replace(outputs, last_hidden_state=None, hidden_states=None, attentions=None)

    @property
    def overrides_image_features(self) -> bool:
        """Whether [`get_image_features`] is that of a subclass, or was replaced on this model."""
        own = type(self).get_image_features is EncodesImages.get_image_features
        return not own or "get_image_features" in vars(self)

    def _call_image_features(
        self,
        images: Tensor | TowerFeatures,
        question: Question | Tensor | Prompt | None,
        num_merged_tokens: int | str | list | None,
        options: dict,
    ) -> EncodedImages | BaseModelOutputWithPooling:
        """What [`get_image_features`], which may be overridden, makes of images, with where its tokens sit.

        Raises:
            ValueError: An override returns another number of features than the prompt has placeholders.
        """
        merged = []
        ours = {"question": question, "num_merged_tokens": num_merged_tokens, "merged": merged}
        given = {"pixel_values": images, **options, **ours, "return_dict": True}
        taken = taken_by(self.get_image_features, given) if self.overrides_image_features else given
        with nullcontext() if ours.keys() <= taken.keys() else asking(self, *ours.values()):
            result = self.get_image_features(**taken)
        features = list(getattr(result, "pooler_output", result))  # 4.57 returns it alone
        if merged and [*map(len, features)] == merged[1]:
            merged[0].pooler_output = features
            return merged[0]
        if isinstance(question, Prompt):
            check_num_features(question.new_image_mask, features)
        return BaseModelOutputWithPooling(pooler_output=features)

    def _project(self, merged_features: Tensor) -> Tensor:
        """Projected features (I, M, hidden) of merged ones (I, M, vision_dim)."""
        device = device_of(self.multi_modal_projector, merged_features)
        return self.multi_modal_projector(merged_features.to(device))

    def _merge_and_project(self, features, outputs, image_shape, question, budgets, extras) -> EncodedImages:
        """What [`encode_images`] returns; images of the same budget are merged together."""
        grid, num_patches = self.config.patch_grid(image_shape), features.shape[1]
        if isinstance(question, Tensor):
            question = Question.of_each_image(question)
        extras = self._with_relevance(extras, features, question)
        if len(set(budgets)) == 1:
            projected, places, sizes = self._merge_alike(features, question, grid, budgets[0], extras)
            outputs.pooler_output = list(projected)  # I × (M, hidden)
        else:
            tokens = merge_by_budget(self._merge_alike, features, question, grid, budgets, extras)
            outputs.pooler_output, places, sizes = (tokens[0], *map(torch.cat, tokens[1:]))
        if not self.places_tokens:
            return outputs
        return EncodedImages.of(outputs, places.flatten(), sizes.flatten(), num_patches)

    def _merge_alike(self, features, question, grid, budget: int | str, extras) -> tuple[Tensor, Tensor, Tensor]:
        """Projected features (I, M, hidden), places and sizes (I, M) of images with the same budget."""
        merged = self.merge_features(features, question, grid, budget, extras)
        return self._project(merged.merged_features), merged.positions, merged.sizes

    @counted
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        question: Question | Tensor | Prompt | None = None,
        num_merged_tokens: int | str | list | None = None,
        return_dict: bool | None = None,
        merged: list | None = None,
        **kwargs,
    ):
        """Merged and projected features of each image, as stock LLaVA returns them.

        All that looks at images calls it: `forward`, `generate`, `encode_images`, training and evaluation. An override
        is given their arguments, and may leave out those that stock LLaVA does not have, which are found here again.

        Args:
            pixel_values: (I, 3, H, W), or what [`run_tower`] made of them.
            question: For question-aware mergers, the language model's input embeddings (I, T, text_dim) of each image's
                question, or a [`Question`]; `forward` and `generate` give the prompt, to read it from.
            num_merged_tokens: M, or one for each image, "all" for those that are not merged; default the config's.
            merged: A list that gets the result with where its tokens sit, and the number of tokens of each image.

        Returns:
            A list of I tensors (M, hidden) on transformers 4.57; on 5.x the tower's output with that list as
            `pooler_output`, a tuple with `return_dict=False`.

        Raises:
            ValueError: The placeholders of the prompt are not those of the images, or a question cannot be told from
                its answer.
        """
        if merged is None and self.overrides_image_features:  # maybe by a method that takes stock's arguments alone
            question, num_merged_tokens, merged = asked_of(self, question, num_merged_tokens, merged)
        options = kwargs | tower_options(vision_feature_layer, vision_feature_select_strategy)
        options["image_sizes"] = image_sizes
        outputs = self._encode_images(pixel_values, question, num_merged_tokens, options)
        if merged is not None:
            merged += outputs, [*map(len, outputs.pooler_output)]
        return image_features_result(outputs, self.config.return_dict if return_dict is None else return_dict)

    def _encode_images(self, images: Tensor | TowerFeatures, question, num_merged_tokens, options: dict):
        """[`get_image_features`] with where tokens sit."""
        if self.resizes_pictures and isinstance(images, Tensor):
            budgets = self.budgets(len(images), num_merged_tokens)
            if isinstance(question, Prompt):
                self._read_question(question, budgets, self.config.num_patches)
            return self._encode_resized(images, budgets, options)
        features, outputs, question, budgets, extras = self._read_images(images, question, num_merged_tokens, options)
        image_shape = images.image_shape if isinstance(images, TowerFeatures) else images.shape[-2:]
        return self._merge_and_project(features, outputs, image_shape, question, budgets, extras)

    @counted
    def run_tower(self, pixel_values: Tensor, **kwargs) -> TowerFeatures:
        """Images (I, 3, H, W) behind the tower, with what the merging method requires.

        The other arguments are those of [`get_vision_features`].
        """
        features, _, extras = self._run_tower(pixel_values, with_extras=True, **kwargs)
        return TowerFeatures(features, extras, tuple(pixel_values.shape[-2:]))

    @counted
    def encode_images_of_prompt(
        self,
        images: Tensor | TowerFeatures,
        prompt: Prompt,
        num_merged_tokens: int | str | list | None = None,
        **kwargs,
    ) -> EncodedImages:
        """[`encode_images`] with the question of each image that is new in the `prompt`.

        Args:
            images: Pixels (I, 3, H, W), or what [`run_tower`] made of them.
            kwargs: `vision_feature_layer` and `vision_feature_select_strategy` for pixels; `tower_outputs`, the
                pixels and the output of `vision_tower` with all hidden states, spares its pass: several mergers or
                questions may share it.

        Raises:
            ValueError: The placeholders are not those of the images, or a question cannot be told from its answer.
        """
        return self._call_image_features(images, prompt, num_merged_tokens, kwargs)

    def _read_images(self, images: Tensor | TowerFeatures, question, num_merged_tokens, options: dict) -> tuple:
        """Features, output of the tower, question, budgets and extras of images; `question` may be a prompt still."""
        budgets = self.budgets(len(images), num_merged_tokens)
        prompt = question if isinstance(question, Prompt) else None
        if prompt is not None and ALL_TOKENS not in budgets:  # an error comes before the tower runs
            question = self._read_question(prompt, budgets, self.config.num_patches)
        if isinstance(images, TowerFeatures):
            features, outputs, extras = images.features, BaseModelOutputWithPooling(), images.extras
        else:
            with_extras = set(budgets) != {ALL_TOKENS}
            features, outputs, extras = self._run_tower(images, with_extras=with_extras, **options)
        if prompt is not None and ALL_TOKENS in budgets:
            question = self._read_question(prompt, budgets, features.shape[1])
        return features, outputs, question, budgets, extras

    def _read_question(self, prompt: Prompt, budgets: list[int | str], num_patches: int) -> Question | None:
        """The question of each new image of a prompt that was checked to have the placeholders for them."""
        num_tokens = [tokens_of_budget(budget, num_patches) for budget in budgets]
        check_placeholders(prompt.new_image_mask, num_tokens, num_patches)
        return self.get_question(prompt, num_tokens)

    @counted
    @torch.no_grad()
    def merge_sources(self, pixel_values: Tensor, num_merged_tokens=None, **inputs) -> list[Tensor]:
        """Which patches each merged token of a prompt came from, to be looked at: see `llava_merge.visualization`.

        Args:
            pixel_values: (I, 3, H, W).
            num_merged_tokens: See `forward`.
            inputs: What else the processor returned, `input_ids` and `attention_mask`, and the masks of `forward`.

        Returns:
            For each image (M, N) float32: the share of each patch in each token; rows sum to 1. Where two attentions
            make a token, as in V3, the share is by weight times length of what is added (arXiv 2004.10102).

        Raises:
            ValueError: As `forward`; or a custom method does not say it.
        """
        masks = {name: inputs.pop(name, None) for name in ("question_mask", "answer_mask")}
        prompt, options = self._prompt_of_call(masks, inputs)
        grid = self.config.patch_grid(pixel_values.shape[-2:])
        if self.resizes_pictures:
            budgets = self.budgets(len(pixel_values), num_merged_tokens)
            self._read_question(prompt, budgets, self.config.num_patches)
            return self._sources_of_resized(pixel_values, budgets)
        features, _, question, budgets, extras = self._read_images(pixel_values, prompt, num_merged_tokens, options)
        extras = self._with_relevance(extras, features, question)

        def source_of(*merged_alike) -> tuple[Tensor]:
            source = self.merge_features(*merged_alike, return_source=True).source
            if source is None:
                raise ValueError(
                    f"merger_type={self.config.merger_config.merger_type!r} does not say where its tokens come from: "
                    f"its method has to give MergeOutput(source=...) where `return_source` is asked for."
                )
            return (source.float(),)

        return merge_by_budget(source_of, features, question, grid, budgets, extras)[0]

    def _prompt_of_call(self, masks: dict, arguments: dict) -> tuple[Prompt, dict]:
        """The prompt of a forward with these `arguments`, and those of them that are for the tower."""
        input_ids, inputs_embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        masks |= {name: arguments.get(name) for name in ("attention_mask", "position_ids")}
        options = {name: arguments[name] for name in TOWER_ARGUMENTS if name in arguments}
        return self.read_prompt(input_ids, inputs_embeds, **masks), options

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
