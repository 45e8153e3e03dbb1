# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Which parts of a LLaVA train, at which learning rate, and in which mode the rest runs."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_merge import LlavaMergeForConditionalGeneration
from llava_merge.training.settings import TrainedSettings


MERGER, PROJECTOR, LANGUAGE_MODEL = "merger", "multi_modal_projector", "language_model"
TRAINED = {
    "merger": (MERGER,),
    "merger_projector": (MERGER, PROJECTOR),
    "merger_lora": (MERGER, PROJECTOR),
    "all": (MERGER, PROJECTOR, LANGUAGE_MODEL),
}


def prepare_parts(model: LlavaMergeForConditionalGeneration, trained: TrainedSettings) -> nn.Module:
    """Freezes what is not trained, and makes what is float32; wraps the model in PEFT's where that is asked for.

    Raises:
        ValueError: There is nothing to train: the method has no parameters and neither has anything else.
    """
    model.requires_grad_(False)
    if trained.parts == "merger_lora":
        model = with_lora(model, trained)
    else:
        for name in TRAINED[trained.parts]:
            model.model.get_submodule(name).requires_grad_(True)
        if trained.parts == "all":
            model.lm_head.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # merger and optimizer lose too much in half precision
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"merger_type={model.config.merger_config.merger_type!r} has no parameters, and trained.parts="
            f"{trained.parts!r} trains nothing else. Set trained.parts to 'merger_projector', or another merger_type."
        )
    return model


def with_lora(model: LlavaMergeForConditionalGeneration, trained: TrainedSettings) -> nn.Module:
    """The model with LoRA on its language model, and merger and projector trained beside it."""
    from peft import LoraConfig, get_peft_model

    names = "|".join(trained.lora_target_modules)
    has_parameters = any(True for _ in model.model.merger.parameters())
    config = LoraConfig(
        r=trained.lora_rank,
        lora_alpha=2 * trained.lora_rank,
        lora_dropout=trained.lora_dropout,
        target_modules=rf".*language_model.*\.({names})",
        modules_to_save=[MERGER, PROJECTOR] if has_parameters else [PROJECTOR],
    )
    return get_peft_model(model, config)


def part_of(name: str) -> str:
    """The part that a parameter with this name belongs to; LoRA and the head to the language model."""
    return next((part for part in (MERGER, PROJECTOR) if f"{part}." in name), LANGUAGE_MODEL)


def parameter_groups(model: nn.Module, trained: TrainedSettings, weight_decay: float) -> list[dict]:
    """Groups of the optimizer, by part and by whether weights decay: vectors and the merger's queries do not."""
    rates = {
        MERGER: trained.merger_learning_rate,
        PROJECTOR: trained.projector_learning_rate,
        LANGUAGE_MODEL: trained.language_model_learning_rate,
    }
    groups: dict[tuple[str, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim == 2 and "norm" not in name
            groups.setdefault((part_of(name), decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        for (part, decays), parameters in groups.items()
    ]


def set_modes(module: nn.Module, training: bool = True):
    """Training mode for what trains, eval mode for the rest, which otherwise would drop activations out.

    A frozen layer that recomputes its activations is told that it trains, or it would not; what is in it is not.
    """
    parameters = [*module.parameters()]
    if parameters:
        training = any(parameter.requires_grad for parameter in parameters)
    recomputes = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    module.training = training or recomputes
    for child in module.children():
        set_modes(child, training)


def describe_parts(model: nn.Module) -> str:
    """One line on how many parameters are trained."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    trained, everything = sum(counts.values()), sum(parameter.numel() for parameter in model.parameters())
    each = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return f"Trains {trained:,} of {everything:,} parameters ({trained / everything:.2%}): {each}"


def has_finite_gradients(model: nn.Module) -> bool:
    """Whether no gradient holds inf or nan."""
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return not norms or bool(torch.isfinite(torch.stack([norm.float().to(full[0].device) for norm in full]).sum()))
