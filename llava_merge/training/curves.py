# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Curves of a run as a picture."""

from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(log_history: list[dict], path: Path):
    """Draws the losses of a run, by budget, and the validation accuracy to a PNG file at `path`."""
    names = sorted({name for entry in log_history for name in entry}, key=by_budget)
    panels = {
        "training loss": [name for name in names if name == "loss" or name.startswith("loss_at_")],
        "losses": [name for name in names if name in ("cross_entropy", "distillation", "reconstruction")],
        "validation accuracy": [name for name in names if name.startswith("eval_") and name.endswith("_accuracy")],
    }
    panels = {title: shown for title, shown in panels.items() if shown}
    figure = Figure(figsize=(5 * max(1, len(panels)), 4), layout="constrained")
    all_axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, (title, shown) in zip(all_axes, panels.items(), strict=False):  # an empty run has one, empty
        for name in shown:
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=2, linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def by_budget(name: str) -> tuple[int, str]:
    """Sorts names of logged values by the budget in them."""
    numbers = [int(part) for part in name.split("_") if part.isdigit()]
    return (numbers[0] if numbers else 0, name)
