# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge demo`"""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer

from llava_merge.cli.common import JsonOption, ModelOption, command


UNMERGED, BASELINE = "none", "random"


@command("demo")
def demo(
    image: Annotated[str | None, typer.Option(help="Picture, a file or URL; default a bundled one.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="What to ask; may be given several times.")] = None,
    num_merged_tokens: Annotated[int | None, typer.Option(help="Tokens per picture after merging.")] = None,
    model: ModelOption = None,
    merger: Annotated[
        list[str] | None,
        typer.Option(
            help="A method (see `llava-merge mergers`), a bundled merger (question_aware, agnostic, salient), or "
            "directory or Hub repo of one; several to compare. Default the model's own; of the bundled model, "
            "question_aware."
        ),
    ] = None,
    attention_mass: Annotated[
        float | None,
        typer.Option(help="Weight of merged tokens, 0 (as one token) to 1 (as their patches); default the merger's."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("llava_merge_demo.png"),
    as_json: JsonOption = False,
):
    """Answers questions about a picture with all visual tokens and with merged ones, and draws what was merged.

    A baseline that keeps tokens at random stands beside every merger.
    """
    from transformers.utils import logging

    from llava_merge.demo import ANSWERS, KNOWS, MERGERS, MODEL_DIR, NUM_MERGED_TOKENS, PICTURE, QUESTIONS
    from llava_merge.demo.compare import Comparison
    from llava_merge.evaluation.candidates import checkpoints_of, shown_name, text_towers_of
    from llava_merge.model.checkpoint_saving import refuse_output_in_input
    from llava_merge.training.pictures import check_writable, open_image, save_picture
    from llava_merge.visualization import side_by_side, thumbnail

    logging.disable_progress_bar()
    questions, mergers = question or list(QUESTIONS), merger or [None]
    if model is None and merger is None:
        mergers, num_merged_tokens = [MERGERS[0]], NUM_MERGED_TOKENS if num_merged_tokens is None else num_merged_tokens
    refuse_output_in_input(output, image or PICTURE, model or MODEL_DIR, *checkpoints_of(filter(None, mergers)))
    check_writable(output)
    for text in questions:
        if not text.strip() or "\n" in text:
            raise ValueError(f"question={text!r} is empty or has several lines; give one line, or leave it out.")
    if UNMERGED in mergers:
        raise ValueError("--merger none: the answers with all tokens are shown beside every merger; leave it out.")
    if len({short_name(name or "") for name in mergers}) < len(mergers):
        raise ValueError("--merger: two are called alike; rename a folder, or leave one out.")
    picture = open_image(image or PICTURE)
    if model is None and image is not None:
        typer.echo(KNOWS, err=True)
    comparison = Comparison(model or str(MODEL_DIR), num_merged_tokens, mergers[0], attention_mass)
    columns = {UNMERGED: [comparison.with_all_tokens(picture, text) for text in questions]}
    panels = [(caption_of(columns, questions, UNMERGED, 0), thumbnail(picture))]
    for index, merger_name in enumerate([*mergers, *([BASELINE] if BASELINE not in mergers else [])]):
        if index:
            comparison.use(merger_name)
        name = comparison.name if merger_name is None else shown_name(merger_name)
        columns[name] = [comparison.with_merged_tokens(picture, text) for text in questions]
        for number in shown_questions(columns, name, comparison.used.config.question_aware):
            drawn = comparison.picture(picture, questions[number])
            panels.append((caption_of(columns, questions, name, number), drawn))
    refuse_output_in_input(output, *text_towers_of(comparison.model, comparison.candidates.values()))
    captions, pictures = zip(*panels, strict=True)
    save_picture(side_by_side(pictures, captions), output)
    if as_json:
        answers = {name: [asdict(answer) for answer in given] for name, given in columns.items()}
        typer.echo(json.dumps({"questions": questions, "answers": answers, "picture": str(output)}, indent=1))
        return
    print_answers(questions, columns)
    right = [ANSWERS.get(text) for text in questions] if image is None and model is None else [None]
    typer.echo(f"\nWhat the merged tokens keep of the picture: {output}\n{summary(columns, right)}")


def shown_questions(columns: dict[str, list], name: str, question_aware: bool) -> list[int]:
    """Which questions a merger is drawn for: two if it reads them, else one, of the baseline one that it fails."""
    if question_aware:
        return [*range(min(2, len(columns[name])))]
    pairs = zip(columns[UNMERGED], columns[name], strict=True)
    failed = [number for number, (one, other) in enumerate(pairs) if one.text != other.text]
    return (failed if name == BASELINE else [])[:1] or [0]


def caption_of(columns: dict[str, list], questions: list[str], name: str, number: int) -> str:
    """What stands above the picture of a merger: its name, a question, and the answer."""
    answer = columns[name][number]
    return f"{head_of(name, answer.num_image_tokens)}\n{questions[number]} {shorten(answer.text, 24, placeholder=' …')}"


def head_of(name: str, num_image_tokens: int) -> str:
    """Tokens of an image, and the merger that made them."""
    return f"{num_image_tokens} tokens" + ("" if name == UNMERGED else f", {short_name(name)}")


def short_name(name: str) -> str:
    """A method, or what a merger's folder is called."""
    return Path(name).name


def summary(columns: dict[str, list], right: list[str | None]) -> str:
    """One line: how many answers are right, or the unmerged ones where it is not known which are, and how fast.

    Args:
        right: The right answer to each question, None where it is not known.
    """
    (_, unmerged), *merged = columns.items()
    known, found = None not in right, []
    wanted = right if known else [answer.text for answer in unmerged]

    def score(answers: list) -> str:
        same = [answer.text.lower() == each.lower() for answer, each in zip(answers, wanted, strict=True)]
        return f"{sum(same)}/{len(same)}"

    speed = statistics.median(answer.milliseconds for answer in unmerged)
    for name, answers in merged:
        times = speed / statistics.median(answer.milliseconds for answer in answers)
        found.append(f"{score(answers)} with {short_name(name)}" + (f", {times:.1f} × as fast" * (name != BASELINE)))
    head = f"Right answers: {score(unmerged)} with all tokens; " if known else "Answers as with all tokens: "
    return head + "; ".join(found) + "."


def print_answers(questions: list[str], columns: dict[str, list]):
    """A table: each question, then answer and milliseconds with all tokens and with those of each merger."""
    rows = [[shorten(answer.text, 32, placeholder=" …") for answer in answers] for answers in columns.values()]
    heads = [head_of(name, answers[0].num_image_tokens) for name, answers in columns.items()]
    widths = [max(len(head) - 10, 11, *map(len, texts)) for head, texts in zip(heads, rows, strict=True)]
    first = max(map(len, questions))
    typer.echo("  ".join([" " * first, *(f"{head:{width + 10}}" for head, width in zip(heads, widths, strict=True))]))
    for index, question in enumerate(questions):
        cells = [
            f"{texts[index]:{width}} {answers[index].milliseconds:6.0f} ms"
            for texts, answers, width in zip(rows, columns.values(), widths, strict=True)
        ]
        typer.echo("  ".join([f"{question:{first}}", *cells]))
