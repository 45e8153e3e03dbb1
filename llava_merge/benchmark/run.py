# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A whole benchmark, from settings to a report."""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from llava_merge import CompiledModel, LlavaMergeForConditionalGeneration, LlavaMergeProcessor, compile_for_inference
from llava_merge.benchmark.memory import measure_throughput
from llava_merge.benchmark.models import SHAPES, inputs_of_cell, make_model, tokens_of_cell
from llava_merge.benchmark.report import make_tables
from llava_merge.benchmark.timing import time_generate
from llava_merge.demo import MERGERS, MODEL_DIR
from llava_merge.evaluation.candidates import (
    UNMERGED,
    Candidate,
    checkpoints_of,
    parse_candidate,
    put_merger,
    text_towers_of,
)
from llava_merge.evaluation.grid import Cell, make_cells
from llava_merge.evaluation.protocol import BUNDLED, attention_of, check_device, describe_machine
from llava_merge.model.checkpoint_saving import refuse_output_in_input, renamed_when_whole, write_whole
from llava_merge.model.placeholders import ALL_TOKENS


logger = logging.get_logger(f"transformers.{__name__}")


@dataclass
class BenchmarkSettings:
    """What is measured, and how; see `llava-merge benchmark --help`.

    Attributes:
        model: A shape of `SHAPES`, or directory or Hub repo of a LLaVA.
        mergers: Methods, directories or Hub repos; `NAME:FIELD=VALUE,FIELD=VALUE` sets fields.
        budgets: Merged tokens of an image.
        batch_sizes: Prompts at once, each with a picture.
        text_tokens: Of a prompt, besides the picture's.
        new_tokens: Of an answer.
        rounds: Of which the median is taken.
        compile: Backend to compile each with and measure it again, "none" for CUDA graphs alone; None leaves that out.
        memory: GiB in which requests a second are measured, at the largest batch; None leaves that out.
    """

    model: str
    mergers: list[str]
    budgets: list[int] = field(default_factory=lambda: [64, 16])
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    text_tokens: int = 64
    new_tokens: int = 32
    rounds: int = 5
    compile: str | None = None
    memory: float | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    device: str = "cpu"
    seed: int = 0


def benchmark(settings: BenchmarkSettings, output: Path, command: str | None = None) -> dict:
    """Measures every merger at every budget beside the stock model and writes report.json, report.md and times.png.

    The cells of a round follow each other, so that what slows the machine down slows all of them. What is measured is
    written after each batch size, so that a run that is cut short leaves it.

    Returns:
        The report: `protocol`, `results` by batch size and cell.

    Raises:
        ValueError: A setting cannot be used, or `output` is, holds or lies in a checkpoint that is read.
    """
    check_settings(settings)
    refuse_output_in_input(output, settings.model, *checkpoints_of(settings.mergers))
    model = make_model(settings.model, getattr(torch, settings.dtype), settings.device, settings.attn_implementation)
    mergers = make_mergers(model, settings)
    refuse_output_in_input(output, *text_towers_of(model, mergers))
    cells = make_cells(mergers, settings.budgets)
    report = {"command": command, "protocol": describe_run(settings, model), "results": {}, "throughput": None}
    for size in settings.batch_sizes:
        report["results"][str(size)] = measure_cells(model, cells, size, settings)
        write_report(report, output)
    if settings.memory is not None:
        report["throughput"] = measure_throughput(model, cells, settings)
        write_report(report, output)
    return report


