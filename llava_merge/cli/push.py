# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge push`"""

import json
from pathlib import Path
from typing import Annotated

import typer

from llava_merge.cli.common import JsonOption, command


@command("push")
def push(
    directory: Annotated[
        Path,
        typer.Argument(help="Folder of a merger, a LLaVA with one, or an adapter, as training and saving write it."),
    ],
    repo_id: Annotated[str, typer.Argument(help="Repo on the Hub, ORGANISATION/NAME; made where it does not exist.")],
    report: Annotated[
        Path | None, typer.Option(help="report.json of `llava-merge evaluate`, whose results go into the card.")
    ] = None,
    merger: Annotated[
        str | None, typer.Option(help="Which of the report's mergers the folder is; default the only one.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new repo private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    as_json: JsonOption = False,
):
    """Pushes a saved folder to the Hub in one commit, with a model card, and with evaluation results in it.

    Log in with `hf auth login` before. Pickles, optimizer states and checkpoints of training stay here. The folder's
    own README.md is the card, else that of the repo, else a new one.
    """
    from llava_merge.evaluation.report import read_evaluation
    from llava_merge.serving.pushing import push_directory

    results = None if report is None else read_evaluation(report)
    commit = push_directory(directory, repo_id, results, merger, private or None, revision, create_pr)
    url = commit.pr_url or commit.commit_url
    typer.echo(json.dumps({"repo_id": repo_id, "url": url, "commit": commit.oid}) if as_json else f"Pushed: {url}")
