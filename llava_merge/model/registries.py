# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The lists of other libraries that name a LLaVA: our names stand beside its own, and replace nobody's."""

import sys

from transformers.models.auto import modeling_auto
from transformers.utils import logging


LIGER = "liger_kernel.transformers.monkey_patch"
PEFT = "peft.utils.constants"
STOCK = "llava"
logger = logging.get_logger(f"transformers.{__name__}")


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
