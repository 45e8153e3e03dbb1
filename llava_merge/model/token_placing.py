# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Puts merged tokens where their patches were, and lets them weigh what these weighed. The sums: token_layout.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .compat import cache_mask_sizes
from .merging_base import find_merging_method
from .merging_grid import slot_places
from .placeholders import check_on_device
from .token_layout import (
    TokenLayout,
    biased_causal_mask,
    biased_mask,
    counted_positions,
    is_padding_mask,
    layout_of_images,
    place_on_slots,
    samples_of,
)
from .vllm_backend import is_run_by_vllm


logger = logging.get_logger(f"transformers.{__name__}")

LOST_LAYOUT = (
    "The cache holds {past} tokens, but does not know where its merged images sit, as position_ids='source' and "
    "attention_mass need: it was filled by another model, or copied into a new object. Go on with the cache that "
    "forward or generate returned, or pass the whole conversation without a cache."
)
FEATURES_IN_EMBEDS = (
    "inputs_embeds hold {number} vectors that are the embedding of no token, and no images come with them. If they are "
    "image features, this model (position_ids={positions!r}, attention_mass={mass}) has to know where these sit: leave "
    "the image token's embeddings in, and pass mm_encoder_outputs={{'image': model.encode_images(pixel_values)}}. If "
    "not, as with soft prompts, or if position_ids and attention_mask are right already, pass tokens_are_placed=True."
)
NO_MASS = (
    "attention_mass={mass} with attn_implementation={attention!r}: a bias on image tokens needs "
    "attn_implementation='sdpa' or 'eager'. Load the model with one of them, or with "
    "merger_config={{'attention_mass': 0}}."
)
NO_BIAS = (
    "Merged tokens weigh as one token each (attention_mass=0): a bias on them needs attn_implementation='sdpa' or "
    "'eager' and text layers of one kind, and this model has {attention!r} and {kinds}. An untrained merger answers "
    "worse without it; pass merger_config={{'attention_mass': 0}} to say that it is meant."
)
TAKE_BIAS = ("sdpa", "eager")


@dataclass
class EncodedImages(BaseModelOutputWithPooling):
    """A tower's output with the projected features of each image as `pooler_output`, and where they sit.

    Attributes:
        token_places: (all merged tokens,) int64, the patch of its image that each token sits at.
        token_sizes: (all merged tokens,) float32, the number of patches that each token stands for.
        num_patches: Patches N of an image.
    """

    token_places: Tensor | None = None
    token_sizes: Tensor | None = None
    num_patches: int | None = None

    @classmethod
    def of(
        cls, outputs: BaseModelOutputWithPooling, token_places: Tensor, token_sizes: Tensor, num_patches: int
    ) -> "EncodedImages":
        """The tower's output with where its merged tokens sit."""
        parts = outputs.last_hidden_state, outputs.pooler_output, outputs.hidden_states, outputs.attentions
        return cls(*parts, token_places, token_sizes, num_patches)


class ImagesOfPrompt(BaseModelOutputWithPooling):
    """Projected features of each image as `pooler_output`, which were found to be those of the prompt they go with."""


def find_cache(arguments: dict) -> Cache | None:
    """The KV cache among the arguments or outputs of a call, whatever the installed release calls it."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def cached_length(cache: Cache | None) -> int | Tensor:
    """Tokens in a cache; a tensor in a static one."""
    return 0 if cache is None else cache.get_seq_length()


def cached_length_on_host(cache: Cache | None) -> int | Tensor:
    """Tokens in a cache; a tensor in a static one that is being compiled, which may not ask the device."""
    past = cached_length(cache)
    return past if torch.compiler.is_compiling() else int(past)


def is_empty(past: int | Tensor) -> bool:
    """Whether nothing is cached; of a static cache that is being compiled, which is filled eagerly, it is not asked."""
    return isinstance(past, int) and past == 0


def attention_kinds(text_config) -> set[str]:
    """Kinds of attention of the text model's layers, full or sliding; empty where it does not say."""
    return set(getattr(text_config, "layer_types", None) or ())


