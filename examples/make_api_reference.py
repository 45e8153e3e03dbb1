# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes the API reference, one HTML page for each module, from the docstrings.

pip install ".[docs]" && python examples/make_api_reference.py api
"""

import pkgutil
import sys
from pathlib import Path

import pdoc
import pdoc.render

import llava_merge


# commands; what needs lmms-eval or vLLM
NOT_SHOWN = ("llava_merge.__main__", "llava_merge.cli", "llava_merge.evaluation.lmms_eval", "llava_merge.serving.vllm")


def module_names() -> list[str]:
    """The package, its modules, and its packages, which bring their own modules."""
    names = [f"llava_merge.{module.name}" for module in pkgutil.iter_modules(llava_merge.__path__)]
    return ["llava_merge", *(name for name in names if name not in NOT_SHOWN)]


def main(output: str = "api"):
    pdoc.render.configure(docformat="google", footer_text=f"llava_merge {llava_merge.__version__}")
    pdoc.pdoc(*module_names(), *(f"!{name}" for name in NOT_SHOWN), output_directory=Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
