# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every difference between the supported transformers releases, each with what changed and when it can go.

Differences inside `generate` are in compat_generation.py, that of the processor in compat_processing.py.
"""

import re

import torch
import transformers
from packaging.version import Version
from transformers import PretrainedConfig, PreTrainedModel


TRANSFORMERS_VERSION = Version(transformers.__version__)

# 5.0 moved key renaming into a registry, returns output objects from get_image_features, expands placeholders in
# replace_image_token and dropped AutoModelForVision2Seq. Remove when 4.57 is no longer supported.
TRANSFORMERS_V5 = TRANSFORMERS_VERSION.major >= 5

# 5.18 lets LLaVA's forward take encoded images, as `mm_encoder_outputs`, and keeps them to the prefill itself.
# Remove when 5.18 is the oldest supported release.
FORWARD_TAKES_ENCODED_IMAGES = TRANSFORMERS_VERSION >= Version("5.18")

# Where the output of LLaVA's forward has its images; since 5.24 all that encoded them, and the old name is a property.
# Remove when 5.24 is the oldest supported release.
OUTPUT_OF_IMAGES = "image_outputs" if TRANSFORMERS_VERSION >= Version("5.24") else "image_hidden_states"

# 5.x before 5.18 leaves out what an adapter holds besides its layers (`modules_to_save`), with no more than a warning.
# Remove when 5.18 is the oldest 5.x.
LOADS_SAVED_MODULES_OF_ADAPTERS = not TRANSFORMERS_V5 or TRANSFORMERS_VERSION >= Version("5.18")

# 5.x matches the modules that quantisation leaves alone from the start of their path; 4.57 wants the name of one part.
# Remove when 4.57 is no longer supported.
MERGER_IN_MODULE_LISTS = r"(.*\.)?merger" if TRANSFORMERS_V5 else "merger"

# 5.22 replaced the class attribute sub_configs by sub_configs_defaults. Remove when 5.22 is the oldest 5.x.
HAS_SUB_CONFIG_SPECS = TRANSFORMERS_VERSION >= Version("5.22")

# 5.23 gives images to the chunks of a prompt that `prefill_chunk_size` asks for.
# Remove when 5.23 is the oldest supported release.
CHUNKS_LACK_IMAGES = TRANSFORMERS_VERSION < Version("5.23")

# 5.23 lets output_hidden_states name the hidden states to keep; before, True keeps all of them.
# Remove when 5.23 is the oldest supported release.
KEEPS_NAMED_HIDDEN_STATES = TRANSFORMERS_VERSION >= Version("5.23")

# 5.24 renamed the argument and output that is the KV cache. Remove when 5.24 is the oldest supported release.
CACHE_ARGUMENT = "cache" if TRANSFORMERS_VERSION >= Version("5.24") else "past_key_values"


# AutoModelForImageTextToText is the same mapping with a few models more, and is there in all releases.
if TRANSFORMERS_V5:
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq
else:
    from transformers import AutoModelForVision2Seq


def register_multimodal_model(config_class: type[PretrainedConfig], model_class: type):
    """Registers with the Auto class that only one of the majors has: Vision2Seq on 4.57, MultimodalLM on 5.x."""
    if TRANSFORMERS_V5:
        from transformers import AutoModelForMultimodalLM as auto_class
    else:
        auto_class = AutoModelForVision2Seq
    auto_class.register(config_class, model_class, exist_ok=True)


def add_sub_config(name: str, sub_config_class: type[PretrainedConfig]):
    """Class decorator that adds an optional sub-config to those that a configuration class inherits."""

    def add(config_class: type[PretrainedConfig]) -> type[PretrainedConfig]:
        if HAS_SUB_CONFIG_SPECS:
            from transformers.configuration_utils import SubConfigSpec

            spec = SubConfigSpec(sub_config_class, optional=True)
            config_class.sub_configs_defaults = {**config_class.sub_configs_defaults, name: spec}
        else:
            config_class.sub_configs = {**config_class.sub_configs, name: sub_config_class}
        return config_class

    return add


def register_llava_key_mapping(model_type: str, for_generation: str, headless: str) -> None:
    """Renames the keys of stock LLaVA checkpoints for our classes too.

    On 5.x a class outside transformers gets no renaming unless it is registered, and its language model then stays
    random with no more than a warning. On 4.57 the renaming is inherited as `_checkpoint_conversion_mapping`.
    """
    if not TRANSFORMERS_V5:
        return
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    for ours, stock in ((model_type, "llava"), (for_generation, "llava"), (headless, "LlavaModel")):
        register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(stock), overwrite=True)


def usable_device_map(device_map, parts: tuple[str, ...]):
    """`device_map`, with the merger beside the projector where it names only the parts of a stock LLaVA.

    On 4.57 with the parts by name, where it would take "disk" for a device that tensors can be on. Remove that when
    4.57 is no longer supported.
    """
    if not TRANSFORMERS_V5 and device_map == {"": "disk"}:
        return dict.fromkeys(parts, "disk")
    if not isinstance(device_map, dict):
        return device_map
    beside = {}
    for name, device in device_map.items():
        found = re.match(r"(model\.)?multi_modal_projector(\.|$)", str(name))  # or a layer of it
        if found:
            beside.setdefault(f"{found[1] or ''}merger", device)
    return beside | device_map


def cache_mask_sizes(cache, past, length: int, device) -> tuple[int, int]:
    """Number of keys, and of the first of them, that `length` new tokens behind `past` ones attend to in a cache.

    4.57 asks with the positions of the new tokens, 5.x with their number. Remove when 4.57 is no longer supported.
    """
    if TRANSFORMERS_V5:
        return cache.get_mask_sizes(length, 0)
    return cache.get_mask_sizes(past + torch.arange(length, device=device), 0)


def hidden_states_to_keep(layers: list[int], requested: bool | None) -> bool | list[int]:
    """Value of `output_hidden_states` for the tower: only `layers` where that can be asked for."""
    return layers if KEEPS_NAMED_HIDDEN_STATES and not requested else True


def image_features_result(outputs, return_dict: bool):
    """What `get_image_features` returns: a list of (M, hidden) tensors on 4.57, on 5.x the output that holds it."""
    if not TRANSFORMERS_V5:
        return outputs.pooler_output
    return outputs if return_dict else outputs.to_tuple()


def record_before_replicas(tower: PreTrainedModel):
    """Puts the hooks that record hidden states on 5.x into `tower`, before DataParallel makes replicas of it.

    Each replica would put them in itself, into the same dictionaries, and every state would be recorded several times.
    Remove when transformers tells replicas apart, and with 4.57.
    """
    if not TRANSFORMERS_V5:
        return
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    for part in tower.modules():
        if isinstance(part, PreTrainedModel):
            maybe_install_capturing_hooks(part)
