# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What a prompt says to merging: where images and questions are."""

import torch
from torch import Tensor

from .placeholders import check_on_device
from .question_turns import Prompt, Question, TurnMarks, question_of_images, split_turns


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
