# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat import FORWARD_TAKES_ENCODED_IMAGES
from .compat_generation import KeepsEncodedImagesToThePrefill
from .question import last_images_of_rows, repeat_rows_together
from .question_turns import Prompt


TOWER_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


class EncodesImagesBeforeForward(KeepsEncodedImagesToThePrefill):
    """Mixin for `generate`: the images are encoded once per prompt, with the prompt as their question.

    On every transformers release that happens at the same moment: before rows are repeated for beams, so that each
    image is encoded once and stays with its row, and before drafts of assisted decoding stand behind the prompt.
    """

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        """5.18 and newer encode the images here, without a question; ours are encoded in the next step, with it."""
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ):
        if model_kwargs.get("pixel_values") is not None:
            if model_kwargs.get("mm_encoder_outputs"):
                raise ValueError("Pass images either as pixel_values or encoded as mm_encoder_outputs, not both.")
            self._encode_images_for_generation(input_ids, model_kwargs)
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded:
            encoded = self._expand_encoded_images(encoded["image"], input_ids, model_kwargs, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if encoded:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _encode_images_for_generation(self, input_ids: Tensor | None, model_kwargs: dict):
        """Puts `mm_encoder_outputs` into `model_kwargs`, in the place of `pixel_values` and what goes with them."""
        question_mask = model_kwargs.pop("question_mask", None)
        options = {name: model_kwargs.pop(name, None) for name in TOWER_OPTIONS}
        pixel_values, inputs_embeds = model_kwargs["pixel_values"], model_kwargs.get("inputs_embeds")
        num_inputs = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        prompt = self.model.read_prompt(
            input_ids,
            inputs_embeds,
            new_from=num_cached_inputs(num_inputs, model_kwargs),  # turns before are in the cache
            question_mask=question_mask,
            may_hold_answers=False,
            **{name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")},
        )
        if prompt.new_from:
            pixel_values = self._images_not_in_cache(pixel_values, prompt)
        if FORWARD_TAKES_ENCODED_IMAGES or pixel_values is None:
            model_kwargs.pop("pixel_values")
        if pixel_values is None:
            return
        outputs = self.model.encode_images_of_prompt(pixel_values, prompt, **options)
        model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=outputs.pooler_output)}

    def _images_not_in_cache(self, pixel_values: Tensor, prompt: Prompt) -> Tensor | None:
        """The images whose placeholders stand behind the cached tokens, where those of the whole chat are given."""
        image_mask, behind = prompt.image_mask, prompt.new_image_mask
        if not behind.any():
            return None
        tokens_per_image = image_mask.sum() // len(pixel_values)
        if tokens_per_image != self.model.num_image_tokens:
            return pixel_values  # only the new images are given
        counts, all_counts = behind.sum(dim=1) // tokens_per_image, image_mask.sum(dim=1) // tokens_per_image
        return pixel_values[last_images_of_rows(all_counts, counts).to(pixel_values.device)]

    def _expand_encoded_images(self, outputs, input_ids: Tensor | None, model_kwargs: dict, times: int) -> dict:
        """The images of each row repeated together, as its text is repeated for beams and return sequences."""
        if times == 1:
            return {"image": outputs}
        image_mask = self.model.get_image_mask(input_ids, model_kwargs.get("inputs_embeds"))
        image_mask = image_mask[:, num_cached_inputs(image_mask.shape[1], model_kwargs) :]
        features = torch.stack(list(outputs.pooler_output))  # (I, M, hidden)
        image_counts = image_mask.sum(dim=1) // features.shape[1]
        order = repeat_rows_together(image_counts, times).to(features.device)
        return {"image": BaseModelOutputWithPooling(pooler_output=list(features[order]))}


def num_cached_inputs(num_inputs: int, model_kwargs: dict) -> int:
    """How many of the `num_inputs` tokens given to `generate` are in the cache it is given already.

    All that the cache holds where the whole conversation is given, none where only the new tokens are.
    """
    cache = next((value for value in model_kwargs.values() if isinstance(value, Cache)), None)
    cached = 0 if cache is None else int(cache.get_seq_length())
    if not cached or cached >= num_inputs:
        return 0
    mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    of_all_tokens = position_ids if mask is None else mask  # generate drops a mask of ones
    return cached if of_all_tokens is None or of_all_tokens.shape[-1] == num_inputs else 0
