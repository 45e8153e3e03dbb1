# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Saving a checkpoint: what was there before loads until the new one is whole, and nothing else is touched."""

import importlib
import os
import re
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from .compat import TRANSFORMERS_V5
from .hub import push_arguments, push_card_if_missing, push_folder
from .merging_base import method_file


logger = logging.get_logger(__name__)

STAGED = ".saving-"  # prefix of a folder that is being written
CONFIG = "config.json"
PROJECTOR = "multi_modal_projector.safetensors"  # may lie beside a merger
WEIGHTS = (
    r"model(?P<variant>\..+?)?(-\d{5}-of-\d{5})?\.safetensors",
    r"model\.safetensors\.index(?P<variant>\..+)?\.json",
)


def save_at_once(save, directory: str | os.PathLike, optional: tuple[str, ...] = ()) -> list[str]:
    """Calls `save(path)` with a temporary folder on the device of `directory`, then puts the files into `directory`.

    A new folder appears with one rename. In one that exists, config.json leaves before the first file is replaced and
    comes last, so that a folder loads as the old checkpoint or the new one, or says that it has no config.json. A save
    that fails before leaves the old checkpoint.

    Args:
        optional: Files that are part of the checkpoint where they are written; else an older one is removed.

    Returns:
        The files that were written, by their path in `directory`.

    Raises:
        ValueError: `directory` is a file, or holds a link that leads out of it where a file is to be written.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a checkpoint is saved as a folder. Give another path.")
    is_new = not directory.exists()
    parent = directory.parent if is_new else directory
    parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(parent, f".{directory.name}-" if is_new else STAGED) as staged:
        save(staged)
        files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        if is_new:
            os.rename(staged, directory)
        else:
            move_files(staged, directory, files, optional)
    return files


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
    """Puts the `files` of a whole checkpoint into their places, and removes weights of the one that it replaces."""
    for name in files:
        if not (directory / name).parent.resolve().is_relative_to(directory):
            raise ValueError(f"{(directory / name).parent} is a link that leads out of {directory}. Remove it.")
    old_config, hidden = directory / CONFIG, staged / f"{CONFIG}.old"
    hides, moved = CONFIG in files and os.path.lexists(old_config), False
    if hides:
        os.replace(old_config, hidden)
    try:
        for name in sorted(files, key=CONFIG.__eq__):
            if name == CONFIG:
                for stale in replaced_weights(files, os.listdir(directory), optional):
                    os.unlink(directory / stale)
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, directory / name)
            moved = True
    finally:
        if hides and not moved:
            os.replace(hidden, old_config)


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


def is_first_rank() -> bool:
    """Whether this process is the one that writes, of those that run together."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def offloaded_weights(module: nn.Module) -> dict:
    """`state_dict` for `save_pretrained` where accelerate keeps weights elsewhere; nothing where it does not."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return {}
    # by name, or remote code would need accelerate to be installed
    return {"state_dict": importlib.import_module("accelerate.utils.modeling").get_state_dict_offloaded_model(module)}


class SavesAtOnce:
    """Mixin whose `save_pretrained` leaves the old checkpoint or the new one, whatever happens."""

    _card_kind = ""  # what the model card calls it
    _optional_files: tuple[str, ...] = ()

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        """As in transformers, but a save that fails leaves what was there; of several ranks, the first writes.

        A merging method of one's own is saved, and pushed, with its file. `push_to_hub=True` pushes the files of this
        save in one commit, after they were saved; its arguments are those of `push_to_hub`.

        Raises:
            ValueError: The method is defined in a script or notebook, so that no other process could load it.
        """
        if kwargs.get("distributed_checkpoint"):  # every rank writes its own files
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        pushes, hub_kwargs = kwargs.pop("push_to_hub", False), push_arguments(kwargs)
        if not (is_main_process and is_first_rank()):
            if TRANSFORMERS_V5:  # takes part in gathering shards, and writes nothing; 4.57 would write weights
                super().save_pretrained(save_directory, False, *args, **kwargs)
            return
        own_method = method_file(self.merging_config)

        def save(staged: Path):
            self._write_files(staged, True, *args, **kwargs)
            if own_method is not None:
                shutil.copy(own_method, staged)

        files = save_at_once(save, save_directory, self._optional_files)
        if pushes:
            repo_id = hub_kwargs.pop("repo_id", None) or Path(os.path.realpath(save_directory)).name
            push_card_if_missing(self.config, repo_id, self._card_kind, hub_kwargs)
            return push_folder(save_directory, repo_id, files=files, kind=self._card_kind, **hub_kwargs)

    def _write_files(self, *args, **kwargs):
        super().save_pretrained(*args, **kwargs)
