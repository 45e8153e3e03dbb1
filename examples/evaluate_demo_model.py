# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of the demo model on held-out scenes, with all visual tokens and with merged ones.

    python examples/evaluate_demo_model.py --output examples/results/demo_accuracy.json

One question about each scene: stock LLaVA with all tokens answers first, then average pooling at each budget, packed
unless told otherwise: `compare_positions.py` compares that.
"""

import argparse
import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import PIL
import torch
import transformers
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MODEL_DIR
from llava_merge.demo.scenes import QUESTION_TYPES, Question, Scene, ask_question, draw_scene, sample_scene, scene_rng
from llava_merge.evaluation.metrics import wilson_interval


logger = logging.getLogger("evaluate_demo_model")

BUDGETS = [144, 64, 36, 16, 9, 4]


@dataclass(frozen=True)
class TestQuestion:
    """A question about one scene; `index` names the scene within its split."""

    index: int
    scene: Scene
    question: Question


def collect_questions(per_type: int, split: str = "test") -> list[TestQuestion]:
    """`per_type` questions of each type, every one about another scene, in an order that mixes the types."""
    missing, collected = dict.fromkeys(QUESTION_TYPES, per_type), []
    for index in count():
        wanted = [name for name in QUESTION_TYPES if missing[name]]
        if not wanted:
            return collected
        rng = scene_rng(split, index)
        scene = sample_scene(rng)
        name = wanted[index % len(wanted)]
        question = ask_question(scene, name, rng)
        if question is not None:
            missing[name] -= 1
            collected.append(TestQuestion(index, scene, question))
    raise AssertionError("unreachable: count() never ends")


@torch.inference_mode()
def evaluate(model, processor, questions: list[TestQuestion], batch_size: int) -> dict:
    """Accuracy of greedy answers per type and over all, with n and the 95 % interval; and the seconds it took."""
    right = {name: [] for name in QUESTION_TYPES}
    began = time.perf_counter()
    for batch in tqdm(list(batches_of(questions, batch_size)), unit="batch", mininterval=5):
        for item, answer in zip(batch, answer_batch(model, processor, batch), strict=True):
            right[item.question.type].append(is_right(answer, item.question.answer))
    seconds = time.perf_counter() - began
    return {
        "accuracy": summarize_types(right),
        "seconds": round(seconds, 2),
        "image_tokens": image_tokens(model, processor),
    }


def answer_batch(model, processor, batch: list[TestQuestion]) -> list[str]:
    """The model's greedy answers to one question to a picture."""
    size = processor.image_processor.crop_size["height"]
    prompts = [prompt(processor, item.question.text) for item in batch]
    pictures = [draw_scene(item.scene, size) for item in batch]
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(model.device, model.dtype)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def prompt(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def is_right(answer: str, expected: str) -> bool:
    return answer.strip().lower() == expected


def summarize_types(right: dict[str, list[bool]]) -> dict:
    """[`summarize`] of each type's answers, and of all."""
    report = {name: summarize(hits) for name, hits in right.items() if hits}
    return {**report, "all": summarize([hit for hits in right.values() for hit in hits])}


def summarize(hits: list[bool]) -> dict:
    low, high = wilson_interval(sum(hits), len(hits))
    return {"accuracy": round(sum(hits) / len(hits), 4), "n": len(hits), "ci95": [round(low, 4), round(high, 4)]}


def image_tokens(model, processor) -> int:
    """The number of placeholders that the processor writes for one picture."""
    size = processor.image_processor.crop_size["height"]
    picture = PIL.Image.new("RGB", (size, size))
    ids = processor(images=picture, text=prompt(processor, "?"), return_tensors="pt")["input_ids"]
    return int((ids == model.config.image_token_index).sum())


def majority_baseline(questions: list[TestQuestion]) -> dict[str, float]:
    """What always giving each type's most common answer would score."""
    shares = {}
    for name in QUESTION_TYPES:
        answers = [item.question.answer for item in questions if item.question.type == name]
        shares[name] = round(max(map(answers.count, set(answers))) / len(answers), 4)
    return shares


def environment(device: torch.device) -> dict[str, str]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "hardware": hardware,
        "threads": str(torch.get_num_threads()),
        "command": shlex.join(["python", *sys.argv]),
    }


def write_report(report: dict, path: Path):
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def batches_of(items: list[TestQuestion], size: int) -> Iterator[list[TestQuestion]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="saved folder or Hub name of a LLaVA")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--per-type", type=int, default=300, help="questions of a type")
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS, help="merged tokens an image")
    parser.add_argument("--position-ids", choices=("packed", "source"), default="packed", help="of merged tokens")
    parser.add_argument("--attention-mass", type=float, default=0.0, help="weight of merged tokens, from 0 to 1")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    device = torch.device(args.device)
    questions = collect_questions(args.per_type)

    def measure(model, processor) -> dict:
        result = evaluate(model.to(device).eval(), processor, questions, args.batch_size)
        logger.info("%s", result)
        return result

    stock = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    results = {"all tokens": measure(stock, AutoProcessor.from_pretrained(args.model))}
    for budget in args.budgets:
        merger_config = {
            "merger_type": "average_pooling",
            "num_merged_tokens": budget,
            "position_ids": args.position_ids,
            "attention_mass": args.attention_mass,
        }
        model = LlavaMergeForConditionalGeneration.from_pretrained(
            args.model, merger_config=merger_config, dtype=torch.float32
        )
        processor = LlavaMergeProcessor.from_pretrained(args.model, num_merged_tokens=budget)
        results[f"average_pooling, {budget} tokens"] = measure(model, processor)
    report = {"split": "test", "models": results, "majority": majority_baseline(questions), **environment(device)}
    write_report(report, args.output)


if __name__ == "__main__":
    main()
