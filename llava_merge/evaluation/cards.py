# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What a model card says of an evaluation."""

from huggingface_hub import EvalResult, ModelCard

from llava_merge.evaluation.candidates import BASELINES, UNMERGED
from llava_merge.evaluation.report import make_table, protocol_in_words


START, END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def add_evaluation(card: ModelCard, report: dict, merger: str | None = None):
    """Puts the results of a merger, beside the baselines of the same run, into a card; earlier ones are replaced.

    Args:
        report: What is in a report.json of `llava-merge evaluate`.
        merger: As the report calls it; default the only one that it has beside the baselines.

    Raises:
        ValueError: The report has no such merger, or several and none is named.
    """
    merger = find_merger_of_report(report, merger)
    rows = {key: row for key, row in report["results"].items() if row["merger"] in (*BASELINES, merger)}
    protocol = report["protocol"]
    section = [
        START,
        "## Evaluation",
        f"{protocol['questions']} questions of {protocol['data']} ({protocol['split']}); `{UNMERGED}` merges nothing.",
        make_table(rows),
        protocol_in_words(protocol),
        END,
    ]
    before, _, rest = card.text.partition(START)
    after = rest.partition(END)[2].strip()
    card.text = "\n\n".join([before.rstrip(), *section, *([after] if after else [])]) + "\n"
    if protocol["metric"] is not None:
        card.data.model_name = card.data.model_name or merger.rstrip("/").rpartition("/")[2]
        card.data.eval_results = [hub_result(row, protocol) for row in rows.values() if row["merger"] == merger]


def find_merger_of_report(report: dict, merger: str | None) -> str:
    """The merger that a card is about.

    Raises:
        ValueError: The report has no such merger, or several and none is named.
    """
    names = dict.fromkeys(row["merger"] for row in report["results"].values() if row["merger"] not in BASELINES)
    if merger is None and len(names) == 1:
        return next(iter(names))
    if merger not in names:
        what = "say which of its mergers this is" if merger is None else f"it has no merger {merger!r}"
        raise ValueError(f"The report has the mergers {', '.join(names) or 'none'}: {what}.")
    return merger


def hub_result(row: dict, protocol: dict) -> EvalResult:
    """One budget's score as the Hub lists it, in %."""
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=protocol["data"],
        dataset_name=protocol["data"],
        dataset_split=protocol["split"],
        metric_type=protocol["metric"],
        metric_name=f"{protocol['metric']}, {row['budget']} tokens",
        metric_value=round(100 * row["scores"]["all"]["score"], 2),
    )
