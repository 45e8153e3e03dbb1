# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Questions about pictures, from files, from the Hub, or about the drawn scenes of the embedded model."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from PIL import Image
from transformers.utils import logging

from llava_merge.demo.scenes import (
    HARD_QUESTION_TYPES,
    QUESTION_TYPES,
    Scene,
    ask_question,
    draw_scene,
    scene_of,
)
from llava_merge.training.data import ERROR, SKIP, ChatDataset, files_of_dataset, read_dataset, sample_name
from llava_merge.training.pictures import scheme_of
from llava_merge.training.samples import first_turn, images_of, kept_turns, located, open_images, read_turns


logger = logging.get_logger(f"transformers.{__name__}")

DEMO, HARD_DEMO = "demo", "demo-hard"  # in the place of a file
TYPES = ("type", "category", "question_type")  # columns, in the order in which they are looked for


@dataclass(frozen=True)
class PictureQuestion:
    """A question with its pictures.

    Attributes:
        name: What errors call it.
        messages: Chat messages up to the answer, as of a [`Sample`].
        images: Of each placeholder in reading order: path or URL, bytes of a file, `PIL.Image.Image`, or [`Scene`].
        answers: Right ones; empty where none is known.
        type: Its group in tables.
    """

    name: str
    messages: list[dict]
    images: list
    answers: tuple[str, ...] = ()
    type: str = "all"

    def open_images(self) -> list[Image.Image]:
        """The pictures, in RGB.

        Raises:
            ValueError: One is missing or broken; it is named.
        """
        return open_images(self.name, [draw_scene(each) if isinstance(each, Scene) else each for each in self.images])


def read_questions(
    path: str,
    split: str = "test",
    image_folder: str | Path | None = None,
    limit: int | None = None,
    prompt: str = "{question}",
    on_broken_row: str = ERROR,
) -> list[PictureQuestion]:
    """The questions of a JSON, JSONL or parquet file, of a dataset on the Hub, or "demo", "demo-hard" for drawn scenes.

    Args:
        path: Rows as of training: with a question, or conversations, of which the first turn is asked. They mostly have
            an answer, and may have a type (or category, question_type).
        split: Of a dataset on the Hub, or of the drawn scenes.
        image_folder: What image paths are relative to; default the folder of the file.
        limit: The first questions alone. Of drawn scenes, those of each type; default 50 there.
        prompt: What is asked, with `{question}` in it.
        on_broken_row: "error" raises where a row cannot be asked, or has a picture that is not there; "skip" leaves it
            out, and opens all pictures first to know which are broken.

    Raises:
        ValueError: A row cannot be asked, and that is an error; it is named.
    """
    if "{question}" not in prompt:
        raise ValueError(f"prompt={prompt!r}: it has to hold {{question}}, in the place of the question.")
    if path in (DEMO, HARD_DEMO):
        asked = demo_questions(split, 50 if limit is None else limit, path == HARD_DEMO)
        return [with_prompt(each, prompt) for each in asked]
    dataset = read_dataset(path, split, image_folder)
    number = min(len(dataset), len(dataset) if limit is None else limit)
    questions = [each for at in range(number) if (each := read_checked(dataset, at, on_broken_row)) is not None]
    if not questions:
        raise ValueError(f"{path} holds no questions{' that can be asked' if number else ''}.")
    if len(questions) < number:
        logger.warning(f"{path}: {number - len(questions)} of {number} rows cannot be asked and are left out.")
    num_texts = sum(not question.images for question in questions)
    if num_texts:
        logger.warning(f"{path}: {num_texts} of {len(questions)} questions have no picture and are asked as text.")
    unanswered = [question.name for question in questions if not question.answers]
    if unanswered and len(unanswered) < len(questions):
        raise ValueError(f"{unanswered[0]}: it has no answer, but others have. Give answers to all or to none.")
    return [with_prompt(question, prompt) for question in questions]


