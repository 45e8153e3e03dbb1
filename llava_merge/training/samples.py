# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""One row of a dataset as chat messages and pictures, whatever the format."""

import json
import math
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from llava_merge.training.json_rows import BROKEN
from llava_merge.training.pictures import open_image, path_of_file_url, scheme_of


IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURNS = ("conversations", "messages", "conversation")  # columns, in the order in which they are looked for
QUESTIONS = ("question", "query", "instruction", "text", "prompt")
ANSWERS = ("answers", "answer", "label", "response", "output", "completion", "correct_choice_idx", "direct_answers")
PICTURES = (
    *("images", "image", "imgname", "image_path", "img_path", "image_file", "img_file", "decoded_image"),
    *("img", "imageId", "image_id"),
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPTIONS = ("choices", "options")
NOT_READ = ("videos", "video", "audios", "audio")
INLINE = ("image", "image_url", "url", "path")  # of a part of a message
NAMED_LIKE_PICTURE = re.compile(r"image|img|picture|photo", re.IGNORECASE)
FILE_OF_PICTURE = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?)|data:image/.*", re.IGNORECASE | re.DOTALL)
TAG_OF_PICTURE = re.compile(r"<img>[^<\n]{1,500}</img>")
COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})")


@dataclass(frozen=True)
class Sample:
    """A conversation.

    Attributes:
        name: What errors call it: its file and its id or number.
        messages: Chat messages, each {"role", "content": [{"type": "image"} or {"type": "text", "text"}]}.
        images: Of each placeholder in reading order: a path or URL, a `PIL.Image.Image`, or bytes of a file.
        untrained: Numbers of messages that are answers not to be learnt: `loss: false`.
        num_left_out: Turns of the row that are no messages: answers before the first question, questions after the last
            answer.
    """

    name: str
    messages: list[dict]
    images: list
    untrained: frozenset[int] = frozenset()
    num_left_out: int = 0

    def open_images(self) -> list[Image.Image]:
        """The pictures, in RGB and upright.

        Raises:
            ValueError: One is missing or broken; it is named.
        """
        return open_images(self.name, self.images)


def open_images(name: str, images: list) -> list[Image.Image]:
    """The pictures of the row of a name.

    Raises:
        ValueError: One is missing or broken; it is named.
    """
    try:
        return [open_image(image) for image in images]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def located(image, folder: Path):
    """An image of a row: a relative path as one in the `folder`, a name without an extension with it.

    Raises:
        ValueError: It is nothing that can be an image.
    """
    if isinstance(image, dict):  # of the datasets library, not decoded; or of a chat part
        image = next((image[key] for key in ("bytes", *INLINE) if image.get(key) is not None), image)
    if isinstance(image, int) and not isinstance(image, bool):
        return str(folder / names_in(folder).get(str(image), f"{image}.jpg"))
    if isinstance(image, str) and scheme_of(image) == "file":
        with suppress(ValueError):  # said where it is opened
            return path_of_file_url(image)
    if isinstance(image, os.PathLike) or isinstance(image, str) and not scheme_of(image):
        text = os.fspath(image)
        return str(folder / (text if Path(text).suffix else names_in(folder).get(text, text)))
    if not isinstance(image, str | bytes | Image.Image):
        raise ValueError(f"image {type(image).__name__}: has to be a path, a URL, bytes or a PIL image.")
    return image


def names_in(folder: Path) -> dict[str, str]:
    """Files by what rows call them: without the extension, and COCO's also by their number."""
    return listed_names(folder, os.stat(folder).st_mtime_ns) if folder.is_dir() else {}


@lru_cache(maxsize=4)
def listed_names(folder: Path, modified: int) -> dict[str, str]:
    """[`names_in`] a folder as it was when it was last modified."""
    names: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        stem = Path(name).stem
        number = COCO_NAME.fullmatch(stem)
        names |= {number[1].lstrip("0"): name} if number else {}
        names[stem] = name
    return names


def read_sample(row: dict, name: str, image_folder: Path) -> Sample:
    """A row as a conversation to learn from.

    It has turns ("conversations" as LLaVA-Instruct and ShareGPT, "messages", "prompt" with "completion"), or a question
    with one answer or several, of which the most frequent is learnt. Answers before the first question are left out,
    and questions after the last answer, both with their images.

    Raises:
        ValueError: It is none of these, or its images, placeholders and answers do not fit together; `name` is in it.
    """
    try:
        turns, references = read_turns(row)
        if references:
            turns.append({"role": "assistant", "content": split_text(Counter(references).most_common(1)[0][0])})
        refuse_images_in_answers(turns)
        images = [located(image, image_folder) for image in images_of(row, turns)]
        answered = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"] if references != () else []
        messages, images = kept_turns(turns, images, max(answered, default=-1))
        check_sample(messages)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    untrained = frozenset(at for at, message in enumerate(messages) if not message.pop("loss", True))
    return Sample(name, messages, images, untrained, len(turns) - len(messages))


