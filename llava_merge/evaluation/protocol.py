# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""How answers were made: what has to be equal where numbers are compared."""

import platform
from dataclasses import dataclass, field

import PIL
import torch
import transformers
from transformers import PreTrainedModel

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor, __version__
from llava_merge.demo import MODEL_DIR
from llava_merge.evaluation.data import PictureQuestion, fingerprint


BUNDLED = "the bundled demo model"


@dataclass
class EvaluationSettings:
    """What is asked, and how; see `llava-merge evaluate --help`.

    Attributes:
        model: Directory or Hub repo of a LLaVA.
        data: File, dataset on the Hub, or "demo".
        split: Of a dataset on the Hub, or of the drawn scenes.
        image_folder: What image paths are relative to.
        limit: Questions at most; of drawn scenes, of each type.
        prompt: What is asked, with {question} in it.
        metric: One of `METRICS`.
        mergers: See [`make_candidates`].
        budgets: Merged tokens of an image.
        position_ids: Of mergers that do not say their own.
        attention_mass: The same; None leaves it to the model, see [`MergerConfig`].
        batch_size: Questions at once.
        max_new_tokens: Of an answer.
        dtype: Of the model.
        attn_implementation: As in `from_pretrained`.
        device: Default a GPU, if there is one.
        seed: Of `random`.
        flips: Number of questions that are also asked in batches of each of `FLIP_SIZES`.
        on_broken_row: See [`read_questions`].
    """

    model: str
    data: str
    split: str = "test"
    image_folder: str | None = None
    limit: int | None = None
    prompt: str = "{question}"
    metric: str = "exact_match"
    mergers: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    position_ids: str = "source"
    attention_mass: float | None = None
    batch_size: int = 16
    max_new_tokens: int = 32
    dtype: str = "float32"
    attn_implementation: str | None = None
    device: str = "cpu"
    seed: int = 0
    flips: int = 0
    on_broken_row: str = "error"


def describe_protocol(
    settings: EvaluationSettings,
    model: LlavaMergeForConditionalGeneration,
    processor: LlavaMergeProcessor,
    questions: list[PictureQuestion],
) -> dict:
    """All that the numbers depend on, besides mergers and budgets."""
    num_texts = sum(not question.images for question in questions)
    return {
        "model": BUNDLED if settings.model == str(MODEL_DIR) else settings.model,
        "data": settings.data,
        "split": settings.split,
        "questions": len(questions),
        **({"questions_without_images": num_texts} if num_texts else {}),
        "questions_sha256": fingerprint(questions),
        "metric": settings.metric if questions[0].answers else None,
        "prompt": processor.apply_chat_template(questions[0].messages, add_generation_prompt=True),
        "prompt_template": settings.prompt,
        "decoding": "greedy",
        "max_new_tokens": settings.max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": settings.batch_size,
        "padding_side": "left",
        "attention": {
            "vision_tower": attention_of(model.model.vision_tower),
            "language_model": attention_of(model.model.language_model),
        },
        "seed": settings.seed,
        **describe_machine(model.device),
    }


def check_device(name: str):
    """Refuses a device that torch does not know, or that is not there.

    Raises:
        ValueError: So it is.
    """
    try:
        torch.zeros(0, device=name)
    except (AssertionError, RuntimeError) as error:  # of builds without CUDA, and of the others
        reason = str(error).partition("\n")[0].rstrip(".")[:100]
        raise ValueError(
            f"device={name!r} cannot be used ({reason}). Leave it out, or give cpu, cuda or cuda:1."
        ) from error


def describe_machine(device: torch.device) -> dict:
    """Hardware and versions."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "llava_merge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
    }


def attention_of(module: PreTrainedModel) -> str:
    """Name of the attention kind that a module runs."""
    return module.config._attn_implementation


def check_same_protocol(protocol: dict, other: dict, name: str):
    """Refuses to compare what was not made alike.

    Args:
        name: Of the file that `other` is from.

    Raises:
        ValueError: They differ; each difference is named.
    """
    keys = [key for key in {**protocol, **other} if protocol.get(key) != other.get(key)]
    if keys:
        differences = "; ".join(f"{key}: {other.get(key)!r} there, {protocol.get(key)!r} here" for key in keys)
        raise ValueError(
            f"{name} was made by another protocol, so that its numbers say nothing beside these. {differences}"
        )
