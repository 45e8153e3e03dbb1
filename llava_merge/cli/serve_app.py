# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge app`"""

from typing import Annotated

import typer

from llava_merge.cli.common import ModelOption, command


@command("app", extra="app")
def serve_app(
    model: ModelOption = None,
    merger: Annotated[
        list[str] | None,
        typer.Option(help="Directory or Hub repo of a merger, or a method, to stand first in the list; several too."),
    ] = None,
    num_merged_tokens: Annotated[int | None, typer.Option(help="Tokens per picture at the start.")] = None,
    attention_mass: Annotated[
        float | None,
        typer.Option(help="Weight of merged tokens, 0 (as one token) to 1 (as their patches); default the merger's."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets everybody on the network in.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default the first free one from 7860.")] = None,
):
    """Asks about a picture in the browser: answers with all and with merged tokens, and what these keep of it."""
    from transformers.utils import logging

    from llava_merge.demo.browser import LAUNCH, make_app

    logging.disable_progress_bar()
    make_app(model, merger, num_merged_tokens, attention_mass).launch(server_name=host, server_port=port, **LAUNCH)