def sliding_window_of(text_config) -> int | None:
    """Tokens that the text model's attention looks back on, None where it is all.

    Raises:
        ValueError: Some layers have a window and others not, so that one mask does not serve all.
    """
    kinds = attention_kinds(text_config)
    if kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise ValueError(
            f"The text model has layers of {', '.join(sorted(kinds))}, but attention_mass and packed rows need one "
            f"attention mask for all layers. Use attention_mass=0 and one sample a row."
        )
    return getattr(text_config, "sliding_window", None)  # only some text models have it


def flash_lengths(past: int, length: int, samples: Tensor | None, device: torch.device) -> dict:
    """Arguments that tell FlashAttention the samples of one row, which it would guess from the positions otherwise."""
    bounds = torch.tensor([0, length], device=device)
    if samples is not None:
        starts = (samples[0].diff() != 0).nonzero()[:, 0] + 1
        bounds = torch.cat((bounds[:1], starts, bounds[1:]))
    key_bounds = bounds if samples is not None else torch.tensor([0, past + length], device=device)
    lengths = {}
    for name, ends in (("q", bounds), ("k", key_bounds)):
        lengths[f"cu_seq_lens_{name}"] = ends.int()
        lengths[f"max_length_{name}"] = int(ends.diff().max())
    return lengths


def attended_tokens(attention_mask: Tensor) -> Tensor:
    """(B, keys) bool: tokens that any query attends to, of a mask (B, keys) or (B, heads, queries, keys)."""
    if attention_mask.is_floating_point() and attention_mask.ndim == 4:  # what is added to the attention
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return attention_mask.bool().flatten(1, -2).any(dim=1) if attention_mask.ndim == 4 else attention_mask.bool()


def fingerprints(vectors: Tensor) -> Tensor:
    """A number (..., ) int64 of each of the `vectors` (..., D): hardly any have the same but those that round alike."""
    bits = vectors[..., :32].bfloat16().float().contiguous().view(torch.int32).long()
    weights = (torch.arange(1, 1 + bits.shape[-1], device=bits.device) * 2654435761) ** 2  # wraps around
    return (bits * weights).sum(dim=-1)


