# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every difference between the supported transformers releases, each with what changed and when it can go.

And the lists of other libraries that name a LLaVA: our names stand beside its own, and replace nobody's.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import transformers
from packaging.version import Version
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging


logger = logging.get_logger(f"transformers.{__name__}")


IS_PACKAGE = __name__.startswith("llava_merge.")  # and not the code that came with a checkpoint

NEEDS_PACKAGE = (
    "This code came with a checkpoint, and has its merging method alone. Install the package llava_merge and load "
    "without trust_remote_code."
)

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

LIGER = "liger_kernel.transformers.monkey_patch"
PEFT = "peft.utils.constants"
STOCK = "llava"


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


_asked: ContextVar[dict[int, tuple] | None] = ContextVar("asked", default=None)


def takes_arguments_of(stock: Callable) -> Callable:
    """Decorator of an override with keyword arguments only: it is called as `stock` is, by position too.

    `inspect.signature`, from which `generate` and `Trainer` learn what a model takes, shows the parameters of `stock`
    in the installed release, then those that the override adds.
    """
    shown = inspect.signature(stock)
    *parameters, catch_all = shown.parameters.values()  # self, input_ids, ..., **kwargs
    names = [parameter.name for parameter in parameters[1:]]

    def decorate(override: Callable) -> Callable:
        own = [
            parameter
            for parameter in inspect.signature(override).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in shown.parameters
        ]

        @functools.wraps(override)
        def with_names(self, *args, **kwargs):
            if len(args) > len(names):
                raise TypeError(f"{override.__name__} takes at most {len(names)} arguments by position: {names}")
            return override(self, **dict(zip(names, args, strict=False)), **kwargs)

        with_names.__signature__ = shown.replace(parameters=[*parameters, *own, catch_all])
        return with_names

    return decorate


@contextmanager
def asking(model, *arguments):
    """Inside, [`asked_of`] the model returns these arguments, in this thread or task."""
    token = _asked.set({**(_asked.get() or {}), id(model): arguments})
    try:
        yield
    finally:
        _asked.reset(token)


def asked_of(model, *arguments) -> tuple:
    """The arguments of [`asking`], or these outside."""
    return (_asked.get() or {}).get(id(model), arguments)


def taken_by(function: Callable, arguments: dict) -> dict:
    """Those of the arguments, by name, that the function takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return arguments if takes_all else {name: arguments[name] for name in arguments if name in parameters}


def register_names(model_type: str, for_generation: str, headless: str):
    """Adds our classes to the names by which pipelines, trainers and servers tell what a model does.

    `AutoModel.register` adds to the classes alone.
    """
    ours = {"LlavaForConditionalGeneration": for_generation, "LlavaModel": headless}
    for mapping, names in vars(modeling_auto).items():
        if mapping.startswith("MODEL_") and mapping.endswith("_MAPPING_NAMES") and STOCK in names:
            names.setdefault(model_type, ours[names[STOCK]])


class ModelType:
    """`model_type` of a configuration, in the lists of libraries that are not imported yet when this package is.

    They look a model up by it, so that our names are there when they do. A configuration may be given another one.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, config, owner) -> str:
        register_with_imported(self.name)
        return self.name if config is None else vars(config).get("model_type", self.name)

    def __set__(self, config, name: str):
        vars(config)["model_type"] = name


def register_with_imported(model_type: str):
    """Adds `model_type` to the lists of Liger and PEFT, where the process has imported them."""
    kernels = getattr(sys.modules.get(LIGER), "MODEL_TYPE_TO_APPLY_LIGER_FN", {})
    if STOCK in kernels:
        kernels.setdefault(model_type, apply_liger_kernel_to_llava_merge)
    for mapping, modules in list(vars(sys.modules.get(PEFT, object)).items()):
        if mapping.endswith("_TARGET_MODULES_MAPPING") and STOCK in modules:
            modules.setdefault(model_type, modules[STOCK])


def apply_liger_kernel_to_llava_merge(
    cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, model=None, **kwargs
):
    """Liger's kernels for LLaVA, but for its forward, which gives a merger neither labels nor a budget."""
    if fused_linear_cross_entropy:
        logger.warning_once(
            "Liger's fused loss is not used, whose forward would not tell the merger what is answer; its kernels for "
            "the layers are. liger_kernel_config={'fused_linear_cross_entropy': False} says so."
        )
    options = {"cross_entropy": cross_entropy, "fused_linear_cross_entropy": False, **kwargs}
    sys.modules[LIGER].apply_liger_kernel_to_llava(model=model, **options)