def read_turns(row: dict) -> tuple[list[dict], tuple[str, ...] | None]:
    """The messages of a row, and the right answers to the last; None where the answers are among the messages.

    Raises:
        ValueError: There is no question in it.
    """
    if BROKEN in row:
        raise ValueError(f"{row[BROKEN]}.")
    raw = next((parsed(row[key], key) for key in TURNS if row.get(key) is not None), None)
    if raw is None and isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        raw = [*row["prompt"], *row["completion"]]
    references = None
    if raw is None:
        raw, options = question_turns(row)
        references = read_answers(first_of(row, ANSWERS), bool(options))
    if not isinstance(raw, list):
        raise ValueError(f"its turns are {type(raw).__name__}; give a list of messages, each with role and content.")
    messages = [read_message(message, f"message {at + 1}") for at, message in enumerate(raw)]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("it has no question (role user or human).")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not any(each["role"] == "system" for each in messages):
        messages.insert(0, {"role": "system", "content": split_text(system)})
    return messages, references


def parsed(value, name: str):
    """The value of a column that holds a list, or JSON of one.

    Raises:
        ValueError: It is text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name!r} is text that is no JSON ({error}); give a list.") from error


def first_of(row: dict, names: tuple[str, ...]):
    """The first of the columns `names` that has a value; an empty text or list is none."""
    return next((row[name] for name in names if is_filled(row.get(name))), None)


def is_filled(value) -> bool:
    """Whether a column has a value."""
    return value is not None and not (isinstance(value, str | bytes | list | tuple | dict) and len(value) == 0)


def question_turns(row: dict) -> tuple[list[dict], list[str]]:
    """The turns of a row with a question: its `history` of pairs, and the question, with `input` after it; and options.

    Raises:
        ValueError: It has none.
    """
    question, rest = first_of(row, QUESTIONS), row.get("input")
    if question is None:
        raise ValueError(
            f"it has the columns {', '.join(sorted(map(str, row))) or 'none'}; a sample has conversations (and image) "
            f"as in LLaVA-Instruct, or messages (and images), or a question and an answer (and image)."
        )
    pairs = row.get("history") or ()
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError("'history' has to hold pairs of a question and an answer.")
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    lines = [as_text(question, "the question"), *([rest] if isinstance(rest, str) and rest.strip() else [])]
    options = read_options(row)
    if not all(option in lines[0] for option in options):
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return [*turns, {"role": "user", "content": "\n".join(lines)}], options


def read_options(row: dict) -> list[str]:
    """What can be chosen from: a list in a column of its own, or columns A, B and so on.

    Raises:
        ValueError: It is no list of texts.
    """
    options = first_of(row, OPTIONS)
    if options is None and is_filled(row.get("A")) and is_filled(row.get("B")):
        options = [row[letter] for letter in LETTERS if is_filled(row.get(letter))]
    listed = parsed(options, "options") if options is not None else []
    if not isinstance(listed, list | tuple):
        raise ValueError(f"its options are {type(listed).__name__}; give a list of texts.")
    return [as_text(option, "an option") for option in listed]


def read_answers(answers, of_options: bool = False) -> tuple[str, ...]:
    """Right answers of a row: one, several, JSON of several, or several as {"answer": ...}, as VQA has them.

    Args:
        of_options: Numbers count options from 0, and become their letters.

    Raises:
        ValueError: One is no text and no number.
    """
    if isinstance(answers, dict):
        answers = first_of(answers, ("answer", "text"))
    if isinstance(answers, str) and answers.startswith('["'):
        answers = parsed(answers, "answers")
    listed = answers if isinstance(answers, list | tuple) else [] if answers is None else [answers]
    texts = [each.get("answer") if isinstance(each, dict) else each for each in listed]
    if of_options:
        texts = [LETTERS[text] if type(text) is int and 0 <= text < len(LETTERS) else text for text in texts]
    return tuple(as_text(text, "an answer") for text in texts)


def as_text(value, what: str) -> str:
    """Text, also of a number.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise ValueError(f"{what} is {type(value).__name__} ({str(value)[:40]}); write it as text.")


