# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Loading and saving, and changing of the merger, for LLaVA with and without its head."""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.utils import logging

from .bypass import bypassing
from .checkpoint_files import BoundsMissingWeights, for_other_repo, hub_arguments, naming_broken_files
from .compat import MERGER_IN_MODULE_LISTS, usable_device_map
from .configuration_llava_merge import BUDGET, LlavaMergeConfig, MergerConfig, as_fields, lay_over
from .hub import MODEL
from .loading import (
    as_merge_config,
    check_adapter,
    check_loaded_keys,
    check_merger_request,
    find_bundled,
    is_merger_key,
    log_merger,
    read_checkpoint,
    read_request,
)
from .merging_base import find_merging_method
from .modeling_token_merger import TokenMerger
from .projector_files import (
    check_replaceable,
    make_projector,
    merger_of_projector,
    read_projector,
    replace_projectors,
    warn_if_another_merger_s,
)
from .question_marks import find_question_marks, read_questions_of_folder
from .running_calls import counted
from .saving import SavesAtOnce


logger = logging.get_logger(f"transformers.{__name__}")


def unused_layers_pattern(config: LlavaMergeConfig) -> str:
    """Pattern of the keys of tower layers that no feature is taken from, so that they are not built."""
    layers = range(config.num_used_tower_layers, config.vision_config.num_hidden_layers)
    return rf"\blayers\.({'|'.join(map(str, layers)) or 'none'})\."


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


class LlavaMergePreTrainedModel(BoundsMissingWeights, SavesAtOnce, LlavaPreTrainedModel):
    """What the headless model and the one with a language-modelling head share: loading and the merger's handling."""

    config_class = LlavaMergeConfig
    _card_kind = MODEL
    _saved_prefixes: dict[str, str] = {}  # of the keys in a checkpoint, and what they are called in the model
    _parts: tuple[str, ...] = ()

    def _prepare_loading(self, fresh_merger: bool, allow_missing_weights: bool):
        """What loading shall leave alone: called between the initialisation of transformers' class and the parts'."""
        if fresh_merger:
            self._may_be_missing = r"(^|\.)merger\."
            self._keys_to_ignore_on_load_missing = [self._may_be_missing]
        if allow_missing_weights:
            self._may_be_missing = ""
        if (
            "quantization_config" in vars(self.config)
            and not find_merging_method(self.config.merger_config).training_free
        ):
            self._keep_in_fp32_modules = [MERGER_IN_MODULE_LISTS]  # its branches that start at zero would become noise
        self._keys_to_ignore_on_load_unexpected = [rf"vision_tower\..*{unused_layers_pattern(self.config)}"]

    @property
    def merging_config(self) -> MergerConfig:
        """The configuration of its merger."""
        return self.config.merger_config

    @property
    def headless_model(self):
        """The model that holds tower, merger, projector and language model."""
        raise NotImplementedError

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

    def _prepare_questions(self, path: str, hub_kwargs: dict, fetches_text_tower: bool):
        """What a question-aware merger needs besides weights: marks between turns, and a text tower and tokenizer."""
        merger_config, headless = self.config.merger_config, self.headless_model
        tower_kwargs = for_other_repo(hub_kwargs) | ({} if fetches_text_tower else {"local_files_only": True})
        text_tower = headless.find_text_tower(merger_config, **tower_kwargs)
        wants_marks = merger_config.question_aware and merger_config.question_end_token_ids is None
        if wants_marks or text_tower is not None:
            headless.question_tokenizer = read_questions_of_folder(merger_config, path, hub_kwargs)

    def load_state_dict(self, state_dict: dict, *args, **kwargs):
        """As in torch, also with the keys of a checkpoint, which `Trainer` passes to resume."""
        renamed = {self._name_in_model(key): tensor for key, tensor in state_dict.items()}
        return super().load_state_dict(renamed, *args, **kwargs)

    def _name_in_model(self, key: str) -> str:
        saved = next((prefix for prefix in self._saved_prefixes if key.startswith(prefix)), "")
        return self._saved_prefixes.get(saved, "") + key.removeprefix(saved)

    @contextmanager
    def merger_bypassed(self):
        """Inside, images keep all their tokens, as in the stock model: `with model.merger_bypassed(): ...`.

        That holds for the calls of this thread or asyncio task; others go on merging. The prompts need all placeholders
        then: a processor with `num_merged_tokens=None`.
        """
        with bypassing(self.headless_model):
            yield self

    def set_num_merged_tokens(self, num_merged_tokens: int, processor=None):
        """Changes M of the model, and of `processor` if given; the weights stay.

        Raises:
            ValueError: M is below 1 or above the number of visual tokens; nothing is changed then.
            RuntimeError: A call of this model is running.
        """
        merger_config = self.config.merger_config
        if merger_config.merger_type == "none":
            raise ValueError(f"num_merged_tokens={num_merged_tokens}: merger_type='none' keeps all tokens.")
        if num_merged_tokens is None:
            raise ValueError(
                "num_merged_tokens=None: give a number; to keep all tokens, call inside model.merger_bypassed(), or "
                "give num_merged_tokens='all' in the call."
            )
        changed = MergerConfig(
            **{**merger_config.to_dict(), "num_merged_tokens": num_merged_tokens, "merge_ratio": None}
        )
        changed.num_tokens(self.config.num_patches)
        with self._no_call_beside("set_num_merged_tokens"):
            for config in (merger_config, self.headless_model.merger.config):  # one and the same, but for PEFT's copy
                config.num_merged_tokens, config.merge_ratio = num_merged_tokens, None
            self.config.image_seq_length = num_merged_tokens
        if processor is not None:
            processor.num_merged_tokens = num_merged_tokens

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
        """Writes the merger alone, config.json and model.safetensors of a few MB, all at once or not at all.

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

    def _no_call_beside(self, change: str):
        return self.headless_model.running_calls.none_beside(change)

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

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs):
        """As in transformers, which knows a part by its configuration: the tower's is a copy, with the layers built."""
        config, built = self.config, self.headless_model.vision_tower.config
        whole, config.vision_config = config.vision_config, built
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        finally:
            config.vision_config = whole
        whole._attn_implementation = built._attn_implementation

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
