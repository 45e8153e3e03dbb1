# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The `llava-merge` command."""

import sys
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Annotated


try:
    import PIL  # noqa: F401 - said here what is missing, not in the middle
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"The llava-merge command needs {error.name}: pip install 'llava-merge[demo]'")

ModelOption = Annotated[str | None, typer.Option(help="Directory or Hub repo of a LLaVA; default the bundled one.")]
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def describe():
    """LLaVA with fewer visual tokens, merged in CLIP space, before the projector."""


@app.command()
def demo(
    image: Annotated[str | None, typer.Option(help="Picture, a file or URL; default a bundled one.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="What to ask; may be given several times.")] = None,
    num_merged_tokens: Annotated[int | None, typer.Option(help="Tokens per picture after merging.")] = None,
    model: ModelOption = None,
    merger: Annotated[
        list[str] | None,
        typer.Option(
            help="A method (see `llava-merge mergers`), a bundled merger (question_aware, agnostic), or directory or "
            "Hub repo of one; several to compare. Default the model's own; of the bundled model, question_aware."
        ),
    ] = None,
    attention_mass: Annotated[
        float | None, typer.Option(help="Weight of merged tokens, from 0 (one token) to 1 (all their patches).")
    ] = None,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("llava_merge_demo.png"),
):
    """Answers questions about a picture with all visual tokens and with merged ones, and draws what was merged.

    A baseline that keeps tokens at random stands beside every merger.
    """
    from transformers.utils import logging

    from llava_merge.demo import MERGERS, MODEL_DIR, NUM_MERGED_TOKENS, PICTURE, QUESTIONS
    from llava_merge.demo.compare import Comparison
    from llava_merge.pictures import open_picture
    from llava_merge.visualization import side_by_side, thumbnail

    logging.set_verbosity_error()  # that a fresh merger is fresh is no news here
    logging.disable_progress_bar()
    questions, mergers = question or list(QUESTIONS), merger or [None]
    if model is None and merger is None:
        mergers, num_merged_tokens = [MERGERS[0]], NUM_MERGED_TOKENS if num_merged_tokens is None else num_merged_tokens
    with one_line_errors():
        picture = open_picture(image or PICTURE)
        comparison = Comparison(model or str(MODEL_DIR), num_merged_tokens, mergers[0], attention_mass)
        columns = {"": [comparison.with_all_tokens(picture, text) for text in questions]}
        drawn = {"the picture": thumbnail(picture)}
        for index, name in enumerate([*mergers, *(["random"] if "random" not in mergers else [])]):
            if index:
                comparison.use(name)
            columns[name or comparison.name] = [comparison.with_merged_tokens(picture, text) for text in questions]
            if name in mergers:
                caption = f"{name or comparison.name}, {comparison.num_merged_tokens} tokens"
                drawn[caption] = comparison.picture(picture, questions[0])
        print_answers(questions, columns)
        side_by_side([*drawn.values()], [*drawn]).save(output)
    typer.echo(f"\nWhat the merged tokens keep of the picture: {output}")


@app.command()
def mergers():
    """Lists the merging methods: what each does, whether it is trained, and what it needs."""
    from llava_merge import list_mergers

    for method in list_mergers():
        kind = "trained" if method.trained else "training-free"
        needs = [f"needs {', '.join(method.requires)}"] if method.requires else []
        question = ["reads the question"] if method.question_aware else []
        typer.echo(f"{method.name}: {method.summary}")
        typer.echo(f"    {'; '.join([kind, *question, *needs, *([method.paper] if method.paper else [])])}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/configs.")],
    set: Annotated[
        list[str] | None, typer.Option(help="Another value for a key, such as training.max_steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last whole checkpoint of training.output_dir.")] = False,
):
    """Trains a merger, on one GPU, or on many under torchrun or accelerate: `torchrun -m llava_merge train ...`."""
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("llava_merge").setLevel(logging.INFO)
    with one_line_errors():
        try:
            from llava_merge.training.settings import load_settings

            settings = load_settings(config, set or [])
            from llava_merge.training.run import train as run
        except ModuleNotFoundError as error:
            raise ValueError(f"Training needs {error.name}: pip install 'llava-merge[train]'") from error
        run(settings, resume)


@app.command()
def evaluate(
    data: Annotated[
        str,
        typer.Argument(help="JSON, JSONL or parquet file, dataset on the Hub; `demo` or `demo-hard` for drawn scenes."),
    ] = "demo",
    model: ModelOption = None,
    merger: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, a bundled merger (question_aware, agnostic), directory or Hub repo of one, or `own`; "
            "several to compare. NAME:FIELD=VALUE,FIELD=VALUE sets fields, as in tome:attention_mass=0. Default the "
            "model's own, or the bundled ones, else tome."
        ),
    ] = None,
    num_merged_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of an image; several make a grid. Default 1/2 to 1/36 of all.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="exact_match, vqa_accuracy, relaxed_accuracy (charts) or pope (yes and no).")
    ] = "exact_match",
    image_folder: Annotated[
        Path | None, typer.Option(help="What image paths are relative to; default the folder of the file.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a dataset on the Hub, or of the drawn scenes.")] = "test",
    limit: Annotated[
        int | None, typer.Option(help="Questions at most; of drawn scenes, of each type (default 50).")
    ] = None,
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
        float, typer.Option(help="Weight of merged tokens, from 0 (one token) to 1 (all their patches).")
    ] = 1.0,
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
    with one_line_errors():
        try:
            from llava_merge.evaluation.run import evaluate as run
            from llava_merge.evaluation.run import settings_of_options
        except ModuleNotFoundError as error:
            raise ValueError(f"Evaluation needs {error.name}: pip install 'llava-merge[evaluate]'") from error
        run(settings_of_options(options), output, against, choose)
    typer.echo((output / ("report.json" if as_json else "report.md")).read_text(encoding="utf-8"))


@contextmanager
def one_line_errors():
    """Ends the command with one line and exit code 2 where something the user gave cannot be used."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from error


def print_answers(questions: list[str], columns: dict[str, list]):
    """A table: each question, then answer and milliseconds with all tokens and with those of each merger."""
    rows = [[shorten(answer.text, 32, placeholder=" …") for answer in answers] for answers in columns.values()]
    heads = [
        f"{answers[0].num_image_tokens} tokens{', ' if name else ''}{Path(name).name}"
        for name, answers in columns.items()
    ]
    widths = [max(len(head) - 10, 11, *map(len, texts)) for head, texts in zip(heads, rows, strict=True)]
    first = max(map(len, questions))
    typer.echo("  ".join([" " * first, *(f"{head:{width + 10}}" for head, width in zip(heads, widths, strict=True))]))
    for index, question in enumerate(questions):
        cells = [
            f"{texts[index]:{width}} {answers[index].milliseconds:6.0f} ms"
            for texts, answers, width in zip(rows, columns.values(), widths, strict=True)
        ]
        typer.echo("  ".join([f"{question:{first}}", *cells]))
