# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Loads a LLaVA with its merger, and changes the merger of a loaded one."""

import copy
import importlib
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import cached_file, find_adapter_config_file, logging

from .checkpoint_files import (
    NOT_NEEDED,
    BoundsMissingWeights,
    check_weight_files,
    for_other_repo,
    hub_arguments,
    naming_broken_files,
    refuse_missing_weights,
)
from .checkpoint_saving import (
    SavesAtOnce,
    check_replaceable,
    make_projector,
    merger_of_projector,
    read_projector,
    replace_projectors,
    warn_if_another_merger_s,
)
from .compat import LOADS_SAVED_MODULES_OF_ADAPTERS, TRANSFORMERS_VERSION, usable_device_map
from .configuration_llava_merge import (
    BUDGET,
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
from .model_card import MODEL, check_push_options, push_card_if_missing
from .modeling_token_merger import TokenMerger
from .question_marks import find_question_marks
from .vision_encoding import counted


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
    name = importlib.import_module("llava_merge.demo").find_merger(name)  # by name: model/ imports nothing of the rest
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


def names_text_tower(merger_config: MergerConfig | dict | None) -> bool:
    """Whether a caller's configuration names a text tower, which may then be fetched; a checkpoint's may not."""
    if isinstance(merger_config, dict):
        return merger_config.get("text_tower") is not None
    return merger_config is not None and merger_config.text_tower is not None


def in_the_place_of(old: TokenMerger, merger: TokenMerger) -> TokenMerger:
    """A copy of `merger` that is trained where `old` was, in its dtype and mode."""
    merger = copy.deepcopy(merger).train(old.training)
    for parameter in old.parameters():
        return merger.to(parameter.dtype).requires_grad_(parameter.requires_grad)
    return merger


class ModelCheckpoints(BoundsMissingWeights, SavesAtOnce):
    """Mixin of LLaVA with and without its head: checkpoints of all kinds, and another merger for a loaded model."""

    _card_kind = MODEL

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config: PretrainedConfig | str | None = None,
        merger: str | None = None,
        merger_config: MergerConfig | dict | str | None = None,
        merger_revision: str | None = None,
        allow_missing_weights: bool = False,
        **kwargs,
    ):
        """Loads a llava_merge checkpoint, a stock LLaVA checkpoint, or a PEFT adapter of one of them.

        Args:
            pretrained_model_name_or_path: Directory or Hub repo. A stock LLaVA (`llava-hf/llava-1.5-7b-hf`) gives its
                weights and gets a merger that is fresh unless `merger` is given.
            merger: Directory or Hub repo of a merger checkpoint to lay over it; or the name of a bundled merger, or of
                a method, which starts fresh.
            merger_config: Configuration of the merger instead of the checkpoint's: an object, a dict of its fields, or
                the name of a method.
            merger_revision: Branch, tag or commit of `merger` on the Hub.
            allow_missing_weights: Load even where the checkpoint lacks weights; they stay random.

        The other arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: Weights are missing (those of a fresh merger may), a file is truncated or corrupted, or the
                merger does not fit the model.
        """
        if pretrained_model_name_or_path is None:  # a config and a state_dict
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        merger, merger_config = read_request(merger, merger_config, kwargs)
        path = str(pretrained_model_name_or_path)
        hub_kwargs = hub_arguments(kwargs)
        checkpoint = read_checkpoint(path, hub_kwargs)
        fetches_text_tower = names_text_tower(merger_config)
        if checkpoint.adapter_merger is not None and not isinstance(config, PretrainedConfig):
            merger_config = lay_over(checkpoint.adapter_merger, merger_config)
        check_merger_request(checkpoint, merger, merger_config, merger_revision)
        if merger is not None and checkpoint.saved_merger is None:
            merger_config = {"merger_type": "none"}  # nothing to initialise before it is replaced
        if isinstance(merger_config, MergerConfig) and config is None:  # 4.57 would take it for a setting of generate
            config = cls.config_class.from_dict(checkpoint.config_fields, merger_config=merger_config)
            merger_config = None
        if isinstance(config, PretrainedConfig):
            config = as_merge_config(config, checkpoint, merger_config)
            merger_config = config.merger_config
        elif merger_config is not None:
            kwargs["merger_config"] = merger_config  # for LlavaMergeConfig.from_pretrained
        if "device_map" in kwargs:
            kwargs["device_map"] = usable_device_map(kwargs["device_map"], cls._parts)
        fresh_merger = not checkpoint.has_weights_of(merger_config)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        kwargs |= {"fresh_merger": fresh_merger, "allow_missing_weights": allow_missing_weights}
        with naming_broken_files(path, hub_kwargs, kwargs.get("variant")):
            model, info = super().from_pretrained(path, *model_args, config=config, **kwargs)
        if fresh_merger and merger is None:
            info["missing_keys"] = [*info["missing_keys"], *filter(is_merger_key, model.state_dict())]
        if not allow_missing_weights:
            check_loaded_keys(checkpoint, model.config, info)
        if merger is not None:
            model.load_merger(merger, **for_other_repo(hub_kwargs), revision=merger_revision)
        log_merger(path, model.config, fresh_merger and merger is None, model.headless_model.attention_mass)
        model._prepare_questions(checkpoint.adapter_base or path, hub_kwargs, fetches_text_tower)
        return (model, info) if wants_info else model

    @counted
    def _write_files(self, *args, **kwargs):
        super()._write_files(*args, **kwargs)

    def set_question_marks(self, processor):
        """Learns from the processor's chat template which ids stand between question and answer.

        Its tokenizer is kept too, for a `text_tower`. Loading does the same where the checkpoint has a chat template.

        Raises:
            ValueError: There is no chat template, or it writes nothing between the two.
            RuntimeError: A call of this model is running.
        """
        marks = find_question_marks(processor)
        with self._no_call_beside("set_question_marks"):
            self.config.merger_config.update(marks)
            self.headless_model.question_tokenizer = processor.tokenizer

    @counted
    def save_merger(self, save_directory: str, projector: bool | None = None):
        """Writes the merger alone, config.json and model.safetensors of a few MB, atomically.

        Args:
            projector: Also write the projector, where it was trained with the merger; 42 MB in bf16 at 7B. Default
                where it came with the merger.

        Raises:
            ValueError: The projector is quantised, or has LoRA layers; or the folder holds a whole model.
        """
        self.headless_model.merger.save_pretrained(save_directory, projector=self._projector_to_save(projector))

    def _projector_to_save(self, wanted: bool | None) -> nn.Module | None:
        projector = self.headless_model.multi_modal_projector
        wanted = merger_of_projector(projector) is not None if wanted is None else wanted
        return projector if wanted else None

    def load_merger(self, pretrained_model_name_or_path: str, **kwargs):
        """Puts the merger of a checkpoint (directory, Hub repo, name of a bundled one) in the place of the present one.

        So it does with the projector that was trained with it; where the checkpoint has none, the present one stays. Of
        a Hub repo `revision` is the branch, tag or commit.

        Raises:
            ValueError: Its widths are not this model's, a file is broken, or it names a method; the model is as before.
            RuntimeError: A call of this model is running.
        """
        path = find_bundled(str(pretrained_model_name_or_path))
        merger = TokenMerger.from_pretrained(path, **{"dtype": self.dtype, **kwargs})
        projector = None
        if merger.config.has_projector:
            check_replaceable(self.headless_model.multi_modal_projector)
            weights = read_projector(path, hub_arguments(kwargs))
            projector = make_projector(weights, self.config, path)
        tower_kwargs = for_other_repo(hub_arguments(kwargs)) | {"local_files_only": True}
        with self._no_call_beside("load_merger"):
            self.headless_model.find_text_tower(merger.config, **tower_kwargs)
            self.config.set_merger_config(self._fit_merger_config(merger.config))
            self.headless_model.settle_mass()
            self.config.merger_config.has_projector = False  # it is the model's now
            if projector is not None:
                replace_projectors(self.headless_model, projector, self.dtype, str(path))
                logger.info(f"{path} replaced the projector too, which was trained with its merger.")
            else:
                warn_if_another_merger_s(self.headless_model.multi_modal_projector)
            self._put_merger(merger)

    def set_merger(self, merger_config: MergerConfig | dict | str):
        """Puts a fresh merger in the place of the present one: `model.set_merger("tome")`.

        Args:
            merger_config: Its configuration, or the name of a method. The budget stays as it is where it has none.

        Raises:
            ValueError: It does not fit the model; the model is as before then.
            RuntimeError: A call of this model is running.
        """
        present, merger_config = self.config.merger_config, as_fields(merger_config)
        if isinstance(merger_config, dict) and not {*BUDGET} & {*merger_config}:
            if "none" not in (merger_config.get("merger_type"), present.merger_type):
                merger_config = {"num_merged_tokens": present.num_merged_tokens, **merger_config}
        merger = TokenMerger(self._fit_merger_config(merger_config)).to(self.dtype)
        with self._no_call_beside("set_merger"):
            self.headless_model.find_text_tower(merger.config)
            self.config.set_merger_config(merger.config)
            self.headless_model.settle_mass()
            warn_if_another_merger_s(self.headless_model.multi_modal_projector)
            self._put_merger(merger)

    def _fit_merger_config(self, merger_config: MergerConfig | dict) -> MergerConfig:
        """`merger_config` as this model needs it.

        Raises:
            ValueError: It does not fit the model, or reads layers of the tower that were not built.
        """
        fitted = self.config.fit_merger_config(merger_config)
        layers = self.config.feature_layers(fitted.feature_layers or [])
        self.headless_model.check_built(layers, f"merger_config={{'feature_layers': {fitted.feature_layers}}}")
        return fitted

    def _put_merger(self, merger: TokenMerger):
        """Puts `merger`, which `self.config` is of already, in the place of the present one."""
        weight = next(self.headless_model.multi_modal_projector.parameters(), torch.empty(0))
        merger = merger.to("cpu" if weight.is_meta else weight.device)
        for name, old in list(self.headless_model.named_modules()):
            if isinstance(old, TokenMerger):  # PEFT has two, one of them trained
                parent, _, child = name.rpartition(".")
                new = in_the_place_of(old, merger)
                new.config = new.method.config = self.config.merger_config
                setattr(self.headless_model.get_submodule(parent), child, new)

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        """As in transformers, from safetensors only.

        Raises:
            ValueError: The adapter is a pickle, or has parts that the installed transformers would not load.
        """
        if peft_model_id is not None:
            check_adapter(peft_model_id, hub_arguments(kwargs))
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def push_merger_to_hub(self, repo_id: str, projector: bool | None = None, **kwargs):
        """Pushes what [`save_merger`] writes; `model.load_merger(repo_id)` gets it back.

        The other arguments, and the errors, are those of [`TokenMerger.push_to_hub`].
        """
        return self.headless_model.merger.push_to_hub(repo_id, projector=self._projector_to_save(projector), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """As in transformers, with the code; a repo without a model card gets one.

        Raises:
            ValueError: An argument is none of transformers'.
        """
        if self.headless_model is self:  # whose use a card does not show
            return super().push_to_hub(repo_id, **kwargs)
        names = inspect.signature(super().push_to_hub).parameters
        check_push_options(kwargs, tuple(name for name in names if name not in ("repo_id", "deprecated_kwargs")))
        push_card_if_missing(self.config, repo_id, MODEL, kwargs)
        return super().push_to_hub(repo_id, **kwargs)
