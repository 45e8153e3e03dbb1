# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The YAML file of a training run."""

import dataclasses
import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from yaml import YAMLError

from llava_merge.model.configuration_llava_merge import own_merger_fields


PARTS = ("merger", "merger_projector", "merger_lora", "all")
RULES = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping", list: "a list"},
    type(None): "null",
}
# where they differ from TrainingArguments'
TRAINING_DEFAULTS = {
    "output_dir": "llava_merge_training",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "dataloader_num_workers": 2,
}


@dataclass
class MllmSettings:
    """The LLaVA that gets the merger.

    Attributes:
        model: Directory or Hub repo.
        merger: Directory or Hub repo of a merger checkpoint to go on from, instead of a fresh one.
        vision_dim: Width of the visual features, checked against the model.
        hidden_dim: Width of the language model, checked against the model.
        dtype: Of the weights that are not trained; those that are, are float32. Default bfloat16 where training is.
        attn_implementation: As in `from_pretrained`.
    """

    model: str = "llava-hf/llava-1.5-7b-hf"
    merger: str | None = None
    vision_dim: int | None = None
    hidden_dim: int | None = None
    dtype: str | None = None
    attn_implementation: str | None = None


@dataclass
class BackboneSettings:
    """What the merger is trained for."""

    mllm_settings: MllmSettings = field(default_factory=MllmSettings)


@dataclass
class DataSettings:
    """What is trained on.

    Attributes:
        train: LLaVA-Instruct JSON; JSONL, parquet or folder of chat messages; or a dataset on the Hub.
        validation: As `train`; without it, nothing is validated.
        split: Of a dataset on the Hub.
        validation_split: The same, of `validation`.
        image_folder: What image paths are relative to; default the folder of the file.
        streaming: Read the dataset as it comes instead of loading it; needs `training.max_steps`.
        on_broken_image: "skip" takes the next sample in its place, counted and logged; "error" ends the run.
        on_broken_row: The same, of a row that cannot be trained on, or a line that is no JSON.
        max_length: Samples with more tokens, unmerged, are skipped in the same way; default none.
        num_validation: Validation samples at most.
    """

    train: str | None = None
    validation: str | None = None
    split: str = "train"
    validation_split: str = "validation"
    image_folder: str | None = None
    streaming: bool = False
    on_broken_image: str = "skip"
    on_broken_row: str = "error"
    max_length: int | None = None
    num_validation: int = 500


@dataclass
class LossSettings:
    """Weights of the losses, each a mean over the answer tokens or images of a step, and how the teacher is asked.

    Attributes:
        cross_entropy: On the answers.
        distillation: KL divergence from what the same, frozen weights answer with all visual tokens.
        reconstruction: Share of the variance of an image's features that the merged tokens do not explain.
        temperature: Of the distillation's softmaxes.
        cache_teacher: Compute the teacher's logits of each sample once and keep them in main memory: two bytes for
            each answer token and word of the vocabulary, 64 kB a token at LLaVA-1.5.
    """

    cross_entropy: float = 0.5
    distillation: float = 1.0
    reconstruction: float = 0.0
    temperature: float = 1.0
    cache_teacher: bool = False


@dataclass
class TrainedSettings:
    """What is trained; the rest is frozen.

    Attributes:
        parts: "merger_projector", "merger", "merger_lora" (and LoRA on the language model), or "all" but the tower.
        merger_learning_rate: Peak.
        projector_learning_rate: Peak.
        language_model_learning_rate: Peak, also of LoRA.
        lora_rank: Rank of LoRA; its alpha is twice that.
        lora_target_modules: Names of the language model's layers that get LoRA.
        lora_dropout: Dropout of LoRA.
    """

    parts: str = "merger_projector"
    merger_learning_rate: float = 1e-3
    projector_learning_rate: float = 5e-4
    language_model_learning_rate: float = 2.5e-4
    lora_rank: int = 64
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    lora_dropout: float = 0.0


@dataclass
class BudgetSettings:
    """How many tokens an image gets.

    Attributes:
        train: Budgets M that steps are drawn from: a list, or {min: 4, max: 144}. Default the merger's own.
        validation: Budgets that are validated; default those of `train`, or the ends of its range.
        curriculum: Share of the training in which smaller budgets come in one after the other; 0 has all at once.
        question_dropout: Share of samples whose question a question-aware merger does not get.
    """

    train: Any = None
    validation: list[int] | None = None
    curriculum: float = 0.0
    question_dropout: float = 0.1