class PlacesTokens:
    """Mixin of the headless model: positions and attention mask of prompts with merged images."""

    @property
    def attention_mass(self) -> float:
        """What merged tokens weigh, see [`MergerConfig`]: where nobody has said it, 1 if attention takes a bias."""
        mass = self.config.merger_config.attention_mass
        return float(self.takes_bias) if mass is None else mass

    @property
    def takes_bias(self) -> bool:
        """Whether the text model's attention can add a bias to merged tokens, by one mask for all layers."""
        text_config = self.language_model.config
        return text_config._attn_implementation in TAKE_BIAS and len(attention_kinds(text_config)) <= 1

    @property
    def places_tokens(self) -> bool:
        """Whether merged tokens sit or weigh otherwise than tokens of text."""
        merger_config = self.config.merger_config
        return merger_config.merger_type != "none" and (
            merger_config.position_ids == "source" or self.attention_mass > 0
        )

    def settle_mass(self):
        """Writes what merged tokens weigh into the configuration of a method that is trained, if nobody has said it.

        What is trained belongs to its mass; other methods have what attention allows, wherever they are loaded. Where
        it takes no bias, one warning says so.
        """
        merger_config, text_config = self.config.merger_config, self.language_model.config
        if merger_config.attention_mass is not None or merger_config.merger_type == "none":
            return
        if not self.takes_bias:
            kinds = ", ".join(sorted(attention_kinds(text_config))) or "one kind"
            logger.warning_once(NO_BIAS.format(attention=text_config._attn_implementation, kinds=kinds))
        if not find_merging_method(merger_config).training_free:
            merger_config.attention_mass = self.attention_mass

    def place_tokens(self, images: BaseModelOutputWithPooling | None, arguments: dict) -> TokenLayout | None:
        """Puts positions and mask into the `arguments` of a forward; None where nothing differs from packed tokens.

        The `images` are those of the prompt.
        """
        if is_run_by_vllm(self.config):  # which has asked get_rope_index, and takes its first row for all of them
            position_ids = arguments["position_ids"]
            arguments["position_ids"] = position_ids[0] if position_ids.ndim == 3 else position_ids
            return None
        if not self.places_tokens:
            return None
        inputs = arguments.get("inputs_embeds")
        inputs = arguments["input_ids"] if inputs is None else inputs
        cache, attention_mask = find_cache(arguments), arguments.get("attention_mask")
        past, length, position_ids = cached_length_on_host(cache), inputs.shape[1], arguments.get("position_ids")
        samples = None
        if position_ids is not None and attention_mask is None and is_empty(past):
            samples = samples_of(position_ids[:, -length:]).expand(len(inputs), -1)
        image_mask = self.get_image_mask(arguments.get("input_ids"), arguments.get("inputs_embeds"))
        layout = self.layout_of_prompt(image_mask, images, cache, samples)
        counted = counted_positions(attention_mask, past, length, inputs.device)
        if position_ids is not None:
            positions = position_ids[:, -length:]
        elif layout.is_packed and is_empty(past):  # bit for bit those of stock's forward
            positions = torch.arange(length, device=inputs.device)[None]
        else:
            positions = layout.go_on(counted, attention_mask)
            if layout.is_packed:
                arguments["position_ids"] = positions
        if not layout.is_packed:
            arguments |= self.placed_arguments(layout, positions, past, attention_mask, cache, samples)
        if position_ids is None and not (is_padding_mask(attention_mask) and length > 1):
            return layout  # a token behind another moves nothing
        return layout.moved_to(positions, counted, attention_mask, past)

    @torch.no_grad()
    def check_text_embeds(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None):
        """Refuses image features among the embeddings (B, L, text_dim) of a call without images: their places are lost.

        Raises:
            ValueError: A vector that is attended to is the embedding of no token.
        """
        if not (self.places_tokens and self.merger_enabled) or is_run_by_vllm(self.config):
            return
        embed = self.get_input_embeddings()
        vocabulary = torch.arange(self.config.text_config.vocab_size, device=inputs_embeds.device)
        known = [fingerprints(embed(ids).to(inputs_embeds.dtype)) for ids in vocabulary.split(8192)]
        is_foreign = ~torch.isin(fingerprints(inputs_embeds), torch.cat(known).to(inputs_embeds.device))
        if attention_mask is not None:
            is_foreign &= attended_tokens(attention_mask)[:, -is_foreign.shape[1] :]
        number, merger_config = is_foreign.sum(), self.config.merger_config
        check_on_device(
            number == 0,
            "inputs_embeds hold image features.",
            lambda: FEATURES_IN_EMBEDS.format(
                number=int(number), positions=merger_config.position_ids, mass=self.attention_mass
            ),
        )

    @property
    def get_rope_index(self) -> Callable:
        """[`rope_index`], which vLLM's Transformers backend asks for as of models with M-RoPE.

        Exporters ask for it too where there is one, but give other arguments and hand the positions to the forward.
        """
        if not is_run_by_vllm(self.config):
            raise AttributeError("get_rope_index is for vLLM's Transformers backend alone.")
        return self.rope_index

    def rope_index(self, input_ids: Tensor, mm_token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (3, 1, L), three times the same, of a prompt (1, L), and how far text behind it has moved, (1, 1).

        Args:
            mm_token_type_ids: (1, L), 1 at merged tokens.
        """
        image_mask, number = mm_token_type_ids == 1, self.config.merger_config.num_merged_tokens
        num_images = int(image_mask.sum()) // number
        grid = self.config.patch_grid(self.config.image_shape)
        positions, _, moved = place_on_slots(image_mask, [number] * num_images, grid)
        return positions.expand(3, 1, -1), moved[None, None]

    def layout_of_prompt(
        self,
        image_mask: Tensor,
        images: BaseModelOutputWithPooling | None,
        cache: Cache | None,
        samples: Tensor | None = None,
        times: int = 1,
    ) -> TokenLayout:
        """The [`TokenLayout`] of the tokens in the `cache` and of new ones with placeholders at `image_mask` (B, L).

        Args:
            times: How often each new row is repeated, as the rows of the cache are already.

        Raises:
            ValueError: The cache does not know where its images are, or is of other rows.
        """
        if images is None:
            new = TokenLayout.of_text(*image_mask.shape, image_mask.device)
        else:
            new = self._layout_of_images(image_mask, images, samples)
        new = new.repeated(times)
        past, kept = cached_length_on_host(cache), getattr(cache, "token_layout", None)
        if kept is None and isinstance(past, int) and past:
            raise ValueError(LOST_LAYOUT.format(past=past))
        if kept is None or is_empty(past):
            return new
        kept = kept.of_rows(len(new.skipped))
        if images is None and (torch.compiler.is_compiling() or kept.num_tokens <= past):
            return kept  # its last column is that of all text behind
        return kept.followed_by(new, int(past))

    def _layout_of_images(self, image_mask, images: BaseModelOutputWithPooling, samples) -> TokenLayout:
        num_tokens = [len(features) for features in images.pooler_output]
        merger_config = self.config.merger_config
        if isinstance(images, EncodedImages):
            places, sizes, num_patches = images.token_places, images.token_sizes, images.num_patches
        else:  # made by others: of slots
            grid, num_patches = self.config.patch_grid(self.config.image_shape), self.config.num_patches
            places = torch.cat([slot_places(grid, number, image_mask.device) for number in num_tokens])
            sizes = None
        if merger_config.position_ids == "packed":
            places = None
        mass = self.attention_mass
        return layout_of_images(image_mask, places, num_tokens, num_patches, mass, sizes, samples)

    def placed_arguments(
        self,
        layout: TokenLayout,
        positions: Tensor,
        past: int | Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        samples: Tensor | None = None,
    ) -> dict:
        """Arguments of the language model that place the new tokens, whose packed `positions` are (B or 1, length).

        Raises:
            ValueError: `attention_mass` with an attention that takes no bias.
        """
        length, mass = positions.shape[1], self.attention_mass
        placed = {"position_ids": positions + layout.shift(past, length).to(positions.device)}
        attention = self.language_model.config._attn_implementation
        if mass and attention not in TAKE_BIAS:
            raise ValueError(NO_MASS.format(mass=mass, attention=attention))
        if "flash" in attention:
            if len(layout.skipped) == 1 and length > 1:
                placed |= flash_lengths(int(past), length, samples, positions.device)
        elif mass or samples is not None:
            placed["attention_mask"] = self._biased_mask(layout, past, length, attention_mask, cache, samples)
        elif attention_mask is None and cache is None:
            # without it, transformers would take a jump in the positions for the next packed sample
            placed["attention_mask"] = torch.ones(len(layout.skipped), length, device=positions.device)
        return placed

    def _biased_mask(self, layout, past, length, attention_mask, cache, samples) -> Tensor:
        """(B, 1, length, keys) float.

        Raises:
            ValueError: The caller's mask is neither a 2-D nor a 4-D tensor.
        """
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim in (2, 4)):
            raise ValueError(
                f"attention_mass with a {type(attention_mask).__name__} as attention_mask: a bias can be added to "
                f"a tensor (batch, tokens) or (batch, 1, queries, keys) only. Pass the 2-D mask of the processor."
            )
        dtype = self.get_input_embeddings().weight.dtype  # a replica of DataParallel has no dtype
        if attention_mask is not None and attention_mask.ndim == 4:
            return biased_mask(attention_mask, layout, dtype)
        keys = (length, 0) if cache is None else cache_mask_sizes(cache, past, length, layout.bias.device)
        window = sliding_window_of(self.config.text_config)
        return biased_causal_mask(layout, past, length, keys, dtype, attention_mask, window, samples)
