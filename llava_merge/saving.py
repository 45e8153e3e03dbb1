# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Saving a checkpoint all at once or not at all, also where the process is killed in the middle."""

import importlib
import json
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from .merging_base import method_file


STAGED = ".saving-"  # prefix of a folder that is being written
COMPLETE = ".saved"  # a folder that is whole; its files have still to be moved to their places
MANIFEST = ".files.json"  # in it: all files of the checkpoint
PROJECTOR = "multi_modal_projector.safetensors"  # may lie beside a merger
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", PROJECTOR)


def save_at_once(save, directory: str | os.PathLike):
    """Calls `save(path)` with a temporary folder on the device of `directory`, then puts the files into `directory`.

    A save that fails, or is killed, leaves the old checkpoint. A new folder appears with one rename. In one that
    exists, the rename that makes the temporary folder `.saved` decides: killed after it, the next load or save moves
    the rest. Files of other names stay; weights that the new checkpoint does not have are removed.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a checkpoint is saved as a folder. Give another path.")
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(directory.parent, f".{directory.name}-") as staged:
            save(staged)
            os.rename(staged, directory)
        return
    finish_interrupted_save(directory)
    for leftover in (*directory.glob(f"{STAGED}*"), *directory.glob(COMPLETE)):
        shutil.rmtree(leftover)
    with staging_folder(directory, STAGED) as staged:
        save(staged)
        files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        (staged / MANIFEST).write_text(json.dumps(files))
        os.rename(staged, directory / COMPLETE)
    finish_interrupted_save(directory)


@contextmanager
def staging_folder(parent: Path, prefix: str):
    """A new folder in `parent`, which is removed afterwards where it still is there."""
    path = parent / f"{prefix}{uuid.uuid4().hex}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def finish_interrupted_save(directory: str | os.PathLike) -> bool:
    """Moves what a save that was killed had still to move; whether there was anything.

    Raises:
        ValueError: There was, but the folder cannot be written.
    """
    directory = Path(os.path.realpath(directory))
    complete = directory / COMPLETE
    if not (complete / MANIFEST).is_file():
        return False
    try:
        move_files(complete, directory)
    except PermissionError as error:
        raise ValueError(
            f"A save to {directory} was interrupted, and finishing it needs write access ({error}). Load it once as "
            f"somebody who may write there."
        ) from error
    return True


def move_files(complete: Path, directory: Path):
    """Moves the files of a whole checkpoint from `complete` into `directory`; may be called again after a break."""
    files = json.loads((complete / MANIFEST).read_text())
    for name in files:
        if (complete / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(complete / name, directory / name)
    stale = WEIGHTS if any(name.endswith(".safetensors") for name in files) else (PROJECTOR,)
    for path in (path for pattern in stale for path in directory.glob(pattern)):
        if path.name not in files:
            path.unlink()
    (complete / MANIFEST).unlink()
    shutil.rmtree(complete)


def offloaded_weights(module: nn.Module) -> dict:
    """`state_dict` for `save_pretrained` where accelerate keeps weights elsewhere; nothing where it does not."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return {}
    # by name, or remote code would need accelerate to be installed
    return {"state_dict": importlib.import_module("accelerate.utils.modeling").get_state_dict_offloaded_model(module)}


class SavesAtOnce:
    """Mixin whose `save_pretrained` leaves the old checkpoint or the new one, whatever happens."""

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        """As in transformers, all at once or not at all; a merging method of one's own is saved with its file.

        Raises:
            ValueError: The method is defined in a script or notebook, so that no other process could load it.
        """
        if not is_main_process:
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        own_method = method_file(self.merging_config)

        def save(staged: Path):
            self._write_files(staged, True, *args, **kwargs)
            if own_method is not None:
                shutil.copy(own_method, staged)

        save_at_once(save, save_directory)

    def _write_files(self, *args, **kwargs):
        super().save_pretrained(*args, **kwargs)
