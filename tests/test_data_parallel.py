# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Replicas of torch.nn.DataParallel, which Trainer uses where it sees several GPUs: modules without parameters."""

import pytest
import torch
from conftest import agnostic, answered, aware, pixels, prompts, tiny_model
from torch import nn


M = 9


def replica_of(module: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate, which needs GPUs, makes of it: copies of weights as attributes."""
    modules = [*module.modules()]
    copies = {id(part): part._replicate_for_data_parallel() for part in modules}
    for part in modules:
        copy = copies[id(part)]
        copy._former_parameters = {}
        for name, child in part._modules.items():
            copy._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in part._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, parameter * 1)
                copy._former_parameters[name] = getattr(copy, name)
    return copies[id(module)]


def batch(num_images: int = 2) -> dict:
    inputs = answered(prompts([num_images, 0], M))
    return inputs if not num_images else {**inputs, "pixel_values": pixels(num_images)}


@pytest.mark.parametrize(
    "config",
    [
        agnostic(M, attention_mass=0.5),
        aware(M, attention_mass=1.0),
        {"merger_type": "tome", "num_merged_tokens": M, "attention_mass": 1.0},
        {"merger_type": "average_pooling", "num_merged_tokens": M, "position_ids": "packed"},
    ],
    ids=str,
)
def test_a_replica_answers_as_the_model(config):
    model = tiny_model(config, train_merger=True).train()
    replica = replica_of(model)
    assert not [*replica.parameters()]
    torch.testing.assert_close(replica(**batch()).loss, model(**batch()).loss)


@pytest.mark.parametrize("kind", [2, 4])
def test_with_a_mask_of_its_own(kind):
    model = tiny_model(agnostic(M, attention_mass=0.5))
    inputs = batch(1)
    length = inputs["input_ids"].shape[1]
    if kind == 4:
        inputs["attention_mask"] = torch.ones(2, 1, length, length).tril().bool()
    torch.testing.assert_close(replica_of(model)(**inputs).logits, model(**inputs).logits)


def test_a_merger_in_float32_behind_a_tower_in_bfloat16():
    model = tiny_model(agnostic(M), train_merger=True).bfloat16()
    model.model.merger.float()
    inputs = batch(1)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    torch.testing.assert_close(replica_of(model)(**inputs).logits, model(**inputs).logits)


def test_a_batch_without_images_has_something_to_train():
    model = tiny_model(agnostic(M)).train().requires_grad_(False)
    model.model.merger.requires_grad_(True)
    replica_of(model)(**batch(0)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.merger.parameters())
