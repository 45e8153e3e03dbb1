# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What comes out of an evaluation: numbers, a table, warnings, and the smallest budget that will do."""

import json
from collections.abc import Iterator
from pathlib import Path

from llava_merge.evaluation.candidates import UNMERGED
from llava_merge.evaluation.data import PictureQuestion
from llava_merge.evaluation.metrics import METRICS, exact_match, pope_report, summarize


def mean(values: list[float]) -> float:
    """Of one number or more."""
    return sum(values) / len(values)


def join_batches(rows: list[dict]) -> dict[str, dict]:
    """What each cell answered in all batches, in order."""
    joined: dict[str, dict] = {}
    for row in rows:
        for key, found in row["cells"].items():
            of_cell = joined.setdefault(key, {"seconds": 0.0})
            of_cell["seconds"] += found["seconds"]
            for name in ("answers", "kl", "entered", "cached"):
                of_cell.setdefault(name, []).extend(found[name] or ())
    return joined


def make_results(questions: list[PictureQuestion], rows: list[dict], cells: list[str], metric: str | None) -> dict:
    """For each cell: scores by type, agreement with the first cell, tokens and milliseconds of a question."""
    found = join_batches(rows)
    tower_seconds = sum(row["tower_seconds"] for row in rows)
    unmerged = found[cells[0]]["answers"]
    results = {}
    for key in cells:
        of_cell = found[key]
        name, _, budget = key.rpartition("@")
        result = {"merger": name, "budget": budget}
        if metric is not None:
            result["scores"] = scores_by_type(questions, of_cell["answers"], metric)
        if metric == "pope":
            result["pope"] = pope_report(of_cell["answers"], [question.answers for question in questions])
        agreed = [exact_match(one, [other]) for one, other in zip(of_cell["answers"], unmerged, strict=True)]
        result |= {
            "agreement": summarize(agreed),
            "token_kl": round(mean(of_cell["kl"]), 5) if of_cell["kl"] else None,
            "tokens_entered": round(mean(of_cell["entered"]), 1),
            "tokens_cached": round(mean(of_cell["cached"]), 1),
            "milliseconds": round(1000 * (of_cell["seconds"] + tower_seconds) / len(questions), 2),
        }
        results[key] = result
    return results


def scores_by_type(questions: list[PictureQuestion], answers: list[str], metric: str) -> dict[str, dict]:
    """[`summarize`] of each type of question, and of all."""
    by_type: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        by_type.setdefault(question.type, []).append(METRICS[metric](answer, question.answers))
    every = [score for scores in by_type.values() for score in scores]
    return {name: summarize(scores) for name, scores in sorted(by_type.items())} | {"all": summarize(every)}


def make_flips(by_size: dict[int, list[dict]], cells: list[str]) -> dict[str, dict]:
    """Share of questions whose answer is not the same in batches of every size.

    Args:
        by_size: Batches of the same questions, by their size.
    """
    found = {size: join_batches(rows) for size, rows in by_size.items()}
    flips = {}
    for key in cells:
        answers = zip(*(found[size][key]["answers"] for size in found), strict=True)
        flips[key] = summarize([float(len(set(each)) > 1) for each in answers])
    return {"batch_sizes": list(found), "cells": flips}


def make_warnings(results: dict[str, dict], flips: dict | None) -> Iterator[str]:
    """What a reader should doubt."""
    unmerged, *merged = results
    if "scores" in results[unmerged]:
        high = results[unmerged]["scores"]["all"]["ci95"][1]
        for key in merged:
            score = results[key]["scores"]["all"]["score"]
            if score > high:
                yield (
                    f"{key} scores {score:.1%}, above the interval of the unmerged model (up to {high:.1%}): merging "
                    f"cannot add what the picture lacks. Look for an unmerged run that is not what it should be."
                )
    if flips is not None:
        stock = flips["cells"][unmerged]["score"]
        for key in merged:
            share = flips["cells"][key]["score"]
            if share > stock + 0.002:
                yield (
                    f"{key}: {share:.1%} of the answers depend on the batch size, {stock:.1%} without merging; small "
                    f"differences between mergers may be rounding."
                )


