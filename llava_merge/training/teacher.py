# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The teacher: the same weights, as they were before training, with all visual tokens."""

import copy
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Teacher:
    """Makes a model in training answer as it did before, without a second copy of it.

    The language model and the tower are the same, frozen; where LoRA trains, it is left out; of a projector that
    trains, a copy from before is kept, 42 MB at 7B in half precision.

    Args:
        model: As it is before training; the trained one later, or one that PEFT wraps.
        keeps_projector: Whether its projector trains and PEFT, which keeps the old one, does not wrap it.
        projector: The teacher's, where the model's was trained with a merger before.
    """

    def __init__(self, model: nn.Module, keeps_projector: bool, projector: nn.Module | None = None):
        if projector is None and keeps_projector:
            projector = model.model.multi_modal_projector
        self.projector = None if projector is None else copy.deepcopy(projector).requires_grad_(False)

    @contextmanager
    def answering(self, model: nn.Module):
        """Inside, the `model`, not wrapped by accelerate, is the teacher."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(model.merger_bypassed())
            if is_peft_model(model):
                stack.enter_context(model.disable_adapter())
            if self.projector is not None:
                self.projector.to(next(model.parameters()).device)
                handle = model.headless_model.multi_modal_projector.register_forward_hook(
                    lambda module, inputs, output: self.projector(*inputs)
                )
                stack.callback(handle.remove)
            yield model


def is_peft_model(model: nn.Module) -> bool:
    """Whether PEFT wraps the model; asked without importing it."""
    return type(model).__module__.partition(".")[0] == "peft"


class LogitsCache:
    """Logits of the teacher at each sample's answers, in half precision on the CPU, by the sample's number."""

    def __init__(self):
        self.of_sample: dict[int, Tensor] = {}

    def has(self, sample_ids: Tensor) -> bool:
        """Whether the answers of all samples are there."""
        return all(sample in self.of_sample for sample in sample_ids.tolist())

    def put(self, sample_ids: Tensor, logits: Tensor, num_answer_tokens: list[int]):
        """Keeps `logits` (A, vocabulary) of samples with so many answer tokens each."""
        parts = logits.to("cpu", torch.float16).split(num_answer_tokens)
        self.of_sample |= zip(sample_ids.tolist(), parts, strict=True)

    def get(self, sample_ids: Tensor, device: torch.device) -> Tensor:
        """Logits (A, vocabulary) of the samples, one after the other."""
        return torch.cat([self.of_sample[sample] for sample in sample_ids.tolist()]).to(device, non_blocking=True)
