# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Heads of the methods that attend over visual tokens, and the weights of their attention."""

from torch import Tensor

from .configuration_llava_merge import MergerConfig


def check_heads(config: MergerConfig, *names: str):
    """Refuses fields of `config` that its heads do not divide.

    Raises:
        ValueError: They do not.
    """
    for name in names:
        if getattr(config, name) % config.num_heads:
            raise ValueError(
                f"{name}={getattr(config, name)} cannot be split into num_heads={config.num_heads} equal heads; "
                f"choose a num_heads that divides it."
            )


def split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """(I, L, num_heads × head_dim) → (I, num_heads, L, head_dim)."""
    return tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(tensor: Tensor) -> Tensor:
    """(I, num_heads, L, head_dim) → (I, L, num_heads × head_dim)."""
    return tensor.transpose(1, 2).flatten(2)


def attention_weights(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """Attention (I, heads, M, N) float32: what `scaled_dot_product_attention` does not return."""
    scores = queries.float() @ keys.float().transpose(-1, -2) / queries.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.float()
    return scores.softmax(dim=-1)