def read_message(message, name: str) -> dict:
    """A message with its content in parts, of which images hold what they show where it stands there.

    Raises:
        ValueError: It has no known role, or content that is none.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{name} is {type(message).__name__}; a message has role (or from) and content (or value).")
    given = first_of(message, ("from", "role"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"role {given!r} of {name}: has to be one of {', '.join(ROLES)}.")
    content = first_of(message, ("value", "content"))
    parts = content if isinstance(content, list | tuple) else [] if content is None else [content]
    read = {"role": role, "content": [part for each in parts for part in read_part(each, name)]}
    learnt = all(message.get(key) is None or message[key] != 0 for key in ("loss", "weight"))
    return read if learnt else {**read, "loss": False}


def read_part(part, name: str) -> list[dict]:
    """A part of a message's content; text is split at its placeholders.

    Raises:
        ValueError: It is neither text nor image.
    """
    if not isinstance(part, dict):
        text = as_text(part, f"the content of {name}")
        tag = TAG_OF_PICTURE.search(text)
        if tag:
            raise ValueError(
                f"{name} names a picture in its text, {tag[0]}. Write {IMAGE} there, and the column image."
            )
        return split_text(text)
    kind = part.get("type") or ("text" if isinstance(part.get("text"), str) else None)
    if kind == "text":
        return [{"type": "text", "text": as_text(part.get("text") or "", f"the text of {name}")}]
    if kind not in ("image", "image_url"):
        raise ValueError(f"content of type {kind!r} in {name}: has to be 'text' or 'image'.")
    shown = first_of(part, INLINE)
    if shown is None and isinstance(part.get("base64"), str):
        shown = f"data:image/png;base64,{part['base64']}"  # Pillow looks at the file itself
    return [{"type": "image"} if shown is None else {"type": "image", "shown": shown}]


def split_text(text: str) -> list[dict]:
    """Text with placeholders as parts, without the line breaks that LLaVA-Instruct writes around them."""
    first, *rest = text.split(IMAGE)
    parts = [{"type": "text", "text": first.removesuffix("\n") if rest else first}]
    for index, piece in enumerate(rest):
        last = index == len(rest) - 1
        parts += [{"type": "image"}, {"type": "text", "text": piece.removeprefix("\n") if last else piece.strip("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def images_of(row: dict, turns: list[dict]) -> list:
    """The images of a row, in reading order; placeholders for them are put before the first question if it has none.

    Raises:
        ValueError: There are more or fewer than placeholders, or a column that is not read looks like one of images.
    """
    places = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
    inline = [part.pop("shown", None) for part in places]
    given = first_of(row, PICTURES)
    if isinstance(given, str) and given.startswith('["'):
        given = parsed(given, "images")
    images = list(given) if isinstance(given, list | tuple) else [given]
    images = [image for image in images if is_filled(image)]
    refuse_unread(row, bool(images or places))
    if images and not places:
        asked = next(turn for turn in turns if turn["role"] == "user")
        asked["content"] = [{"type": "image"} for _ in images] + asked["content"]
        return images
    num_open = inline.count(None)
    if not num_open:  # each stands in its message
        return inline
    if num_open != len(images):
        raise ValueError(f"it has {len(images)} images for {num_open} placeholders {IMAGE}; write one for each.")
    rest = iter(images)
    return [next(rest) if image is None else image for image in inline]


def refuse_unread(row: dict, has_images: bool):
    """Refuses a row with what is not read: videos, sounds, or, where it has no images, a column that looks like one.

    Raises:
        ValueError: So it is. A row that says `image: null` is of text alone, unless a column holds a picture.
    """
    for name in NOT_READ:
        if is_filled(row.get(name)):
            raise ValueError(f"its column {name!r} is not read: rows are of text and images.")
    says_none = any(name in row for name in PICTURES)
    for name, value in row.items() if not has_images else ():
        named, picture = NAMED_LIKE_PICTURE.search(str(name)) and is_filled(value), is_picture(value)
        if (picture and (named or not isinstance(value, str))) if says_none else (picture or named):
            raise ValueError(
                f"its column {name!r} looks like a picture's, and is not read. Call it image; or, if the row is of "
                f"text alone, add image: null."
            )


def is_picture(value) -> bool:
    """Whether a column of an unknown name holds a picture, or the name of one."""
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, Image.Image) or isinstance(value, str) and bool(FILE_OF_PICTURE.fullmatch(value))


def kept_turns(turns: list[dict], images: list, last: int) -> tuple[list[dict], list]:
    """Turns from the first question to number `last`, and their images; a system message stays."""
    first = [turn["role"] for turn in turns].index("user")
    kept, kept_images, remaining = [], [], iter(images)
    for at, turn in enumerate(turns):
        shown = [next(remaining) for part in turn["content"] if part["type"] == "image"]
        if turn["role"] == "system" or first <= at <= last:
            kept.append(turn)
            kept_images += shown
    return kept, kept_images


def first_turn(turns: list[dict], images: list) -> tuple[list[dict], list, str | None]:
    """The turns up to the first answer to a question, their images, and that answer, None where there is none."""
    asked = [turn["role"] for turn in turns].index("user")
    reply = next((at for at, turn in enumerate(turns) if at > asked and turn["role"] == "assistant"), None)
    last = len(turns) if reply is None else reply - 1
    return *kept_turns(turns, images, last), None if reply is None else text_of(turns[reply])


def refuse_images_in_answers(turns: list[dict]):
    """Refuses answers that hold images.

    Raises:
        ValueError: One does.
    """
    if any(part["type"] == "image" for turn in turns if turn["role"] == "assistant" for part in turn["content"]):
        raise ValueError(f"an answer holds {IMAGE}; images belong into questions.")


def check_sample(messages: list[dict]):
    """Refuses what cannot be trained on.

    Raises:
        ValueError: There is no answer to be learnt, or an empty one.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("it has no answer (role assistant or gpt), so that nothing could be learnt from it.")
    empty = [index for index, answer in enumerate(answers) if not text_of(answer).strip()]
    if empty:
        raise ValueError(f"answer {empty[0] + 1} of {len(answers)} is empty.")
    if not any(answer.get("loss", True) for answer in answers):
        raise ValueError("each of its answers has loss: false, so that nothing could be learnt from it.")


def text_of(message: dict) -> str:
    """The text of a message, without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