def choose_budgets(results: dict[str, dict], target: float) -> dict[str, int | None]:
    """Of each merger, the smallest budget that keeps a share of `target` of the unmerged answers; None if none does."""
    chosen: dict[str, int | None] = {}
    for row in results.values():
        if row["budget"] == "all":
            continue
        name, before = row["merger"], chosen.setdefault(row["merger"], None)
        if row["agreement"]["score"] >= target:
            chosen[name] = min(int(row["budget"]), before or int(row["budget"]))
    return chosen


def describe_choice(report: dict) -> Iterator[str]:
    """A line for each merger about the budget that was chosen, if one was asked for."""
    choice = report["choice"]
    for name, budget in choice["budgets"].items() if choice else ():
        if budget is None:
            yield f"{name}: no budget that was tried keeps {choice['agreement']:.1%} of the answers."
            continue
        found = report["results"][f"{name}@{budget}"]["agreement"]
        low, high = found["ci95"]
        unsure = "" if low >= choice["agreement"] else " Ask more questions to be sure: the interval reaches below."
        yield (
            f"{name}: {budget} tokens keep {found['score']:.1%} of the unmerged answers (n = {found['n']}, 95 % from "
            f"{low:.1%} to {high:.1%}).{unsure}"
        )


def protocol_in_words(protocol: dict) -> str:
    """How it was measured, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in protocol["versions"].items())
    return (
        f"{protocol['model']}, {protocol['dtype']}, {protocol['metric'] or 'no labels'}, batches of "
        f"{protocol['batch_size']}; {protocol['hardware']}; {versions}. Intervals of 95 %. Milliseconds of a question "
        f"are those of the batch, shared out, with the tower's."
    )


def make_table(results: dict[str, dict]) -> str:
    """The results as a Markdown table: scores in % with their 95 % interval, best first within a budget."""
    first = next(iter(results.values()))
    types = [*(name for name in first["scores"] if name != "all"), "all"] if "scores" in first else []
    head = ["merger", "tokens", *types, *(first.get("pope") or ()), "agreement", "token KL", "entered", "cached", "ms"]
    rows = [table_row(row, types) for row in sorted(results.values(), key=sort_key)]
    lines = [" | ".join(cells) for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def sort_key(row: dict) -> tuple:
    """Unmerged first, then large budgets, then high scores."""
    budget = float("inf") if row["budget"] == "all" else int(row["budget"])
    return row["merger"] != UNMERGED, -budget, -summary_of(row)["score"]


def summary_of(row: dict) -> dict:
    """The score over all types, or the agreement where there are no labels."""
    return row["scores"]["all"] if "scores" in row else row["agreement"]


def table_row(row: dict, types: list[str]) -> list[str]:
    """The cells of a result in [`make_table`]."""
    scores = [percent(row["scores"][name]) for name in types]
    counts = [f"{100 * value:.1f}" for value in (row.get("pope") or {}).values()]
    divergence = "" if row["token_kl"] is None else f"{row['token_kl']:.4f}"
    tokens = [f"{row[name]:.0f}" for name in ("tokens_entered", "tokens_cached")]
    agreement = percent(row["agreement"])
    return [
        row["merger"],
        row["budget"],
        *scores,
        *counts,
        agreement,
        divergence,
        *tokens,
        f"{row['milliseconds']:.1f}",
    ]


def percent(summary: dict) -> str:
    """A score and its interval in %."""
    low, high = summary["ci95"]
    return f"{100 * summary['score']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def read_evaluation(path: Path) -> dict:
    """The report of an evaluation.

    Raises:
        ValueError: There is none at the path.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["protocol"], report["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report.json of an evaluation: {error}") from error
    return report