@dataclass
class Settings:
    """A training run; see the attributes' classes.

    Attributes:
        method_settings: Fields of [`MergerConfig`]: merger_type, merge_ratio and so on.
        backbone_settings: The LLaVA.
        data: What is trained on.
        losses: Their weights.
        trained: What is trained.
        budgets: How many tokens an image gets.
        training: Fields of `transformers.TrainingArguments`.
    """

    method_settings: dict[str, Any] = field(default_factory=dict)
    backbone_settings: BackboneSettings = field(default_factory=BackboneSettings)
    data: DataSettings = field(default_factory=DataSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    trained: TrainedSettings = field(default_factory=TrainedSettings)
    budgets: BudgetSettings = field(default_factory=BudgetSettings)
    training: dict[str, Any] = field(default_factory=dict)


FREE_SECTIONS = {  # keys that sections have which are no dataclass of ours
    "method_settings": own_merger_fields(),
    "training": {item.name for item in dataclasses.fields(TrainingArguments)},
}


def load_settings(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Reads a YAML file, with `overrides` such as "training.max_steps=100" laid over it.

    Raises:
        ValueError: There is no such file, it is no YAML, or a key or value is none of a training run's; it is named.
    """
    try:
        given = OmegaConf.load(path)
        if OmegaConf.is_dict(given):
            given = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(given, resolve=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}. Give the path of a YAML file.") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML of settings: {' '.join(str(error).split())}") from error
    return settings_of(plain, str(path))


def settings_of(plain: dict, source: str = "settings") -> Settings:
    """[`Settings`] of a nested dict, named `source` in errors.

    Raises:
        ValueError: A key or value is none of a training run's.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"{source} holds {type(plain).__name__}; settings are sections with keys.")
    check_keys(plain, Settings, source)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), plain))
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]} (at {error.full_key})") from error
    check_values(settings, source)
    return settings


def check_keys(given: dict, section: type, source: str):
    """Refuses keys that a section does not have.

    Raises:
        ValueError: There is one; the nearest known one is named.
    """
    types = {item.name: item for item in dataclasses.fields(section)}
    for key, value in given.items():
        check_key(str(key), types, source)
        inner = types[key].default_factory if types[key].default_factory is not dataclasses.MISSING else None
        if key in FREE_SECTIONS:
            for name in value or ():
                check_key(str(name), FREE_SECTIONS[key], f"{source}, {key}")
        elif dataclasses.is_dataclass(inner) and isinstance(value, dict):
            check_keys(value, inner, f"{source}, {key}")


def check_key(key: str, known, source: str):
    """Refuses a key that is not known, with the nearest that is.

    Raises:
        ValueError: So it is.
    """
    if key not in known:
        near = get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
        raise ValueError(f"{source}: there is no key {key!r}; {hint}")


NOT_OF_A_STREAM = (
    "what the teacher answers is kept by the number of a sample, which a stream counts anew in each loading process. "
    "Set losses.cache_teacher=false; with trained.parts='all', where it has to be kept, losses.distillation=0; or do "
    "not stream."
)


NOT_OF_TRAINING = {
    "resume_from_checkpoint": "it would not be read; go on with --resume",
    "label_smoothing_factor": "it would not be read; the losses are those of losses",
}
AT_LEAST_1 = ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size")


