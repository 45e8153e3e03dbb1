# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Files of checkpoints: written atomically into the folder that was named, read as safetensors alone."""

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging


logger = logging.get_logger(f"transformers.{__name__}")


_saving = threading.RLock()
STAGED = ".saving-"  # prefix of a folder that is being written
REPLACED = "replaced"  # folder in there, of files that were replaced
LEFT_FOLDER, LEFT_FILE = re.compile(r"\..+-[0-9a-f]{32}"), re.compile(r"\.[0-9a-f]{32}-.+")
CONFIG = "config.json"
WEIGHT_FILES = (
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
    matches = [match for match in (re.fullmatch(pattern, name) for pattern in WEIGHT_FILES) if match]
    return (matches[0]["variant"] or "") if matches else None


WEIGHTS, INDEX = "model{}.safetensors", "model.safetensors.index{}.json"  # with the variant
MISSING = 1 << 27  # weights that a checkpoint may lack, besides as many as it has, before they are refused

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# arguments for files that may be missing
NOT_NEEDED = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def hub_arguments(kwargs: dict) -> dict:
    """Those of `kwargs` that say where on the Hub, or in its cache, a checkpoint is."""
    return {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}


def for_other_repo(hub_kwargs: dict) -> dict:
    """The Hub arguments that also hold for a second repo: token and cache, but not the revision of the first."""
    return {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}


class BoundsMissingWeights:
    """Mixin of a model: weights that a checkpoint lacks are made only where they are not more than those it has.

    Else a small file whose config.json names large sizes could ask for all memory.
    """

    _may_be_missing: str = r"(?!)"  # pattern of weights that the caller knows to be missing

    def _move_missing_keys_from_meta_to_device(self, missing_keys, *args, **kwargs):  # of transformers 5
        self._check_size_of(missing_keys)
        return super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def _move_missing_keys_from_meta_to_cpu(self, missing_keys, *args, **kwargs):  # of 4.57
        self._check_size_of(missing_keys)
        return super()._move_missing_keys_from_meta_to_cpu(missing_keys, *args, **kwargs)

    def _check_size_of(self, missing_keys):
        known, weights = re.compile(self._may_be_missing), dict(self.named_parameters())
        missing = [key for key in missing_keys if key in weights and not known.search(key)]
        num_missing = sum(weights[key].numel() for key in missing)
        num_present = sum(weight.numel() for weight in weights.values()) - num_missing
        if num_missing > num_present + MISSING:
            refuse_missing_weights(self.config.name_or_path or "The checkpoint", missing)


@contextmanager
def naming_broken_files(path: str | os.PathLike, hub_kwargs: dict, variant: str | None = None):
    """Checks index and safetensors of `path` first, and names the checkpoint where one cannot be read inside.

    Raises:
        ValueError: As `check_weight_files`; or there are no safetensors.
    """
    has_weights = check_weight_files(path, hub_kwargs, variant)
    with refusing_broken_file(path):
        try:
            yield
        except OSError as error:
            if has_weights:
                raise
            raise ValueError(
                f"{path} has no {WEIGHTS.format(variant_part(variant))} that can be had ({error}). A pytorch_model.bin "
                f"is a pickle, which is never opened here: save the checkpoint again as safetensors."
            ) from error


def variant_part(variant: str | None) -> str:
    """What names of files of a variant have between the others' parts."""
    return f".{variant}" if variant else ""


def check_weight_files(path: str | os.PathLike, hub_kwargs: dict, variant: str | None = None) -> bool:
    """Reads the headers of the weights at `path`, a directory or Hub repo, as far as they are on this machine.

    As in transformers, the index counts where there is no whole file, and other files are nobody's business.

    Returns:
        Whether there is one of the two.

    Raises:
        ValueError: A file is truncated or corrupted, or the index names what is no safetensors file below it.
    """
    variant = variant_part(variant)
    whole = cached_file(path, WEIGHTS.format(variant), **NOT_NEEDED, **hub_kwargs)
    if whole is not None:
        check_safetensors_file(whole)
        return True
    index = cached_file(path, INDEX.format(variant), **NOT_NEEDED, **hub_kwargs)
    if index is not None:
        shards = {Path(index).parent / name for name in read_index(Path(index)).values()}
        for shard in sorted(filter(Path.is_file, shards)):
            check_safetensors_file(shard)
    return index is not None


def check_safetensors_files(directory: str | os.PathLike):
    """Opens the header of each safetensors file in `directory`; does nothing where that is no local directory.

    Raises:
        ValueError: A file is truncated or corrupted; it is named.
    """
    for path in sorted(Path(directory).glob("*.safetensors")):
        check_safetensors_file(path)


def check_safetensors_file(path: str | os.PathLike):
    """Opens the header of a safetensors file.

    Raises:
        ValueError: It is truncated or corrupted; it is named.
    """
    with refusing_broken_file(path), safe_open(path, framework="pt"):
        pass


def read_index(path: Path) -> dict[str, str]:
    """The file that each weight is in, as the index of a sharded checkpoint has it.

    Raises:
        ValueError: It is no index, or names what is no safetensors file beside or below it.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {*weight_map.values()}
        outside = sorted(name for name in names if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index of weights ({error!r}). Download or save the checkpoint again."
        ) from error
    wrong = outside or sorted(name for name in names if not name.endswith(".safetensors"))
    if wrong:
        raise ValueError(
            f"{path} names {wrong[0]!r} as a file of weights: only safetensors in its folder are read. Do not use "
            f"this checkpoint, or save it again."
        )
    return weight_map


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


def check_shapes(path: str, shapes: dict[str, tuple[int, ...]], hub_kwargs: dict):
    """Refuses a checkpoint in one file that lacks weights of these `shapes`, before there is memory for them.

    Raises:
        ValueError: A weight is missing, or has another shape.
    """
    file = cached_file(path, SAFE_WEIGHTS_NAME, **NOT_NEEDED, **hub_kwargs)
    if file is None:
        return
    with safe_open(file, framework="pt") as weights:
        names = {*weights.keys()}
        refuse_missing_weights(path, shapes.keys() - names)
        for name, shape in shapes.items():
            found = tuple(weights.get_slice(name).get_shape())
            if found != tuple(shape):
                raise ValueError(
                    f"{path} has {name} of shape {found}, and its config.json asks for {tuple(shape)}. Download or "
                    f"save the checkpoint again."
                )


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
