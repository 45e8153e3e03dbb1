# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables of README.md: what mergers there are, and what was measured.

python examples/update_readme.py
"""

import json
import re
from pathlib import Path

from llava_merge import MergerInfo, list_mergers
from llava_merge.configuration_llava_merge import QUESTION_METHODS


README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
WAYS = {"packed": "packed", "source": "source", "packed_mass": "packed, mass 1", "source_mass": "source, mass 1"}
TRAINED = {  # names of the results, and what they are called in the table
    "source_mass, trained": "`fixed_pooling` (V3)",
    "source_mass_projector, trained": "`fixed_pooling` (V3) and the projector",
    "fixed_pooling_question, trained": "`fixed_pooling` (V3), question-aware",
    "gumbel_topk, trained": "`gumbel_topk` (V1)",
    "gumbel_topk_soft, trained": '`gumbel_topk` (V1), `estimator="soft_topk"`',
    "gumbel_topk_question, trained": "`gumbel_topk_question` (V2)",
    "gumbel_topk_question_soft, trained": '`gumbel_topk_question` (V2), `estimator="soft_topk"`',
}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, *rows)).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def mergers_table() -> str:
    """Of [`llava_merge.list_mergers`]: the default first, then by name."""
    mergers = sorted(list_mergers(), key=lambda merger: (merger.name != "fixed_pooling", merger.name))
    head = ["`merger_type`", "trained", "reads the question", "needs", "what it does", "source"]
    return table(head, [merger_row(merger) for merger in mergers])


def merger_row(merger: MergerInfo) -> list[str]:
    question = "no"
    if merger.question_aware:
        question = "yes" if merger.name in QUESTION_METHODS else "with `question_aware=True`"
    file = f"merging_{merger.name}.py"
    source = ", ".join([f"[{file}](llava_merge/{file})", *([merger.paper] if merger.paper else [])])
    name = f"`{merger.name}`" + (" (default)" if merger.name == "fixed_pooling" else "")
    return [name, "yes" if merger.trained else "no", question, ", ".join(merger.requires), merger.summary, source]


def accuracy_table(models: dict) -> str:
    """Accuracy in % over all question types by tokens an image; the best way of each untrained method first."""
    rows, budgets = [], None
    for name, ways in models.items():
        if name == "all tokens":
            continue
        shown = TRAINED.get(name, f"`{name}`" if "," not in name else "`visionzip`, `faithful=True`")
        for way, measured in sorted(ways.items(), key=lambda item: list(WAYS).index(item[0]), reverse=True):
            budgets = list(measured)
            cells = [f"{100 * row['all']['accuracy']:.1f}" for row in measured.values()]
            rows.append([shown, "yes" if name in TRAINED else "no", WAYS[way], *cells])
    return table(["", "trained", "positions, mass", *budgets], rows)


def training_table(report: dict) -> str:
    """Validation of a run before and after it."""
    head = ["", *(f"step {entry['step']}" for entry in report["evaluations"])]
    names = {"eval_16_accuracy": "16 tokens", "eval_all_accuracy": "all 576 tokens"}
    rows = [
        [shown, *(f"{100 * entry[name]:.1f} %" for entry in report["evaluations"])] for name, shown in names.items()
    ]
    measured = (
        f"{report['hardware']}, transformers {report['versions']['transformers']}, n = {report['num_validation']}"
    )
    seconds = f"{report['metrics']['train_runtime']:.0f} s with both validations"
    return f"{table(head, rows)}\n\n{measured}, {seconds} ([demo_training.json](examples/results/demo_training.json))."


def training_cost_table(report: dict) -> str:
    """Seconds and memory of a step at 7B's size, and many GPUs against one."""
    head = ["teacher", "tokens an image", "samples / s", "peak GiB", "share of the step that is the teacher's"]
    rows, seconds = (
        [],
        {(row["teacher"], row["num_merged_tokens"]): row["seconds_per_step"] for row in report["step"]["rows"]},
    )
    for row in report["step"]["rows"]:
        alone = seconds["none", row["num_merged_tokens"]]
        share = f"{1 - alone / row['seconds_per_step']:.0%}"
        budget, rate, memory = row["num_merged_tokens"], row["samples_per_second"], row["peak_memory_gib"]
        rows.append([row["teacher"], str(budget), f"{rate:.1f}", f"{memory:.1f}", share])
    differences = report["parallel"]["largest_difference_from_one_gpu"].values()
    worst = max(value["losses, relative"] for value in differences)
    return (
        f"{table(head, rows)}\n\nOne of {report['hardware']}, torch {report['versions']['torch']}, transformers "
        f"{report['versions']['transformers']}. On the demo model, eight steps of {report['parallel']['global_batch']} "
        f"samples under DDP and FSDP2 on two GPUs have the losses of one GPU (largest relative difference, of five "
        f"decimals: {worst:g}) ([training_benchmark.json](examples/results/training_benchmark.json))."
    )


def updated(text: str) -> str:
    """README with the tables of today between their marks."""
    mergers, training, cost = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("demo_mergers", "demo_training", "training_benchmark")
    )
    tables = {
        "mergers": mergers_table(),
        "accuracy of mergers": accuracy_table(mergers["models"]),
        "training": training_table(training),
        "cost of training": training_cost_table(cost),
    }
    for name, lines in tables.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = f"{re.escape(marks[0])}.*{re.escape(marks[1])}"
        text, found = re.subn(pattern, lambda _: f"{marks[0]}\n{lines}\n{marks[1]}", text, flags=re.DOTALL)  # noqa: B023
        if found != 1:
            raise ValueError(f"README.md has {found} places between {marks[0]} and {marks[1]}; it has to have one.")
    return text


def main():
    text = updated(README.read_text(encoding="utf-8"))
    temporary = README.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(README)


if __name__ == "__main__":
    main()
