# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The ids that a chat template writes around what a user says; travels where a checkpoint does not know them."""

import os
import re
import string
from itertools import dropwhile

from transformers.utils import logging

from .processing_llava_merge import MergedPlaceholderProcessor


logger = logging.get_logger(f"transformers.{__name__}")

CHAT = {"QUESTIONONE": "user", "ANSWERONE": "assistant", "QUESTIONTWO": "user"}
CHAT_OF_USERS = {"QUESTIONONE": "user", "QUESTIONTWO": "user"}
CHAT_WITH_SYSTEM = {"SYSTEMONE": "system", "QUESTIONONE": "user"}
CHAT_WITH_TOOL = {"QUESTIONONE": "user", "TOOLONE": "tool"}


def find_question_marks(processor) -> dict[str, list[list[int]]]:
    """`question_start_token_ids` and `question_end_token_ids` of a [`MergerConfig`], from a processor's chat template.

    A question starts behind what the template writes before every text of a user. It ends at the special token that the
    template writes behind it, or where there is none, at all that it writes there.

    Raises:
        ValueError: It has no chat template, or one that takes no question with an answer or writes nothing between
            them, or a tokenizer that cannot say which characters its tokens are of.
    """
    tokenizer, image = processor.tokenizer, processor.image_token
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} cannot say which characters a token is of, so that the marks of the chat "
            f"template cannot be found. Load the processor with use_fast=True, or set question_end_token_ids of the "
            f"merger_config."
        )
    special = [token for token in tokenizer.get_added_vocab() if token.strip()]
    first, behind, later = (split_at(special, text) for text in text_before_messages(processor, CHAT) or ("", "", ""))
    end = without_first(behind, ())
    if not end:
        raise ValueError(
            "The chat template takes no question with an answer, or writes nothing between them, so that a "
            "question-aware merger cannot tell them apart. Set question_end_token_ids of the merger_config."
        )
    closing = end[:1] if end[0] in special else ["".join(end)]
    outer = (tokenizer.bos_token, tokenizer.eos_token, *closing)
    shared = without_first(common_suffix(first, later), outer)
    start = "".join(shared if re.search(r"\w", "".join(shared)) else without_first(later, outer))
    resuming, interrupting = marks_between_messages(processor, start.rstrip(), closing[0].rstrip(), "".join(later))
    before = ("", "x ", "x  ", "x\n", "x\n\n", f"{image} ", f"{image}\n", tokenizer.eos_token or "")
    attached = () if behind[0].isspace() else ("x", "x.", "x?", "x!")
    starts = dict.fromkeys((start, *resuming), before)
    ends = {closing[0]: before + attached} | dict.fromkeys(interrupting, (start,))
    return {
        "question_start_token_ids": ids_of_marks(processor, starts, whole=True),
        "question_end_token_ids": ids_of_marks(processor, ends),
    }


def marks_between_messages(processor, start: str, end: str, later: str) -> tuple[list[str], list[str]]:
    """What else opens what a user writes in a turn, and what else ends it: two lists.

    The first are what ends a message and opens the user's, which ends no turn, and what Llama-2 writes behind a system
    prompt in the user's turn. The second are what it writes before that, and Qwen before the text of a tool there.

    Args:
        start: What opens the user's text.
        end: What ends it.
        later: All that stands between an answer and the next question.
    """
    if not start:
        return [], []
    before_system, behind_system = text_before_messages(processor, CHAT_WITH_SYSTEM) or ("", "")
    _, before_tool = text_before_messages(processor, CHAT_WITH_TOOL) or ("", "")
    _, between_users = text_before_messages(processor, CHAT_OF_USERS) or ("", later)
    openings = [before_tool.rpartition(start)[2]]
    resuming = [between_users.rstrip()] if between_users.lstrip().startswith(end) else []
    if start in before_system and end in behind_system:  # it is written as a user's message, of another turn
        resuming = []
    elif start in before_system:
        openings.append(before_system.rpartition(start)[2])
        resuming.append(behind_system)
    return resuming, [opening for opening in openings if not opening.startswith(end)]


def text_before_messages(processor, chat: dict[str, str]) -> list[str] | None:
    """What the chat template writes before each message of `chat`, texts and roles; None where it takes no such chat.

    Raises:
        ValueError: There is no chat template.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise ValueError(
            "The processor has no chat template, so that a question-aware merger cannot tell question from answer. Set "
            "processor.chat_template, or question_end_token_ids of the merger_config."
        )
    for content in (lambda text: [{"type": "text", "text": text}], str):  # older templates take no list of parts
        messages = [{"role": role, "content": content(text)} for text, role in chat.items()]
        try:
            rendered = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # templates raise what they like
            continue
        *before, _ = re.split("|".join(chat), rendered)
        if len(before) == len(chat) and "'type'" not in rendered:
            return before
    return None


def split_at(special: list[str], text: str) -> list[str]:
    """A text in its special tokens and the characters between them."""
    return re.findall("|".join([*map(re.escape, sorted(special, key=len, reverse=True)), "."]), text, re.DOTALL)


def without_first(pieces: list[str], unwanted) -> list[str]:
    """Pieces of a text from the first that is neither blank nor unwanted."""
    return list(dropwhile(lambda piece: piece.isspace() or piece in unwanted, pieces))


def common_suffix(first: list[str], second: list[str]) -> list[str]:
    """The longest end that two lists share."""
    return os.path.commonprefix([first[::-1], second[::-1]])[::-1]


def ids_of_marks(processor, marks: dict[str, tuple[str, ...]], whole: bool = False) -> list[list[int]]:
    """The ids of `marks` behind each of the texts that they map to, for tokenizers write them differently there.

    A mark's last token may hold more space than the template writes behind it.

    Args:
        whole: Also with the space that the template writes behind it.
    """
    tokenizer, image, found = processor.tokenizer, processor.image_token, []
    for mark, before in marks.items():
        name = mark.strip()
        space = mark[len(mark.rstrip()) :]
        behind = ["", "\n", *(space + more for more in ("", "\n", "\n\n", "\n\n\n", image))]
        behind += [] if space or whole else joined_to(tokenizer, name[-1:])
        for text in before if name else ():
            found += [ids_in_text(tokenizer, text, name, after) for after in behind]
            found += [ids_in_text(tokenizer, text, name + space, after) for after in ("", image) if whole]
    known = [ids for ids in found if ids and tokenizer.unk_token_id not in ids]
    return [ids for index, ids in enumerate(known) if ids not in known[:index]]


def joined_to(tokenizer, last: str) -> list[str]:
    """What may stand behind the `last` character of a mark in one token with it, as an answer that begins with "("."""
    return [
        token[1:]
        for token in tokenizer.get_vocab()
        if len(token) > 1 and token[0] == last and {*token} <= {*string.punctuation}
    ]


def ids_in_text(tokenizer, before: str, mark: str, after: str) -> list[int]:
    """The ids of tokens that hold characters of `mark` where it stands between other text."""
    encoding = tokenizer(before + mark + after, add_special_tokens=False, return_offsets_mapping=True)
    start, stop = len(before), len(before) + len(mark)
    pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return [id for id, (begin, end) in pairs if begin < stop and end > start]


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
