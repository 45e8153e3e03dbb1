# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Requests a second in a given memory, each merger at the largest batch that fits."""

import torch

from llava_merge.benchmark.models import inputs_of_cell
from llava_merge.benchmark.timing import Stopwatch, wall_time
from llava_merge.evaluation.grid import Cell


GIB = 1 << 30
LARGEST, TRIED = 1024, (2, 8)  # requests at once: at most, and those that memory is told from


def measure_throughput(model, cells: list[Cell], settings) -> dict[str, dict]:
    """Of each cell the largest batch whose answers fit, its peak memory and its requests a second.

    Args:
        settings: A [`BenchmarkSettings`].
    """
    found = {}
    for cell in cells:
        with cell.candidate.answering(model):
            found[cell.key] = measure_largest(model, cell, settings)
    stock = found[cells[0].key]["requests_per_second"]
    return {key: {**row, "ratio": round(row["requests_per_second"] / stock, 3)} for key, row in found.items()}


def measure_largest(model, cell: Cell, settings) -> dict:
    """The largest batch of a cell, foretold by two small ones; smaller by a tenth as long as it does not fit."""
    few, more = (run(model, cell, size, settings)[1] for size in TRIED)
    each = (more - few) / (TRIED[1] - TRIED[0])
    size = min(LARGEST, int((settings.memory * GIB - (few - TRIED[0] * each)) / each))
    while size > 0:
        try:
            seconds, peak = run(model, cell, size, settings)
        except torch.cuda.OutOfMemoryError:
            seconds, peak = None, float("inf")
        torch.cuda.empty_cache()
        if peak <= settings.memory * GIB:
            return {"batch_size": size, "peak_memory_bytes": peak, "requests_per_second": round(size / seconds, 3)}
        size = size - max(1, size // 10)
    raise ValueError(f"memory={settings.memory}: not one request fits into so many GiB.")


def run(model, cell: Cell, batch_size: int, settings) -> tuple[float, int]:
    """Seconds of the second of two equal batches, and the most memory that was used."""
    inputs = inputs_of_cell(model, cell, batch_size, settings)
    torch.cuda.reset_peak_memory_stats()
    stopwatch = Stopwatch(model.device)
    with torch.inference_mode():
        wall_time(model, inputs, settings.new_tokens, stopwatch)
        seconds = wall_time(model, inputs, settings.new_tokens, stopwatch) / 1000
    return seconds, torch.cuda.max_memory_allocated()
