# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The `llava-merge` command: a file for each subcommand."""

from llava_merge.cli import benchmark, convert, demo, evaluate, mergers, push, serve_app, train  # noqa: F401 - each registers its own
from llava_merge.cli.common import app


__all__ = ["app"]
