# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Answers on disk, line by line, so that an evaluation that was killed goes on where it was."""

import json
from pathlib import Path

from llava_merge.evaluation.protocol import check_same_protocol
from llava_merge.model.checkpoint_saving import write_whole


class AnswersFile:
    """A JSONL file: a header that says how the answers are made, then a line for each batch.

    Args:
        path: It is made where there is none; else what it holds is kept, but for a last line that was not finished.
        header: `{"protocol", "candidates", "cells"}`, equal to the file's.

    Raises:
        ValueError: The file holds answers that were made otherwise.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.rows = path, {}
        header = json.loads(json.dumps(header))
        if not path.exists():
            self._replace([header])
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        found = whole[0] if whole else header
        hint = "Give another --output, or remove the file."
        try:
            check_same_protocol(header["protocol"], found["protocol"], str(path))
        except ValueError as error:
            raise ValueError(f"{error} {hint}") from error
        if header["cells"] != found["cells"]:
            raise ValueError(f"{path} holds answers of other mergers or budgets: {', '.join(found['cells'])}. {hint}")
        if header["candidates"] != found["candidates"]:
            raise ValueError(f"{path} holds answers of mergers that were made otherwise. {hint}")
        self.rows = {row["batch"]: row for row in whole[1:]}
        self._replace(whole or [header])

    def _replace(self, rows: list[dict]):
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, row: dict):
        """Appends the answers of a batch."""
        self.rows[row["batch"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
