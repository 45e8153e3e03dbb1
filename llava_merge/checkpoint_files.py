# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Weight files: only safetensors, whole, and with every weight that is needed."""

import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def hub_arguments(kwargs: dict) -> dict:
    """Those of `kwargs` that say where on the Hub, or in its cache, a checkpoint is."""
    return {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}


def for_other_repo(hub_kwargs: dict) -> dict:
    """The Hub arguments that also hold for a second repo: token and cache, but not the revision of the first."""
    return {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}


@contextmanager
def naming_broken_files(path: str | os.PathLike, subfolder: str | None = None):
    """Checks the safetensors of a local `path` first, and names the checkpoint where one cannot be read inside.

    Raises:
        ValueError: A file is truncated or corrupted.
    """
    check_safetensors_files(Path(path) / (subfolder or ""))
    with refusing_broken_file(path):
        yield


def check_safetensors_files(directory: str | os.PathLike):
    """Opens the header of each safetensors file in `directory`; does nothing where that is no local directory.

    Raises:
        ValueError: A file is truncated or corrupted; it is named.
    """
    for path in sorted(Path(directory).glob("*.safetensors")):
        with refusing_broken_file(path), safe_open(path, framework="pt"):
            pass


@contextmanager
def refusing_broken_file(path: str | os.PathLike):
    """Names `path` where a safetensors file cannot be read inside.

    Raises:
        ValueError: So it is.
    """
    try:
        yield
    except SafetensorError as error:
        if str(error).startswith("device"):  # one that the caller asked for
            raise
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Download or save the checkpoint again."
        ) from error


def refuse_missing_weights(path: str, missing_keys, hint: str = ""):
    """Raises where a checkpoint lacked weights.

    Raises:
        ValueError: `missing_keys` is not empty; those weights are random now.
    """
    missing = sorted(missing_keys)
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{path} lacks weights of this model, which would stay random: {some}. Use a complete checkpoint of the "
            f"same architecture{hint}."
        )
