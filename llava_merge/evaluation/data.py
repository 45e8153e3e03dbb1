# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Questions about pictures, from files, from the Hub, or about the drawn scenes of the embedded model."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from PIL import Image

from llava_merge.demo.scenes import (
    HARD_QUESTION_TYPES,
    QUESTION_TYPES,
    Scene,
    ask_question,
    draw_scene,
    scene_of,
)
from llava_merge.training.data import files_of_dataset, read_dataset, sample_name
from llava_merge.training.samples import located, open_image, read_sample, split_text, text_of


DEMO, HARD_DEMO = "demo", "demo-hard"  # in the place of a file
NAMES = {  # of a column, in the order in which they are looked for
    "question": ("question", "text", "query"),
    "answers": ("answers", "answer", "label"),
    "image": ("images", "image"),
    "type": ("type", "category", "question_type"),
}


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
        try:
            return [draw_scene(each) if isinstance(each, Scene) else open_image(each) for each in self.images]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def read_questions(
    path: str,
    split: str = "test",
    image_folder: str | Path | None = None,
    limit: int | None = None,
    prompt: str = "{question}",
) -> list[PictureQuestion]:
    """The questions of a JSON, JSONL or parquet file, of a dataset on the Hub, or "demo", "demo-hard" for drawn scenes.

    Args:
        path: Rows have a question (or text, query), image or images, and mostly an answer (answers, label) and a type
            (category, question_type); or they are conversations as in training, of which the first turn is asked.
        split: Of a dataset on the Hub, or of the drawn scenes.
        image_folder: What image paths are relative to; default the folder of the file.
        limit: The first questions alone. Of drawn scenes, those of each type; default 50 there.
        prompt: What is asked, with `{question}` in it.

    Raises:
        ValueError: A row cannot be asked; it is named.
    """
    if "{question}" not in prompt:
        raise ValueError(f"prompt={prompt!r}: it has to hold {{question}}, in the place of the question.")
    if path in (DEMO, HARD_DEMO):
        asked = demo_questions(split, 50 if limit is None else limit, path == HARD_DEMO)
        return [with_prompt(each, prompt) for each in asked]
    dataset = read_dataset(path, split, image_folder)
    rows = [dataset.rows[index] for index in range(min(len(dataset), len(dataset) if limit is None else limit))]
    if not rows:
        raise ValueError(f"{path} holds no questions.")
    questions = [read_question(row, sample_name(path, row, at), dataset.image_folder) for at, row in enumerate(rows)]
    unanswered = [question.name for question in questions if not question.answers]
    if unanswered and len(unanswered) < len(questions):
        raise ValueError(f"{unanswered[0]}: it has no answer, but others have. Give answers to all or to none.")
    return [with_prompt(question, prompt) for question in questions]


def files_of_questions(path: str, questions: list[PictureQuestion]) -> Iterator:
    """What the `questions` of [`read_questions`] are read from, and their pictures, whatever they are."""
    yield from () if path in (DEMO, HARD_DEMO) else files_of_dataset(path)
    for question in questions:
        yield from question.images


def read_question(row: dict, name: str, image_folder: Path) -> PictureQuestion:
    """A row of a dataset as a question.

    Raises:
        ValueError: There is no question in it, or its images and placeholders do not fit together.
    """
    found = {
        key: next((row[name] for name in names if row.get(name) is not None), None) for key, names in NAMES.items()
    }
    kind = "all" if found["type"] is None else str(found["type"])
    if not isinstance(found["question"], str):
        sample = read_sample(row, name, image_folder)
        first = next(index for index, message in enumerate(sample.messages) if message["role"] == "assistant")
        return PictureQuestion(name, sample.messages[:first], sample.images, (text_of(sample.messages[first]),), kind)
    images = found["image"] if isinstance(found["image"], list | tuple) else [found["image"]]
    images = [located(image, image_folder) for image in images if image is not None]
    content = split_text(found["question"])
    num_places = sum(part["type"] == "image" for part in content)
    if not num_places:
        content = [{"type": "image"}] * len(images) + content
    elif num_places != len(images):
        raise ValueError(f"{name}: it has {len(images)} images for {num_places} placeholders <image>.")
    return PictureQuestion(name, [{"role": "user", "content": content}], images, read_answers(found["answers"]), kind)


def read_answers(answers) -> tuple[str, ...]:
    """Right answers of a row: one, several, or several as {"answer": ...}, as VQA has them."""
    listed = answers if isinstance(answers, list | tuple) else [] if answers is None else [answers]
    return tuple(str(each["answer"] if isinstance(each, dict) else each) for each in listed)


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
