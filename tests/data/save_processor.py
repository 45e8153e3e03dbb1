# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes the processor that test_tokenizers.py expects from the transformers release that runs this, without code."""

import shutil
import sys
import tempfile
from pathlib import Path

import transformers


sys.path.insert(0, str(Path(__file__).parents[1]))

from test_tokenizers import hub_files, save_here


directory = Path(__file__).parent / f"processor_saved_by_{transformers.__version__}"
with tempfile.TemporaryDirectory() as scratch:
    save_here(hub_files(Path(scratch) / "stock"), Path(scratch) / "merged")
    shutil.copytree(Path(scratch) / "merged", directory, ignore=shutil.ignore_patterns("*.py"), dirs_exist_ok=True)
