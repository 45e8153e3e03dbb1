# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The projector that was trained with a merger, in a file beside it."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import cached_file, logging

from .checkpoint_files import refusing_broken_file
from .configuration_llava_merge import LlavaMergeConfig
from .saving import PROJECTOR, offloaded_weights


logger = logging.get_logger(f"transformers.{__name__}")

LAYERS = ("linear_1", "linear_2")


def save_projector(projector: nn.Module, directory: Path):
    """Writes the weights of a projector, also of one that PEFT trains as a whole or accelerate keeps elsewhere.

    Raises:
        ValueError: It is quantised, or has LoRA layers.
    """
    check_plain(projector)
    weights = offloaded_weights(projector).get("state_dict")
    if weights is None:
        weights = {
            f"{layer}.{name}": parameter.detach().contiguous()
            for layer in LAYERS
            for name, parameter in getattr(projector, layer).named_parameters()
        }
    save_file(weights, directory / PROJECTOR, metadata={"format": "pt"})


def check_plain(projector: nn.Module):
    """Refuses a projector that has other weights than those of two linear layers.

    Raises:
        ValueError: It is quantised, or has LoRA layers, or is no projector of LLaVA.
    """
    if not all(hasattr(projector, layer) for layer in LAYERS):
        raise ValueError(
            f"multi_modal_projector is a {type(projector).__name__}, whose weights cannot be saved with a merger. "
            f"Leave the projector out, or save the whole model."
        )
    for layer in LAYERS:
        kind = type(getattr(projector, layer))
        if kind is not nn.Linear:
            raise ValueError(
                f"multi_modal_projector.{layer} is a {kind.__module__}.{kind.__name__}, which cannot be saved with a "
                f"merger. Merge the adapter first (merge_and_unload of PEFT), load the model in full precision, or "
                f"leave the projector out."
            )


def check_replaceable(projector: nn.Module):
    """Refuses to replace a projector that has LoRA layers, which would be lost, or that is none of LLaVA.

    Raises:
        ValueError: So it is.
    """
    if not any(isinstance(module, LlavaMultiModalProjector) for module in projector.modules()):
        raise ValueError(
            f"multi_modal_projector is a {type(projector).__name__}, which the projector of a merger does not replace. "
            f"Load the merger before you put in your own."
        )
    adapted = [name for name, _ in projector.named_modules() if name.endswith(".base_layer")]
    if adapted:
        raise ValueError(
            f"multi_modal_projector has adapters on {', '.join(adapted)}, which another projector would drop. Load the "
            f"merger before PEFT adds its layers, or merge them first (merge_and_unload)."
        )


def read_projector(path: str, hub_kwargs: dict) -> dict[str, Tensor]:
    """Weights of the projector in a merger checkpoint, directory or Hub repo.

    Raises:
        ValueError: The file is not there, truncated or corrupted.
    """
    file = cached_file(path, PROJECTOR, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if file is None:
        raise ValueError(
            f"{path} lacks {PROJECTOR}, the projector that was trained with its merger (has_projector in config.json). "
            f"Download or save the checkpoint again."
        )
    with refusing_broken_file(file):
        return load_file(file)


def make_projector(weights: dict[str, Tensor], config: LlavaMergeConfig, path: str) -> LlavaMultiModalProjector:
    """A projector for the model of `config` with the `weights` of the merger checkpoint at `path`.

    Raises:
        ValueError: They are those of another width, or of another architecture.
    """
    with torch.device("meta"):
        projector = LlavaMultiModalProjector(config)
    needed = {name: tuple(parameter.shape) for name, parameter in projector.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if needed != found:
        raise ValueError(
            f"The projector in {path} has weights {found}, this model needs {needed}. Use a merger that was trained "
            f"with this LLaVA, or a LLaVA of these widths."
        )
    projector.load_state_dict(weights, assign=True)
    return projector


def replace_projectors(model: nn.Module, projector: LlavaMultiModalProjector, dtype: torch.dtype, path: str):
    """Puts copies of `projector` in the place of the model's, of which PEFT keeps two, one of them trained.

    Args:
        path: The merger checkpoint that it came with.
    """
    for name, old in list(model.named_modules()):
        if isinstance(old, LlavaMultiModalProjector):
            weight = next(old.parameters())
            new = copy.deepcopy(projector).to("cpu" if weight.is_meta else weight.device)
            new = new.to(weight.dtype if weight.is_floating_point() else dtype).train(old.training)
            new.came_with = path
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.requires_grad_(weight.requires_grad))


def merger_of_projector(projector: nn.Module) -> str | None:
    """The merger checkpoint that `projector` came with, None where it is the LLaVA's own."""
    return getattr(projector, "came_with", None)


def warn_if_another_merger_s(projector: nn.Module):
    """Warns where the `projector` came with a merger that was replaced, so that it belongs to neither of the two."""
    path = merger_of_projector(projector)
    if path is not None:
        logger.warning(
            f"The projector that came with the merger {path} stays in the model, and was not trained for the new "
            f"merger. Load the model again for its own."
        )
