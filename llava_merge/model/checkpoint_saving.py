# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Saves models and mergers atomically, by one rank, with the file of a custom method and a trained projector."""

import ast
import copy
import importlib
import json
import os
import re
import shutil
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import cached_file, logging

from .checkpoint_files import (
    BoundsMissingWeights,
    check_shapes,
    hub_arguments,
    naming_broken_files,
    refuse_missing_weights,
    refusing_broken_file,
    save_without_weights,
)
from .compat import TRANSFORMERS_V5
from .configuration_llava_merge import LlavaMergeConfig, MergerConfig
from .merging_base import MERGING_METHODS, READ_FOR_QUESTION, method_file
from .model_card import MERGER, check_push_options, push_arguments, push_card_if_missing, push_folder, refuse_pickles


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

PROJECTOR = "multi_modal_projector.safetensors"  # may lie beside a merger
CODE = Path(__file__).parent
CUSTOM_METHOD = "merging_of_checkpoint"
ASIDE = {"relevance", "question_marks"}  # which the model imports where they are there, and a merger never
MERGER_ENTRY, MODEL_ENTRY = "modeling_token_merger", "modeling_llava_merge"  # entry files of the code of a checkpoint
SIBLING = re.compile(r"^\s*from\s+\.(\w+)\s+import", flags=re.MULTILINE)
LAYERS = ("linear_1", "linear_2")


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


def save_code(config: MergerConfig, folder: Path):
    """Completes the code of a checkpoint: the file of its merging method and what that imports join the entry files.

    An entry file gets the name of every other file: transformers 4.57 copies no deeper than its imports.

    Raises:
        ValueError: The method is defined in a script, or its file is called as one of this code.
    """
    method = method_file(config)
    if method.parent == CODE:
        needed = {method.stem}
    else:
        needed = {CUSTOM_METHOD} if save_custom_method(method, folder) else set()
    if MERGING_METHODS[config.merger_type].requires & READ_FOR_QUESTION:
        needed.add("relevance")
    if config.text_tower is not None or config.question_aware and config.question_end_token_ids is None:
        needed.add("question_marks")
    for entry in filter(Path.is_file, (folder / f"{name}.py" for name in (MERGER_ENTRY, MODEL_ENTRY))):
        names = {entry.stem, *(needed if entry.stem == MODEL_ENTRY else needed - ASIDE)}
        siblings, text = bring_code(names, folder) - {entry.stem}, entry.read_text(encoding="utf-8")
        unnamed = sorted(siblings - {*SIBLING.findall(text)})
        lines = "".join(f"from .{sibling} import __name__ as _  # noqa: E402\n" for sibling in unnamed)
        entry.write_text(f"{text}\n\n{lines}" if lines else text, encoding="utf-8")


def bring_code(names: set[str], folder: Path) -> set[str]:
    """The modules of `names` and all that they import, which are copied into `folder`, but for the entry files."""
    found, queue = set(), sorted(names)
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            file = folder / f"{name}.py"
            if name not in (MERGER_ENTRY, MODEL_ENTRY) and (CODE / file.name).is_file():
                shutil.copy(CODE / file.name, file)
            queue += SIBLING.findall(file.read_text(encoding="utf-8"))
    return found


