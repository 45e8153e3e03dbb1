# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The phases of the first token as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from llava_merge.benchmark.report import COLUMNS


STACKED = ("vision_tower", "merger", "multi_modal_projector", "prefill", "rest")


def draw_phases(report: dict, path: Path):
    """Draws a bar for each cell, one picture for each batch size side by side, to a PNG at `path`."""
    results = {
        size: {key: row for key, row in rows.items() if not row["compiled"]} for size, rows in report["results"].items()
    }
    figure = Figure(
        figsize=(1.5 + 4.5 * len(results), 1 + 0.4 * len(next(iter(results.values())))), layout="constrained"
    )
    for axes, (size, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        left = [0.0] * len(rows)
        for phase in STACKED:
            widths = [max(0.0, row["milliseconds"][phase]["median"]) for row in rows.values()]
            axes.barh([*rows], widths, left=left, label=COLUMNS[phase])
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(title=f"{size} at once", xlabel="ms to the first token")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
