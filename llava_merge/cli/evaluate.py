# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge evaluate`"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_merge.cli.common import ModelOption, command


@command("evaluate", extra="evaluate")
def evaluate(
    data: Annotated[
        str,
        typer.Argument(help="JSON, JSONL or parquet file, dataset on the Hub; `demo` or `demo-hard` for drawn scenes."),
    ] = "demo",
    model: ModelOption = None,
    merger: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, a bundled merger (question_aware, agnostic, salient), directory or Hub repo of one, or "
            "`own`; several to compare. NAME:FIELD=VALUE,FIELD=VALUE sets fields, as in tome:attention_mass=0. Default "
            "the model's own, or the bundled ones, else tome."
        ),
    ] = None,
    num_merged_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of an image; several make a grid. Default 1/2 to 1/36 of all.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="exact_match, vqa_accuracy, textvqa_accuracy, relaxed_accuracy (charts), pope (yes and no) or "
            "multiple_choice (letters)."
        ),
    ] = "exact_match",
    image_folder: Annotated[
        Path | None, typer.Option(help="What image paths are relative to; default the folder of the file.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a dataset on the Hub, or of the drawn scenes.")] = "test",
    limit: Annotated[
        int | None, typer.Option(help="Questions at most; of drawn scenes, of each type (default 50).")
    ] = None,
    on_broken_row: Annotated[
        str, typer.Option(help="`error` ends before anything is asked; `skip` leaves out broken rows and pictures.")
    ] = "error",
    prompt: Annotated[
        str, typer.Option(help="What is asked, with {question} in the place of the question.")
    ] = "{question}",
    choose: Annotated[
        float | None,
        typer.Option(help="Find the smallest budget that keeps this share of the unmerged answers, such as 0.98."),
    ] = None,
    flips: Annotated[
        int, typer.Option(help="Ask this many questions in batches of 1, 8 and 32 too, and count other answers.")
    ] = 0,
    against: Annotated[
        list[Path] | None, typer.Option(help="report.json of another run of the same protocol, to show along.")
    ] = None,
    position_ids: Annotated[str, typer.Option(help="`source` or `packed`, of methods named above.")] = "source",
    attention_mass: Annotated[
        float | None,
        typer.Option(
            help="Weight of merged tokens of methods named above, from 0 (one token) to 1 (all their patches); default "
            "1 where attention takes a bias."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default bfloat16 on a GPU, else float32.")
    ] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="As in from_pretrained.")] = None,
    device: Annotated[str | None, typer.Option(help="Default a GPU, if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of `random`.")] = 0,
    output: Annotated[
        Path,
        typer.Option(help="Folder for answers.jsonl, report.json, report.md and scores.png; goes on with its own."),
    ] = Path("llava_merge_evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of the table.")] = False,
):
    """Asks questions with each merger at each budget, and with none, and compares the answers.

    Rows of DATA have a question, an image (or images), and mostly an answer (or answers) and a type; or they are
    conversations as for training. Without answers, agreement with the unmerged model is all that is measured.
    """
    options = {
        name: value for name, value in locals().items() if name not in ("output", "against", "choose", "as_json")
    }
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading
    from llava_merge.evaluation.run import evaluate as run
    from llava_merge.evaluation.run import settings_of_options

    run(settings_of_options(options), output, against, choose, shlex.join(["llava-merge", *sys.argv[1:]]))
    typer.echo((output / ("report.json" if as_json else "report.md")).read_text(encoding="utf-8"))
