# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The ids that a chat template writes between question and answer."""

import os

from transformers.utils import logging

from .compat_processing import MergedPlaceholderProcessor


logger = logging.get_logger(__name__)

USER, ANSWER, NEXT_USER = "QUESTIONONE", "ANSWERONE", "QUESTIONTWO"


def find_question_marks(processor) -> dict[str, list[list[int]]]:
    """`question_start_token_ids` and `question_end_token_ids` of a [`MergerConfig`], from a processor's chat template.

    Raises:
        ValueError: It has no chat template, or one that writes nothing between a question and its answer.
    """
    end, start = text_between_messages(processor)
    eos = processor.tokenizer.eos_token
    if eos and eos not in end:  # an answer that was cut off has none
        start = start.removeprefix(eos)
    end, start = (mark.lstrip().rstrip(" ") for mark in (end, start))
    if not end:
        raise ValueError(
            "The chat template writes nothing between a question and its answer, so that a question-aware merger "
            "cannot tell them apart. Set question_end_token_ids of the merger_config."
        )
    return {
        "question_start_token_ids": tokens_of_mark(processor.tokenizer, start),
        "question_end_token_ids": tokens_of_mark(processor.tokenizer, end),
    }


def text_between_messages(processor) -> tuple[str, str]:
    """What the chat template writes between a question and its answer, and between that and the next question."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise ValueError(
            "The processor has no chat template, so that a question-aware merger cannot tell question from answer. Set "
            "processor.chat_template, or question_end_token_ids of the merger_config."
        )
    roles = {USER: "user", ANSWER: "assistant", NEXT_USER: "user"}
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for text, role in roles.items()]
    rendered = processor.apply_chat_template(chat, chat_template=template, tokenize=False)
    between_first, _, rest = rendered.partition(USER)[2].partition(ANSWER)
    return between_first, rest.partition(NEXT_USER)[0]


def tokens_of_mark(tokenizer, mark: str) -> list[list[int]]:
    """The ids of `mark`, which tokenizers write differently behind a space, a line break and the end of an answer."""
    found = []
    for before in ("x ", "x\n", tokenizer.eos_token or "", ""):
        alone, marked = (encode(tokenizer, text) for text in (before, before + mark))
        ids = marked[len(os.path.commonprefix([alone, marked])) :]
        if ids and ids not in found:
            found.append(ids)
    return found


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def read_questions_of_folder(merger_config, path: str, hub_kwargs: dict):
    """Sets the marks of a question-aware `merger_config`, where it has none, from the processor at `path`.

    Returns:
        The tokenizer of that processor; None where there is no processor.
    """
    tokenizer = None
    try:
        processor = MergedPlaceholderProcessor.from_pretrained(path, **hub_kwargs)
        tokenizer = processor.tokenizer
        if merger_config.question_end_token_ids is None:
            merger_config.update(find_question_marks(processor))
    except (OSError, ValueError, ImportError) as error:
        if merger_config.question_end_token_ids is None:
            logger.warning(
                f"{path} has no chat template that tells a question from its answer, so that a question-aware merger "
                f"reads prompts of several turns whole; model.set_question_marks(processor) sets one. ({error})"
            )
    return tokenizer
