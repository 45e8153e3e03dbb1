# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""One row of a dataset as chat messages and pictures, whatever the format."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_merge.pictures import open_picture


IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """A conversation.

    Attributes:
        name: What errors call it: its file and its id or number.
        messages: Chat messages, each {"role", "content": [{"type": "image"} or {"type": "text", "text"}]}.
        images: Of each placeholder in reading order: a path or URL, a `PIL.Image.Image`, or bytes of a file.
    """

    name: str
    messages: list[dict]
    images: list

    def open_images(self) -> list[Image.Image]:
        """The pictures, in RGB.

        Raises:
            ValueError: One is missing or broken; it is named.
        """
        try:
            return [open_image(image) for image in self.images]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def open_image(image) -> Image.Image:
    """A picture of a dataset: a path or URL, bytes of a file, or one that is open already.

    Raises:
        ValueError: It is missing or broken.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, bytes):
        return open_picture(image)
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"its bytes are no picture that can be opened: {error}") from error


def read_sample(row: dict, name: str, image_folder: Path) -> Sample:
    """A row of LLaVA-Instruct ("conversations", "image") or of chat messages ("messages", "images").

    Also of "prompt" and "completion" with messages, as TRL has them.

    Raises:
        ValueError: It is none of these, or its images, placeholders and answers do not fit together; `name` is in it.
    """
    try:
        messages, images = split_row(row)
        images = [located(image, image_folder) for image in images]
        check_sample(messages, images)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Sample(name, messages, images)


def split_row(row: dict) -> tuple[list[dict], list]:
    """Messages and images of a row."""
    if row.get("conversations") is not None:
        raw = [{"role": turn.get("from"), "content": turn.get("value")} for turn in row["conversations"]]
    elif row.get("messages") is not None:
        raw = row["messages"]
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        raw = [*row["prompt"], *row["completion"]]
    else:
        raise ValueError(
            f"it has the columns {', '.join(sorted(row)) or 'none'}; a sample has conversations (and image) as in "
            f"LLaVA-Instruct, or messages (and images)."
        )
    inline: list = []
    messages = [read_message(message, inline) for message in raw]
    given = row["images"] if row.get("images") is not None else row.get("image")
    images = inline if given is None else given
    return messages, images if isinstance(images, list | tuple) else [images]


def read_message(message: dict, inline: list) -> dict:
    """A message with its content in parts; images that are part of it go to `inline`."""
    role = ROLES.get(message.get("role"))
    if role is None:
        raise ValueError(f"role {message.get('role')!r}: has to be one of {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": split_text(content)}
    parts = []
    for part in content or ():
        if part.get("type") == "text":
            parts.append({"type": "text", "text": part.get("text") or ""})
        elif part.get("type") in ("image", "image_url"):
            parts.append({"type": "image"})
            inline += [part[key] for key in ("image", "url", "path") if part.get(key) is not None][:1]
        else:
            raise ValueError(f"content of type {part.get('type')!r}: has to be 'text' or 'image'.")
    return {"role": role, "content": parts}


def split_text(text: str) -> list[dict]:
    """Text with placeholders as parts, without the line breaks that LLaVA-Instruct writes around them."""
    first, *rest = text.split(IMAGE)
    parts = [{"type": "text", "text": first.removesuffix("\n") if rest else first}]
    for index, piece in enumerate(rest):
        last = index == len(rest) - 1
        parts += [{"type": "image"}, {"type": "text", "text": piece.removeprefix("\n") if last else piece.strip("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def located(image, folder: Path):
    """An image of a row, with a relative path made one in `folder`."""
    if isinstance(image, dict):  # of the datasets library, not decoded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | os.PathLike) and "://" not in str(image):
        return str(folder / image)
    if not isinstance(image, str | bytes | Image.Image):
        raise ValueError(f"image {type(image).__name__}: has to be a path, a URL, bytes or a PIL image.")
    return image


def check_sample(messages: list[dict], images: list):
    """Refuses what cannot be trained on.

    Raises:
        ValueError: There is no answer, an empty one, or there are more or fewer images than placeholders.
    """
    answers = [text_of(message) for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("it has no answer (role assistant or gpt), so that nothing could be learnt from it.")
    empty = [index for index, answer in enumerate(answers) if not answer.strip()]
    if empty:
        raise ValueError(f"answer {empty[0] + 1} of {len(answers)} is empty.")
    parts = [(message["role"], part) for message in messages for part in message["content"]]
    places = [role for role, part in parts if part["type"] == "image"]
    if "assistant" in places:
        raise ValueError(f"an answer holds {IMAGE}; images belong into questions.")
    if len(places) != len(images):
        raise ValueError(f"it has {len(images)} images for {len(places)} placeholders {IMAGE}; write one for each.")


def text_of(message: dict) -> str:
    """The text of a message, without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
