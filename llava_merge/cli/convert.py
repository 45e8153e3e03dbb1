# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge convert`"""

import json
from pathlib import Path
from typing import Annotated

import typer

from llava_merge.cli.common import JsonOption, command


@command("convert")
def convert(
    base: Annotated[str, typer.Argument(help="Directory or Hub repo of a stock LLaVA, in safetensors.")],
    merger: Annotated[
        str,
        typer.Option(
            help="Directory or Hub repo of a merger, or a method, see `llava-merge mergers`; "
            "NAME:FIELD=VALUE,FIELD=VALUE sets fields, as in tome:position_ids=packed."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    num_merged_tokens: Annotated[int | None, typer.Option(help="Tokens per image; default the merger's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the base on the Hub.")] = None,
    as_json: JsonOption = False,
):
    """Makes one checkpoint of a stock LLaVA and a merger, with code and processor, without loading the LLaVA.

    vLLM serves it, and it loads as `from_pretrained(BASE, merger=MERGER)` does, also where this package is not
    installed. Weight files of the base are hard links where they can be, so that it takes hardly any room. All at once
    or not at all.
    """
    from llava_merge.serving.convert import convert as run

    config = run(base, out, merger, num_merged_tokens, revision).merger_config
    done = {"out": str(out), "merger_type": config.merger_type, "num_merged_tokens": config.num_merged_tokens}
    typer.echo(
        json.dumps(done) if as_json else f"{out}: {config.merger_type}, {config.num_merged_tokens or 'all'} tokens"
    )
