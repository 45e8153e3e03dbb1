# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What `generate` does with encoded images by itself since 5.18. Remove when 5.18 is the oldest supported release."""

from transformers import LlavaForConditionalGeneration

from .compat import FORWARD_TAKES_ENCODED_IMAGES
from .stock_signature import takes_arguments_of


class KeepsEncodedImagesToThePrefill:
    """Mixin: `mm_encoder_outputs` go into the first forward, into all where nothing is cached, and never to a draft."""

    if not FORWARD_TAKES_ENCODED_IMAGES:

        @takes_arguments_of(LlavaForConditionalGeneration.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self, *, mm_encoder_outputs: dict | None = None, **kwargs) -> dict:
            """As in transformers, with the images that `generate` encoded."""
            model_inputs = super().prepare_inputs_for_generation(**kwargs)
            if mm_encoder_outputs:
                model_inputs.pop("pixel_values", None)
                model_inputs["mm_encoder_outputs"] = dict(mm_encoder_outputs)
                if kwargs.get("use_cache", True):
                    mm_encoder_outputs.clear()  # this call's own dict, which the next step is given again
            return model_inputs

        def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
            """Drafts get the pictures: their towers are their own, and their features may be of another width."""
            without = {name: value for name, value in model_kwargs.items() if name != "mm_encoder_outputs"}
            return super()._get_candidate_generator(*args, model_kwargs=without, **kwargs)


# What an override below this mixin adds its arguments to.
prepare_inputs_for_generation = (
    LlavaForConditionalGeneration if FORWARD_TAKES_ENCODED_IMAGES else KeepsEncodedImagesToThePrefill
).prepare_inputs_for_generation
