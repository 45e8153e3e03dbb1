# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat import cached_tokens, is_prefill
from .question import repeat_rows_together


class EncodesImagesBeforeForward:
    """Mixin for `generate`: the images are encoded once per prompt, with the prompt as their question.

    On every transformers release that happens at the same moment: before rows are repeated for beams, so that each
    image is encoded once and stays with its row, and before drafts of assisted decoding stand behind the prompt.
    """

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        """5.19 and newer encode the images here, without a question; ours are encoded in the next step, with it."""
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ):
        if model_kwargs.get("pixel_values") is not None:
            if model_kwargs.get("mm_encoder_outputs"):
                raise ValueError("Pass images either as pixel_values or encoded as mm_encoder_outputs, not both.")
            self._encode_images_for_generation(input_ids, model_kwargs)
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and expand_size > 1:
            image_mask, _ = self._prompt(input_ids, model_kwargs.get("inputs_embeds"))
            image_mask = image_mask[:, cached_tokens(model_kwargs.get("past_key_values")) :]
            encoded = self._expand_encoded_images(encoded["image"], image_mask, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if encoded:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _encode_images_for_generation(self, input_ids: Tensor | None, model_kwargs: dict):
        """Replaces `pixel_values` and what goes with it in `model_kwargs` by `mm_encoder_outputs`."""
        pixel_values = model_kwargs.pop("pixel_values")
        question_mask = model_kwargs.pop("question_mask", None)
        names = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
        options = {name: model_kwargs.pop(name, None) for name in names}
        image_mask, inputs_embeds = self._prompt(input_ids, model_kwargs.get("inputs_embeds"))
        masks = [image_mask, model_kwargs.get("attention_mask"), question_mask]
        cached = cached_tokens(model_kwargs.get("past_key_values"))  # turns before this one
        image_mask, attention_mask, question_mask = (None if mask is None else mask[:, cached:] for mask in masks)
        question = self.model.get_question(
            inputs_embeds[:, cached:], image_mask, len(pixel_values), attention_mask, question_mask
        )
        outputs = self.model.encode_images(pixel_values, **options, **question)
        model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=outputs.pooler_output)}

    def _expand_encoded_images(self, outputs, image_mask: Tensor, times: int) -> dict:
        """The images of each row repeated together, as its text is repeated for beams and return sequences."""
        features = torch.stack(list(outputs.pooler_output))  # (I, M, hidden)
        image_counts = image_mask.sum(dim=1) // features.shape[1]
        order = repeat_rows_together(image_counts, times).to(features.device)
        return {"image": BaseModelOutputWithPooling(pooler_output=list(features[order]))}

    def _prompt(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """Placeholder mask (B, L) and embeddings (B, L, hidden) of a prompt given as ids or as embeddings."""
        if inputs_embeds is not None:
            return self.model.get_image_mask(None, inputs_embeds), inputs_embeds
        return self.model.get_image_mask(input_ids, None), self.get_input_embeddings()(input_ids)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        """Encoded images go into the prefill only; after that they are in the cache."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if not is_prefill(kwargs):
            model_inputs.pop("mm_encoder_outputs", None)
        return model_inputs
