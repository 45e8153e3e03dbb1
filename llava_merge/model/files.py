# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Files on disk: whole or not at all, in the folder that was named, and nothing else is touched."""

import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(f"transformers.{__name__}")

_saving = threading.RLock()
STAGED = ".saving-"  # prefix of a folder that is being written
REPLACED = "replaced"  # folder in there, of files that were replaced
LEFT_FOLDER, LEFT_FILE = re.compile(r"\..+-[0-9a-f]{32}"), re.compile(r"\.[0-9a-f]{32}-.+")
CONFIG = "config.json"
WEIGHTS = (
    r"model(?P<variant>\..+?)?(-\d{5}-of-\d{5})?\.safetensors",
    r"model\.safetensors\.index(?P<variant>\..+)?\.json",
)


def refuse_output_in_input(output: Path, *inputs: str | Path | None):
    """Refuses to write where something is read: a command must not replace the checkpoint that it was given.

    Args:
        output: Folder or file that will be written.
        inputs: Folders, files, or Hub repos and other names, which are no paths here and do no harm.

    Raises:
        ValueError: `output` is one of the `inputs`, lies in one or holds one.
    """
    target = Path(output).resolve()
    for given in inputs:
        source = Path(given).resolve() if given is not None and os.path.exists(given) else None
        if source is not None and (target.is_relative_to(source) or source.is_relative_to(target)):
            raise ValueError(
                f"{output}, which is to be written, is, holds or lies in {given}, which is read. Give another path."
            )


def refuse_replaced_files(output: str | Path, written: tuple[str, ...], files: Iterable):
    """Refuses to replace files that are read, such as those of a dataset, which may lie where results are written.

    Args:
        output: Folder that will be written into.
        written: Patterns of the files in there that are written or removed.
        files: That are read. What is no path of a file does no harm; looked at only where a file could be replaced.

    Raises:
        ValueError: One of the `files` is there in the `output` and fits one of the patterns.
    """
    replaced = {path.resolve() for pattern in written for path in Path(output).glob(pattern)}
    for file in files if replaced else ():
        if isinstance(file, str | os.PathLike) and os.path.isfile(file) and Path(file).resolve() in replaced:
            raise ValueError(
                f"{file} is read, and would be replaced by what is written into {output}. Give another output, or "
                f"rename the file."
            )


def refuse_link_outside(folder: Path, file: Path):
    """Refuses a file of a `folder` that is a link out of it, since its content would be copied or published.

    In a snapshot of the Hub's cache, a link may lead into the `blobs` of the same repo, where its files are.

    Raises:
        ValueError: So it is.
    """
    root, target = folder.resolve(), file.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (root, *blobs)):
        raise ValueError(
            f"{file} is a link to {target}, outside of the folder, which would be published. Copy the file if it "
            f"belongs here, or remove the link."
        )


@contextmanager
def renamed_when_whole(path: Path):
    """The path to write a file at, of the same extension, which becomes `path` afterwards where nothing is raised."""
    written = path.with_name(f".{uuid.uuid4().hex}-{path.name}")  # a name that no link can lie in wait for
    try:
        yield written
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def write_whole(path: Path, text: str):
    """Writes a file of text whole or not at all."""
    with renamed_when_whole(path) as written:
        written.write_text(text, encoding="utf-8")


def save_at_once(save, directory: str | os.PathLike, optional: tuple[str, ...] = ()) -> list[str]:
    """Calls `save(path)` with a temporary folder on the device of `directory`, then puts the files into `directory`.

    A new folder appears with one rename. In one that exists, config.json leaves before the first file is replaced and
    comes last, so that a folder loads as the old checkpoint or the new one, or says that it has no config.json. A save
    that fails leaves the old checkpoint. Threads wait for each other; processes put their files over those of others.

    Args:
        optional: Files that are part of the checkpoint where they are written; else an older one is removed.

    Returns:
        The files that were written, by their path in `directory`.

    Raises:
        ValueError: `directory` is a file, or holds a folder, or a link that leads out of it, where a file is to be
            written.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a checkpoint is saved as a folder. Give another path.")
    with _saving:  # two threads at once would put files into one folder by turns
        is_new = not directory.exists()
        parent = directory.parent if is_new else directory
        parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(parent, f".{directory.name}-" if is_new else STAGED) as staged:
            save(staged)
            files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
            with suppress(OSError):  # where another process was faster
                if is_new:
                    os.rename(staged, directory)
                    return files
            move_files(staged, directory, files, optional)
    return files


def remove_leftovers(folder: Path):
    """Removes what saves into `folder` have left that were broken off; not where it holds what was to be replaced."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink():
            continue
        if LEFT_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()
        elif LEFT_FOLDER.fullmatch(path.name) and path.is_dir() and not (path / REPLACED).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            continue
        logger.warning(f"Removed {path}, of a save that was broken off.")


@contextmanager
def staging_folder(parent: Path, prefix: str):
    """A new folder in `parent`, which is removed afterwards where it still is there."""
    path = parent / f"{prefix}{uuid.uuid4().hex}"
    for leftover in parent.glob(f"{prefix}{'?' * 32}"):  # maybe of a process that still writes it
        logger.warning_once(f"{leftover} is of a save that was broken off, or still runs; remove it if none does.")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def move_files(staged: Path, directory: Path, files: list[str], optional: tuple[str, ...] = ()):
    """Puts the `files` of a whole checkpoint into their places, and removes weights of the one that it replaces.

    What is replaced or removed is kept in `staged` till all is done, and put back where something fails.

    Raises:
        ValueError: A folder is in the place of a file, or a link leads out of `directory`.
    """
    for name in files:
        if not (directory / name).parent.resolve().is_relative_to(directory):
            raise ValueError(f"{(directory / name).parent} is a link that leads out of {directory}. Remove it.")
        if (directory / name).is_dir() and not (directory / name).is_symlink():
            raise ValueError(f"{directory / name} is a folder, and a file is to be saved there. Remove it.")
    stale = replaced_weights(files, os.listdir(directory), optional)
    first = [CONFIG] if CONFIG in files else []  # so that nobody loads what is half replaced
    kept, put = staged / REPLACED, []
    try:
        for name in first + stale:
            keep(directory / name, kept / name)
        for name in sorted(files, key=CONFIG.__eq__):
            keep(directory / name, kept / name)
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, directory / name)
            put.append(name)
    except BaseException:
        for name in put:
            (directory / name).unlink(missing_ok=True)
        old = [path.relative_to(kept).as_posix() for path in kept.rglob("*") if not path.is_dir() or path.is_symlink()]
        for name in sorted(old, key=CONFIG.__eq__):
            os.replace(kept / name, directory / name)
        raise


def keep(path: Path, kept: Path):
    """Moves a file away, if it is there still: another process may replace the same."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        os.replace(path, kept)


def replaced_weights(written: list[str], present: list[str], optional: tuple[str, ...] = ()) -> list[str]:
    """Names of those `present` that are of the weights that the `written` files replace: other shards, or their index.

    Weights of another variant, or of names that `save_pretrained` does not give, are somebody else's.
    """
    variants = {variant_of(name) for name in written} - {None}
    return [
        name
        for name in present
        if name not in written and (variant_of(name) in variants or (name in optional and CONFIG in written))
    ]


def variant_of(name: str) -> str | None:
    """The variant that a file of weights is of, ".fp16" or "" for none; None where it is no such file."""
    matches = [match for match in (re.fullmatch(pattern, name) for pattern in WEIGHTS) if match]
    return (matches[0]["variant"] or "") if matches else None