def read_checked(dataset: ChatDataset, index: int, on_broken_row: str) -> PictureQuestion | None:
    """Row `index` as a question, whose pictures are there; None where it is left out.

    Raises:
        ValueError: It cannot be asked, and that is an error.
    """
    try:
        row = dataset.rows[index]
        question = read_question(row, sample_name(dataset.source, row, index), dataset.image_folder)
        if on_broken_row == SKIP:
            question.open_images()
        for image in question.images:
            if isinstance(image, str) and not scheme_of(image) and not Path(image).is_file():
                raise ValueError(f"{question.name}: {image}: there is no such file. Set image_folder.")
    except ValueError as error:
        if on_broken_row == ERROR:
            raise
        logger.warning(f"Skipped {error}")
        return None
    return question


def files_of_questions(path: str, questions: list[PictureQuestion]) -> Iterator:
    """What the `questions` of [`read_questions`] are read from, and their pictures, whatever they are."""
    yield from () if path in (DEMO, HARD_DEMO) else files_of_dataset(path)
    for question in questions:
        yield from question.images


def read_question(row: dict, name: str, image_folder: Path) -> PictureQuestion:
    """A row of a dataset as a question: that of its own column, or the first of a conversation.

    Raises:
        ValueError: There is no question in it, or its images and placeholders do not fit together.
    """
    try:
        turns, answers = read_turns(row)
        images = [located(image, image_folder) for image in images_of(row, turns)]
        if answers is None:
            messages, images, answer = first_turn(turns, images)
            answers = () if answer is None else (answer,)
        else:
            messages, images = kept_turns(turns, images, len(turns))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    kind = next((str(row[key]) for key in TYPES if row.get(key) is not None), "all")
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return PictureQuestion(name, messages, images, answers, kind)


def with_prompt(question: PictureQuestion, prompt: str) -> PictureQuestion:
    """The question with its last text written into the `prompt`."""
    *before, last = question.messages
    texts = [index for index, part in enumerate(last["content"]) if part["type"] == "text"]
    if prompt == "{question}" or not texts:
        return question
    content = [dict(part) for part in last["content"]]
    content[texts[-1]]["text"] = prompt.replace("{question}", content[texts[-1]]["text"])
    return replace(question, messages=[*before, {**last, "content": content}])


def demo_questions(split: str, per_type: int, hard: bool = False) -> list[PictureQuestion]:
    """`per_type` questions of each type, every one about another drawn scene, in an order that mixes the types."""
    return list(asked_scenes(split, per_type, hard))


def asked_scenes(split: str, per_type: int, hard: bool) -> Iterator[PictureQuestion]:
    """Questions about the scenes of a split, in their order, until each type has `per_type`."""
    missing = dict.fromkeys(HARD_QUESTION_TYPES if hard else QUESTION_TYPES, per_type)
    for index in count():
        wanted = [name for name, number in missing.items() if number]
        if not wanted:
            return
        scene, rng = scene_of(split, index, hard)
        asked = ask_question(scene, wanted[index % len(wanted)], rng)
        if asked is not None:
            missing[asked.type] -= 1
            content = [{"type": "image"}, {"type": "text", "text": asked.text}]
            name, messages = f"scene {index} of {split}", [{"role": "user", "content": content}]
            yield PictureQuestion(name, messages, [scene], (asked.answer,), asked.type)


def fingerprint(questions: list[PictureQuestion]) -> str:
    """SHA-256 of all that is asked, pictures by their names or bytes."""
    digest = hashlib.sha256()
    for question in questions:
        images = [describe_image(image) for image in question.images]
        row = [question.messages, images, question.answers, question.type]
        digest.update(json.dumps(row, ensure_ascii=True).encode())
    return digest.hexdigest()


def describe_image(image) -> str | dict:
    """What tells a picture from others: its scene, the hash of its pixels, or the name of its file."""
    if isinstance(image, Scene):
        return asdict(image)
    if isinstance(image, Image.Image):
        image = image.tobytes()
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else Path(image).name
