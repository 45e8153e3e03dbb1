# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A whole evaluation, from settings to a report."""

import json
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MERGERS, MODEL_DIR
from llava_merge.evaluation.answers_file import AnswersFile
from llava_merge.evaluation.candidates import (
    OWN,
    UNMERGED,
    checkpoints_of,
    make_candidates,
    text_towers_of,
)
from llava_merge.evaluation.data import PictureQuestion, files_of_questions, read_questions
from llava_merge.evaluation.fingerprints import TEXT_HASH, describe_merger, hash_of_text_model
from llava_merge.evaluation.grid import Grid, make_cells
from llava_merge.evaluation.metrics import METRICS
from llava_merge.evaluation.protocol import (
    EvaluationSettings,
    check_device,
    check_same_protocol,
    describe_protocol,
)
from llava_merge.evaluation.report import (
    choose_budgets,
    describe_choice,
    make_flips,
    make_results,
    make_table,
    make_warnings,
    protocol_in_words,
    read_evaluation,
)
from llava_merge.model.checkpoint_loading import read_checkpoint
from llava_merge.model.checkpoint_saving import (
    refuse_output_in_input,
    refuse_replaced_files,
    renamed_when_whole,
    write_whole,
)


logger = logging.get_logger(f"transformers.{__name__}")

WRITTEN = ("answers.jsonl", "report.json", "report.md", "scores.png")
DTYPES = ("float32", "bfloat16", "float16")
FLIP_SIZES = (1, 8, 32)  # batches in which the same questions are asked


def evaluate(
    settings: EvaluationSettings,
    output: Path,
    against: list[Path] | None = None,
    choose: float | None = None,
    command: str | None = None,
) -> dict:
    """Asks every merger at every budget and writes `answers.jsonl`, `report.json`, `report.md` and `scores.png`.

    Run again with the same settings and output, it goes on with the first batch that is missing.

    Args:
        against: Reports of the same protocol, whose mergers are shown along.
        choose: Share of answers that have to agree with the unmerged model's; the smallest budgets that hold it are
            chosen.
        command: That does the same, for the report.

    Returns:
        The report: `protocol`, `results` by merger and budget, `flips`, `choice`, `warnings`.

    Raises:
        ValueError: A setting, file or question cannot be used, a report is of another protocol, `output` is, holds or
            lies in a checkpoint that is read, or what is written would replace a file that is read.
    """
    check_settings(settings, choose)
    mergers = settings.mergers or default_mergers(settings.model)
    refuse_output_in_input(output, settings.model, *checkpoints_of(mergers))
    data = settings.data, settings.split, settings.image_folder, settings.limit, settings.prompt
    questions = read_questions(*data, on_broken_row=settings.on_broken_row)
    check_answers(settings.metric, questions)
    refuse_replaced_files(output, WRITTEN, chain(against or (), files_of_questions(settings.data, questions)))
    model, processor = load_model(settings)
    places = {"position_ids": settings.position_ids, "attention_mass": settings.attention_mass}
    candidates = make_candidates(model, processor, mergers, places, settings.seed)
    refuse_output_in_input(output, *text_towers_of(model, candidates))
    budgets = settings.budgets or default_budgets(model.config.num_patches)
    check_budgets(budgets, model.config.num_patches)
    grid = Grid(model, processor, make_cells(candidates, budgets), settings.max_new_tokens)
    protocol = describe_protocol(settings, model, processor, questions)
    others = [read_report(path, protocol) for path in against or ()]
    keys = [cell.key for cell in grid.cells]
    output.mkdir(parents=True, exist_ok=True)
    described = {candidate.name: describe_merger(candidate, model) for candidate in candidates}
    answers = AnswersFile(output / "answers.jsonl", {"protocol": protocol, "candidates": described, "cells": keys})
    rows = ask(grid, questions, settings.batch_size, answers, "asked")
    flips = None
    if settings.flips:
        few = questions[: settings.flips]
        by_size = {size: ask(grid, few, size, answers, f"flips-{size}", False) for size in FLIP_SIZES}
        flips = make_flips(by_size, keys)
    results = make_results(questions, rows, keys, protocol["metric"])
    warnings = list(make_warnings(results, flips))
    report = {
        "command": command,
        "protocol": protocol,
        "candidates": described,
        TEXT_HASH: hash_of_text_model(dict(model.named_parameters())),
        "results": results,
        "flips": flips,
        "choice": None if choose is None else {"agreement": choose, "budgets": choose_budgets(results, choose)},
        "warnings": warnings,
    }
    write_report(report, output, others)
    return report


def settings_of_options(options: dict) -> EvaluationSettings:
    """Settings from the options of the command, with their defaults."""
    merger, budgets, folder = (options.pop(name) for name in ("merger", "num_merged_tokens", "image_folder"))
    on_gpu = (options["device"] or "cuda").startswith("cuda") and torch.cuda.is_available()
    options["device"] = options["device"] or ("cuda" if on_gpu else "cpu")
    options["dtype"] = options["dtype"] or ("bfloat16" if on_gpu else "float32")
    options["model"] = options["model"] or str(MODEL_DIR)
    options["prompt"] = options["prompt"].replace("\\n", "\n").replace("\\t", "\t")  # as shells pass them on
    folder = None if folder is None else str(folder)
    return EvaluationSettings(**options, mergers=merger or [], budgets=budgets or [], image_folder=folder)


