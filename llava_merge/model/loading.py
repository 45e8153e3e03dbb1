# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Loading of a whole LLaVA: what is at the path, and whether every weight came from it."""

import importlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig
from transformers.utils import cached_file, find_adapter_config_file, logging

from .checkpoint_files import NOT_NEEDED, check_weight_files, for_other_repo, refuse_missing_weights
from .compat import LOADS_SAVED_MODULES_OF_ADAPTERS, TRANSFORMERS_VERSION
from .configuration_llava_merge import (
    DEFAULT_MERGER_TYPE,
    LlavaMergeConfig,
    MergerConfig,
    as_fields,
    as_saved_by_this_release,
    check_trained_with,
    fill_in,
    lay_over,
    refuse_merger_fields,
    stock_or_own_fields,
)
from .merging_base import MERGING_METHODS, find_merging_method


logger = logging.get_logger(f"transformers.{__name__}")

ADAPTER_MERGER = "merger_config.json"  # beside an adapter


@dataclass
class Checkpoint:
    """What a path holds.

    Attributes:
        path: As it was given.
        config_fields: Fields of the configuration; of the base model where the path holds an adapter.
        adapter_base: Base model that an adapter at the path names, None where there is no adapter.
        adapter_merger: Configuration of the merger that the adapter was trained with, where it says so.
    """

    path: str
    config_fields: dict
    adapter_base: str | None
    adapter_merger: dict | None = None

    @property
    def saved_merger(self) -> dict | None:
        """Fields of the merger whose weights are in the checkpoint; None in that of a stock LLaVA."""
        return self.config_fields.get("merger_config")

    def has_weights_of(self, merger_config: MergerConfig | dict | None) -> bool:
        """Whether its merger is of the type of `merger_config`, which None and a dict without a type leave open."""
        if self.saved_merger is None or merger_config is None:
            return self.saved_merger is not None
        given = merger_config if isinstance(merger_config, dict) else merger_config.to_dict()
        saved_type = self.saved_merger.get("merger_type", DEFAULT_MERGER_TYPE)
        return given.get("merger_type", saved_type) == saved_type


def read_checkpoint(path: str, hub_kwargs: dict) -> Checkpoint:
    """Reads the configuration at `path`, a directory or Hub repo.

    Raises:
        ValueError: There is none, it holds a pickled adapter, or the base model of an adapter is broken.
    """
    base = check_adapter(path, hub_kwargs)
    merger = None
    if base is not None:
        merger = read_merger_of_adapter(path, hub_kwargs)
        hub_kwargs = for_other_repo(hub_kwargs)
        check_weight_files(base, hub_kwargs)
    fields, _ = PretrainedConfig.get_config_dict(base or path, **hub_kwargs)
    if not fields:  # transformers would build LLaVA-1.5-7B, with random weights
        raise ValueError(
            f"{base or path} has no config.json. Give the folder or Hub repo of a LLaVA; if a save to it was broken "
            f"off, save again."
        )
    return Checkpoint(path, fields, base, merger)


def read_merger_of_adapter(path: str, hub_kwargs: dict) -> dict | None:
    """Fields of the merger that an adapter was trained with; `llava-merge train` saves them beside it."""
    file = cached_file(path, ADAPTER_MERGER, **NOT_NEEDED, **hub_kwargs)
    if file is None:
        return None
    fields = json.loads(Path(file).read_text(encoding="utf-8"))
    return {name: value for name, value in fields.items() if name in MergerConfig().to_dict()}


def check_adapter(path: str, hub_kwargs: dict) -> str | None:
    """Path of the base model of the PEFT adapter at `path`, None where there is no adapter.

    Raises:
        ValueError: The adapter is a pickle, or has parts that the installed transformers would not load.
    """
    file = find_adapter_config_file(path, **hub_kwargs)
    if file is None:
        return None
    check_adapter_is_safetensors(path, hub_kwargs)
    adapter = json.loads(Path(file).read_text())
    if adapter.get("modules_to_save") and not LOADS_SAVED_MODULES_OF_ADAPTERS:
        raise ValueError(
            f"The adapter {path} holds {', '.join(adapter['modules_to_save'])} (modules_to_save), which transformers "
            f"{TRANSFORMERS_VERSION} would leave out. Load the base model and then peft.PeftModel.from_pretrained("
            f"model, {str(path)!r}), or use transformers 5.18 or newer."
        )
    return adapter["base_model_name_or_path"]


def check_adapter_is_safetensors(path: str, hub_kwargs: dict):
    """Refuses a PEFT adapter, a directory or Hub repo, that has no weights but pickled ones.

    Raises:
        ValueError: There is no adapter_model.safetensors.
    """
    found = cached_file(path, "adapter_model.safetensors", **NOT_NEEDED, **hub_kwargs)
    if found is None:
        raise ValueError(
            f"The adapter {path} has no adapter_model.safetensors that can be had. An adapter_model.bin is a pickle, "
            f"which is never opened here: save the adapter again with safe_serialization=True."
        )


def is_method(name: str | None) -> bool:
    """Whether a `merger` is the name of a method and not a folder."""
    return name in MERGING_METHODS and not Path(name).is_dir()


