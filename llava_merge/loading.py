# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Reading of checkpoints: which configuration they mean, and what is refused."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import find_adapter_config_file

from .configuration_llava_merge import LlavaMergeConfig


HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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


def refuse_missing_weights(path: str, missing_keys):
    """Raises where a checkpoint lacked weights.

    Raises:
        ValueError: `missing_keys` is not empty; those weights are random now.
    """
    missing = sorted(missing_keys)
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{path} lacks weights of this model, which would stay random: {some}. Use a complete checkpoint of the "
            f"same architecture, or pass allow_missing_weights=True."
        )


def for_other_repo(hub_kwargs: dict) -> dict:
    """The Hub arguments that also hold for a second repo: token and cache, but not the revision of the first."""
    return {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}


def is_merger_key(key: str) -> bool:
    return key.startswith(("merger.", "model.merger."))


def load_config(path: str, config, merger_config, hub_kwargs: dict) -> tuple[LlavaMergeConfig, bool]:
    """Config for the checkpoint at `path`, and whether that has to hold the weights of the merger which it names.

    `config` and `merger_config` replace what the checkpoint says, a dict `merger_config` field by field.
    """
    adapter = find_adapter_config_file(path, **hub_kwargs)
    if adapter is not None:
        path = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        hub_kwargs = for_other_repo(hub_kwargs)
    saved, _ = PretrainedConfig.get_config_dict(path, **hub_kwargs)
    saved_merger = saved.get("merger_config")
    if adapter is not None and saved_merger is None and merger_config is None:
        raise ValueError(
            f"The adapter's base {path} is a stock LLaVA, and an adapter does not say which merger it was trained "
            f"with. Pass merger_config=... or merger=... as in training."
        )
    if isinstance(merger_config, dict):
        merger_config = overlay_merger_config(saved_merger or {}, merger_config)
    if not isinstance(config, LlavaMergeConfig):
        fields = saved if config is None else config.to_dict()
        fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
        config = LlavaMergeConfig.from_dict({**fields, "merger_config": merger_config or saved_merger})
    elif merger_config is not None:
        config.set_merger_config(merger_config)
    saved_type = (saved_merger or {}).get("merger_type")
    return config, saved_type == config.merger_config.merger_type


def overlay_merger_config(saved: dict, given: dict) -> dict:
    """The fields of `given` over those of the checkpoint for the same method; a budget replaces the other kind."""
    if given.get("merger_type", saved.get("merger_type")) != saved.get("merger_type"):
        return given
    budget = ("num_merged_tokens", "merge_ratio")
    if any(name in given for name in budget):
        saved = {name: value for name, value in saved.items() if name not in budget}
    return {**saved, **given}
