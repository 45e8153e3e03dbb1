# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`python -m llava_merge`, and `torchrun -m llava_merge`, are the `llava-merge` command."""

from llava_merge.cli import app


app()
