# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Text on disk, whole or not at all."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str):
    """Writes a file under another name first, and then renames it."""
    written = path.with_name(f".{path.name}-{uuid.uuid4().hex}")  # a name that no link can lie in wait for
    try:
        written.write_text(text, encoding="utf-8")
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
