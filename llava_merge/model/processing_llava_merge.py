# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The processor, which writes as many placeholders as tokens are left."""

import copy
import json
import os
import re
import sys
from pathlib import Path

from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import MultiModalData, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput

from .compat import IS_PACKAGE, TRANSFORMERS_V5
from .placeholders import ALL_TOKENS, budget_of_each_image, is_whole_number, tokens_of_budget, warn_of_positions


if IS_PACKAGE:
    from . import checkpoint_saving
if TRANSFORMERS_V5:
    from transformers.processing_utils import ProcessingKwargs as ProcessorKwargs
else:
    from transformers.models.llava.processing_llava import LlavaProcessorKwargs as ProcessorKwargs

    PIPELINE = "transformers.pipelines.image_text_to_text"


Texts = TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput]  # by these a processor is known
UNKNOWN_LENGTH = 10**9  # tokenizers that do not know how much their model takes name more

CHANNELS = (1, 3, 4)
MOST_ELONGATED = 100  # longer side by the shorter; resized to the tower's, a picture grows by that


class MergedPlaceholderProcessor(LlavaProcessor):
    """LlavaProcessor that writes as many placeholders as an image has merged tokens.

    Attributes:
        num_merged_tokens: Placeholders of every image, or a list with those of each; None and "all" as in LLaVA. No
            class has it: 5.x takes what a processor's class has for defaults of its arguments.
    """

    num_merged_tokens: int | list[int | str] | None

    def budget(self, image_idx: int) -> int | str:
        """Placeholders of an image, or "all"."""
        budget = self.num_merged_tokens
        if isinstance(budget, list):
            budget = budget[image_idx]
        return ALL_TOKENS if budget is None else budget

    def check_budgets(self):
        """Refuses a budget that is no number, or above the visual tokens of an image, once a call.

        Raises:
            ValueError: There is one.
        """
        budgets = self.num_merged_tokens if isinstance(self.num_merged_tokens, list) else [self.num_merged_tokens]
        numbers = [budget for budget in budgets if budget not in (None, ALL_TOKENS)]
        if not all(map(is_whole_number, numbers)):
            raise ValueError(
                f"num_merged_tokens={self.num_merged_tokens!r}: has to be a whole number of at least 1; None keeps all."
            )
        if numbers and self.patch_size is not None and max(numbers) > self.num_patches:
            raise ValueError(
                f"num_merged_tokens={self.num_merged_tokens}: an image has {self.num_patches} visual tokens, and "
                f"merging makes no more of them. Ask for fewer, or for 'all'."
            )

    @property
    def num_patches(self) -> int:
        """Visual tokens of an image before merging, as the processor's sizes have it."""
        return super()._get_num_multimodal_tokens(image_sizes=[(1, 1)]).num_image_tokens[0]

    def with_placeholders(self, text: str | list[str], num_images: int) -> list[str]:
        """The prompts with as many placeholders for each image as its budget, in the place of one.

        Raises:
            ValueError: They are for more or fewer images.
        """
        texts = [text] if isinstance(text, str) else text or []
        found = sum(sample.count(self.image_token) for sample in texts)
        if found != num_images:
            raise ValueError(
                f"The prompts hold {found} {self.image_token} for {num_images} images. Write one for each image, in "
                f"reading order."
            )
        budgets, num_patches = map(self.budget, range(found)), self.num_patches

        def placeholders(_: re.Match) -> str:
            return self.image_token * tokens_of_budget(next(budgets), num_patches)

        return [re.sub(re.escape(self.image_token), placeholders, sample) for sample in texts]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]):
        """As in transformers; also warns of source positions behind what the tokenizer says a model takes."""
        super()._check_special_mm_tokens(text, text_inputs, modalities)
        limit = self.tokenizer.model_max_length
        if self.num_merged_tokens is None or self.patch_size is None or limit > UNKNOWN_LENGTH:
            return
        num_patches, image = self.num_patches, 0
        for ids, mask in zip(text_inputs["input_ids"], text_inputs.get("attention_mask", text), strict=True):
            num_tokens = sum(map(int, mask)) if "attention_mask" in text_inputs else len(ids)
            left, skipped = list(ids).count(self.image_token_id), 0
            while left > 0:
                number = tokens_of_budget(self.budget(image), num_patches)
                image, left, skipped = image + 1, left - number, skipped + num_patches - number
            warn_of_positions(num_tokens + skipped, num_tokens, limit, "tokenizer.model_max_length")

    def to_json_file(self, json_file_path: str | os.PathLike, **kwargs):
        """Writes processor_config.json, the last file of `save_pretrained`, and finishes tokenizer_config.json."""
        super().to_json_file(json_file_path, **kwargs)
        if self.tokenizer.is_fast and type(self.tokenizer).__module__.startswith("transformers."):
            name_plain_tokenizer(Path(json_file_path).parent / "tokenizer_config.json", self.tokenizer)

    if TRANSFORMERS_V5:

        @classmethod
        def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, **kwargs):
            """tokenizer.json as it is, as for LLaVA, whatever class is named: a LlamaTokenizer would lose spaces."""
            kwargs["tokenizer_type"] = "llava"
            return super()._load_tokenizer_from_pretrained(sub_processor_type, pretrained_model_name_or_path, **kwargs)

        def validate_inputs(self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs):
            """As in transformers, to which the placeholders of encoded images are no more than text."""
            if images is None and getattr(self, "images_are_encoded", False):
                text = [sample.replace(self.image_token, "") for sample in text]
            super().validate_inputs(images=images, text=text, **kwargs)

        def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
            """The placeholders of one image, as many as its budget."""
            budget = self.budget(image_idx)
            if budget == ALL_TOKENS:
                return super().replace_image_token(image_inputs, image_idx, **kwargs)
            return self.image_token * budget

    else:  # remove when 4.57 is no longer supported

        def _merge_kwargs(self, *args, **kwargs):
            """As in transformers, which takes what it reads out of the caller's dictionaries."""
            kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
            return super()._merge_kwargs(*args, **kwargs)

        def __call__(
            self,
            images: ImageInput | None = None,
            text: Texts | None = None,
            audio=None,
            videos=None,
            **kwargs: Unpack[ProcessorKwargs],
        ) -> BatchFeature:
            if self.num_merged_tokens is None or images is None or text is None:
                return super().__call__(images=images, text=text, **kwargs)
            merged = self._merge_kwargs(ProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
            image_inputs = self.image_processor(images, **merged["images_kwargs"])
            # with pictures, stock would write its own number of placeholders for each of ours
            inputs = super().__call__(text=self.with_placeholders(text, len(image_inputs["pixel_values"])), **kwargs)
            inputs.update(image_inputs)
            return inputs

        def apply_chat_template(self, conversation, chat_template=None, **kwargs):
            """As in transformers, with the `num_merged_tokens` of a pipeline, which gives chats none of its arguments.

            They are read where that has left them; the pipeline of 5.x passes them on.
            """
            caller, given = sys._getframe(1), {**(kwargs.pop("processor_kwargs", None) or {}), **kwargs}
            if caller.f_globals.get("__name__") == PIPELINE:
                dropped = caller.f_locals["processing_kwargs"]
                given = {**(dropped.get("processor_kwargs") or {}), **dropped, **given}
            if given.get("num_merged_tokens") is not None:
                kwargs["num_merged_tokens"] = given["num_merged_tokens"]
            return super().apply_chat_template(conversation, chat_template, **kwargs)


def name_plain_tokenizer(path: Path, tokenizer):
    """Lets a tokenizer_config.json name the class that takes tokenizer.json as it is, on every release and in vLLM.

    4.57 names a LlamaTokenizer, which 5.x builds anew unless the model's type is "llava", and then loses spaces behind
    `<image>`; 5.x names a TokenizersBackend, and lists special tokens by a name, which 4.57 cannot read.
    """
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)
    if extra:  # an empty one hides the others from 5.17
        config["additional_special_tokens" if isinstance(extra, list) else "extra_special_tokens"] = extra
    config |= {name: getattr(tokenizer, name) for name in ("padding_side", "model_input_names")}  # were of the class
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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

    if IS_PACKAGE:

        def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
            """As in transformers, but atomically; links in the folder are replaced and not followed."""
            if push_to_hub:
                kwargs.setdefault("repo_id", Path(save_directory).name)
            write, said = super().save_pretrained, []

            def save(staged: Path):
                paths = write(str(staged), push_to_hub=push_to_hub, **kwargs)
                said.extend(Path(path).relative_to(staged) for path in paths)

            checkpoint_saving.save_at_once(save, save_directory)
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
