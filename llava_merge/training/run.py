# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A whole training run, from settings to a merger checkpoint with a card."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor, __version__
from llava_merge.evaluation.candidates import text_towers_of
from llava_merge.model.checkpoint_saving import (
    refuse_output_in_input,
    refuse_replaced_files,
    renamed_when_whole,
    write_whole,
)
from llava_merge.model.configuration_llava_merge import BUDGET
from llava_merge.model.model_card import ADAPTER, MERGER, MODEL, make_card
from llava_merge.training.budgets import BudgetSchedule
from llava_merge.training.checkpoints import last_whole_checkpoint, remove_broken_off
from llava_merge.training.collator import MergerCollator
from llava_merge.training.data import ChatDataset, ChatStream, files_of_dataset, read_dataset
from llava_merge.training.parts import describe_parts
from llava_merge.training.settings import Settings, training_arguments
from llava_merge.training.trainer import MergerTrainer
from llava_merge.training.validation import AnswerScorer


logger = logging.get_logger(f"transformers.{__name__}")

WRITTEN = (  # into output_dir, or removed from there, with what tokenizers and processors save
    *("config.json", "generation_config.json", "adapter_config.json", "merger_config.json", "metrics.json"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.*", "additional_chat_templates/*"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.py", "curves.png", "README.md", "checkpoint-*/**/*"),
)
WITH_QUESTION = {"question_aware": True}


def train(settings: Settings, resume: bool = False, config: Path | None = None) -> dict[str, float]:
    """Trains a merger and writes it, its card, curves and metrics to `training.output_dir`.

    Args:
        resume: Go on from the last checkpoint in there that is whole, if there is one.
        config: The file that the settings are from, which is not replaced.

    Returns:
        The metrics.

    Raises:
        ValueError: A setting, a file or a sample cannot be used, or would be replaced by what is written; it is named.
            Nothing has been trained then.
    """
    args, mllm = training_arguments(settings), settings.backbone_settings.mllm_settings
    refuse_output_in_input(args.output_dir, mllm.model, mllm.merger)
    set_seed(args.seed)
    budgets = settings.budgets
    schedule = BudgetSchedule(budgets.train, budgets.curriculum, args.seed) if budgets.train else None
    datasets = read_datasets(settings, args)
    refuse_replaced_files(args.output_dir, WRITTEN, files_of_run(settings, config, datasets))
    loaded = load_model(settings, args, schedule)
    refuse_output_in_input(args.output_dir, *text_towers_of(loaded[0]))
    trainer = make_trainer(settings, args, schedule, loaded, *datasets)
    if args.should_save:
        logger.info(describe_parts(trainer.model))
    checkpoint = last_whole_checkpoint(args.output_dir) if resume else None
    if resume and args.should_save:
        remove_broken_off(args.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.state.global_step:
        raise ValueError(
            f"No step was made: {settings.data.train} gave no batch of {args.train_batch_size} samples. Look at what "
            f"was skipped above, and at data.image_folder."
        )
    metrics = {**result.metrics, "skipped_samples": trainer.num_skipped_samples}
    if trainer.num_skipped_samples:
        logger.warning(f"{trainer.num_skipped_samples} samples were skipped, since they are broken or too long.")
    if trainer.eval_dataset is not None:
        metrics |= last_evaluation(trainer) or trainer.evaluate()
    trainer.save_model()
    if args.should_save:
        write_report(settings, trainer, metrics)
        logger.info(describe_result(settings, trainer, metrics))
    trainer.accelerator.wait_for_everyone()  # the files are there when any process returns
    return metrics


def read_datasets(settings: Settings, args: TrainingArguments) -> tuple[ChatDataset | ChatStream, ChatDataset | None]:
    """The datasets of training and validation, checked.

    Raises:
        ValueError: One cannot be read, or a sample cannot be trained on.
    """
    data = settings.data
    if data.train is None:
        raise ValueError(
            "data.train is missing: the dataset to train on. Set it in the file, or with --set data.train=..."
        )
    if data.streaming and args.max_steps <= 0:
        raise ValueError("data.streaming=true: the length of the dataset is not known; set training.max_steps.")
    rules = {"on_broken_image": data.on_broken_image, "on_broken_row": data.on_broken_row}
    train_set = read_dataset(data.train, data.split, data.image_folder, data.streaming, **rules)
    is_main = args.process_index == 0
    if isinstance(train_set, ChatDataset):
        train_set = train_set.check(progress=is_main)
        batch = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(train_set) < batch:
            raise ValueError(
                f"data.train has {len(train_set)} samples, less than a batch of {batch}, which "
                f"training.dataloader_drop_last drops. Set it to false, or training.per_device_train_batch_size lower."
            )
    if data.validation is None:
        return train_set, None
    validation = read_dataset(data.validation, data.validation_split, data.image_folder, **rules)
    return train_set, validation.first(data.num_validation).check(progress=is_main)


def files_of_run(
    settings: Settings, config: Path | None, datasets: Iterable[ChatDataset | ChatStream | None]
) -> Iterator:
    """What a run reads besides checkpoints, but for the pictures of a stream, which come later."""
    yield config
    yield from settings.training.values()  # may name files of DeepSpeed, FSDP or accelerate
    for path in filter(None, (settings.data.train, settings.data.validation)):
        yield from files_of_dataset(path)
    for dataset in datasets:
        yield from dataset.images() if isinstance(dataset, ChatDataset) else ()


def load_model(
    settings: Settings, args: TrainingArguments, schedule: BudgetSchedule | None
) -> tuple[LlavaMergeForConditionalGeneration, LlavaMergeProcessor, nn.Module | None]:
    """The LLaVA with the merger of `settings`, its processor, and its own projector where the merger brought another.

    Raises:
        ValueError: Its widths are not those of the settings, or the merger does not fit it.
    """
    mllm = settings.backbone_settings.mllm_settings
    method = dict(settings.method_settings)
    if mllm.merger and method not in ({}, WITH_QUESTION):
        raise ValueError(
            f"backbone_settings.mllm_settings.merger={mllm.merger!r} brings its own configuration; leave out "
            f"method_settings ({', '.join(method)}), but for question_aware=true."
        )
    if schedule and not {*BUDGET} & {*method} and method.get("merger_type") != "none":
        method["num_merged_tokens"] = max(schedule.values)
    dtype = mllm.dtype or ("bfloat16" if args.bf16 else "float32")
    options = {"dtype": dtype, "attn_implementation": mllm.attn_implementation}
    given = {"merger_type": "none"} if mllm.merger else method
    model = LlavaMergeForConditionalGeneration.from_pretrained(mllm.model, merger_config=given, **options)
    processor = LlavaMergeProcessor.from_pretrained(mllm.model)
    own_projector = model.model.multi_modal_projector
    if mllm.merger:
        model.load_merger(mllm.merger)
        if settings.method_settings == WITH_QUESTION:
            add_question(model, processor)
        if schedule:
            model.set_num_merged_tokens(max(schedule.values))
    widths = {"vision_dim": model.config.merged_vision_dim, "hidden_dim": model.config.text_config.hidden_size}
    for name, width in widths.items():
        if getattr(mllm, name) not in (None, width):
            raise ValueError(
                f"backbone_settings.mllm_settings.{name}={getattr(mllm, name)}, but {mllm.model} has {name}={width}. "
                f"Set that, or leave it out."
            )
    processor.num_merged_tokens = model.config.merger_config.num_merged_tokens
    replaced = own_projector is not model.model.multi_modal_projector
    return model, processor, own_projector if replaced else None


def add_question(model: LlavaMergeForConditionalGeneration, processor: LlavaMergeProcessor):
    """Lets the model's merger read the question; it starts as it was, since that branch starts at zero.

    Raises:
        ValueError: Its method has no such branch.
    """
    trained = model.model.merger
    model.set_merger({**trained.config.to_dict(), **WITH_QUESTION})
    model.set_question_marks(processor)
    model.model.merger.load_state_dict(trained.state_dict(), strict=False)


def make_trainer(settings, args, schedule, loaded, train_set, validation) -> MergerTrainer:
    """The trainer of a run with what [`load_model`] `loaded`."""
    model, processor, teacher_projector = loaded
    budgets, data = settings.budgets, settings.data
    collator = MergerCollator(processor, model.config.num_patches, as_bytes=True)
    if isinstance(train_set, ChatDataset):
        collator.encode(train_set.sample(0))  # the template is the same for all
    if data.max_length is not None:
        for dataset in filter(None, (train_set, validation)):
            dataset.accepts = lambda sample: collator.length(sample) <= data.max_length
    scorer = None
    if validation is not None:
        scorer = AnswerScorer(validation, processor, args.per_device_eval_batch_size)
    return MergerTrainer(
        model,
        args,
        budgets=schedule,
        loss_settings=settings.losses,
        trained=settings.trained,
        question_dropout=budgets.question_dropout,
        validation_budgets=budgets.validation,
        scorer=scorer,
        teacher_projector=teacher_projector,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=validation,
        processing_class=processor,
    )


def write_report(settings: Settings, trainer: MergerTrainer, metrics: dict[str, float]):
    """Writes metrics.json, curves.png and the model card beside the checkpoint."""
    folder = Path(trainer.args.output_dir)
    write_whole(folder / "metrics.json", json.dumps(report_of(settings, trainer, metrics), indent=1) + "\n")
    from llava_merge.training.curves import draw_curves  # matplotlib is slow to import

    with renamed_when_whole(folder / "curves.png") as written:
        draw_curves(trainer.state.log_history, written)
    kind = MERGER if trainer.saves_parts else ADAPTER if settings.trained.parts == "merger_lora" else MODEL
    config = trainer.accelerator.unwrap_model(trainer.model).config.merger_config
    base, facts = settings.backbone_settings.mllm_settings.model, run_facts(settings, trainer, metrics)
    card = make_card(config, folder.resolve().name, kind, base, facts)
    write_whole(folder / "README.md", str(card))


def report_of(settings: Settings, trainer: MergerTrainer, metrics: dict[str, float]) -> dict:
    """What there is to know about a run: its settings, versions, hardware, metrics, and what was validated when."""
    device = trainer.args.device
    evaluations: dict[int, dict] = {}
    for entry in trainer.state.log_history:
        values = {name: entry[name] for name in entry if name.startswith("eval_") and "second" not in name}
        if values:
            evaluations.setdefault(entry["step"], {}).update(values)
    return {
        "settings": asdict(settings),
        "versions": {"llava_merge": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "ranks": trainer.args.world_size,
        "num_validation": len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0,
        "metrics": metrics,
        "evaluations": [{"step": step, **values} for step, values in evaluations.items()],
    }


def last_evaluation(trainer: MergerTrainer) -> dict[str, float]:
    """What was validated after the last step; empty where nothing was."""
    entries = [entry for entry in trainer.state.log_history if entry.get("step") == trainer.state.global_step]
    values = {name: value for entry in entries for name, value in entry.items() if name.startswith("eval_")}
    return values if "eval_loss" in values else {}


def describe_result(settings: Settings, trainer: MergerTrainer, metrics: dict[str, float]) -> str:
    """Where the run was saved, how it is loaded, and how good it is."""
    folder, model = trainer.args.output_dir, settings.backbone_settings.mllm_settings.model
    loads = f"{model!r}, merger={folder!r}" if trainer.saves_parts else repr(folder)
    lines = [f"Saved to {folder} after {metrics['train_runtime']:.0f} s: from_pretrained({loads})"]
    fresh = {name: entry[name] for entry in trainer.state.log_history if not entry.get("step") for name in entry}
    for name in (name for name in metrics if name.startswith("eval_") and name.endswith("_accuracy")):
        before = f"{fresh[name]:.1%} → " if name in fresh and name != "eval_all_accuracy" else ""
        lines.append(f"  right answers with {name.split('_')[1]} tokens: {before}{metrics[name]:.1%}")
    if len(lines) == 1 and "eval_loss" in metrics:
        lines.append(f"  loss of validation: {metrics['eval_loss']:.4g}")
    return "\n".join(lines)


def run_facts(settings: Settings, trainer: MergerTrainer, metrics: dict[str, float]) -> dict[str, str]:
    """What a card says about a run."""
    args, losses = trainer.args, settings.losses
    weights = {name: getattr(losses, name) for name in ("cross_entropy", "distillation", "reconstruction")}
    facts = {
        "base model": settings.backbone_settings.mllm_settings.model,
        "data": settings.data.train,
        "trained": settings.trained.parts,
        "steps": str(trainer.state.global_step),
        "samples a step": str(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size),
        "losses": ", ".join(f"{weight:g} × {name}" for name, weight in weights.items() if weight),
        "budgets": str(settings.budgets.train or trainer.schedule.listed),
        "seed": str(args.seed),
        "torch": torch.__version__,
    }
    wanted = [name for name in metrics if name.startswith("eval_") and name.endswith(("_accuracy", "_loss"))]
    return facts | {name.removeprefix("eval_").replace("_", " "): f"{metrics[name]:.4g}" for name in wanted}
