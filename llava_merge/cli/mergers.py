# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge mergers`"""

import json
from dataclasses import asdict

import typer

from llava_merge.cli.common import JsonOption, command


READS = {True: "reads the question", False: "reads the question with question_aware=true"}


@command("mergers")
def mergers(as_json: JsonOption = False):
    """Lists the merging methods: what each does, whether it is trained, and what it needs."""
    from llava_merge import list_mergers
    from llava_merge.model.configuration_llava_merge import QUESTION_METHODS

    methods = list_mergers()
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in methods], indent=1))
        return
    for method in methods:
        kind = "trained" if method.trained else "training-free"
        needs = [f"needs {', '.join(method.requires)}"] if method.requires else []
        question = [READS[method.name in QUESTION_METHODS]] if method.question_aware else []
        typer.echo(f"{method.name}: {method.summary}")
        typer.echo(f"    {'; '.join([kind, *question, *needs, *([method.paper] if method.paper else [])])}")
