# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Which text an image is merged for: that of the turn which holds it.

A turn reaches from the end of an answer, or the start of the row or packed sample, to the start of the next answer. It
is the one rule that training rows, single turns, later turns of a chat and a KV cache, which keeps an image as its own
turn saw it, can all keep. Its question is what the user wrote in it: no placeholders, padding, answers or marks, and
nothing that stands before its first mark of a question, such as a system prompt.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .placeholders import check_on_device


UNMARKED_ANSWER = (
    "A question-aware merger cannot tell the question of the images in rows {rows} from its answer, and would read "
    "both: there are neither labels nor a mark of question_end_token_ids in their turns. Pass labels, or question_mask "
    "(batch, tokens); or make the prompts with the chat template, after `model.set_question_marks(processor)`."
)
EMPTY_QUESTION = (
    "The images in rows {rows} have no question: in their turns every token is answer (label other than -100), "
    "padding or a mark, so that a question-aware merger would train without one. Set the labels of the prompt to -100, "
    "or use question_aware=False; a question_mask of False leaves it out on purpose."
)


@dataclass
class TurnMarks:
    """Ids that tell turns apart.

    Attributes:
        question_start: Id sequences that open what a user writes, such as those of "USER:".
        question_end: Id sequences that end it, such as those of "ASSISTANT:"; what follows is answer to the next start.
        eos: Ids that end a sample, or its turn, where they are no part of such a sequence.
        bos: Ids that begin a sample.
    """

    question_start: list[list[int]]
    question_end: list[list[int]]
    eos: list[int]
    bos: list[int]

    @property
    def ids(self) -> list[int]:
        """Every id that means something here."""
        marks = self.question_start + self.question_end
        return sorted({*self.eos, *self.bos, *(id for mark in marks for id in mark)})


@dataclass
class Prompt:
    """A batch of prompts, and what is known about their tokens.

    Attributes:
        ids: (B, L) int64; of prompts given as embeddings only those that mean something to us are right.
        embeds: (B, L, text_dim), the language model's input embeddings where the prompts are given as such.
        image_mask: (B, L) bool, the image placeholders.
        new_from: Tokens before this one are in the cache already, with their images.
        attention_mask: (B, L or more), 0 where a token is padding; the last L columns count.
        position_ids: (B or 1, L or more); where they start again, a packed sample starts.
        answer_mask: (B, L or more) bool, what is known to be answer: in training, tokens whose label is not -100.
        question_mask: (B, L or more) bool, what the caller wants to be read.
        may_hold_answers: Whether there may be answers that nothing marks. Not in the prompt of `generate`.
    """

    ids: Tensor
    embeds: Tensor | None
    image_mask: Tensor
    new_from: int = 0
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    answer_mask: Tensor | None = None
    question_mask: Tensor | None = None
    may_hold_answers: bool = True

    @property
    def new_image_mask(self) -> Tensor:
        """(B, L - new_from) bool: placeholders of images that are not in the cache."""
        return self.image_mask[:, self.new_from :]

    def first_placeholders(self, num_tokens: list[int]) -> Tensor:
        """Where each new image begins, all rows on end, of images with `num_tokens` placeholders each: (I,)."""
        is_new = torch.nn.functional.pad(self.new_image_mask, (self.new_from, 0))
        count = is_new.flatten().cumsum(0)
        if len(set(num_tokens)) == 1:
            before = torch.arange(len(num_tokens), device=count.device) * num_tokens[0]
        else:
            before = torch.tensor([0, *accumulate(num_tokens[:-1])], device=count.device)
        return torch.searchsorted(count, before + 1).clamp(max=count.shape[0] - 1)


@dataclass
class Turns:
    """The turns of a batch.

    Attributes:
        number: (B, L) int64, the turn that each token belongs to; an answer's tokens to the question before it. Never
            falls from token to token and from row to row.
        is_text: (B, L) bool, whether a token is readable text of its turn's question.
        opens_answer: (B, L) bool, where a mark that ends a question begins.
    """

    number: Tensor
    is_text: Tensor
    opens_answer: Tensor

    def has_marked_answer(self, tokens: Tensor) -> Tensor:
        """Whether a mark opens an answer in the turns of `tokens` (n,), counted over all rows on end: (n,) bool."""
        return in_turns_with(self.opens_answer, self.number).flatten()[tokens]