def save_custom_method(file: Path, folder: Path) -> bool:
    """Copies the `file` of a custom method beside the code of a checkpoint; whether that code can import it too.

    It imports a second copy, which takes from this code what the first takes from the package.

    Raises:
        ValueError: It is called as a file of that code.
    """
    siblings = {path.stem for path in CODE.glob("*.py")} - {"__init__"}
    if file.stem in siblings:
        raise ValueError(
            f"The file {file.name} of merger_type's method is called as one of llava_merge's own, which it would "
            f"replace in the checkpoint. Rename it."
        )
    shutil.copy(file, folder)
    tree = with_relative_imports(ast.parse(file.read_text(encoding="utf-8")), siblings, file.parent)
    text = "" if tree is None else ast.unparse(tree) + "\n"
    if tree is None or not siblings.issuperset(SIBLING.findall(text)):  # of a docstring, which transformers reads too
        logger.warning(
            f"{file.name} imports llava_merge otherwise than by `from llava_merge import NAME`, more of it than a "
            f"checkpoint brings, or a file beside it: with trust_remote_code=True this checkpoint will not load."
        )
        return False
    (folder / f"{CUSTOM_METHOD}.py").write_text(text, encoding="utf-8")
    return True


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
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return {"state_dict": get_state_dict_offloaded_model(module)}


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

        A custom merging method is saved, and pushed, with its file. `push_to_hub=True` pushes the files of this
        save in one commit, after they were saved; its arguments are those of `push_to_hub`.

        Raises:
            ValueError: The method is defined in a script or notebook, so that no other process could load it; or the
                folder holds a merger, and this is a whole model, or the other way round.
        """
        is_gathered_late = not TRANSFORMERS_V5 and self._tp_size is not None  # 4.57 waits for all ranks as it writes
        if kwargs.get("distributed_checkpoint") or is_gathered_late:  # every rank writes
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            return save_code(self.merging_config, Path(save_directory)) if is_first_rank() else None
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
        method_file(self.merging_config)  # refuses a method without a file before anything is written

        def save(staged: Path):
            self._write_files(staged, True, *args, **kwargs)
            save_code(self.merging_config, staged)

        files = save_at_once(save, save_directory, self._optional_files)
        if pushes:
            repo_id = hub_kwargs.pop("repo_id", None) or Path(os.path.realpath(save_directory)).name
            push_card_if_missing(self.config, repo_id, self._card_kind, hub_kwargs)
            return push_folder(save_directory, repo_id, files=files, kind=self._card_kind, **hub_kwargs)

    def _write_files(self, *args, **kwargs):
        super().save_pretrained(*args, **kwargs)


def save_projector(projector: nn.Module, directory: Path):
    """Writes the weights of a projector, also of one that PEFT trains as a whole or accelerate keeps elsewhere.

    Raises:
        ValueError: It is quantised, or has LoRA layers.
    """
    check_plain(projector)
    weights = offloaded_weights(projector).get("state_dict")
    if weights is None:
        weights = {
            f"{layer}.{name}": parameter.detach().contiguous()
            for layer in LAYERS
            for name, parameter in getattr(projector, layer).named_parameters()
        }
    save_file(weights, directory / PROJECTOR, metadata={"format": "pt"})


def check_plain(projector: nn.Module):
    """Refuses a projector that has other weights than those of two linear layers.

    Raises:
        ValueError: It is quantised, or has LoRA layers, or is no projector of LLaVA.
    """
    if not all(hasattr(projector, layer) for layer in LAYERS):
        raise ValueError(
            f"multi_modal_projector is a {type(projector).__name__}, whose weights cannot be saved with a merger. "
            f"Leave the projector out, or save the whole model."
        )
    for layer in LAYERS:
        kind = type(getattr(projector, layer))
        if kind is not nn.Linear:
            raise ValueError(
                f"multi_modal_projector.{layer} is a {kind.__module__}.{kind.__name__}, which cannot be saved with a "
                f"merger. Merge the adapter first (merge_and_unload of PEFT), load the model in full precision, or "
                f"leave the projector out."
            )


def check_replaceable(projector: nn.Module):
    """Refuses to replace a projector that has LoRA layers, which would be lost, or that is none of LLaVA.

    Raises:
        ValueError: So it is.
    """
    if not any(isinstance(module, LlavaMultiModalProjector) for module in projector.modules()):
        raise ValueError(
            f"multi_modal_projector is a {type(projector).__name__}, which the projector of a merger does not replace. "
            f"Load the merger before you put in your own."
        )
    adapted = [name for name, _ in projector.named_modules() if name.endswith(".base_layer")]
    if adapted:
        raise ValueError(
            f"multi_modal_projector has adapters on {', '.join(adapted)}, which another projector would drop. Load the "
            f"merger before PEFT adds its layers, or merge them first (merge_and_unload)."
        )


def read_projector(path: str, hub_kwargs: dict) -> dict[str, Tensor]:
    """Weights of the projector in a merger checkpoint, directory or Hub repo.

    Raises:
        ValueError: The file is not there, truncated or corrupted.
    """
    file = cached_file(path, PROJECTOR, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if file is None:
        raise ValueError(
            f"{path} lacks {PROJECTOR}, the projector that was trained with its merger (has_projector in config.json). "
            f"Download or save the checkpoint again."
        )
    with refusing_broken_file(file):
        return load_file(file)


def make_projector(weights: dict[str, Tensor], config: LlavaMergeConfig, path: str) -> LlavaMultiModalProjector:
    """A projector for the model of `config` with the `weights` of the merger checkpoint at `path`.

    Raises:
        ValueError: They are those of another width, or of another architecture.
    """
    with torch.device("meta"):
        projector = LlavaMultiModalProjector(config)
    needed = {name: tuple(parameter.shape) for name, parameter in projector.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if needed != found:
        raise ValueError(
            f"The projector in {path} has weights {found}, this model needs {needed}. Use a merger that was trained "
            f"with this LLaVA, or a LLaVA of these widths."
        )
    projector.load_state_dict(weights, assign=True)
    return projector


def replace_projectors(model: nn.Module, projector: LlavaMultiModalProjector, dtype: torch.dtype, path: str):
    """Puts copies of `projector` in the place of the model's, of which PEFT keeps two, one of them trained.

    Args:
        path: The merger checkpoint that it came with.
    """
    for name, old in list(model.named_modules()):
        if isinstance(old, LlavaMultiModalProjector):
            weight = next(old.parameters())
            new = copy.deepcopy(projector).to("cpu" if weight.is_meta else weight.device)
            new = new.to(weight.dtype if weight.is_floating_point() else dtype).train(old.training)
            new.came_with = path
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.requires_grad_(weight.requires_grad))


def merger_of_projector(projector: nn.Module) -> str | None:
    """The merger checkpoint that `projector` came with, None where it is the LLaVA's own."""
    return getattr(projector, "came_with", None)