def write_report(report: dict, output: Path):
    """report.json, report.md and times.png in the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_whole(output / "report.md", make_tables(report))
    draw_if_possible(report, output / "times.png")


def settings_of_options(given: dict) -> BenchmarkSettings:
    """Settings, with what suits the machine where nothing is given."""
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.startswith("cuda")
    default = {"device": device, "dtype": "bfloat16" if on_gpu else "float32"}
    default |= {"model": "llava-1.5-7b"} if on_gpu else {"model": str(MODEL_DIR)}
    default |= {"batch_sizes": [1, 8, 32]} if on_gpu else {}
    settings = {**default, **given}
    bundled = settings["model"] == str(MODEL_DIR)
    settings.setdefault("mergers", [*MERGERS] if bundled else ["fixed_pooling", "fixed_pooling:question_aware=true"])
    return BenchmarkSettings(**settings)


def check_settings(settings: BenchmarkSettings):
    """Refuses settings that can be told to be wrong without a model.

    Raises:
        ValueError: So they are.
    """
    for name, least in (("text_tokens", 2), ("new_tokens", 2), ("rounds", 1)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name}={getattr(settings, name)}: has to be {least} or more.")
    for name in ("budgets", "batch_sizes"):
        if not getattr(settings, name) or min(getattr(settings, name)) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: has to be whole numbers of 1 or more.")
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={settings.dtype!r}: has to be float32, bfloat16 or float16.")
    if settings.compile not in (None, "none") and settings.compile not in torch._dynamo.list_backends(()):
        backends = ", ".join(["none", *torch._dynamo.list_backends()])
        raise ValueError(f"compile={settings.compile!r}: has to be one of {backends}.")
    check_device(settings.device)
    if settings.memory is not None and not settings.device.startswith("cuda"):
        raise ValueError(f"memory={settings.memory}: can be measured on a GPU only, not on {settings.device!r}.")


def make_mergers(model: LlavaMergeForConditionalGeneration, settings: BenchmarkSettings) -> list[Candidate]:
    """The stock model, and the mergers; the model is as before.

    Raises:
        ValueError: One cannot be used, or a budget is above the number of visual tokens.
    """
    num_patches = model.config.num_patches
    if max(settings.budgets) > num_patches:
        raise ValueError(
            f"num_merged_tokens={max(settings.budgets)} is more than the {num_patches} tokens of an image."
        )
    processor = None if settings.model in SHAPES else LlavaMergeProcessor.from_pretrained(settings.model)
    before, candidates = Candidate.of(UNMERGED, model), []
    for name in dict.fromkeys([UNMERGED, *settings.mergers]):
        with before.answering(model):
            put_merger(model, processor, *parse_candidate(name), places={})
            candidates.append(Candidate.of(name, model))
    return candidates


@dataclass(frozen=True)
class Row:
    """A cell as it is, or answered by a model that was compiled for it, in so many seconds."""

    cell: Cell
    compiled: CompiledModel | None = None
    compile_seconds: float | None = None

    @property
    def key(self) -> str:
        """What reports call it, such as `tome@16` or `tome@16, compiled`."""
        return self.cell.key + (", compiled" if self.compiled else "")

    @contextmanager
    def answering(
        self, model: LlavaMergeForConditionalGeneration
    ) -> Iterator[LlavaMergeForConditionalGeneration | CompiledModel]:
        """Puts the merger into the model inside; hands over what answers."""
        with self.cell.candidate.answering(model):
            yield self.compiled or model


def make_rows(model, cells: list[Cell], batch_size: int, settings: BenchmarkSettings) -> list[Row]:
    """What takes turns: all cells, and all of them compiled if the settings say so."""
    rows = [Row(cell) for cell in cells]
    if settings.compile is None:
        return rows
    return rows + [compiled_row(model, cell, batch_size, settings) for cell in cells]


def compiled_row(model, cell: Cell, batch_size: int, settings: BenchmarkSettings) -> Row:
    """The cell compiled for one batch of prompts as it has them."""
    with cell.candidate.answering(model):
        start = time.perf_counter()
        compiled = compile_for_inference(
            model,
            batch_sizes=[batch_size],
            prompt_lengths=[tokens_of_cell(model, cell) + settings.text_tokens],
            num_merged_tokens=None if cell.budget == ALL_TOKENS else [cell.budget],
            max_new_tokens=settings.new_tokens,
            backend=None if settings.compile == "none" else settings.compile,
        )
        return Row(cell, compiled, time.perf_counter() - start)


def measure_cells(
    model: LlavaMergeForConditionalGeneration, cells: list[Cell], batch_size: int, settings: BenchmarkSettings
) -> dict[str, dict]:
    """Of each row, [`time_generate`] as median and quartiles, its ratio to the stock model, tokens and memory."""
    rows = make_rows(model, cells, batch_size, settings)
    rounds: dict[str, list[dict]] = {row.key: [] for row in rows}
    peaks = {}
    with tqdm(total=len(rows) * (settings.rounds + 1), desc=f"batch {batch_size}", disable=None) as bar:
        for number in range(settings.rounds + 1):  # the first one warms up
            for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
                times, peaks[row.key] = measure_once(model, row, batch_size, settings)
                if number:
                    rounds[row.key].append(times)
                bar.update()
    for row in rows:
        if row.compiled:
            row.compiled.decompile()
    return {row.key: summarize_row(model, row, rows, rounds, peaks[row.key], batch_size, settings) for row in rows}


def measure_once(model, row: Row, batch_size: int, settings: BenchmarkSettings) -> tuple[dict[str, float], int | None]:
    """Milliseconds of a row, and the most memory that was used, in bytes, on a GPU where there are no graphs."""
    measures_memory = model.device.type == "cuda" and settings.compile is None
    with row.answering(model) as answering:
        inputs = inputs_of_cell(model, row.cell, batch_size, settings)
        if measures_memory:
            torch.cuda.reset_peak_memory_stats()
        times = time_generate(answering, inputs, settings.new_tokens)
    return times, torch.cuda.max_memory_allocated() if measures_memory else None


def summarize_row(
    model,
    row: Row,
    rows: list[Row],
    rounds: dict[str, list[dict]],
    peak: int | None,
    batch_size: int,
    settings: BenchmarkSettings,
) -> dict:
    """What a report says of a row; ratios are medians of those of each round."""
    own, num_tokens = rounds[row.key], tokens_of_cell(model, row.cell)
    stocks = {"": rows[0]} | ({"_of_compiled": rows[len(rows) // 2]} if row.compiled else {})
    ratios = {
        f"{name}_ratio{of}": statistics.median(
            stock[name] / mine[name] for stock, mine in zip(rounds[other.key], own, strict=True)
        )
        for of, other in stocks.items()
        for name in ("first_token", "answer")
    }
    milliseconds = {name: spread([each[name] for each in own]) for name in own[0]}
    seconds = milliseconds["answer"]["median"] / 1000
    return {
        "merger": row.cell.candidate.name,
        "budget": str(row.cell.budget),
        "attention_mass": row.cell.candidate.attention_mass(model),
        "compiled": row.compiled is not None,
        "compile_seconds": row.compile_seconds and round(row.compile_seconds, 1),
        "tokens_entered": num_tokens + settings.text_tokens,
        "tokens_cached": num_tokens + settings.text_tokens + settings.new_tokens - 1,
        "kv_bytes_of_image": num_tokens * kv_bytes_of_token(model),
        "peak_memory_bytes": peak,
        "tokens_per_second": round(batch_size * settings.new_tokens / seconds, 1),
        "milliseconds": milliseconds,
        **{name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


@torch.inference_mode()
def kv_bytes_of_token(model: LlavaMergeForConditionalGeneration) -> int:
    """Bytes of keys and values of one token in all layers, as its cache has them."""
    cache = model(input_ids=torch.tensor([[1]], device=model.device), use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def describe_run(settings: BenchmarkSettings, model) -> dict:
    """All that the numbers depend on, besides mergers, budgets and batch sizes."""
    given = asdict(settings)
    for name in ("mergers", "budgets", "batch_sizes", "device", "attn_implementation"):
        given.pop(name)
    given["model"] = BUNDLED if settings.model == str(MODEL_DIR) else settings.model
    return {
        **given,
        "weights": "random" if settings.model in SHAPES else "of the checkpoint",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention": {
            "vision_tower": attention_of(model.model.vision_tower),
            "language_model": attention_of(model.model.language_model),
        },
        **describe_machine(model.device),
    }


def draw_if_possible(report: dict, path: Path):
    """Draws the phases of the first token, where matplotlib is installed."""
    try:
        from llava_merge.benchmark.plot import draw_phases  # slow to import
    except ModuleNotFoundError as error:
        logger.warning_once(f"No {path.name} was drawn, since {error.name} is not installed.")
        return
    with renamed_when_whole(path) as written:
        draw_phases(report, written)
