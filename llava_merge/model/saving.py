# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Saving of models: all at once, by one rank, with the file of a method of one's own."""

import ast
import importlib
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from .compat import TRANSFORMERS_V5
from .files import CONFIG, save_at_once
from .hub import push_arguments, push_card_if_missing, push_folder, refuse_pickles
from .merging_base import method_file


logger = logging.get_logger(f"transformers.{__name__}")

PROJECTOR = "multi_modal_projector.safetensors"  # may lie beside a merger


OWN_METHOD = "merging_of_checkpoint"
ENTRIES = ("modeling_token_merger.py", "modeling_llava_merge.py")  # of the code of a checkpoint
IMPORT_OF_METHOD = f"\n\nfrom .{OWN_METHOD} import __name__ as _  # noqa: E402 - it registers its method\n"


def save_method(file: Path, folder: Path):
    """Copies the `file` of a method of one's own beside the code of a checkpoint, which finds it too.

    That code imports a second copy, which takes from this code what it would take from the package.

    Raises:
        ValueError: It is called as a file of that code.
    """
    siblings = {path.stem for path in folder.glob("*.py")}
    if file.stem in siblings:
        raise ValueError(
            f"The file {file.name} of merger_type's method is called as one of llava_merge's own, which it would "
            f"replace in the checkpoint. Rename it."
        )
    shutil.copy(file, folder)
    tree = with_relative_imports(ast.parse(file.read_text(encoding="utf-8")), siblings, file.parent)
    if tree is None:
        logger.warning(
            f"{file.name} imports llava_merge otherwise than by `from llava_merge import NAME`, more of it than a "
            f"checkpoint brings, or a file beside it: with trust_remote_code=True this checkpoint will not load."
        )
        return
    (folder / f"{OWN_METHOD}.py").write_text(ast.unparse(tree) + "\n", encoding="utf-8")
    for entry in filter(Path.is_file, (folder / name for name in ENTRIES)):
        entry.write_text(entry.read_text(encoding="utf-8") + IMPORT_OF_METHOD, encoding="utf-8")


def with_relative_imports(tree: ast.Module, siblings: set[str], place: Path) -> ast.Module | None:
    """Code that imports from the `siblings`, modules beside it, what it imports from this package by name.

    None where it imports the package as a whole, what no sibling has, or a module that lies in its `place` alone.
    """
    package = __name__.partition(".")[0]

    class ToSiblings(ast.NodeTransformer):
        def visit_Import(self, node: ast.Import) -> ast.Import:  # noqa: N802 - ast's name
            for alias in node.names:
                refuse_local(alias.name)
            return node

        def visit_ImportFrom(self, node: ast.ImportFrom):  # noqa: N802
            if node.level or node.module.partition(".")[0] != package:
                refuse_local("." if node.level else node.module)
                return node
            names = defaultdict(list)
            for alias in node.names:
                found = getattr(importlib.import_module(node.module), alias.name, None)
                home = node.module if "." in node.module else getattr(found, "__module__", package)
                names[home.rpartition(".")[2]].append(alias)
            if not siblings.issuperset(names):
                raise LookupError
            return [ast.ImportFrom(module, imported, level=1) for module, imported in names.items()]

    def refuse_local(name: str):
        head = name.partition(".")[0]
        if head in ("", package) or (place / head).is_dir() or (place / f"{head}.py").is_file():
            raise LookupError

    try:
        return ast.fix_missing_locations(ToSiblings().visit(tree))
    except LookupError:
        return None


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


def refuse_other_kind(directory: Path, model_type: str):
    """Refuses to replace a whole model by a merger, or a merger by a whole model: both are kept in model.safetensors.

    Raises:
        ValueError: So it would be.
    """
    try:
        present = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if {present, model_type} == {"llava_merge", "llava_merger"}:
        present, saved = ("merger", "model") if present == "llava_merger" else ("model", "merger")
        raise ValueError(
            f"{directory} holds a {present}, which the {saved} would replace. Save the {saved} into another folder."
        )


class SavesAtOnce:
    """Mixin whose `save_pretrained` leaves the old checkpoint or the new one, whatever happens."""

    _card_kind = ""  # what the model card calls it
    _optional_files: tuple[str, ...] = ()

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        """As in transformers, but a save that fails leaves what was there; of several ranks, the first writes.

        A merging method of one's own is saved, and pushed, with its file. `push_to_hub=True` pushes the files of this
        save in one commit, after they were saved; its arguments are those of `push_to_hub`.

        Raises:
            ValueError: The method is defined in a script or notebook, so that no other process could load it; or the
                folder holds a merger, and this is a whole model, or the other way round.
        """
        is_gathered_late = not TRANSFORMERS_V5 and self._tp_size is not None  # 4.57 waits for all ranks as it writes
        if kwargs.get("distributed_checkpoint") or is_gathered_late:  # every rank writes
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        pushes, hub_kwargs = kwargs.pop("push_to_hub", False), push_arguments(kwargs)
        if not (is_main_process and is_first_rank()):
            if TRANSFORMERS_V5:  # takes part in gathering shards, and writes nothing; 4.57 would write weights
                super().save_pretrained(save_directory, False, *args, **kwargs)
            elif is_main_process:
                logger.warning_once(
                    f"Of several ranks the first one saves, so nothing was written to {save_directory} by this one."
                )
            return
        refuse_pickles(kwargs)
        refuse_other_kind(Path(save_directory), self.config.model_type)
        own_method = method_file(self.merging_config)

        def save(staged: Path):
            self._write_files(staged, True, *args, **kwargs)
            if own_method is not None:
                save_method(own_method, staged)

        files = save_at_once(save, save_directory, self._optional_files)
        if pushes:
            repo_id = hub_kwargs.pop("repo_id", None) or Path(os.path.realpath(save_directory)).name
            push_card_if_missing(self.config, repo_id, self._card_kind, hub_kwargs)
            return push_folder(save_directory, repo_id, files=files, kind=self._card_kind, **hub_kwargs)

    def _write_files(self, *args, **kwargs):
        super().save_pretrained(*args, **kwargs)
