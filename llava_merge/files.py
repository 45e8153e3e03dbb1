# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Reports and pictures on disk, each whole or not at all."""

import os
from pathlib import Path

from PIL import Image


def write_whole(path: Path, text: str):
    """Writes a file under another name first, and then renames it."""
    written = path.with_name(f".{path.name}.new")
    written.write_text(text, encoding="utf-8")
    os.replace(written, path)


def save_picture(picture: Image.Image, path: Path):
    """Saves a picture under another name of the same extension first, and then renames it.

    Raises:
        ValueError: There is no such folder, or the extension is of no format that Pillow writes.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}.")
    written = path.with_name(f".new-{path.name}")
    picture.save(written)
    os.replace(written, path)
