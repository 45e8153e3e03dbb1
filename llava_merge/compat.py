# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every difference between the supported transformers releases, each with what changed and when it can go."""

import transformers
from packaging.version import Version
from transformers import BatchFeature, LlavaProcessor, PretrainedConfig


TRANSFORMERS_VERSION = Version(transformers.__version__)

# 5.0 moved key renaming into a registry, returns output objects from get_image_features, expands placeholders in
# replace_image_token and dropped AutoModelForVision2Seq. Remove when 4.57 is no longer supported.
TRANSFORMERS_V5 = TRANSFORMERS_VERSION.major >= 5

# 5.22 replaced the class attribute sub_configs by sub_configs_defaults. Remove when 5.22 is the oldest 5.x.
HAS_SUB_CONFIG_SPECS = TRANSFORMERS_VERSION >= Version("5.22")

# 5.23 lets output_hidden_states name the hidden states to keep; before, True keeps all of them.
# Remove when 5.23 is the oldest supported release.
KEEPS_NAMED_HIDDEN_STATES = TRANSFORMERS_VERSION >= Version("5.23")


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


def sub_config_attributes(parent: type[PretrainedConfig], name: str, config_class: type[PretrainedConfig]) -> dict:
    """Class attribute (name and value) that adds an optional sub-config to those of `parent`."""
    if not HAS_SUB_CONFIG_SPECS:
        return {"sub_configs": {**parent.sub_configs, name: config_class}}
    from transformers.configuration_utils import SubConfigSpec

    spec = SubConfigSpec(config_class, optional=True)
    return {"sub_configs_defaults": {**parent.sub_configs_defaults, name: spec}}


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


def hidden_states_to_keep(layers: int | list[int], requested: bool | None) -> bool | int | list[int]:
    """Value of `output_hidden_states` for the tower: only `layers` where that can be asked for."""
    return layers if KEEPS_NAMED_HIDDEN_STATES and not requested else True


def image_features_result(outputs, return_dict: bool):
    """What `get_image_features` returns: a list of (M, hidden) tensors on 4.57, on 5.x the output that holds it."""
    if not TRANSFORMERS_V5:
        return outputs.pooler_output
    return outputs if return_dict else outputs.to_tuple()


def is_prefill(generation_inputs: dict) -> bool:
    """Whether these arguments of `prepare_inputs_for_generation` are those of a forward that has to see the images.

    5.x says so; 4.57 is at position 0 then, in every step where it does without a cache. 5.19 and newer also drop
    encoded images themselves.
    """
    if not TRANSFORMERS_V5:
        return bool(generation_inputs["cache_position"][0] == 0)
    return generation_inputs.get("is_first_iteration", False) or not generation_inputs.get("use_cache", True)


def cached_tokens(past_key_values) -> int:
    """Number of tokens that `generate` finds in the cache it is given along with images.

    Raises:
        ValueError: There are some on 4.57, which passes images on only into an empty cache.
    """
    cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if cached and not TRANSFORMERS_V5:
        raise ValueError(
            f"past_key_values hold {cached} tokens: transformers 4.57 cannot add an image to a filled cache. Pass the "
            f"whole conversation without past_key_values, or use transformers 5."
        )
    return cached


class MergedPlaceholderProcessor(LlavaProcessor):
    """LlavaProcessor that writes `num_merged_tokens` placeholders per image, or all of them where that is None.

    5.x asks `replace_image_token` for each image. 4.57 counts inside `__call__`, which is therefore written anew.
    """

    num_merged_tokens: int | None = None

    def placeholders(self) -> str:
        """The placeholders of one merged image.

        Raises:
            ValueError: `num_merged_tokens` is below 1.
        """
        if self.num_merged_tokens < 1:
            raise ValueError(
                f"num_merged_tokens={self.num_merged_tokens}: an image needs 1 placeholder or more; None keeps all."
            )
        return self.image_token * self.num_merged_tokens

    if TRANSFORMERS_V5:

        def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
            if self.num_merged_tokens is None:
                return super().replace_image_token(image_inputs, image_idx, **kwargs)
            return self.placeholders()

    else:

        def __call__(self, images=None, text=None, audio=None, videos=None, **kwargs) -> BatchFeature:
            if self.num_merged_tokens is None or images is None or text is None:
                return super().__call__(images=images, text=text, **kwargs)
            from transformers.models.llava.processing_llava import LlavaProcessorKwargs

            merged = self._merge_kwargs(
                LlavaProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
            )
            return_tensors = merged["text_kwargs"].pop("return_tensors", None)
            merged["text_kwargs"].pop("return_mm_token_type_ids", None)
            texts = [text] if isinstance(text, str) else text
            texts = [sample.replace(self.image_token, self.placeholders()) for sample in texts]
            text_inputs = self.tokenizer(texts, **merged["text_kwargs"], return_tensors=None)
            self._check_special_mm_tokens(texts, text_inputs, modalities=["image"])
            image_inputs = self.image_processor(images, **merged["images_kwargs"])
            return BatchFeature(data={**text_inputs, **image_inputs}, tensor_type=return_tensors)
