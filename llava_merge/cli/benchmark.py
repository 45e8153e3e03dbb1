# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge benchmark`"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_merge.cli.common import JsonOption, command


@command("benchmark")
def benchmark(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory or Hub repo of a LLaVA, or a shape, llava-1.5-7b or 0.2b, with random weights. Default the "
            "first shape on a GPU, the bundled model without one."
        ),
    ] = None,
    merger: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, or directory or Hub repo of a merger; several to compare. NAME:FIELD=VALUE,FIELD=VALUE "
            "sets fields. Default the bundled ones, else fixed_pooling without and with question_aware=true."
        ),
    ] = None,
    num_merged_tokens: Annotated[list[int] | None, typer.Option(help="Tokens of an image; default 64 and 16.")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Prompts at once; several too. Default 1, on a GPU 1, 8 and 32.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Of a prompt, besides the picture's.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 32,
    rounds: Annotated[int, typer.Option(help="In which all take turns; medians are shown.")] = 5,
    compile: Annotated[
        str | None,
        typer.Option(
            help="Measure each merger also from compile_for_inference(), with this backend of torch.compile, such as "
            "inductor, or none for CUDA graphs alone."
        ),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU in which to measure requests a second, at the largest batch.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default bfloat16 on a GPU, else float32.")
    ] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="As in from_pretrained.")] = None,
    device: Annotated[str | None, typer.Option(help="Default a GPU, if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and pictures.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.md and times.png.")] = Path(
        "llava_merge_benchmark"
    ),
    as_json: JsonOption = False,
):
    """Measures what merging saves on this machine: each phase of an answer, memory, and requests a second.

    The stock model is in every run, and all take turns, so that ratios hold where the machine is not quiet. What is
    answered plays no part.
    """
    from transformers.utils import logging

    from llava_merge.benchmark.run import benchmark as run
    from llava_merge.benchmark.run import settings_of_options

    logging.disable_progress_bar()
    lists = {"mergers": merger, "budgets": num_merged_tokens, "batch_sizes": batch_size}
    numbers = {"text_tokens": text_tokens, "new_tokens": new_tokens, "rounds": rounds, "memory": memory, "seed": seed}
    kinds = {"model": model, "dtype": dtype, "attn_implementation": attn_implementation, "device": device}
    kinds["compile"] = compile
    given = {name: value for name, value in {**lists, **numbers, **kinds}.items() if value is not None}
    run(settings_of_options(given), output, shlex.join(["llava-merge", *sys.argv[1:]]))
    typer.echo((output / ("report.json" if as_json else "report.md")).read_text(encoding="utf-8"))
