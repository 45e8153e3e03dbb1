# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Where the tokens of a prompt with merged images sit, and how much each weighs. Pure functions on tensors.

*Packed* positions count every token as one, so also a merged token that stands for many patches. What merging changes
is kept as a difference to them, which fits every way of counting: from a mask, from a cache, or by the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .merging_grid import slot_places


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