@dataclass
class Question:
    """What each image is merged for: text shared by the images of a turn.

    Attributes:
        embeds: (B, T, text_dim), the language model's input embeddings.
        token_turns: (B, T) int64, whose question a token is: the index of the first image of its turn, or I where it is
            no image's.
        image_turns: (I,) int64, the index of the first image of the turn that each image is in.
        ids: (B, T) int64, the ids that the embeddings are of; None where they are not known.
    """

    embeds: Tensor
    token_turns: Tensor
    image_turns: Tensor
    ids: Tensor | None = None

    @classmethod
    def of_each_image(cls, embeds: Tensor, mask: Tensor | None = None, ids: Tensor | None = None) -> "Question":
        """Of embeddings (I, T, text_dim), one row an image.

        Args:
            mask: (I, T), True where they are question; default all.
            ids: (I, T) int64, the ids that they are of, which `MergerConfig.text_tower` needs.
        """
        num_images, num_tokens = embeds.shape[:2]
        images = torch.arange(num_images, device=embeds.device)
        question = cls(embeds, images[:, None].expand(num_images, num_tokens), images, ids)
        return question if mask is None else question.narrowed(mask)

    def to(self, device, dtype: torch.dtype | None = None, non_blocking: bool = False) -> "Question":
        """The same on another device, in another dtype."""
        embeds = self.embeds.to(device, dtype or self.embeds.dtype, non_blocking=non_blocking)
        ids = None if self.ids is None else self.ids.to(device)
        return Question(embeds, self.token_turns.to(device), self.image_turns.to(device), ids)

    def narrowed(self, mask: Tensor) -> "Question":
        """Only the tokens in `mask` (B, T) of it."""
        outside = ~mask.to(self.token_turns.device).bool()
        return replace(self, token_turns=self.token_turns.masked_fill(outside, len(self.image_turns)))

    def of_images(self, images: Tensor) -> "Question":
        """That of some of the images, by index and in rising order: (n,)."""
        turns = self.image_turns[images]
        order = torch.arange(len(images), device=turns.device)
        outside = turns.new_full((len(self.image_turns) + 1,), len(images))
        new_number = outside.scatter_reduce(0, turns, order, "amin")  # a turn is called by its first image
        return replace(self, token_turns=new_number[self.token_turns], image_turns=new_number[turns])

    @property
    def mask(self) -> Tensor:
        """(I, B·T) bool: which tokens, all rows on end, are the question of each image."""
        return self.token_turns.flatten() == self.image_turns[:, None]

    def rows_of_images(self) -> tuple[Tensor, Tensor]:
        """The row (I,) that holds the question of each image, and which of its tokens are that: (I, T) bool."""
        rows = (self.token_turns == self.image_turns[:, None, None]).any(dim=2).int().argmax(dim=1)
        return rows, self.token_turns[rows] == self.image_turns[:, None]

    @property
    def has_text(self) -> Tensor:
        """(I,) bool: whether an image has a question at all."""
        return self.mask.any(dim=1)


