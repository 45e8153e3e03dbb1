# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
from transformers.processing_utils import MultiModalData

from .compat import TRANSFORMERS_VERSION  # noqa: F401 - transformers 4.57 copies only what is named here
from .compat_processing import MergedPlaceholderProcessor


class LlavaMergeProcessor(MergedPlaceholderProcessor):
    """LLaVA's processor, with as many image placeholders in the prompt as the merger gives tokens.

    Args:
        num_merged_tokens: Placeholders per image, the model's `config.merger_config.num_merged_tokens`. None writes one
            for every visual token, as the stock processor does: right for `merger_type="none"` and inside
            `model.merger_bypassed()`. Saved in processor_config.json.

    The other arguments are those of [`~transformers.LlavaProcessor`].

    Example:
        >>> processor = LlavaMergeProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf", num_merged_tokens=64)
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_merged_tokens=None,
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.num_merged_tokens = num_merged_tokens

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; `num_merged_tokens`, if given, replaces the saved one."""
        unset = object()
        num_merged_tokens = kwargs.pop("num_merged_tokens", unset)
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if num_merged_tokens is not unset:
            processor.num_merged_tokens = num_merged_tokens
        return processor

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if self.num_merged_tokens is None or image_sizes is None:
            return super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        num_images = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_merged_tokens] * num_images, num_image_patches=[1] * num_images
        )
