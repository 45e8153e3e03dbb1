# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge train`"""

from pathlib import Path
from typing import Annotated

import typer

from llava_merge.cli.common import command


@command("train", extra="train")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/configs.")],
    set: Annotated[
        list[str] | None, typer.Option(help="Another value for a key, such as training.max_steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last whole checkpoint of training.output_dir.")] = False,
):
    """Trains a merger, on one GPU, or on many under torchrun or accelerate: `torchrun -m llava_merge train ...`."""
    import logging

    logging.getLogger("transformers.llava_merge").setLevel(logging.INFO)
    from accelerate import PartialState

    from llava_merge.training.run import train as run
    from llava_merge.training.settings import load_settings

    run(load_settings(config, set or []), resume, config)
    PartialState().destroy_process_group()  # its threads may abort a process that ends with one