def warn_if_another_merger_s(projector: nn.Module):
    """Warns where the `projector` came with a merger that was replaced, so that it belongs to neither of the two."""
    path = merger_of_projector(projector)
    if path is not None:
        logger.warning(
            f"The projector that came with the merger {path} stays in the model, and was not trained for the new "
            f"merger. Load the model again for its own."
        )


class MergerCheckpoints(BoundsMissingWeights, SavesAtOnce):
    """Mixin of [`TokenMerger`]: its checkpoints."""

    _card_kind = MERGER
    _optional_files = (PROJECTOR,)

    @classmethod
    def from_pretrained(cls, path, *args, config: MergerConfig, **kwargs):
        """As in transformers, of a whole file of safetensors."""
        wants_info, hub_kwargs = kwargs.pop("output_loading_info", False), hub_arguments(kwargs)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        with naming_broken_files(path, hub_kwargs, kwargs.get("variant")):
            if not kwargs.get("variant"):
                with torch.device("meta"):
                    shapes = {name: weight.shape for name, weight in cls(config).named_parameters()}
                check_shapes(path, shapes, hub_kwargs)
            merger, info = super().from_pretrained(path, *args, config=config, **kwargs)
        refuse_missing_weights(path, info["missing_keys"])
        return (merger, info) if wants_info else merger

    @property
    def merging_config(self) -> MergerConfig:
        """Its configuration."""
        return self.config

    def _write_files(self, save_directory: Path, *args, projector: nn.Module | None = None, **kwargs):
        """Code, config.json and weights, if there are any, and the `projector` that was trained with the merger."""
        if not self.method.training_free:
            super()._write_files(save_directory, *args, **{**offloaded_weights(self), **kwargs})
        else:
            save_without_weights(self, save_directory)
        if projector is not None:
            save_projector(projector, save_directory)
            file = save_directory / CONFIG
            fields = json.loads(file.read_text(encoding="utf-8")) | {"has_projector": True}  # of that checkpoint alone
            file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def push_to_hub(self, repo_id: str, projector: nn.Module | None = None, **kwargs):
        """Pushes the merger in one commit; a repo without a model card gets one.

        Args:
            repo_id: Repo on the Hub, made where it does not exist.
            projector: The projector that was trained with it, to be pushed too.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, as in
                transformers.

        Raises:
            ValueError: There are others.
        """
        check_push_options(kwargs)
        push_card_if_missing(self.config, repo_id, MERGER, kwargs)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, projector=projector)
            return push_folder(folder, repo_id, gone=[] if projector is not None else [PROJECTOR], **kwargs)
