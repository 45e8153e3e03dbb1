# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Scores against tokens as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from llava_merge.evaluation.report import summary_of


def draw_results(results: dict[str, dict], path: Path):
    """Draws score, or agreement where there are no labels, of each merger against its tokens to a PNG at `path`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    by_merger: dict[str, list[tuple[int, dict]]] = {}
    unmerged, *merged = results.values()
    for row in merged:
        by_merger.setdefault(row["merger"], []).append((int(row["budget"]), summary_of(row)))
    for name, points in by_merger.items():
        tokens, summaries = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        scores = [100 * each["score"] for each in summaries]
        bars = [
            [score - 100 * each["ci95"][0] for score, each in zip(scores, summaries, strict=True)],
            [100 * each["ci95"][1] - score for score, each in zip(scores, summaries, strict=True)],
        ]
        axes.errorbar(tokens, scores, yerr=bars, marker="o", markersize=3, linewidth=1.2, capsize=2, label=name)
    axes.axhline(100 * summary_of(unmerged)["score"], color="gray", linestyle="--", linewidth=1, label="unmerged")
    axes.set_xscale("log", base=2)
    budgets = sorted({budget for points in by_merger.values() for budget, _ in points})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set(xlabel="tokens an image", ylabel="score, %" if "scores" in unmerged else "agreement, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