def check_settings(settings: EvaluationSettings, choose: float | None = None):
    """Refuses settings that can be told to be wrong without a model.

    Raises:
        ValueError: So they are.
    """
    if choose is not None and not 0 < choose <= 1:
        raise ValueError(f"choose={choose}: has to be above 0 and up to 1, such as 0.98.")
    if settings.metric not in METRICS:
        raise ValueError(f"metric={settings.metric!r}: has to be one of {', '.join(METRICS)}.")
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype={settings.dtype!r}: has to be one of {', '.join(DTYPES)}.")
    if settings.on_broken_row not in ("error", "skip"):
        raise ValueError(f"on_broken_row={settings.on_broken_row!r}: has to be 'error' or 'skip'.")
    for name in ("batch_size", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: has to be 1 or more.")
    if settings.attention_mass is not None and not 0 <= settings.attention_mass <= 1:
        raise ValueError(f"attention_mass={settings.attention_mass}: has to be from 0 to 1.")
    if settings.flips < 0:
        raise ValueError(f"flips={settings.flips}: has to be 0 or more.")
    check_device(settings.device)
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit={settings.limit}: has to be 1 or more; leave it out to ask all questions.")


def check_answers(metric: str, questions: list[PictureQuestion]):
    """Refuses right answers that the metric cannot score, before anything is asked.

    Raises:
        ValueError: There is one; its question is named.
    """
    for question in questions:
        if question.answers:
            try:
                METRICS[metric](question.answers[0], question.answers)
            except ValueError as error:
                raise ValueError(f"{question.name}: {error}") from error


def default_mergers(model: str) -> list[str]:
    """The model's own merger, or the bundled ones; in a LLaVA without one, a good untrained one."""
    if model == str(MODEL_DIR):
        return list(MERGERS)
    checkpoint = read_checkpoint(model, {})
    saved = checkpoint.adapter_merger or checkpoint.saved_merger or {"merger_type": UNMERGED}
    return ["tome" if saved.get("merger_type") == UNMERGED else OWN]


def default_budgets(num_patches: int) -> list[int]:
    """A half, a quarter, and so on: 288, 144, 72, 36 and 16 of 576 tokens."""
    return sorted({max(1, num_patches // part) for part in (2, 4, 8, 16, 36)}, reverse=True)


def check_budgets(budgets: list[int], num_patches: int):
    """Refuses budgets above the number of visual tokens.

    Raises:
        ValueError: There is one, or none at all.
    """
    if not budgets or max(budgets) > num_patches or min(budgets) < 1:
        raise ValueError(f"num_merged_tokens={budgets}: one or more, from 1 to the {num_patches} tokens of an image.")


def load_model(settings: EvaluationSettings) -> tuple[LlavaMergeForConditionalGeneration, LlavaMergeProcessor]:
    """The model, in eval mode on its device, and its processor."""
    options = {"dtype": getattr(torch, settings.dtype), "attn_implementation": settings.attn_implementation}
    model = LlavaMergeForConditionalGeneration.from_pretrained(settings.model, **options)
    return model.to(settings.device).eval(), LlavaMergeProcessor.from_pretrained(settings.model)


def ask(
    grid: Grid,
    questions: list[PictureQuestion],
    size: int,
    answers: AnswersFile,
    name: str,
    with_divergence: bool = True,
) -> list[dict]:
    """The answers to all questions, in batches of `size`; those that the file has are not asked again."""
    batches = {f"{name}-{start}": questions[start : start + size] for start in range(0, len(questions), size)}
    missing = {batch: few for batch, few in batches.items() if batch not in answers.rows}
    for index, (batch, few) in enumerate(tqdm(missing.items(), name, unit="batch", disable=None)):
        if not index:
            grid.answer(few, with_divergence)  # to warm up, or the first cell would pay for it
        answers.add({"batch": batch, **grid.answer(few, with_divergence)})
    return [answers.rows[batch] for batch in batches]


def read_report(path: Path, protocol: dict) -> dict:
    """The results of an earlier report.

    Raises:
        ValueError: There is none, or it is of another protocol.
    """
    report = read_evaluation(path)
    check_same_protocol(protocol, report["protocol"], str(path))
    where = f" ({path.parent.name})"
    merged = {key: row for key, row in report["results"].items() if row["budget"] != "all"}
    return {key + where: {**row, "merger": row["merger"] + where} for key, row in merged.items()}


def write_report(report: dict, output: Path, others: list[dict]):
    """Writes report.json, report.md and, where matplotlib is installed, scores.png, each whole."""
    shown = dict(report["results"])
    for other in others:
        shown |= other
    protocol = report["protocol"]
    text = [
        f"# {protocol['questions']} questions of {protocol['data']} ({protocol['split']})",
        make_table(shown),
        *(f"**Warning:** {warning}" for warning in report["warnings"]),
        *describe_choice(report),
        protocol_in_words(protocol),
    ]
    write_whole(output / "report.md", "\n\n".join(text) + "\n")
    write_whole(output / "report.json", json.dumps(report, indent=1) + "\n")
    try:
        from llava_merge.evaluation.plot import draw_results  # slow to import
    except ModuleNotFoundError as error:
        logger.warning(f"No scores.png was drawn, since {error.name} is not installed.")
        return
    with renamed_when_whole(output / "scores.png") as written:
        draw_results(shown, written)