def check_values(settings: Settings, source: str):
    """Refuses values out of range.

    Raises:
        ValueError: There is one.
    """

    def check(is_right: bool, name: str, value, rule: str):
        if not is_right:
            raise ValueError(f"{source}: {name}={value!r}: has to be {rule}.")

    data, losses, budgets = settings.data, settings.losses, settings.budgets
    for name in ("on_broken_image", "on_broken_row"):
        check(getattr(data, name) in ("skip", "error"), f"data.{name}", getattr(data, name), "'skip' or 'error'")
    check(settings.trained.parts in PARTS, "trained.parts", settings.trained.parts, f"one of {', '.join(PARTS)}")
    for name in ("cross_entropy", "distillation", "reconstruction"):
        check(getattr(losses, name) >= 0, f"losses.{name}", getattr(losses, name), "0 or more")
    if data.streaming and (losses.cache_teacher or (settings.trained.parts == "all" and losses.distillation)):
        raise ValueError(f"{source}: data.streaming=true: {NOT_OF_A_STREAM}")
    weights = losses.cross_entropy + losses.distillation + losses.reconstruction
    check(weights > 0, "losses", "all 0", "above 0 in one place, or nothing is trained")
    for name in ("num_validation", "max_length"):
        check(getattr(data, name) is None or getattr(data, name) >= 1, f"data.{name}", getattr(data, name), "1 or more")
    for name, why in NOT_OF_TRAINING.items():
        if settings.training.get(name):
            raise ValueError(f"{source}: training.{name}: {why}.")
    check(losses.temperature > 0, "losses.temperature", losses.temperature, "above 0")
    for name in ("curriculum", "question_dropout"):
        check(0 <= getattr(budgets, name) <= 1, f"budgets.{name}", getattr(budgets, name), "from 0 to 1")


def training_arguments(settings: Settings) -> TrainingArguments:
    """Those of `settings.training`, with our defaults.

    Raises:
        ValueError: A value is none that transformers takes, a logger is not installed, or the processes that torchrun
            started would train beside each other.
    """
    given = {name: typed(name, value) for name, value in settings.training.items()}
    fields = {**TRAINING_DEFAULTS, **given}
    fields |= {"remove_unused_columns": False, "prediction_loss_only": True, "label_names": ["labels"]}
    fields.setdefault("learning_rate", settings.trained.merger_learning_rate)
    if settings.data.streaming:
        fields.setdefault("accelerator_config", {"dispatch_batches": False})  # batches differ in length
    if settings.data.validation is not None:
        fields.setdefault("eval_strategy", "steps" if "eval_steps" in fields else "epoch")
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1 and not getattr(torch, "accelerator", torch.cuda).is_available():
        fields.setdefault("use_cpu", True)  # else each process would train alone
    try:
        args = TrainingArguments(**fields)
        args.get_process_log_level()
        if args.torch_compile_mode is not None:
            torch._inductor.list_mode_options(args.torch_compile_mode)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    for name in AT_LEAST_1:
        if getattr(args, name) < 1:
            raise ValueError(f"training.{name}={getattr(args, name)}: has to be 1 or more.")
    missing = set(args.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise ValueError(f"training.report_to: {missing.pop()!r} is not installed. Install it, or set report_to=[].")
    check_scheduler(args)
    if args.world_size != num_ranks:
        raise ValueError(
            f"{num_ranks} processes were started (WORLD_SIZE), but training runs on {args.world_size}, so that each "
            f"would train alone. Leave out training.use_cpu and training.ddp_backend, or start one process."
        )
    return args


def check_scheduler(args: TrainingArguments):
    """Refuses arguments that the scheduler of learning rates does not take.

    Raises:
        ValueError: There is one.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    given = args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training.lr_scheduler_kwargs={given!r}: {error}") from error


def typed(name: str, value):
    """A value of `TrainingArguments`, with numbers that YAML takes for text, such as 1e-3, as numbers.

    Raises:
        ValueError: It is of another type than that setting.
    """
    hint = get_type_hints(TrainingArguments)[name]
    kinds = {get_origin(kind) or kind for kind in get_args(hint) or (hint,)}
    if not kinds <= RULES.keys():
        if value is None or isinstance(value, str) and str in kinds:
            return value  # such as the name of a scheduler, which transformers looks up
        raise ValueError(f"training.{name}={value!r}: it is an object of Python, which settings cannot hold.")
    read = read_yaml_number(value) if isinstance(value, str) and str not in kinds else value
    if type(read) in kinds or (type(read) is int and float in kinds):
        return read
    if isinstance(read, float) and read.is_integer() and int in kinds:
        return int(read)
    rule = " or ".join(RULES[kind] for kind in RULES if kind in kinds)
    raise ValueError(f"training.{name}={value!r}: has to be {rule}.")


def read_yaml_number(text: str) -> float | bool | str:
    """A number or truth value that was written as text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
