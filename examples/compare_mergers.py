# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of the demo model with every merging method, by budget, position ids and attention mass.

    python examples/train_demo_mergers.py --output demo_mergers
    python examples/compare_mergers.py --mergers demo_mergers --output examples/results/demo_mergers.json

Methods that need no training are measured in all four ways of placing tokens, trained ones in the way that they were
trained for. `random` is the mean of three seeds.
"""

import json
import logging
from pathlib import Path

import torch
from compare_positions import Batch, count_right, load, make_batches, make_parser
from evaluate_demo_model import collect_questions, environment, summarize_types, write_report
from train_demo_mergers import JOBS, PLACES, TRAINED

from llava_merge import LlavaMergeProcessor, list_mergers
from llava_merge.demo import MODEL_DIR


logger = logging.getLogger("compare_mergers")

BUDGETS = [72, 36, 16, 9, 4]
WAYS = {**PLACES, "packed_mass": {"position_ids": "packed", "attention_mass": 1.0}}
VARIANTS = {"random": [{"seed": seed} for seed in range(3)]}  # of which the mean is taken
FAITHFUL = ("visionzip, faithful", {"merger_type": "visionzip", "faithful": True})


def training_free() -> dict[str, dict]:
    """merger_config of each method that needs no training."""
    methods = {merger.name: {"merger_type": merger.name} for merger in list_mergers() if not merger.trained}
    del methods["none"]
    return {**methods, FAITHFUL[0]: FAITHFUL[1]}


def measure(models, processor, batches: list[Batch], budgets: list[int]) -> dict:
    """Accuracy at each budget, over the answers of all `models`."""
    report = {}
    for budget in budgets:
        counts = [count_right(model, processor, batches, budget) for model in models]
        report[str(budget)] = summarize_types({name: sum((each[name] for each in counts), []) for name in counts[0]})
    return report


def rows(mergers: Path | None, device: str):
    """(name, way, models) of all that is compared."""
    for name, fields in training_free().items():
        for way, places in WAYS.items():
            variants = VARIANTS.get(name, [{}])
            yield (
                name,
                way,
                [
                    load(device, merger_config={"num_merged_tokens": 64, **fields, **places, **variant})
                    for variant in variants
                ],
            )
    for name in ("source_mass", "source_mass_projector", *TRAINED) if mergers else ():
        yield f"{name}, trained", "source_mass", [load(device, merger=mergers / name)]


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = make_parser(__doc__)
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS, help="merged tokens an image")
    args = parser.parse_args()
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    batches = make_batches(collect_questions(args.per_type), processor, args.batch_size, args.device)
    report = {"split": "test", "models": {}, "training": None, **environment(torch.device(args.device))}
    if args.mergers:
        trained = json.loads((args.mergers / "training.json").read_text())
        report["training"] = {name: trained[name] for name in JOBS if name in trained}
    for name, way, models in rows(args.mergers, args.device):
        if "all tokens" not in report["models"]:
            everything = count_right(models[0], processor, batches, "all")
            report["models"]["all tokens"] = summarize_types(everything)
        measured = measure(models, processor, batches, args.budgets)
        report["models"].setdefault(name, {})[way] = measured
        logger.info("%s, %s: %s", name, way, {budget: row["all"]["accuracy"] for budget, row in measured.items()})
        write_report(report, args.output)  # after each row: a long run may be cut off


if __name__ == "__main__":
    main()
