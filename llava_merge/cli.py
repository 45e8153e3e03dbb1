# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The `llava-merge` command."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated


try:
    import PIL  # noqa: F401 - said here what is missing, not in the middle
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"The llava-merge command needs {error.name}: pip install 'llava-merge[demo]'")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def describe():
    """LLaVA with fewer visual tokens, merged in CLIP space, before the projector."""


@app.command()
def demo(
    image: Annotated[str | None, typer.Option(help="Picture, a file or URL; default a bundled one.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="What to ask; may be given several times.")] = None,
    num_merged_tokens: Annotated[int | None, typer.Option(help="Tokens per picture after merging.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or Hub repo of a LLaVA; default the bundled one.")
    ] = None,
    merger: Annotated[str | None, typer.Option(help="Directory or Hub repo of a merger for it.")] = None,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("llava_merge_demo.png"),
):
    """Answers questions about a picture with all visual tokens and with merged ones, and draws what was merged."""
    from transformers.utils import logging

    from llava_merge.demo import MODEL_DIR, PICTURE, QUESTIONS
    from llava_merge.demo.compare import Comparison
    from llava_merge.pictures import open_picture

    logging.set_verbosity_error()  # that a fresh merger is fresh is no news here
    logging.disable_progress_bar()
    questions = question or list(QUESTIONS)
    with one_line_errors():
        picture = open_picture(image or PICTURE)
        comparison = Comparison(model or str(MODEL_DIR), num_merged_tokens, merger)
        answers = [
            (text, comparison.with_all_tokens(picture, text), comparison.with_merged_tokens(picture, text))
            for text in questions
        ]
        print_answers(answers)
        comparison.picture(picture, questions[0]).save(output)
    typer.echo(f"\nWhat the merged tokens keep of the picture: {output}")


@contextmanager
def one_line_errors():
    """Ends the command with one line and exit code 2 where something the user gave cannot be used."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from error


def print_answers(answers):
    """A table: each question, then answer and milliseconds with all tokens and with merged ones."""
    _, full, merged = answers[0]
    width = max(len(question) for question, _, _ in answers)
    columns = [max(len(pair[i].text) for pair in answers) for i in (1, 2)]
    columns = [max(length, 11) for length in columns]
    heads = [f"{answer.num_image_tokens} tokens" for answer in (full, merged)]
    typer.echo(f"{'':{width}}  {heads[0]:{columns[0] + 10}}  {heads[1]}")
    for question, full, merged in answers:
        cells = [
            f"{a.text:{column}} {a.milliseconds:6.0f} ms" for a, column in zip((full, merged), columns, strict=True)
        ]
        typer.echo(f"{question:{width}}  {cells[0]}  {cells[1]}")
