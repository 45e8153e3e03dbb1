# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Weight files: only safetensors, whole, inside their folder, and with every weight that is needed."""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .compat import NEEDS_PACKAGE


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


def save_without_weights(model, folder: str | os.PathLike):
    """Saves code and configuration of a model that has nothing else, which transformers 4.57 cannot save."""
    model.config.architectures = [type(model).__name__]
    os.makedirs(folder, exist_ok=True)
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)


def needing_package(name: str):
    """A method that stands for the package's of this `name` in the code of a checkpoint."""

    def method(self, *args, **kwargs):
        raise ValueError(f"{name}: {NEEDS_PACKAGE}")

    return method


class OfCheckpoint(BoundsMissingWeights):
    """Mixin of a model whose code came with its checkpoint: it loads that, and says what needs the package."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, from safetensors, and whole.

        Raises:
            ValueError: Weights are missing, or another merger is asked for.
        """
        path, hub_kwargs = pretrained_model_name_or_path, hub_arguments(kwargs)
        for name in ("merger", "merger_revision"):
            if (value := kwargs.pop(name, None)) is not None:
                raise ValueError(f"{name}={value!r}: {NEEDS_PACKAGE}")
        wants_info, may_lack = (kwargs.pop(name, False) for name in ("output_loading_info", "allow_missing_weights"))
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(path, *args, **kwargs)
        if not may_lack:
            refuse_missing_weights(path, info["missing_keys"])
        model._prepare_questions(path, hub_kwargs, False)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers, also of a model without weights."""
        if next(self.parameters(), None) is None:
            return save_without_weights(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _prepare_questions(self, path: str, hub_kwargs: dict, fetches_text_tower: bool):
        """Nothing, in a merger."""

    set_merger, load_merger, save_merger, push_merger_to_hub, set_question_marks = map(
        needing_package, ("set_merger", "load_merger", "save_merger", "push_merger_to_hub", "set_question_marks")
    )


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
