# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every public name has a docstring, and the command that makes a reference of them works."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest
from conftest import load_example

import llava_merge


pytest.importorskip("pdoc", reason="extra `docs`")
pytestmark = pytest.mark.newest
# runs; need more
NOT_IMPORTED = ("llava_merge.__main__", "llava_merge.evaluation.lmms_eval", "llava_merge.serving.vllm")
MODULES = [module.name for module in pkgutil.walk_packages(llava_merge.__path__, "llava_merge.")]


def undocumented(owner, module: str) -> Iterator[str]:
    """Names of functions, classes and properties that are made in the module and have no docstring.

    One of what a method overrides will do.
    """
    for name in vars(owner):
        member = inspect.getattr_static(owner, name)
        value = member.fget if isinstance(member, property) else inspect.unwrap(getattr(owner, name))
        if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        if value.__module__ != module or not value.__qualname__.startswith(getattr(owner, "__qualname__", "")):
            continue  # imported, or of another class
        if not inspect.getdoc(member if isinstance(member, property) else getattr(owner, name)):
            yield value.__qualname__
        if inspect.isclass(value):
            yield from undocumented(value, module)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in NOT_IMPORTED])
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__ and not [*undocumented(module, name)]


def test_the_reference_is_made_by_one_command(tmp_path):
    load_example("make_api_reference").main(str(tmp_path))
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    wanted = [name for name in MODULES if name not in NOT_IMPORTED and not name.startswith("llava_merge.cli")]
    assert pages >= {"index.html", *(f"{name.replace('.', '/')}.html" for name in wanted)}
    page = (tmp_path / "llava_merge" / "model" / "merging_tome.html").read_text()
    assert "bipartite" in page and "num_tokens" in page