def split_turns(
    ids: Tensor,
    image_mask: Tensor,
    marks: TurnMarks,
    attention_mask: Tensor | None = None,
    answer_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Turns:
    """The turns of rows of `ids` (B, L), of which only those in `marks` need be right.

    Args:
        image_mask: (B, L) bool, the image placeholders.
        attention_mask: (B, L), 0 where a token is padding.
        answer_mask: (B, L) bool, what is known to be answer: in training, tokens whose label is not -100.
        position_ids: (B, L) or (1, L); where they start again, a packed sample starts.
    """
    starts, in_start = find_sequences(ids, marks.question_start)
    ends, in_end = find_sequences(ids, marks.question_end)
    ends = ends & ~in_start  # a start may begin with what ends the message before
    is_eos, is_bos = is_one_of(ids, marks.eos), is_one_of(ids, marks.bos)
    new_sample = is_bos | shift_right(is_eos & ~(in_start | in_end))
    if position_ids is not None:
        new_sample = new_sample | restarts(position_ids).expand_as(ids)
    new_sample[:, 0] = True
    is_answer = last_index(ends) > last_index(starts | new_sample)
    if answer_mask is not None:
        is_answer = is_answer | answer_mask.to(ids.device)
    new_turn = new_sample | (shift_right(is_answer) & ~is_answer)
    number = new_turn.flatten().cumsum(0).view_as(ids)
    is_before_start = in_turns_with(starts, number) & (last_index(starts) < last_index(new_turn))
    is_text = ~(is_answer | image_mask | in_start | is_eos | is_bos | is_before_start)
    if attention_mask is not None:
        is_text = is_text & attention_mask.to(ids.device).bool()
    return Turns(number, is_text, ends)


def question_of_images(embeds: Tensor, turns: Turns, images: Tensor, ids: Tensor | None = None) -> Question:
    """The question of each image, from `embeds` (B, L, text_dim) and where the `images` (I,) begin, rows on end.

    Args:
        ids: (B, L), what the embeddings are of, if that is known.
    """
    tokens = turns.number.flatten()
    turn_of_image, num_images = tokens[images], len(images)
    image = torch.searchsorted(turn_of_image, tokens)  # the first of the turn, if the turn has any
    is_question = (turn_of_image[image.clamp(max=num_images - 1)] == tokens) & turns.is_text.flatten()
    token_turns = image.where(is_question, num_images).view_as(turns.number)
    question = Question(embeds, token_turns, torch.searchsorted(turn_of_image, turn_of_image), ids)
    return question.to(embeds.device)


def in_turns_with(mask: Tensor, number: Tensor) -> Tensor:
    """Which tokens are in a turn, by `number` (B, L), that holds a True of `mask` (B, L): (B, L) bool."""
    turns = number.flatten()
    return turns.new_zeros(turns.shape[0] + 1).index_add(0, turns, mask.flatten().long())[number] > 0


def find_sequences(ids: Tensor, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Where one of `sequences` begins in `ids` (B, L), and which tokens are part of one: two (B, L) bool."""
    length, longest = ids.shape[1], max([1, *map(len, sequences)])
    padded = torch.nn.functional.pad(ids, (0, longest - 1), value=-2)
    positions, begins = torch.arange(length, device=ids.device), torch.zeros_like(ids, dtype=torch.bool)
    ends, last_ids = torch.zeros_like(ids), defaultdict(list)
    for *first, last in sequences:
        last_ids[tuple(first)].append(last)
    for first, last in last_ids.items():  # a few, of a few ids, which as numbers need not go to the device
        found = is_one_of(padded[:, len(first) : len(first) + length], last)
        for offset, id in enumerate(first):
            found = found & (padded[:, offset : offset + length] == id)
        begins, ends = begins | found, torch.maximum(ends, found * (positions + len(first) + 1))
    return begins, ends.cummax(dim=1)[0] > positions


def is_one_of(ids: Tensor, wanted: list[int]) -> Tensor:
    """Which ids (B, L) are among those wanted."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for id in wanted:
        found = found | (ids == id)
    return found


def shift_right(mask: Tensor) -> Tensor:
    """Each row of a mask (B, L) one token later."""
    return torch.nn.functional.pad(mask[:, :-1], (1, 0))


def last_index(mask: Tensor) -> Tensor:
    """Index of the latest True up to each token of a mask (B, L), -1 where there is none."""
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return positions.where(mask, -1).cummax(dim=1)[0]


def restarts(position_ids: Tensor) -> Tensor:
    """Where positions (B, L) start again: at 0, or below the one before."""
    return (position_ids == 0) | torch.nn.functional.pad(position_ids.diff(dim=1) < 0, (1, 0))


def turn_marks_of(config) -> TurnMarks:
    """Ids that tell the turns of a prompt apart for the model of a [`LlavaMergeConfig`]."""
    eos, bos = (
        [id for id in ([ids] if isinstance(ids, int) else ids or ()) if id >= 0]  # some say -1 where there is none
        for ids in (config.text_config.eos_token_id, config.text_config.bos_token_id)
    )
    merger_config = config.merger_config
    starts, ends = merger_config.question_start_token_ids, merger_config.question_end_token_ids
    return TurnMarks(starts or [], ends or [], eos, bos)


def as_row_mask(name: str, mask, shape: torch.Size) -> Tensor | None:
    """A mask (B, L or more) of a prompt of `shape` (B, L), if any; with a filled cache it also covers what is in there.

    Raises:
        ValueError: It is not (batch, tokens), so that padding or answers cannot be told from the question.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask[:, -shape[1] :]
    if not isinstance(mask, Tensor) or mask.shape != shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} is {found}, but a question-aware merger reads the text where it is true and needs it as "
            f"(batch, tokens)={tuple(shape)}. Pass the 2-D mask that the processor returns."
        )
    return mask.bool()


def check_each_image(is_right: Tensor, rows: Tensor, message: str):
    """Raises `message` with the {rows} of the images that are not right; both (I,).

    Raises:
        ValueError: There is one.
    """
    check_on_device(
        is_right.all(),
        message,
        lambda: message.format(rows=", ".join(map(str, rows[~is_right].unique().tolist()))),
    )


class ReadsPrompt:
    """Mixin of the headless model: where a prompt has images, and what they are asked."""

    def get_image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where the prompt has image placeholders: (B, L) bool. Of both, `inputs_embeds` count, as in `generate`."""
        return self._find_ids(input_ids, inputs_embeds, [self.config.image_token_id]) == self.config.image_token_id

    def _find_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, wanted: list[int]) -> Tensor:
        """(B, L) int64: ids of a prompt, of which only the `wanted` need be right where embeddings are given."""
        if inputs_embeds is None:
            return input_ids
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        wanted = [id for id in wanted if id < self.config.text_config.vocab_size]  # others are in no embeddings
        for embed, id in zip(self.get_input_embeddings()(ids.new_tensor(wanted)), wanted, strict=True):
            ids = ids.masked_fill((inputs_embeds == embed).all(dim=-1), id)
        return ids

    @property
    def turn_marks(self) -> TurnMarks:
        """Ids that tell the turns of a prompt apart."""
        return turn_marks_of(self.config)

    @property
    def reads_question(self) -> bool:
        """Whether the merger needs the question in this call."""
        return self.merger_enabled and self.config.merger_config.question_aware

    def read_prompt(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, new_from: int = 0, **masks: Tensor | None
    ) -> Prompt:
        """A prompt given as ids or as embeddings, with the `masks` of a [`Prompt`]."""
        wanted = [self.config.image_token_id, *(self.turn_marks.ids if self.reads_question else ())]
        ids = self._find_ids(input_ids, inputs_embeds, wanted)
        return Prompt(ids, inputs_embeds, ids == self.config.image_token_id, new_from, **masks)

    def get_question(self, prompt: Prompt, num_tokens: list[int]) -> Question | None:
        """What each image is merged for, of images with `num_tokens` placeholders each; None where nothing reads it.

        Raises:
            ValueError: A mask is not (batch, tokens), or the question cannot be told from the answer, or is empty.
        """
        if not self.reads_question or not num_tokens:
            return None
        shape = prompt.ids.shape
        attention_mask, answer_mask, question_mask = (
            as_row_mask(name, getattr(prompt, name), shape)
            for name in ("attention_mask", "answer_mask", "question_mask")
        )
        positions = None if prompt.position_ids is None else prompt.position_ids[:, -shape[1] :]
        turns = split_turns(prompt.ids, prompt.image_mask, self.turn_marks, attention_mask, answer_mask, positions)
        images = prompt.first_placeholders(num_tokens)
        embeds = self.get_input_embeddings()(prompt.ids) if prompt.embeds is None else prompt.embeds
        question = question_of_images(embeds, turns, images, prompt.ids if prompt.embeds is None else None)
        if question_mask is not None:
            return question.narrowed(question_mask)
        rows = images // shape[1]
        if prompt.may_hold_answers and answer_mask is None:
            check_each_image(turns.has_marked_answer(images), rows, UNMARKED_ANSWER)
        if prompt.may_hold_answers and (self.training or answer_mask is not None):
            check_each_image(question.has_text, rows, EMPTY_QUESTION)
        return question
