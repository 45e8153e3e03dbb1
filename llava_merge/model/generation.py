# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`generate` of a LLaVA with a merger: images are merged once, whatever is drafted or searched behind."""

import torch
from torch import Tensor
from transformers import GenerationMixin, LlavaForConditionalGeneration

from .compat import (
    CACHE_ARGUMENT,
    CHUNKS_LACK_IMAGES,
    FORWARD_TAKES_ENCODED_IMAGES,
    TRANSFORMERS_V5,
    TRANSFORMERS_VERSION,
    takes_arguments_of,
)
from .placeholders import check_num_features, check_on_device, repeat_rows_together, tokens_of_budget, warn_of_positions
from .positions import ImagesOfPrompt, TokenLayout, cached_length, counted_positions, find_cache, keep_layout
from .questions import Prompt
from .vision_encoding import TowerFeatures, counted


NO_IMAGES = (
    "The prompts hold {number} image placeholders, and no images come with them. Pass the pixel_values that the "
    "processor returned, or mm_encoder_outputs={{'image': model.encode_images(pixel_values)}}."
)
TOWER_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


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


class EncodesImagesBeforeForward(KeepsEncodedImagesToThePrefill):
    """Mixin for `generate`: the images are encoded once per prompt, with the prompt as their question.

    On every transformers release that happens at the same moment: before rows are repeated for beams, so that each
    image is encoded once and stays with its row, and before drafts of assisted decoding stand behind the prompt. Where
    merged tokens sit is known then too, and goes with the call as `token_layout`.
    """

    @takes_arguments_of(GenerationMixin.generate)
    @counted
    def generate(self, **kwargs):
        """As in transformers, with `past_key_values` on every release."""
        if "past_key_values" in kwargs:
            kwargs[CACHE_ARGUMENT] = kwargs.pop("past_key_values")
        return super().generate(**kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        """5.18 and newer encode the images here, without a question; ours are encoded in the next step, with it."""
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ):
        to_merge = images_to_merge(model_kwargs.get("pixel_values"), model_kwargs.get("mm_encoder_outputs"))
        if to_merge is not None:
            model_kwargs.pop("mm_encoder_outputs", None)
            self._encode_images_for_generation(to_merge, input_ids, model_kwargs)
        encoded = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        image_mask = self._new_image_mask(input_ids, model_kwargs)
        inputs_embeds = model_kwargs.get("inputs_embeds")
        if encoded is None and inputs_embeds is not None and not model_kwargs.get("tokens_are_placed"):
            new = inputs_embeds[:, -image_mask.shape[1] :]
            self.model.check_text_embeds(new, model_kwargs.get("attention_mask"))
        if encoded is None and to_merge is None and inputs_embeds is None:
            number = image_mask.sum()
            check_on_device(number == 0, NO_IMAGES.format(number="some"), lambda: NO_IMAGES.format(number=int(number)))
        cache = find_cache(model_kwargs)
        if cache is not None and not image_mask.any():
            encoded = None  # they are in the cache: a draft model is given them again with each of its calls
        if encoded is not None and to_merge is None:
            check_num_features(image_mask, encoded.pooler_output)
        layout = None
        if self.model.places_tokens:
            layout = self.model.layout_of_prompt(image_mask, encoded, cache, times=expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs["token_layout"] = self._moved_layout(layout, image_mask.shape[1], model_kwargs)
        if encoded is not None:
            features = repeat_images(encoded.pooler_output, image_mask, expand_size)
            model_kwargs["mm_encoder_outputs"] = {"image": ImagesOfPrompt(pooler_output=features)}
        return input_ids, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        """As in transformers, at which time the length of the answer is known: warns if its positions are too many.

        Raises:
            ValueError: A prompt with images is to be read in chunks, to which this release gives no images.
        """
        given = ("pixel_values", "mm_encoder_outputs", "inputs_embeds")
        holds_images = any(model_kwargs.get(name) is not None for name in given) or cached_length(
            find_cache(model_kwargs)
        )
        if CHUNKS_LACK_IMAGES and holds_images and getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: transformers {TRANSFORMERS_VERSION} gives "
                f"chunks no images, no embeddings and no places behind a cache. Leave it out, or use 5.23 or newer."
            )
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        layout, mask = model_kwargs.get("token_layout"), model_kwargs.get("attention_mask")
        num_tokens = 0 if layout is None else max(generation_config.max_length, layout.num_tokens)
        if limit is not None and layout is not None and num_tokens + layout.most_skipped > limit:
            # of a batch, may be: only now the device is asked
            skipped = layout.skipped[:, -1]
            padding = torch.zeros_like(skipped) if mask is None else (mask == 0).sum(dim=1)
            longest = int((skipped - padding).argmax())
            num_tokens -= int(padding[longest])
            warn_of_positions(num_tokens + int(skipped[longest]), num_tokens, limit)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        """As in transformers, which only 5.x does, going on from those in a cache that began elsewhere."""
        positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        layout = getattr(find_cache(model_kwargs), "token_layout", None)
        if layout is None:
            return positions
        layout = layout.picked(slice(None, None, max(1, len(layout.skipped) // len(inputs_tensor))))  # may be repeated
        return layout.go_on(positions, model_kwargs.get("attention_mask"))

    def _moved_layout(self, layout: TokenLayout | None, length: int, model_kwargs: dict) -> TokenLayout | None:
        """The layout where the `length` new tokens begin where the caller says, whose `position_ids` 4.57 ignores."""
        position_ids, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        if layout is None or position_ids is None or not TRANSFORMERS_V5:
            return layout
        past = cached_length(find_cache(model_kwargs))
        counted = counted_positions(mask, past, length, position_ids.device)
        return layout.moved_to(position_ids[:, -length:], counted, mask, past)

    def _new_image_mask(self, input_ids: Tensor | None, model_kwargs: dict) -> Tensor:
        """Placeholders behind the cached tokens: (B, new tokens) bool."""
        image_mask = self.model.get_image_mask(input_ids, model_kwargs.get("inputs_embeds"))
        return image_mask[:, num_cached_inputs(image_mask.shape[1], model_kwargs) :]

    def _encode_images_for_generation(
        self, images: Tensor | TowerFeatures, input_ids: Tensor | None, model_kwargs: dict
    ):
        """Puts `mm_encoder_outputs` into `model_kwargs`, in the place of `pixel_values` and what goes with them."""
        question_mask = model_kwargs.pop("question_mask", None)
        options = {name: model_kwargs.pop(name, None) for name in TOWER_OPTIONS}
        inputs_embeds = model_kwargs.get("inputs_embeds")
        budgets = self.model.budgets(len(images), model_kwargs.get("num_merged_tokens"))
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
            new = self._images_not_in_cache(budgets, prompt)
            images, budgets = images[new], [budgets[image] for image in new]
        if FORWARD_TAKES_ENCODED_IMAGES or not budgets:
            model_kwargs.pop("pixel_values", None)
            model_kwargs.pop("num_merged_tokens", None)
        if budgets:
            outputs = self.model.encode_images_of_prompt(images, prompt, budgets, **options)
            model_kwargs["mm_encoder_outputs"] = {"image": outputs}

    def _images_not_in_cache(self, budgets: list[int | str], prompt: Prompt) -> list[int]:
        """Indices of the given images whose placeholders stand behind the cached tokens."""
        if not prompt.new_image_mask.any():
            return []
        num_tokens = [tokens_of_budget(budget, self.config.num_patches) for budget in budgets]
        if sum(num_tokens) != prompt.image_mask.sum():
            return list(range(len(budgets)))  # only the new images are given
        whole = Prompt(prompt.ids, prompt.embeds, prompt.image_mask)
        columns = whole.first_placeholders(num_tokens) % prompt.ids.shape[1]
        return (columns >= prompt.new_from).nonzero()[:, 0].tolist()

    @takes_arguments_of(prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self, *, token_layout: TokenLayout | None = None, num_merged_tokens=None, **kwargs
    ) -> dict:
        """As in transformers, with the positions and the attention mask of merged tokens."""
        model_inputs = super().prepare_inputs_for_generation(**kwargs)
        if token_layout is None:
            return model_inputs
        cache, attention_mask = find_cache(kwargs), kwargs.get("attention_mask")
        keep_layout(cache, token_layout)
        model_inputs["tokens_are_placed"] = True
        positions = model_inputs.get("position_ids") if TRANSFORMERS_V5 else None  # 4.57 repeats the last of given ones
        if token_layout.is_packed and (positions is not None or token_layout.moved is None):
            return model_inputs
        inputs = model_inputs.get("inputs_embeds")
        length = (model_inputs["input_ids"] if inputs is None else inputs).shape[1]
        past = cached_length(cache) if attention_mask is None else attention_mask.shape[1] - length
        if positions is None:
            positions = counted_positions(attention_mask, past, length, token_layout.skipped.device)
            positions = token_layout.go_on(positions, attention_mask)
        if token_layout.is_packed:
            return model_inputs | {"position_ids": positions}
        positions = positions[:, -length:]
        return model_inputs | self.model.placed_arguments(token_layout, positions, past, attention_mask, cache)

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        """A draft model places its own tokens, and need not be one that merges any."""
        ours = {"token_layout", "num_merged_tokens"}
        if isinstance(kwargs.get("assistant_model"), EncodesImagesBeforeForward):
            ours.remove("num_merged_tokens")
        without = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(*args, model_kwargs=without, **kwargs)


def images_to_merge(pixel_values: Tensor | None, mm_encoder_outputs: dict | None) -> Tensor | TowerFeatures | None:
    """The images of a call that are not merged yet, if any: pixels, or what the tower made of them.

    Raises:
        ValueError: There are pixels and encoded images, or `mm_encoder_outputs` has them by another key.
    """
    if mm_encoder_outputs and "image" not in mm_encoder_outputs:
        raise ValueError(
            f"mm_encoder_outputs has {', '.join(map(repr, mm_encoder_outputs))}: what encode_images returned belongs "
            f"to the key 'image'."
        )
    encoded = (mm_encoder_outputs or {}).get("image")
    if pixel_values is not None and encoded is not None:
        raise ValueError("Pass images either as pixel_values or encoded as mm_encoder_outputs, not both.")
    return encoded if isinstance(encoded, TowerFeatures | Tensor) else pixel_values


def repeat_images(features: list[Tensor], image_mask: Tensor, times: int) -> list[Tensor]:
    """The images of each row repeated together, as its text is repeated for beams and return sequences.

    Args:
        features: Of each image, (M, hidden).
        image_mask: (B, L) bool, the placeholders of the images.
    """
    if times == 1:
        return list(features)
    starts = Prompt(image_mask, None, image_mask).first_placeholders([len(image) for image in features])
    counts = torch.bincount(starts // image_mask.shape[1], minlength=len(image_mask))
    return [features[image] for image in repeat_rows_together(counts, times).tolist()]


def num_cached_inputs(num_inputs: int, model_kwargs: dict) -> int:
    """How many of the `num_inputs` tokens given to `generate` are in the cache it is given already.

    All that the cache holds where the whole conversation is given, none where only the new tokens are.
    """
    cached = int(cached_length(find_cache(model_kwargs)))
    if not cached or cached >= num_inputs:
        return 0
    mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    of_all_tokens = position_ids if mask is None else mask  # generate drops a mask of ones
    return cached if of_all_tokens is None or of_all_tokens.shape[-1] == num_inputs else 0
