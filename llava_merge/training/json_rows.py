# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Rows of JSON files as people have them: a list, one object a line, or the list or table inside of an object."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path


BROKEN = "broken row"  # key of what stands for a row that cannot be read: why
LISTS = ("data", "questions", "rows")  # keys of an object that holds the rows


def read_json(file: Path) -> list[dict]:
    """The rows of a JSON file, or one of lines. Of a line that is no JSON, `{BROKEN: why}` takes the place.

    Raises:
        ValueError: It cannot be read, or holds no rows.
    """
    try:
        data = file.read_bytes().removeprefix(BOM_UTF8)
    except OSError as error:
        raise ValueError(f"data: {str(file)!r} cannot be read: {error.strerror}.") from error
    if has_lines(file, data):
        return list(rows_of_lines(data.split(b"\n"), file.name))
    try:
        whole = json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {str(file)!r} is not in UTF-8 ({error}). Save it again so.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {str(file)!r} is no JSON: {error}") from error
    return [as_row(row, f"element {at + 1} of {file.name}") for at, row in enumerate(rows_of_whole(whole, file))]


def stream_json(files: list[str]) -> Iterator[dict]:
    """The rows of files of lines, one after the other, as [`read_json`] gives them."""
    for file in files:
        with open(file, "rb") as lines:
            yield from rows_of_lines(lines, Path(file).name)


def has_lines(file: Path, data: bytes) -> bool:
    """Whether a file has one object a line, which some call .json too, and no list that was called .jsonl."""
    head = data.lstrip()[:1]
    if file.suffix == ".jsonl":
        return head != b"["
    first, _, rest = data.strip().partition(b"\n")
    return head == b"{" and bool(rest.strip()) and BROKEN not in row_of_line(first, "line 1")


def rows_of_lines(lines: Iterable[bytes], name: str) -> Iterator[dict]:
    """The rows of lines that are not empty; a comma at the end is of a list and does no harm."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield row_of_line(line, f"line {number} of {name}")


def row_of_line(line: bytes, where: str) -> dict:
    """The row of one line, or why there is none."""
    try:
        return as_row(json.loads(line.strip().removesuffix(b",")), where)
    except (ValueError, RecursionError) as error:
        return {BROKEN: f"{where} is no JSON ({error}); a line holds one object"}


def as_row(row, where: str) -> dict:
    """A row, or why it is none."""
    return row if isinstance(row, dict) else {BROKEN: f"{where} is {type(row).__name__}; a row is an object"}


def rows_of_whole(whole, file: Path) -> list:
    """The rows that a whole JSON file holds: its list, the list in it, its values by their ids, as of GQA, or one row.

    Raises:
        ValueError: It holds none.
    """
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        for key in LISTS:
            if isinstance(whole.get(key), list):
                return whole[key]
        if whole and all(isinstance(row, dict) for row in whole.values()):
            return [{"id": key, **row} for key, row in whole.items()]
        if whole:
            return [whole]
    raise ValueError(
        f"data: {str(file)!r} holds no list of samples; give a list of objects, one object a line, or an object with "
        f"the list under {', '.join(LISTS)}."
    )
