# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""vLLM's Transformers backend, which runs this code without the plugin, and what it would do wrong in silence."""

import json
from pathlib import Path

from safetensors import safe_open
from transformers.utils import cached_file

from .checkpoint_files import NOT_NEEDED, read_index, refuse_missing_weights
from .configuration_llava_merge import LlavaMergeConfig, keeps_places
from .merging_base import find_merging_method


ATTENTION = "vllm"  # the attention that it gives to language models
NEEDS_PLUGIN = "{what}, which vLLM can do with the plugin alone: pip install '.[serve]' in a clone of llava_merge{fix}."


def is_run_by_vllm(config: LlavaMergeConfig) -> bool:
    """Whether vLLM's Transformers backend makes or runs a model of this configuration."""
    return config.text_config._attn_implementation == ATTENTION


def check_backend(config: LlavaMergeConfig, merger_weights: set[str]):
    """Compares a checkpoint with what the backend can do, and with itself, before it is served.

    Args:
        merger_weights: Names of the merger's weights, which the backend does not miss where they are linear layers'.

    Raises:
        ValueError: It needs the plugin, lacks weights of the merger, or its processor writes another number of tokens.
    """
    merger_config, path = config.merger_config, config._name_or_path
    if merger_config.question_aware:
        raise ValueError(NEEDS_PLUGIN.format(what="This merger reads the question", fix=""))
    if merger_config.attention_mass:
        raise ValueError(f"attention_mass={merger_config.attention_mass}: vLLM cannot do that. Convert with 0.")
    if keeps_places(merger_config) and not find_merging_method(merger_config).sits_on_slots:
        fix = "; or use position_ids='packed'"
        raise ValueError(NEEDS_PLUGIN.format(what="Where this merger's tokens sit depends on the picture", fix=fix))
    refuse_missing_weights(path, merger_weights - saved_merger_weights(path))
    check_processor(path, merger_config.num_merged_tokens)


def saved_merger_weights(path: str) -> set[str]:
    """Names of the merger's weights in the checkpoint at `path`, a directory or Hub repo, as the merger calls them."""
    index = cached_file(path, "model.safetensors.index.json", **NOT_NEEDED)
    if index is not None:
        names = read_index(Path(index)).keys()
    else:
        with safe_open(cached_file(path, "model.safetensors"), framework="pt") as file:
            names = file.keys()
    return {name.partition("merger.")[2] for name in names if "merger." in name}


def check_processor(path: str, num_merged_tokens: int | None):
    """Compares the processor at `path`, which writes the placeholders, with the merger, which fills them.

    Raises:
        ValueError: They are for different numbers of tokens.
    """
    with open(cached_file(path, "processor_config.json"), encoding="utf-8") as file:
        written = json.load(file).get("num_merged_tokens")
    if written != num_merged_tokens:
        raise ValueError(
            f"{path}: the processor writes {written or 'all'} tokens per image, the merger makes "
            f"{num_merged_tokens or 'all'}. Save it anew: LlavaMergeProcessor.from_pretrained(path, "
            f"num_merged_tokens={num_merged_tokens}).save_pretrained(path)."
        )
