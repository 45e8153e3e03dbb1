# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from the first cell to the last, and print what they show."""

from pathlib import Path

import pytest


nbclient = pytest.importorskip("nbclient", reason="extra `test`")
nbformat = pytest.importorskip("nbformat", reason="extra `test`")

pytestmark = pytest.mark.newest
FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = ("quickstart", "your_own_merger", "see_what_is_merged")


def printed(notebook) -> list[str]:
    """What each cell printed."""
    return [
        "".join(output["text"] if output.output_type == "stream" else "" for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/jpeg" in output.get("data", {}) for output in outputs)


def test_all_are_here():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_prints_what_it_shows(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    shown = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(shown)
    fresh = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    for cell in fresh.cells:
        if cell.cell_type == "code":  # warnings and progress depend on the machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    assert printed(fresh) == printed(shown) and pictures(fresh) == pictures(shown) > 0
    assert str(Path.home()) not in (FOLDER / f"{name}.ipynb").read_text()
