# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The processor, which writes as many placeholders as tokens are left."""

import copy
import os
from pathlib import Path

from transformers import BatchFeature
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import MultiModalData, Unpack

from .compat import TRANSFORMERS_VERSION  # noqa: F401 - transformers 4.57 copies only what is named here
from .compat_processing import MergedPlaceholderProcessor, ProcessorKwargs, Texts
from .files import save_at_once
from .placeholders import budget_of_each_image
from .position_range import warn_of_positions  # noqa: F401


CHANNELS = (1, 3, 4)
MOST_ELONGATED = 100  # longer side by the shorter; resized to the tower's, a picture grows by that


def count_images(images: ImageInput | int) -> int:
    """How many there are: pictures, arrays, tensors, paths or URLs, one, in a batch of one tensor, or in lists."""
    if isinstance(images, int):
        return images
    if isinstance(images, list | tuple):
        return sum(map(count_images, images))
    return len(images) if getattr(images, "ndim", 0) == 4 else 1


def check_proportions(images: ImageInput):
    """Refuses pictures, in lists or alone, that would become huge where their shorter side is made the tower's.

    Raises:
        ValueError: There is one.
    """
    if isinstance(images, list | tuple):
        for each in images:
            check_proportions(each)
        return
    short, long = sides_of(images)
    if long > MOST_ELONGATED * short:
        raise ValueError(
            f"An image of {short} × {long} pixels: its longer side may be {MOST_ELONGATED} times the shorter. Crop it."
        )


def sides_of(image) -> tuple[int, int]:
    """Shorter and longer side of a picture, an array or a tensor, the channels first or last; 1 and 1 of others."""
    if is_pil_image(image):
        return min(image.size), max(image.size)
    shape = tuple(getattr(image, "shape", ()))[-3:]
    if len(shape) == 3:
        shape = shape[:2] if shape[2] in CHANNELS and shape[0] not in CHANNELS[1:] else shape[1:]
    return (min(shape), max(shape)) if len(shape) == 2 else (1, 1)


def bos_options(tokenizer, text: Texts | None) -> dict[str, bool]:
    """What a tokenizer has to be told where each of the prompts begins with the BOS token already."""
    texts, bos = [text] if isinstance(text, str) else text, tokenizer.bos_token
    begun = bool(bos and texts) and all(isinstance(each, str) and each.startswith(bos) for each in texts)
    return {"add_special_tokens": False} if begun else {}


class LlavaMergeProcessor(MergedPlaceholderProcessor):
    """LLaVA's processor, with as many image placeholders in the prompt as the merger gives tokens.

    Args:
        num_merged_tokens: Placeholders per image, the model's `config.merger_config.num_merged_tokens`. None writes one
            for every visual token, as the stock processor does: right for `merger_type="none"` and inside
            `model.merger_bypassed()`. Saved in processor_config.json.

    It warns of prompts that take more positions than `tokenizer.model_max_length`, as far as it can know: of a model
    with `position_ids="source"`, the default. Whether it is one, and what its language model takes, `generate` knows.

    The other arguments are those of [`~transformers.LlavaProcessor`].

    Example:
        >>> processor = LlavaMergeProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf", num_merged_tokens=64)
        >>> inputs = processor(images=image, text=prompt, return_tensors="pt")
        >>> inputs = processor(images=image, text=prompt, return_tensors="pt", num_merged_tokens=16)  # for this call
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

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """As in transformers, but all at once; links in the folder are replaced and not followed."""
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)
        write, said = super().save_pretrained, []

        def save(staged: Path):
            paths = write(str(staged), push_to_hub=push_to_hub, **kwargs)
            said.extend(Path(path).relative_to(staged) for path in paths)

        save_at_once(save, save_directory)
        return [str(Path(save_directory) / path) for path in said]

    def __call__(
        self,
        images: ImageInput | int | None = None,
        text: Texts | None = None,
        *,
        num_merged_tokens: int | str | list | None = None,
        **kwargs: Unpack[ProcessorKwargs],
    ) -> BatchFeature:
        """As in transformers, for a budget of this call; prompts that begin with the BOS token get no second one.

        Args:
            images: Also the number of images, for prompts of images that [`encode_images`] has encoded; what is
                returned has no `pixel_values` then.
            num_merged_tokens: Tokens of an image, or one number for each image in reading order; "all" does not merge.
                Returned too, for `generate` and `forward`: nothing is kept here or on the model. Default the
                processor's own, which the model has to share.

        Raises:
            ValueError: `num_merged_tokens` is no such number, or a list for more or fewer images; or an image is far
                longer than wide.
        """
        if "add_special_tokens" not in {**kwargs, **(kwargs.get("text_kwargs") or {})}:
            kwargs |= bos_options(self.tokenizer, text)
        if images is None:
            return super().__call__(text=text, **kwargs)
        processor = copy.copy(self)  # nothing of this call is kept
        if num_merged_tokens is not None:
            processor.num_merged_tokens = budget_of_each_image(num_merged_tokens, count_images(images))
        processor.check_budgets()
        if isinstance(images, int):
            processor.images_are_encoded = True
            images, text = None, processor.with_placeholders(text, images)
        else:
            images = self.image_processor.fetch_images(images)  # of paths and URLs, which have no sides yet
            check_proportions(images)
        inputs = super(LlavaMergeProcessor, processor).__call__(images=images, text=text, **kwargs)
        if num_merged_tokens is not None:
            inputs["num_merged_tokens"] = num_merged_tokens
        return inputs

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if self.num_merged_tokens is None or image_sizes is None:
            return super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        num_images = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_merged_tokens] * num_images, num_image_patches=[1] * num_images
        )
