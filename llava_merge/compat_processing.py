# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""How many placeholders an image gets: a method of its own on 5.x, a part of `__call__` on 4.57."""

from transformers import BatchFeature, LlavaProcessor
from transformers.processing_utils import Unpack

from .compat import TRANSFORMERS_V5


if not TRANSFORMERS_V5:
    from transformers.models.llava.processing_llava import LlavaProcessorKwargs


class MergedPlaceholderProcessor(LlavaProcessor):
    """LlavaProcessor that writes `num_merged_tokens` placeholders per image, or all of them where that is None."""

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

    else:  # remove when 4.57 is no longer supported

        def __call__(
            self, images=None, text=None, audio=None, videos=None, **kwargs: Unpack[LlavaProcessorKwargs]
        ) -> BatchFeature:
            if self.num_merged_tokens is None or images is None or text is None:
                return super().__call__(images=images, text=text, **kwargs)
            texts = [text] if isinstance(text, str) else text
            # with pictures, stock would write its own number of placeholders for each of ours
            inputs = super().__call__(
                text=[sample.replace(self.image_token, self.placeholders()) for sample in texts], **kwargs
            )
            merged = self._merge_kwargs(
                LlavaProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
            )
            inputs.update(self.image_processor(images, **merged["images_kwargs"]))
            return inputs
