# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Reading of checkpoints: which configuration they mean, and what is refused."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import find_adapter_config_file

from .configuration_llava_merge import LlavaMergeConfig, MergerConfig, check_merger_fields


HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


LLAVA_FIELDS = (
    "image_seq_length",
    "image_token_index",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)
# Fields of a merger that its weights were trained with, though their shapes may fit others too.
STRUCTURE = ("init", "num_heads", "internal_dim", "question_aware")


@contextmanager
def naming_broken_files(path: str | os.PathLike, subfolder: str | None = None):
    """Checks the safetensors of a local `path` first, and names the checkpoint where one cannot be read inside.

    Raises:
        ValueError: A file is truncated or corrupted.
    """
    check_safetensors_files(Path(path) / (subfolder or ""))
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path}: a safetensors file is truncated or corrupted ({error}). Download it again."
        ) from error


def check_safetensors_files(directory: str | os.PathLike):
    """Opens the header of each safetensors file in `directory`; does nothing where that is no local directory.

    Raises:
        ValueError: A file is truncated or corrupted; it is named.
    """
    for path in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({error}). Download or save the checkpoint again."
            ) from error


def check_adapter_is_safetensors(directory: str | os.PathLike):
    """Refuses a local PEFT adapter that only has pickled weights.

    Raises:
        ValueError: There is an adapter_model.bin and no adapter_model.safetensors.
    """
    directory = Path(directory)
    if (directory / "adapter_model.bin").exists() and not (directory / "adapter_model.safetensors").exists():
        raise ValueError(
            f"{directory / 'adapter_model.bin'} is a pickle, which is never opened here. Save the adapter again with "
            f"safe_serialization=True to get adapter_model.safetensors."
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


def for_other_repo(hub_kwargs: dict) -> dict:
    """The Hub arguments that also hold for a second repo: token and cache, but not the revision of the first."""
    return {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}


def is_merger_key(key: str) -> bool:
    return key.startswith(("merger.", "model.merger."))


def load_merger_config(path: str, hub_kwargs: dict) -> MergerConfig:
    """Configuration of a merger checkpoint.

    Raises:
        ValueError: It is a checkpoint of something else.
    """
    fields, _ = PretrainedConfig.get_config_dict(path, **hub_kwargs)
    if fields.get("model_type") != MergerConfig.model_type:
        raise ValueError(
            f"{path} is a checkpoint of {fields.get('model_type')!r}, not of a merger. Save the merger of a model with "
            f"model.save_merger(directory) and load that."
        )
    return MergerConfig.from_dict(fields)


@dataclass
class LoadingPlan:
    """The configuration to load a checkpoint with, and the merger fields whose weights it has to hold, if any."""

    config: LlavaMergeConfig
    saved_merger: dict | None

    def check_loaded_keys(self, path: str, info: dict):
        """Refuses a checkpoint that lacked weights, or had merger weights that this configuration has no place for."""
        missing = [key for key in info["missing_keys"] if self.saved_merger or not is_merger_key(key)]
        refuse_missing_weights(path, missing, hint=", or pass allow_missing_weights=True")
        unused = [key for key in info["unexpected_keys"] if is_merger_key(key)]
        if unused and self.saved_merger:
            raise ValueError(
                f"{path} has merger weights that this merger_config has no place for: {', '.join(sorted(unused)[:5])}. "
                f"Load it with the merger_config it was saved with."
            )


def plan_loading(path: str, config, overrides: dict, merger, merger_config, hub_kwargs: dict) -> LoadingPlan:
    """Which configuration the checkpoint at `path` is loaded with.

    `config`, `overrides` and `merger_config` replace what the checkpoint says; a dict `merger_config` field by field.

    Raises:
        ValueError: They contradict each other or the weights.
    """
    if merger is not None and merger_config is not None:
        raise ValueError(f"merger={merger!r} brings its own configuration; leave out either it or merger_config.")
    check_adapter_is_safetensors(path)
    adapter = find_adapter_config_file(path, **hub_kwargs)
    base = path
    if adapter is not None:
        hub_kwargs = for_other_repo(hub_kwargs)
        base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        check_safetensors_files(base)
    saved, _ = PretrainedConfig.get_config_dict(base, **hub_kwargs)
    saved_merger = saved.get("merger_config")
    if adapter is not None:
        check_adapter_request(path, base, saved_merger, merger, merger_config)
    given = load_merger_config(merger, for_other_repo(hub_kwargs)) if merger is not None else merger_config
    if isinstance(given, dict):
        check_merger_fields(given)
        given = overlay_merger_config(saved_merger or {}, given)
    config = build_config(saved, config, overrides, given)
    if merger is not None and saved_merger is not None:  # loaded with its own merger, which is then replaced
        config.set_merger_config(saved_merger)
    return LoadingPlan(config, check_structure(base, saved_merger, config.merger_config))


def build_config(saved: dict, config, overrides: dict, merger_config) -> LlavaMergeConfig:
    if isinstance(config, LlavaMergeConfig):
        config.set_merger_config(config.merger_config if merger_config is None else merger_config)
        return config
    fields = saved if config is None else config.to_dict()
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    if merger_config is None:
        merger_config = saved.get("merger_config")
    return LlavaMergeConfig.from_dict({**fields, **overrides, "merger_config": merger_config})


def check_structure(path: str, saved: dict | None, merger_config: MergerConfig) -> dict | None:
    """`saved`, the checkpoint's merger, if its weights are those of `merger_config`; None for a merger of another type.

    Raises:
        ValueError: They are, but were trained as another function.
    """
    if saved is None or saved.get("merger_type") != merger_config.merger_type:
        return None
    saved_config = MergerConfig(**saved)
    for name in STRUCTURE:
        trained, asked = getattr(saved_config, name), getattr(merger_config, name)
        if trained != asked:
            raise ValueError(
                f"The merger of {path} was trained with {name}={trained!r}, which cannot be changed to {asked!r}. "
                f"Leave {name} out of merger_config, or start from the stock LLaVA."
            )
    merger_config.query_grid = saved_config.query_grid
    return saved


def check_adapter_request(adapter: str, base: str, saved_merger: dict | None, merger, merger_config):
    if merger is not None:
        raise ValueError(
            f"merger={merger!r} would replace the merger that the adapter {adapter} may have trained. Load the merger "
            f"with the base, from_pretrained({base!r}, merger=...), then model.load_adapter({adapter!r})."
        )
    if saved_merger is None and merger_config is None:
        raise ValueError(
            f"The base {base} of the adapter {adapter} is a stock LLaVA, and an adapter does not say which merger it "
            f"was trained with. Pass merger_config=... as in training."
        )


def overlay_merger_config(saved: dict, given: dict) -> dict:
    """The fields of `given` over those of the checkpoint for the same method; a budget replaces the other kind."""
    if given.get("merger_type", saved.get("merger_type")) != saved.get("merger_type"):
        return given
    budget = ("num_merged_tokens", "merge_ratio")
    if any(name in given for name in budget):
        saved = {name: value for name, value in saved.items() if name not in budget}
    return {**saved, **given}
