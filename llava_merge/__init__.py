# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""LLaVA with fewer visual tokens: merged in CLIP space, before the projector."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor

from .compiled import CompiledModel, compile_for_inference
from .model.compat import AutoModelForVision2Seq, register_multimodal_model
from .model.configuration_llava_merge import LlavaMergeConfig, MergerConfig
from .model.merging_base import (
    MERGING_METHODS,
    MergeContext,
    MergeExtras,
    MergeOutput,
    MergerInfo,
    MergingMethod,
    list_mergers,
    register_merging_method,
)
from .model.modeling_llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeModel
from .model.modeling_token_merger import LearnableTokenMergerV3, TokenMerger
from .model.processing_llava_merge import LlavaMergeProcessor
from .model.questions import Question


__version__ = "0.2.0"

AutoConfig.register("llava_merge", LlavaMergeConfig, exist_ok=True)
AutoConfig.register("llava_merger", MergerConfig, exist_ok=True)
AutoModel.register(LlavaMergeConfig, LlavaMergeModel, exist_ok=True)
AutoModel.register(MergerConfig, TokenMerger, exist_ok=True)
AutoModelForImageTextToText.register(LlavaMergeConfig, LlavaMergeForConditionalGeneration, exist_ok=True)
AutoModelForPreTraining.register(LlavaMergeConfig, LlavaMergeForConditionalGeneration, exist_ok=True)
register_multimodal_model(LlavaMergeConfig, LlavaMergeForConditionalGeneration)
AutoProcessor.register(LlavaMergeConfig, LlavaMergeProcessor, exist_ok=True)

__all__ = [
    "MERGING_METHODS",
    "AutoModelForVision2Seq",
    "CompiledModel",
    "LearnableTokenMergerV3",
    "LlavaMergeConfig",
    "LlavaMergeForConditionalGeneration",
    "LlavaMergeModel",
    "LlavaMergeProcessor",
    "MergeContext",
    "MergeExtras",
    "MergeOutput",
    "MergerConfig",
    "MergerInfo",
    "MergingMethod",
    "Question",
    "TokenMerger",
    "__version__",
    "compile_for_inference",
    "list_mergers",
    "register_merging_method",
]
