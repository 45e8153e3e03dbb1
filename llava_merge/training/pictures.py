# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Opening of every picture that the package is given, and saving of those it draws."""

import base64
import io
import os
import string
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_merge.model.checkpoint_saving import renamed_when_whole
from llava_merge.model.processing_llava_merge import check_proportions


TIMEOUT = 60  # seconds that a server may be silent
LARGEST_FILE = 2**28  # bytes
URL = string.punctuation  # what stays as it is; spaces and letters beyond ASCII are encoded
SHOWN = 100  # characters of a source in errors


def open_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """A picture in RGB and upright: as its EXIF orientation says. Of 16 bits a colour, the upper 8 are taken.

    Args:
        source: A path; a URL of http, https, file or data; the bytes of a file; or a picture that is open.

    Raises:
        ValueError: There is none, or it is broken, cannot be downloaded, or is larger than Pillow opens; it is named.
    """
    name = shown(source)
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(readable(source))
        check_proportions(opened)
        return in_8_bits(ImageOps.exif_transpose(opened)).convert("RGB")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{name}: there is no such file. Give the path of a picture, or a URL.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be opened safely; scale it down first. ({error})") from error
    except Exception as error:  # of Pillow's formats, which have no class in common
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} is not a picture that can be opened: {reason}") from error


def shown(source) -> str:
    """What errors call a picture; the contents of one are not repeated."""
    if isinstance(source, Image.Image):
        return f"picture {source.size[0]} × {source.size[1]}"
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    text = os.fspath(source)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def readable(source: str | os.PathLike | bytes) -> str | BinaryIO:
    """What Pillow opens: a path, or a file in memory.

    Raises:
        ValueError: It cannot be had, or is a URL of another kind.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    text = os.fspath(source)
    scheme = scheme_of(text)
    if scheme in ("http", "https"):
        return io.BytesIO(download(text))
    if scheme == "data":
        return io.BytesIO(bytes_of_data_url(text))
    if scheme not in ("", "file"):
        raise ValueError(f"{scheme}:// is not read. Give a path, or a URL of http, https, file or data.")
    return path_of_file_url(text) if scheme else text


def scheme_of(text: str) -> str:
    """What stands before the colon of a URL, in small letters; empty for a path."""
    head = text[:SHOWN]
    return head.partition(":")[0].lower() if "://" in head or head[:5].lower() == "data:" else ""


def path_of_file_url(url: str) -> str:
    """The path of a file:// URL of this machine.

    Raises:
        ValueError: It is of another.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"it is on the machine {parts.netloc!r}; write file:///path for a file of this one.")
    return url2pathname(parts.path)


def bytes_of_data_url(url: str) -> bytes:
    """What a URL of data: holds.

    Raises:
        ValueError: It is not as RFC 2397 has it.
    """
    head, comma, data = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        raw = b"".join(unquote_to_bytes(data).split())  # of lines, as base64.encodebytes makes
        return base64.b64decode(raw, validate=True) if head.lower().endswith(";base64") else raw
    except ValueError as error:
        raise ValueError(f"{error}; write data:image/png;base64, and then the file") from error


def download(url: str) -> bytes:
    """The file at a URL of http or https.

    Raises:
        ValueError: It cannot be had, or is larger than `LARGEST_FILE`.
    """
    try:
        with urlopen(Request(quote(url, safe=URL), headers={"User-Agent": "llava-merge"}), timeout=TIMEOUT) as answer:
            data, missing = answer.read(LARGEST_FILE + 1), answer.length
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"the download failed: {str(error) or type(error).__name__}") from error
    if len(data) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE // 2**20} MiB; scale it down first.")
    if missing:
        raise ValueError(f"the download broke off {missing} bytes before its end.")
    return data


def in_8_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits with the upper 8 of them, which Pillow would cut off at white; others as they are.

    Of floats from 0 to 1, 255 times that.
    """
    if picture.mode == "F" and 0 <= np.min(picture) <= np.max(picture) <= 1:
        return Image.fromarray((np.asarray(picture) * 255).round().astype(np.uint8))
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)) if values.max() > 255 else picture


def check_writable(path: Path):
    """Refuses a picture that could not be saved, before there is one.

    Raises:
        ValueError: There is no such folder, or the extension is of no format that Pillow writes.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}.")
    if path.is_dir() or Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: give the name of a file that ends with .png, .jpg or another format of pictures.")


def save_picture(picture: Image.Image, path: Path):
    """Saves a picture whole or not at all.

    Raises:
        ValueError: As [`check_writable`].
    """
    check_writable(path)
    with renamed_when_whole(path) as written:
        picture.save(written)
