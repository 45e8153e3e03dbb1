# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Where the merged tokens of a prompt sit, and how much each weighs.

*Packed* positions count every token as one, so also a merged token that stands for many patches. What merging changes
is kept as a difference to them, which fits every way of counting: from a mask, from a cache, or by the caller. A KV
cache remembers it: it goes with the request, not with the model.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .compat import cache_mask_sizes
from .merging_base import find_merging_method
from .merging_grid import slot_places
from .placeholders import check_on_device
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
class TokenLayout:
    """Of T tokens in each of B rows; the last of the T + 1 columns stands for all tokens behind them.

    Attributes:
        skipped: (B, T + 1) int64, positions that text at a token has skipped: N - M for each image before it.
        offset: (B, T + 1) int64, how far a merged token sits from where text would; 0 for text.
        bias: (B, T + 1) float32, added to the attention logits of the token as a key; 0 for text.
        is_packed: Whether all three are 0, known without looking at them.
        most_skipped: No row has skipped more, known without looking at them.
        moved: (B, 2) int64, how far the packed positions behind a cache are from those counted from a mask, and from
            those counted from its length; None where they are the same. A caller may have given others, and stock's
            forward counts padding in front.
    """

    skipped: Tensor
    offset: Tensor
    bias: Tensor
    is_packed: bool
    most_skipped: int = 0
    moved: Tensor | None = None

    @classmethod
    def of_text(cls, num_rows: int, num_tokens: int, device: torch.device) -> "TokenLayout":
        """The layout of rows without images."""
        nothing = torch.zeros(num_rows, num_tokens + 1, dtype=torch.long, device=device)
        return cls(nothing, nothing, nothing.float(), True)

    @property
    def num_tokens(self) -> int:
        """Length of the rows."""
        return self.skipped.shape[1] - 1

    def columns(self, start: int | Tensor, length: int) -> Tensor:
        """Columns of the `length` tokens from `start`: (length,)."""
        return (start + torch.arange(length, device=self.skipped.device)).clamp(max=self.num_tokens)

    def shift(self, start: int | Tensor, length: int) -> Tensor:
        """What is added to the packed positions of the `length` tokens from `start`: (B, length)."""
        columns = self.columns(start, length)
        return self.skipped[:, columns] + self.offset[:, columns]

    def of_rows(self, num_rows: int) -> "TokenLayout":
        """Itself, or its only row for each of `num_rows`.

        Raises:
            ValueError: There are others than these rows.
        """
        if len(self.skipped) == num_rows:
            return self
        if len(self.skipped) == 1:
            return self.repeated(num_rows)
        raise ValueError(
            f"The cache was filled with {len(self.skipped)} rows, and now there are {num_rows}: which of them holds "
            f"which images is not known. Pick and repeat rows with the cache's own methods, batch_select_indices, "
            f"batch_repeat_interleave and reorder_cache, or go on with all rows."
        )

    def repeated(self, times: int) -> "TokenLayout":
        """Each row `times` times in place, as `generate` repeats rows."""
        return self if times == 1 else self._each(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def picked(self, rows: Tensor | list[int] | slice) -> "TokenLayout":
        """Some of its rows, by index."""
        return self._each(lambda tensor: tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TokenLayout":
        moved = None if self.moved is None else change(self.moved)
        skipped, offset, bias = map(change, (self.skipped, self.offset, self.bias))
        return replace(self, skipped=skipped, offset=offset, bias=bias, moved=moved)

    def moved_to(
        self, positions: Tensor, counted: Tensor, attention_mask: Tensor | None, past: int | Tensor
    ) -> "TokenLayout":
        """Itself, with the newest tokens, behind `past`, at packed `positions`, and `counted` otherwise (B or 1, L)."""
        num_rows, length = len(self.skipped), positions.shape[1]
        positions, counted = positions.to(counted.device).expand(num_rows, -1), counted.expand(num_rows, -1)
        last = torch.full_like(positions[:, :1], length - 1)
        if is_padding_mask(attention_mask):
            is_text = attention_mask[:, -length:].bool()
            last = (is_text * torch.arange(length, device=is_text.device)).argmax(dim=1, keepdim=True)
        end = positions.gather(1, last)
        moved = torch.cat((end - counted.gather(1, last), end + 1 - past - length), dim=1)
        if is_padding_mask(attention_mask):  # where a row has no new text
            before = moved.new_zeros(1, 2) if self.moved is None else self.moved
            before = before - length * torch.arange(2, device=moved.device)
            moved = moved.where(is_text.any(dim=1, keepdim=True), before)
        return replace(self, moved=moved)

    def go_on(self, counted: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Packed positions of new tokens that are `counted` otherwise (B or 1, L), behind those in the cache."""
        if self.moved is None:
            return counted
        return counted + (self.moved[:, :1] if is_padding_mask(attention_mask) else self.moved[:, 1:])

    def cut(self, num_tokens: int) -> "TokenLayout":
        """Its first `num_tokens`."""
        if num_tokens >= self.num_tokens:
            return self
        return self.followed_by(TokenLayout.of_text(len(self.skipped), 0, self.skipped.device), num_tokens)

    def followed_by(self, new: "TokenLayout", num_kept: int) -> "TokenLayout":
        """The first `num_kept` tokens of these and then the `new`."""
        kept = self.columns(0, num_kept)
        skipped_before = self.skipped[:, self.columns(num_kept, 1)]  # (B, 1)
        return TokenLayout(
            torch.cat((self.skipped[:, kept], new.skipped + skipped_before), dim=1),
            torch.cat((self.offset[:, kept], new.offset), dim=1),
            torch.cat((self.bias[:, kept], new.bias), dim=1),
            self.is_packed and new.is_packed,
            self.most_skipped + new.most_skipped,
            self.moved,
        )


def layout_of_images(
    image_mask: Tensor,
    places: Tensor | None,
    num_tokens: list[int],
    num_patches: int,
    attention_mass: float = 0.0,
    sizes: Tensor | None = None,
    samples: Tensor | None = None,
) -> TokenLayout:
    """The [`TokenLayout`] of prompts whose placeholders are those of images with `num_tokens` merged tokens each.

    Args:
        image_mask: (B, L) bool, the placeholders; as many as the sum of `num_tokens`.
        places: (sum of num_tokens,) int64, the patch of its image that each token sits at; None for packed positions.
        num_patches: N, patches of each image.
        attention_mass: Bias of a merged token, in logarithms of the patches that it stands for.
        sizes: (sum of num_tokens,) float32, how many patches each token stands for; None for N / M each.
        samples: (B, L), number of the packed sample that each token is in, where rows hold several.
    """
    index, count = place_in_image(num_tokens, image_mask.device)
    number = numbers_of_placeholders(image_mask, len(index))
    offset = skip = torch.zeros_like(index)
    if places is not None:
        offset, skip = places.to(index.device) - index, torch.where(index == count - 1, num_patches - count, 0)
    bias = attention_mass * (num_patches / count if sizes is None else sizes.to(count.device)).log()
    skipped = pad_left(skip[number].where(image_mask, 0).cumsum(1))
    if samples is not None:
        is_start = torch.nn.functional.pad(samples.diff(dim=1) != 0, (1, 1))
        skipped = skipped - skipped.where(is_start, 0).cummax(dim=1)[0]
    return TokenLayout(
        skipped,
        pad_right(offset[number].where(image_mask, 0)),
        pad_right(bias[number].where(image_mask, 0)),
        places is None and not attention_mass or all(count == num_patches for count in num_tokens),
        0 if places is None else sum(num_patches - count for count in num_tokens),
    )


def place_on_slots(image_mask: Tensor, num_tokens: list[int], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of one prompt sit whose images, with `num_tokens` each, sit on slots.

    Args:
        image_mask: (1, L) bool, the placeholders.

    Returns:
        Positions (L,), the patch of its image that a token sits at (L,), 0 for text, and how far text behind the prompt
        is from where it would be if each token counted as one (): int64.
    """
    tokens = torch.arange(image_mask.shape[1], device=image_mask.device)
    if not num_tokens:
        return tokens, torch.zeros_like(tokens), tokens.new_zeros(())
    of_images = torch.cat([slot_places(grid, number, image_mask.device) for number in num_tokens])
    layout = layout_of_images(image_mask, of_images, num_tokens, grid[0] * grid[1])
    return (
        tokens + layout.shift(0, len(tokens))[0],
        of_images[numbers_of_placeholders(image_mask, len(of_images))].where(image_mask, 0)[0],
        layout.skipped[0, -1],
    )


def numbers_of_placeholders(image_mask: Tensor, num_tokens: int) -> Tensor:
    """Which of the prompts' `num_tokens` image tokens sits at each placeholder of `image_mask`: (B, L) int64.

    Whatever the mask holds, all are numbers of tokens: a GPU may read them before the placeholders are checked.
    """
    return (image_mask.flatten().cumsum(0) - 1).clamp(0, num_tokens - 1).view_as(image_mask)


def place_in_image(num_tokens: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of each token within its image, and how many that image has, of images with `num_tokens`: (sum,) each."""
    tokens = torch.arange(sum(num_tokens), device=device)
    if len(set(num_tokens)) == 1:
        return tokens % num_tokens[0], torch.full_like(tokens, num_tokens[0])
    counts = torch.tensor(num_tokens, device=device)
    starts = counts.cumsum(0) - counts
    image = torch.repeat_interleave(counts, output_size=len(tokens))  # of each token
    return tokens - starts[image], counts[image]


def pad_left(tensor: Tensor) -> Tensor:
    """With a zero before the first of the last dimension."""
    return torch.nn.functional.pad(tensor, (1, 0))


def pad_right(tensor: Tensor) -> Tensor:
    """With a zero behind the last of the last dimension."""
    return torch.nn.functional.pad(tensor, (0, 1))


def is_padding_mask(attention_mask) -> bool:
    """Whether it is a mask (B, tokens) of which tokens are padding."""
    return isinstance(attention_mask, Tensor) and attention_mask.ndim == 2


def counted_positions(attention_mask: Tensor | None, past: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Positions of the `length` new tokens that count each token as one: (B or 1, length).

    Those of the tokens in a 2-D mask, padding left out, else one after the other.
    """
    if is_padding_mask(attention_mask):
        return (attention_mask.bool().cumsum(1) - 1).clamp(min=0)[:, -length:]
    return past + torch.arange(length, device=device)[None]


def samples_of(position_ids: Tensor) -> Tensor:
    """Number of the packed sample that each token is in, as transformers counts: (B, L)."""
    return pad_left((position_ids.diff(dim=1) != 1).cumsum(1))


def biased_causal_mask(
    layout: TokenLayout,
    past: int | Tensor,
    num_queries: int,
    keys: tuple[int, int],
    dtype: torch.dtype,
    padding_mask: Tensor | None = None,
    window: int | None = None,
    samples: Tensor | None = None,
) -> Tensor:
    """What is added to the attention logits: the layout's bias, the lowest number where a query must not look.

    Args:
        past: Tokens before the queries.
        keys: Number of keys and number of the first, as the cache gives them.
        padding_mask: (B, tokens), 0 where a token is padding.
        window: Tokens that a query looks back on, itself included, in text models with a sliding window.
        samples: (B, num_queries), number of the packed sample that each token is in.

    Returns:
        (B, 1, num_queries, keys) in `dtype`.
    """
    num_keys, first_key = keys
    device = layout.bias.device
    key = first_key + torch.arange(num_keys, device=device)
    query = (past + torch.arange(num_queries, device=device))[:, None]
    is_seen = key <= query  # (num_queries, num_keys)
    if window is not None:
        is_seen = is_seen & (key > query - window)
    is_seen = is_seen[None]
    if padding_mask is not None:
        is_seen = is_seen & padding_mask.bool()[:, key.clamp(max=padding_mask.shape[1] - 1)][:, None]
    if samples is not None:
        is_seen = is_seen & (samples[:, :, None] == samples[:, key.clamp(max=num_queries - 1)][:, None])
    bias = layout.bias[:, layout.columns(first_key, num_keys)][:, None]  # (B, 1, num_keys)
    return torch.where(is_seen, bias.to(dtype), torch.finfo(dtype).min)[:, None]


def biased_mask(mask: Tensor, layout: TokenLayout, dtype: torch.dtype) -> Tensor:
    """A 4-D attention mask of the caller's, True or 0 where a query looks, with the layout's bias: same shape."""
    bias = layout.bias[:, layout.columns(0, mask.shape[-1])][:, None, None]
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, bias.to(dtype), lowest)
    return (mask + bias).to(dtype).clamp(min=lowest)


class CarriesLayout:
    """Mixin of a cache: what picks, repeats or drops rows and tokens does so to the layout too."""

    token_layout: TokenLayout | None = None

    def reorder_cache(self, beam_idx):
        """As in transformers."""
        super().reorder_cache(beam_idx)
        self._change(lambda layout: layout.picked(beam_idx))

    def batch_select_indices(self, indices):
        """As in transformers."""
        super().batch_select_indices(indices)
        self._change(lambda layout: layout.picked(indices))

    def batch_repeat_interleave(self, repeats: int):
        """As in transformers."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda layout: layout.repeated(repeats))

    def crop(self, *args, **kwargs):
        """As in transformers."""
        super().crop(*args, **kwargs)
        self._change(lambda layout: layout.cut(int(self.get_seq_length())))

    def reset(self):
        """As in transformers."""
        super().reset()
        self.token_layout = None

    def _change(self, change):
        if self.token_layout is not None:
            self.token_layout = change(self.token_layout)

    def __reduce__(self):
        return empty_cache, (type(self).__mro__[2],), vars(self)


@functools.cache
def carrying(kind: type[Cache]) -> type[Cache]:
    """That kind of cache with a [`TokenLayout`], under the same name."""
    return type(kind.__name__, (CarriesLayout, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def empty_cache(kind: type[Cache]) -> Cache:
    """One of [`carrying`] `kind` whose attributes are still to come, as copy and pickle make it."""
    return object.__new__(carrying(kind))


def keep_layout(cache: Cache | None, layout: TokenLayout):
    """Lets a cache remember where its images are, and its own methods take it along.

    The cache of a forward that torch.compile has compiled remembers it, but its methods do not take it along.
    """
    if cache is None:
        return
    if not torch.compiler.is_compiling() and not isinstance(cache, CarriesLayout):
        cache.__class__ = carrying(type(cache))
    cache.token_layout = layout


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
