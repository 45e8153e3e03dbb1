# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The interface of a merging method. To add one: a file merging_NAME.py here, with a [`MergingMethod`]."""

import inspect
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .compat import IS_PACKAGE, NEEDS_PACKAGE
from .configuration_llava_merge import MergerConfig
from .merging_grid import SlotGeometry
from .questions import Question


MERGING_METHODS: dict[str, type["MergingMethod"]] = {}
KINDS = ("cls_attention", "keys", "layers", "relevance", "word_relevance")  # of extras
WHERE_METHODS_ARE = "Import a custom method before; its file lies beside the weights that were saved with it."
READ_FOR_QUESTION = frozenset({"relevance", "word_relevance"})  # of what a method may require


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters, or in a replica of DataParallel, which has none, the copies that stand in their places."""
    for part in module.modules():
        weights = part._parameters | getattr(part, "_former_parameters", {})
        yield from (weight for weight in weights.values() if weight is not None)


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


@dataclass
class MergeContext:
    """Everything that a method may use besides the features.

    Attributes:
        grid: Rows and columns of the patch grid; rows × columns = N.
        num_tokens: Merged tokens M of this call.
        question: What each image is merged for, or None.
        return_source: Whether `MergeOutput.source` is wanted.
        geometry: Where the slots lie on the grid; made once per grid, M and device.
        cls_attention: (I, N) float32, see `MergeExtras`; this and the following only where the method `requires` it.
        keys: (I, N, hidden size of the tower).
        num_heads: Heads that the keys are of.
        layers: Hidden states (I, N, tower_dim) that `MergerConfig.feature_layers` names.
        relevance: (I, N) float32, how much each patch matters for its image's question.
        word_relevance: (I, N, T) float32, for each token of it; -inf throughout where a token is none.
    """

    grid: tuple[int, int]
    num_tokens: int
    question: Question | None = None
    return_source: bool = False
    geometry: SlotGeometry | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    num_heads: int = 1
    layers: tuple[Tensor, ...] = ()
    relevance: Tensor | None = None
    word_relevance: Tensor | None = None


@dataclass
class MergeOutput(ModelOutput):
    """Result of a merging method.

    Attributes:
        merged_features: (I, M, vision_dim), in raster order of the slots.
        source: (I, M, N), how much of each token came from each patch; rows sum to 1. None unless asked for.
        positions: (I, M) int64, the place among the N patches that each token sits at, never falling. Where a method
            leaves it out, it is the patch nearest the centre of the token's slot.
        sizes: (I, M) float32, how many patches each token stands for, which `attention_mass` counts: those that merged
            into it, or, where they are lost, those nearest to it. Where a method leaves it out, N / M each.
    """

    merged_features: Tensor | None = None
    source: Tensor | None = None
    positions: Tensor | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True)
class MergerInfo:
    """What [`list_mergers`] tells about a method.

    Attributes:
        name: Value of `merger_type`.
        trained: Whether it has parameters to train.
        question_aware: Whether it can read the question.
        requires: What it cannot do without: "cls_attention", "keys", "layers" of the tower, "relevance" or
            "word_relevance" for a question.
        paper: Where it comes from, with arXiv ids; empty where it is nobody's.
        summary: What it does, in one sentence.
    """

    name: str
    trained: bool
    question_aware: bool
    requires: tuple[str, ...]
    paper: str
    summary: str


class OwnInitialization:
    """Mixin of a module that initialises the parameters it owns itself, instead of by transformers' rules.

    Only for modules that own parameters: transformers 5 never asks a container.
    """

    def reset_parameters(self):
        """Gives the parameters that it owns their values at the start."""
        raise NotImplementedError


class MergingMethod(nn.Module):
    """Base class of the methods: `forward(features, context)` makes (I, M, vision_dim) of features (I, N, vision_dim).

    Class attributes that a method sets where they differ:
        uses_question: Whether it can read the question (`MergerConfig.question_aware`).
        needs_grid: Whether the features have to lie on a rows × columns grid.
        training_free: Whether it has no parameters.
        starts_as: What a new one with parameters does before it is trained, in a few words.
        sits_on_slots: Whether it always leaves `MergeOutput.positions` out, so that they are known without the picture.
        resizes_pictures: Whether it makes no tokens of features, but pictures of which the tower makes M.
        chooses_in_steps: Whether it picks patches in many small steps, which torch.compile would take minutes for.
        requires: What it cannot do without, of `"cls_attention"`, `"keys"`, `"layers"`, `"relevance"` and
            `"word_relevance"`: the model then puts it into the [`MergeContext`]. Which layers is said by
            `MergerConfig.feature_layers`; a method that can do without has it among its `options` only.
        options: Fields of [`MergerConfig`] that only this method and some others read.
        paper: Where the method comes from, with arXiv ids.

    The first line of its docstring says what it does: [`list_mergers`] shows it.

    Parameters of the method itself are initialised by `reset_parameters()`, those of its parts by transformers, or by
    themselves where they are [`OwnInitialization`].
    """

    uses_question = False
    needs_grid = True
    training_free = False
    starts_as = "random"
    sits_on_slots = False
    resizes_pictures = False
    chooses_in_steps = False
    requires: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()
    paper = ""

    def __init__(self, config: MergerConfig):
        super().__init__()
        self.config = config

    def reset_parameters(self):
        """Initialises the parameters that the method owns directly; nothing to do where it has none."""

    def set_progress(self, progress: float):
        """Says how much of the training is done, from 0 to 1; nothing to do where nothing is annealed."""

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        """Merges features (I, N, vision_dim) to `context.num_tokens` (I, M, vision_dim), in any floating dtype."""
        raise NotImplementedError


def register_merging_method(name: str):
    """Class decorator that makes a [`MergingMethod`] available as `merger_type=name`."""

    def register(method: type[MergingMethod]) -> type[MergingMethod]:
        MERGING_METHODS[name] = method
        return method

    return register


def list_mergers() -> list[MergerInfo]:
    """The methods that `merger_type` can name, by name."""
    return [
        MergerInfo(
            name,
            not method.training_free,
            method.uses_question,
            tuple(sorted(method.requires)),
            method.paper,
            inspect.getdoc(method).partition("\n")[0],
        )
        for name, method in sorted(MERGING_METHODS.items())
    ]


def find_merging_method(config: MergerConfig) -> type[MergingMethod]:
    """The class of the method that `config` names.

    Raises:
        ValueError: There is no such method, it cannot read the question that `config` asks it to, it needs a question
            or layers that `config` denies it, or an option of another method is set.
    """
    if config.merger_type not in MERGING_METHODS:
        raise ValueError(
            f"merger_type={config.merger_type!r} does not exist; choose one of {', '.join(sorted(MERGING_METHODS))}. "
            f"{WHERE_METHODS_ARE if IS_PACKAGE else NEEDS_PACKAGE}"
        )
    method = MERGING_METHODS[config.merger_type]
    if config.question_aware and not method.uses_question:
        aware = ", ".join(sorted(name for name, method in MERGING_METHODS.items() if method.uses_question))
        raise ValueError(
            f"question_aware=True: merger_type={config.merger_type!r} does not read the question; set it to False or "
            f"choose one of {aware}."
        )
    if method.requires & READ_FOR_QUESTION and not config.question_aware:
        raise ValueError(
            f"question_aware=False: merger_type={config.merger_type!r} merges for a question; set it to True, or "
            f"choose another method."
        )
    if "layers" in method.requires and not config.feature_layers:
        raise ValueError(
            f"feature_layers=None: merger_type={config.merger_type!r} reads layers of the tower; name them, such as "
            f"feature_layers=[12, 16, 22]."
        )
    check_options(config, method)
    return method


def required_extras(config: MergerConfig) -> frozenset[str]:
    """What the model has to put into the [`MergeContext`]: what the method requires, and layers that are named.

    Of a configuration that [`find_merging_method`] has checked.
    """
    requires = MERGING_METHODS[config.merger_type].requires
    return requires | {"layers"} if config.feature_layers else requires


def check_options(config: MergerConfig, method: type[MergingMethod]):
    """Refuses options that only other methods read, and which would be ignored.

    Raises:
        ValueError: One is set to another value than its default.
    """
    defaults = inspect.signature(MergerConfig.__init__).parameters
    for option in sorted({name for other in MERGING_METHODS.values() for name in other.options} - {*method.options}):
        default = defaults[option].default if option in defaults else None
        value = vars(config).get(option, default)
        if value != default:
            owners = ", ".join(sorted(name for name, other in MERGING_METHODS.items() if option in other.options))
            raise ValueError(
                f"{option}={value!r}: merger_type={config.merger_type!r} does not read it, only {owners}. Leave it "
                f"out, or choose one of these."
            )


def method_file(config: MergerConfig) -> Path:
    """The file of the method that `config` names.

    Raises:
        ValueError: The method is defined in a script or notebook, which no other process can import.
    """
    module = inspect.getmodule(find_merging_method(config))
    if module.__name__ == "__main__":
        raise ValueError(
            f"merger_type={config.merger_type!r} is defined in the script or notebook that runs, so that a checkpoint "
            f"with it could not be loaded elsewhere. Put the method into a file of its own and import it."
        )
    return Path(module.__file__)


def check_grid(grid: tuple[int, int] | None, num_patches: int) -> tuple[int, int]:
    """Rows and columns of the patches: `grid`, or a square where that is None.

    Raises:
        ValueError: `num_patches` visual tokens do not fill it.
    """
    if grid is None:
        side = round(math.sqrt(num_patches))
        grid = (side, side)
    if grid[0] * grid[1] != num_patches:
        raise ValueError(
            f"{num_patches} visual tokens do not fill a grid of {grid[0]} × {grid[1]} patches. "
            f"{explain_grid(num_patches - grid[0] * grid[1])}Patches in another shape need grid=(rows, columns)."
        )
    return grid


def explain_grid(surplus: int) -> str:
    """What may be the matter where there are `surplus` visual tokens more than patches."""
    if surplus == -1:
        return (
            "One is missing: vision_feature_select_strategy='default' cuts the first token, which is a patch in a "
            "tower without CLS such as SigLIP. Use vision_feature_select_strategy='full'. "
        )
    if surplus == 1:
        return "One is no patch: if it is CLS, vision_feature_select_strategy='default' drops it. "
    if 1 < surplus <= 16:
        return (
            f"{surplus} are no patches: towers with registers, such as DINOv2 with registers, are not supported, since "
            f"registers have no place on the grid. "
        )
    return ""


def full_precision(device: torch.device):
    """Context in which torch.autocast leaves alone what is float32 on purpose."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):  # meta has none; to ask breaks older compilers
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def as_source(weights: Tensor, num_images: int) -> Tensor:
    """The same (M, N) weights for each of `num_images` images, as (I, M, N)."""
    return weights.expand(num_images, *weights.shape)


def weighted_sum(weights: Tensor, features: Tensor) -> Tensor:
    """`weights` (M, N) or (I, M, N) times `features` (I, N, dim), in the dtype of the features: (I, M, dim)."""
    return torch.matmul(weights.to(features.dtype), features)


@register_merging_method("none")
class Identity(MergingMethod):
    """Keeps every visual token: stock LLaVA, bit for bit.

    The baseline of every comparison.
    """

    needs_grid = False
    training_free = True
    sits_on_slots = True

    def forward(self, features: Tensor, context: MergeContext) -> MergeOutput:
        source = None
        if context.return_source:
            source = as_source(torch.eye(features.shape[1], device=features.device), features.shape[0])
        return MergeOutput(merged_features=features, source=source)