def read_request(merger: str | None, merger_config, arguments: dict) -> tuple:
    """`merger` and `merger_config` of a call of `from_pretrained`, either of which may be the name of a method.

    Raises:
        ValueError: A field of the merger stands among the other `arguments`.
    """
    refuse_merger_fields(arguments)
    if merger_config is None and is_method(merger):
        return None, as_fields(merger)
    return merger, as_fields(merger_config)


def find_bundled(name: str) -> str:
    """The folder of a merger that the installed package bundles, by its name; any other name as it is.

    Raises:
        ValueError: It is the name of a method, which has no checkpoint, or the path of a folder that is not there.
    """
    if is_method(name):
        raise ValueError(
            f"{name!r} is a method and no checkpoint of a merger: call model.set_merger({name!r}), or pass "
            f"merger_config={name!r} when loading."
        )
    with suppress(ModuleNotFoundError):  # by its name, for this file may be a copy on the Hub without the package
        name = importlib.import_module("llava_merge.demo").find_merger(name)
    if not Path(name).is_dir() and (name.startswith((".", "~", os.sep)) or name.count("/") != 1):
        raise ValueError(
            f"merger={name!r}: there is no such folder, bundled merger or method. Give the folder of a merger, its "
            f"repo on the Hub as ORGANISATION/NAME, or one of the methods {', '.join(sorted(MERGING_METHODS))}."
        )
    return name


def check_merger_request(checkpoint: Checkpoint, merger: str | None, merger_config, merger_revision: str | None):
    """Refuses `merger` and `merger_config` where they contradict each other or an adapter.

    Raises:
        ValueError: They do.
    """
    if merger_revision is not None and merger is None:
        raise ValueError(
            f"merger_revision={merger_revision!r} without a merger. Pass merger=..., or revision=... for the "
            f"checkpoint itself."
        )
    base = checkpoint.adapter_base
    if merger is not None and merger_config is not None:
        raise ValueError(f"merger={merger!r} brings its own configuration; leave out either it or merger_config.")
    if base is not None and merger is not None:
        raise ValueError(
            f"merger={merger!r} would replace the merger that the adapter {checkpoint.path} may have trained. Load "
            f"the merger with the base, from_pretrained({base!r}, merger=...), then "
            f"model.load_adapter({checkpoint.path!r})."
        )
    if base is not None and checkpoint.saved_merger is None and merger_config is None:
        raise ValueError(
            f"The base {base} of the adapter {checkpoint.path} is a stock LLaVA, and an adapter does not say which "
            f"merger it was trained with. Pass merger_config=... as in training."
        )


def as_merge_config(config: PretrainedConfig, checkpoint: Checkpoint, merger_config) -> LlavaMergeConfig:
    """The `config` that a caller gave, with `merger_config` laid over it, as one for the weights of `checkpoint`.

    Raises:
        ValueError: It is the configuration of another architecture, or not of the merger that the weights are of.
    """
    if isinstance(config, LlavaMergeConfig):
        if merger_config is not None:
            config.set_merger_config(lay_over(config.merger_config.to_dict(), merger_config))
    else:
        fields = {**stock_or_own_fields(config.to_dict()), "merger_config": checkpoint.saved_merger}
        config = LlavaMergeConfig.from_dict(fields, merger_config=merger_config)
    if checkpoint.has_weights_of(config.merger_config):
        saved = as_saved_by_this_release(checkpoint.saved_merger)
        fill_in(config.merger_config, saved)
        check_trained_with(saved, config.merger_config.to_dict())
    return config


def check_loaded_keys(checkpoint: Checkpoint, config: LlavaMergeConfig, info: dict):
    """Refuses a checkpoint that lacked weights, or had merger weights that `config` has no place for.

    Raises:
        ValueError: So it is.
    """
    trained = checkpoint.has_weights_of(config.merger_config)
    missing = [key for key in info["missing_keys"] if trained or not is_merger_key(key)]
    refuse_missing_weights(checkpoint.path, missing, hint=", or pass allow_missing_weights=True")
    unused = [key for key in info["unexpected_keys"] if is_merger_key(key)]
    if unused and trained:
        raise ValueError(
            f"{checkpoint.path} has merger weights that this merger_config has no place for: "
            f"{', '.join(sorted(unused)[:5])}. Load it with the merger_config it was saved with."
        )


def is_merger_key(key: str) -> bool:
    """Whether a weight of a LLaVA is of its merger."""
    return key.startswith(("merger.", "model.merger."))


def log_merger(path: str, config: LlavaMergeConfig, is_fresh: bool, attention_mass: float):
    """One line on what the loaded model does, also in the place of transformers' report of new weights."""
    merger = config.merger_config
    if merger.merger_type == "none":
        logger.info(f"{path}: {config.num_patches} tokens, none merged")
        return
    method = find_merging_method(merger)
    if method.training_free:
        state = "training-free"
    elif is_fresh:
        state = "fresh: " + ("random" if merger.init == "random" else method.starts_as)
    else:
        budgets = merger.trained_num_tokens  # None of one that was saved fresh, or trained by other means than ours
        state = f"trained with {', '.join(map(str, budgets))} tokens" if budgets else "as it was saved"
    mass = f", attention mass {attention_mass}" if attention_mass else ""
    logger.info(
        f"{path}: {config.num_patches} → {merger.num_merged_tokens} tokens, {merger.merger_type}, {state}, positions "
        f"{merger.position_ids}{mass}"
    )
