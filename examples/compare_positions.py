# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of the demo model by where merged tokens sit and how much they weigh, without training and with.

python examples/train_demo_mergers.py --output demo_mergers
python examples/compare_positions.py --mergers demo_mergers --output examples/results/demo_positions.json
"""

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from evaluate_demo_model import (
    BUDGETS,
    TestQuestion,
    batches_of,
    collect_questions,
    environment,
    is_right,
    prompt,
    summarize_types,
    write_report,
)
from torch import Tensor
from tqdm import tqdm
from train_demo_mergers import PLACES

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MODEL_DIR
from llava_merge.demo.scenes import QUESTION_TYPES, draw_scene


logger = logging.getLogger("compare_positions")

UNTRAINED = {**PLACES, "source_half_mass": {"position_ids": "source", "attention_mass": 0.5}}


@dataclass(frozen=True)
class Batch:
    """Questions, and the pixels of their pictures (B, 3, H, W)."""

    questions: list[TestQuestion]
    pixel_values: Tensor


def make_batches(questions: list[TestQuestion], processor, batch_size: int, device: str) -> list[Batch]:
    """The pictures are drawn once, for all that is measured."""
    size = processor.image_processor.crop_size["height"]
    batches = []
    for few in tqdm(list(batches_of(questions, batch_size)), desc="drawing"):
        pictures = [draw_scene(question.scene, size) for question in few]
        pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        batches.append(Batch(few, pixel_values.to(device)))
    return batches


def accuracy(model, processor, batches: list[Batch], num_merged_tokens: int | str) -> dict:
    """Of greedy answers, for each type and over all, with n and the 95 % interval."""
    return summarize_types(count_right(model, processor, batches, num_merged_tokens))


@torch.inference_mode()
def count_right(model, processor, batches: list[Batch], num_merged_tokens: int | str) -> dict[str, list[bool]]:
    """Of each question type, which greedy answers are right."""
    num_tokens = model.config.num_patches if num_merged_tokens == "all" else num_merged_tokens
    right = {name: [] for name in QUESTION_TYPES}
    for batch in batches:
        texts = [prompt(processor, item.question.text) for item in batch.questions]
        texts = [text.replace(processor.image_token, processor.image_token * num_tokens) for text in texts]
        inputs = processor.tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        output = model.generate(
            **inputs,
            pixel_values=batch.pixel_values,
            num_merged_tokens=num_merged_tokens,
            do_sample=False,
            max_new_tokens=8,
        )
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for item, answer in zip(batch.questions, answers, strict=True):
            right[item.question.type].append(is_right(answer, item.question.answer))
    return right


def load(device: str, **kwargs) -> LlavaMergeForConditionalGeneration:
    return LlavaMergeForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32, **kwargs).to(device)


def models(mergers: Path | None, device: str):
    """(name, model) of all that are compared."""
    for name, places in UNTRAINED.items():
        merger_config = {"merger_type": "average_pooling", "num_merged_tokens": 64, **places}
        yield f"average_pooling, {name}", load(device, merger_config=merger_config)
    for name in PLACES if mergers else ():
        yield f"fixed_pooling, {name}", load(device, merger=mergers / name)
        yield f"fixed_pooling and projector, {name}", load(device, merger=mergers / f"{name}_projector")


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--mergers", type=Path, help="folder that train_demo_mergers.py wrote; default none")
    parser.add_argument("--per-type", type=int, default=300, help="questions of a type")
    parser.add_argument("--batch-size", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = make_parser(__doc__).parse_args()
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    batches = make_batches(collect_questions(args.per_type), processor, args.batch_size, args.device)
    results = {}
    for name, model in models(args.mergers, args.device):
        if not results:
            results["all tokens"] = {"576": accuracy(model, processor, batches, "all")}
        results[name] = {str(budget): accuracy(model, processor, batches, budget) for budget in BUDGETS}
        logger.info("%s: %s", name, {budget: row["all"]["accuracy"] for budget, row in results[name].items()})
    training = args.mergers and json.loads((args.mergers / "training.json").read_text())
    report = {"split": "test", "models": results, "training": training, **environment(torch.device(args.device))}
    write_report(report, args.output)


if __name__ == "__main__":
    main()
