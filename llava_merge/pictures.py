# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Opening of every picture that the package is given, and saving of those it draws."""

import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from transformers.image_utils import load_image

from llava_merge.files import renamed_when_whole


TIMEOUT = 60  # seconds that a server may be silent


def open_picture(source: str | os.PathLike) -> Image.Image:
    """A picture, a file or URL, in RGB and upright: as its EXIF orientation says.

    Raises:
        ValueError: There is none, or it is broken, cannot be downloaded, or is larger than Pillow opens; it is named.
    """
    source = os.fspath(source)
    if "://" not in source and not os.path.isfile(source):
        raise ValueError(f"{source}: there is no such file. Give the path of a picture, or a URL.")
    try:
        return load_image(source, timeout=TIMEOUT)
    except UnidentifiedImageError as error:
        raise ValueError(f"{source} is not a picture.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{source} is too large to be opened safely; scale it down first. ({error})") from error
    except Exception as error:  # of Pillow's formats, and of the client that downloads, which have no class in common
        reason = str(error) or type(error).__name__
        raise ValueError(f"{source} is not a picture that can be opened: {reason}") from error


def save_picture(picture: Image.Image, path: Path):
    """Saves a picture whole or not at all.

    Raises:
        ValueError: There is no such folder, or the extension is of no format that Pillow writes.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}.")
    with renamed_when_whole(path) as written:
        picture.save(written)
