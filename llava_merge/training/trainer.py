# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer for mergers."""

import os
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from llava_merge import LlavaMergeForConditionalGeneration
from llava_merge.model.checkpoint_loading import ADAPTER_MERGER
from llava_merge.training import losses
from llava_merge.training.budgets import IGNORED, BudgetSchedule, dropped_questions, with_budget, with_unseen_image
from llava_merge.training.checkpoints import load_parts, naming_failed_writes, save_parts
from llava_merge.training.parts import (
    PROJECTOR,
    TRAINED,
    has_finite_gradients,
    parameter_groups,
    prepare_parts,
    set_modes,
)
from llava_merge.training.settings import NOT_OF_A_STREAM, LossSettings, TrainedSettings
from llava_merge.training.teacher import LogitsCache, Teacher
from llava_merge.training.validation import AnswerScorer


logger = logging.get_logger(f"transformers.{__name__}")

MAX_BAD_STEPS = 10  # in a row


class MergerTrainer(Trainer):
    """Trains a merger, with a budget of its own in each step, on what the frozen model answers without it.

    Args:
        model: A [`LlavaMergeForConditionalGeneration`], with a fresh merger or one to go on from.
        args: As [`training_arguments`] makes them: `remove_unused_columns=False`, `prediction_loss_only=True`,
            `label_names=["labels"]`.
        budgets: Budgets M of the steps; default the merger's own alone.
        loss_settings: Weights of the losses.
        trained: What is trained.
        question_dropout: Share of samples whose question is dropped.
        validation_budgets: Budgets of `evaluate`; default those of the schedule.
        scorer: Counts right answers in `evaluate`, and, once, those with all visual tokens.
        teacher_projector: The projector of the unmerged model, where the model has one that a merger was trained with.
        kwargs: As for `Trainer`: datasets, `data_collator` (a [`MergerCollator`] for all visual tokens), callbacks.

    Raises:
        ValueError: There is nothing to train, a budget is above the visual tokens of an image, or the teacher's answers
            to a stream would have to be kept.
    """

    def __init__(
        self,
        model: LlavaMergeForConditionalGeneration,
        args: TrainingArguments,
        *,
        budgets: BudgetSchedule | None = None,
        loss_settings: LossSettings | None = None,
        trained: TrainedSettings | None = None,
        question_dropout: float = 0.0,
        validation_budgets: list[int] | None = None,
        scorer: AnswerScorer | None = None,
        teacher_projector: nn.Module | None = None,
        **kwargs,
    ):
        if args.n_gpu > 1:  # Trainer would split batches among threads, whose copies of the model cannot be trained so
            logger.warning(f"Uses one of {args.n_gpu} GPUs: start with torchrun or accelerate to use all.")
            args._n_gpu = 1
        self.trained, self.loss_settings = trained or TrainedSettings(), loss_settings or LossSettings()
        self.llava_config = config = model.config
        merges = config.merger_config.merger_type != "none"
        own_budget = config.merger_config.num_merged_tokens if merges else config.num_patches
        self.schedule = budgets or BudgetSchedule([own_budget], seed=args.seed)
        self.validation_budgets = validation_budgets or self.schedule.listed
        check_budgets([*self.schedule.values, *self.validation_budgets], config)
        self.question_dropout = question_dropout if config.merger_config.question_aware else 0.0
        self.eval_budget, self.scorer, self.unmerged_accuracy = own_budget, scorer, {}
        keeps_projector = self.trained.parts in ("merger_projector", "all")  # PEFT keeps its own copy
        self.teacher = Teacher(model, keeps_projector, teacher_projector)
        self.has_merger_s_projector = teacher_projector is not None
        self.keeps_teacher_logits = self.loss_settings.cache_teacher or self.teacher_changes
        if self.keeps_teacher_logits and isinstance(kwargs.get("train_dataset"), IterableDataset):
            raise ValueError(f"train_dataset is a stream: {NOT_OF_A_STREAM}")
        self.caches = defaultdict(LogitsCache)  # of training under True, of validation by the name of the set
        self.eval_cache: LogitsCache | None = None  # of the set that is being evaluated
        self.num_bad_steps = self.num_bad_steps_in_a_row = self.num_skipped_samples = 0
        self.num_images_in_step: Tensor | int = 1
        self.sums: dict[str, Tensor] = {}
        super().__init__(model=prepare_parts(model, self.trained), args=args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch
        self.add_callback(StepCallback(self))

    @property
    def teacher_changes(self) -> bool:
        """Whether the teacher's weights are trained too, so that it has to be asked before."""
        return self.trained.parts == "all" and self.loss_settings.distillation > 0

    @property
    def saves_parts(self) -> bool:
        """Whether checkpoints hold the merger and projector alone."""
        return self.trained.parts in ("merger", "merger_projector")

    @property
    def eval_sets(self) -> dict:
        """The sets of validation by name; None is that of a single one."""
        return self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}

    @property
    def merger(self) -> nn.Module:
        """The merger that trains."""
        return self.accelerator.unwrap_model(self.model).headless_model.merger

    def train(self, *args, **kwargs):
        """As in transformers; where the language model is trained, the teacher answers all samples first."""
        if self.teacher_changes:
            self._fill_caches()
        return super().train(*args, **kwargs)

    def create_optimizer(self, model=None):
        """As in transformers, with a learning rate for each part."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(parameter_groups(model, self.trained, self.args.weight_decay), **options)
        return self.optimizer

    def _prepare_inputs(self, inputs):
        """As in transformers; pictures that are uint8 are normalised, on the device."""
        inputs = super()._prepare_inputs(inputs)
        if "pixel_values" in inputs and inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = self.data_collator.normalized(inputs["pixel_values"])
        return inputs

    # --- losses -------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As in transformers; counts the images of the step too, on all ranks where tokens are."""
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.loss_settings.reconstruction:
            return batches, num_tokens
        number = torch.tensor(sum(len(images_of(batch).get("pixel_values", ())) for batch in batches), device=device)
        averages = self.args.average_tokens_across_devices
        self.num_images_in_step = (self.accelerator.gather(number).sum() if averages else number).clamp(min=1)
        return batches, num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted losses of a batch, each a mean over the answer tokens, or the images, of the step on all ranks."""
        training, has_images = model.training, "pixel_values" in inputs
        if training:
            set_modes(model)
        image_token_id, num_patches = self.llava_config.image_token_id, self.llava_config.num_patches
        if self.is_fsdp_enabled and not has_images:
            inputs = with_unseen_image(inputs, image_token_id, num_patches, self.llava_config.image_shape)
        budget = self.schedule.at(self.state.global_step, self.state.max_steps) if training else self.eval_budget
        student = with_budget(inputs, image_token_id, num_patches, budget)
        sums = self._losses(model, inputs, student, budget, has_images)
        weights = {name: getattr(self.loss_settings, name) for name in sums}
        mean = sum(weights[name] * value / count.clamp(min=1) for name, (value, count) in sums.items())
        if training:
            count = (student["labels"][:, 1:] != IGNORED).sum()
            self._keep_for_log({**sums, f"loss_at_{self.schedule.name(budget)}": (mean * count, count)})
            self.num_skipped_samples += int(inputs["num_skipped"].sum())
        loss = mean
        if num_items_in_batch is not None:
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            of_step = {name: num_items_in_batch for name in sums} | {"reconstruction": self.num_images_in_step}
            loss = sum(weights[name] * value * ranks / of_step[name] for name, (value, _) in sums.items())
        return (loss, {"loss": loss}) if return_outputs else loss

    def _losses(
        self, model, inputs: dict, student: dict, budget: int, has_images: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Each loss of a batch, summed over its answer tokens or images, and their number."""
        weights, arguments = self.loss_settings, images_of(inputs)
        if arguments and self.llava_config.merger_config.merger_type != "none":
            arguments["num_merged_tokens"] = budget
        if self.llava_config.merger_config.question_aware:
            seed, share = f"{self.args.seed}-{self.state.global_step}", self.question_dropout if model.training else 0.0
            dropped = dropped_questions(inputs["sample_ids"], share, seed)
            arguments["question_mask"] = (~dropped[:, None]).expand_as(student["input_ids"])
        with self._watched_merger(bool(weights.reconstruction) and has_images) as seen:
            logits = answer_logits(model, student, **arguments)
        targets = student["labels"][:, 1:]
        targets = targets[targets != IGNORED]
        count, sums = torch.tensor(len(targets), device=targets.device), {}
        if weights.cross_entropy:
            sums["cross_entropy"] = losses.answer_cross_entropy(logits, targets), count
        if weights.distillation:
            wanted = self._teacher_logits(model, inputs, self.caches[True] if model.training else self.eval_cache)
            sums["distillation"] = losses.distillation(logits, wanted, weights.temperature), count
        if weights.reconstruction:
            lost = losses.reconstruction(*seen) if seen else 0 * logits.sum()
            sums["reconstruction"] = lost, torch.tensor(len(seen[0]) if seen else 0, device=targets.device)
        return sums

    @contextmanager
    def _watched_merger(self, wanted: bool):
        """A list that, where `wanted`, gets features, merged features and source of the merger's call inside."""
        seen: list[Tensor] = []
        if not wanted:
            yield seen
            return

        def ask(module, args, kwargs):
            return args, {**kwargs, "return_source": True}

        def keep(module, args, kwargs, output):
            seen[:] = args[0], output.merged_features, output.source

        handles = [self.merger.register_forward_pre_hook(ask, with_kwargs=True)]
        handles.append(self.merger.register_forward_hook(keep, with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _teacher_logits(self, model, inputs: dict, cache: LogitsCache | None) -> Tensor:
        """(A, vocabulary): what the model as it was answers with all visual tokens, from the cache if it is there."""
        sample_ids, keeps = inputs["sample_ids"], self.keeps_teacher_logits and cache is not None
        if keeps and cache.has(sample_ids):
            return cache.get(sample_ids, sample_ids.device)
        with self.teacher.answering(self.accelerator.unwrap_model(self.model)):
            logits = answer_logits(model, inputs, **images_of(inputs))
        if keeps:
            cache.put(sample_ids, logits, (inputs["labels"][:, 1:] != IGNORED).sum(dim=1).tolist())
            return cache.get(sample_ids, sample_ids.device)  # rounded, as it will be next time
        return logits

    def _fill_caches(self):
        """Asks the teacher about every sample, on every rank, before its weights change."""
        self.model.to(self.args.device).eval()
        validation = [(dataset, self.caches[name]) for name, dataset in self.eval_sets.items()]
        for dataset, cache in ((self.train_dataset, self.caches[True]), *validation):
            for inputs in DataLoader(dataset or (), self.args.eval_batch_size, collate_fn=self.data_collator):
                with self.compute_loss_context_manager():
                    self._teacher_logits(self.model, self._prepare_inputs(inputs), cache)

    # --- log and validation -------------------------------------------------------------------------------------------

    def _keep_for_log(self, sums: dict[str, tuple[Tensor, Tensor]]):
        for name, (value, count) in sums.items():
            pair = torch.stack((value.detach().float(), count.float()))
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def log(self, logs: dict[str, float], *args, **kwargs):
        """As in transformers, with each loss by itself and by budget, and what was skipped."""
        if "loss" in logs and self.sums:
            means = {name: self.accelerator.reduce(pair) for name, pair in self.sums.items()}
            logs |= {
                name: round((total / count.clamp(min=1)).item(), 4) for name, (total, count) in sorted(means.items())
            }
            logs |= {"skipped_steps": self.num_bad_steps, "skipped_samples": self.num_skipped_samples}
            self.sums = {}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and accuracy at each validation budget, `eval_64_loss` and so on; `eval_loss` is the mean loss.

        Of sets in a dict, each has its losses under its name, `eval_NAME_64_loss` and `eval_NAME_loss`.

        Raises:
            ValueError: It is another set than those of the trainer, whose teacher has been trained since.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        given = self.eval_dataset[given] if isinstance(given, str) else given
        named = {f"_{name}": dataset for name, dataset in given.items()} if isinstance(given, dict) else {"": given}
        metrics, ours = {}, {}
        for name, dataset in named.items():
            prefix = f"{metric_key_prefix}{name}"
            metrics |= self._losses_of_set(dataset, ignore_keys, prefix)
            found = [metrics[f"{prefix}_{budget}_loss"] for budget in self.validation_budgets]
            ours[f"{prefix}_loss"] = sum(found) / len(found)
        if self.scorer is not None:
            ours |= self._accuracies(metric_key_prefix)
        self.log(ours)
        return metrics | ours

    def _losses_of_set(self, dataset, ignore_keys, prefix: str) -> dict[str, float]:
        """What transformers' `evaluate` returns of a set, at each validation budget."""
        own_names = [name for name, own in self.eval_sets.items() if own is dataset]
        if not own_names and self.teacher_changes and self.state.global_step:
            raise ValueError(
                "eval_dataset is not that of the trainer: trained.parts='all' has changed the teacher, which could "
                "only be asked about these samples before. Give it to the trainer, or set losses.distillation to 0."
            )
        name = own_names[0] if own_names else None
        self.eval_cache = self.caches[name] if own_names else LogitsCache()  # samples of all have the same numbers
        metrics = {}
        try:
            for budget in self.validation_budgets:
                self.eval_budget = budget
                metrics |= super().evaluate(dataset if name is None else name, ignore_keys, f"{prefix}_{budget}")
        finally:
            self.eval_cache = None
        return metrics

    def _accuracies(self, prefix: str) -> dict[str, float]:
        """Share of right answers at each validation budget, and with all visual tokens."""
        if self.is_fsdp_enabled:
            logger.warning_once("No accuracy is validated under FSDP, whose shards cannot generate; losses are.")
            return {}
        if not self.unmerged_accuracy:
            with self.teacher.answering(self.accelerator.unwrap_model(self.model)):
                self.unmerged_accuracy = {f"{prefix}_all_accuracy": self._accuracy("all")}
        merged = {f"{prefix}_{budget}_accuracy": self._accuracy(budget) for budget in self.validation_budgets}
        return self.unmerged_accuracy | merged

    def _accuracy(self, budget: int | str) -> float:
        model = self.accelerator.unwrap_model(self.model)
        budget = "all" if budget == self.llava_config.num_patches else budget
        with self.compute_loss_context_manager():
            counts = self.scorer.count(model, budget, self.args.process_index, self.args.world_size)
        right, asked = self.accelerator.reduce(torch.tensor(counts, device=self.args.device)).tolist()
        return right / asked

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, *args, **kwargs):
        """As in transformers; a full disk is an OSError."""
        with naming_failed_writes(output_dir or self.args.output_dir):
            super().save_model(output_dir, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        with naming_failed_writes(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.saves_parts:
            super()._save(output_dir, state_dict)
            if self.trained.parts == "merger_lora" and self.args.should_save:
                file = Path(output_dir or self.args.output_dir) / ADAPTER_MERGER
                self.llava_config.merger_config.to_json_file(file, use_diff=False)
        elif self.args.should_save:
            with_projector = PROJECTOR in TRAINED[self.trained.parts] or self.has_merger_s_projector
            model = self.accelerator.unwrap_model(self.model)
            directory = output_dir or self.args.output_dir
            os.makedirs(directory, exist_ok=True)  # other ranks write there too: no rename may make the folder
            save_parts(model, directory, with_projector, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if not self.saves_parts or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_parts(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class StepCallback(TrainerCallback):
    """Tells the merger how far the training is, and leaves out steps whose gradients are not finite."""

    def __init__(self, trainer: MergerTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        """Tells the merger how far training is."""
        self.trainer.merger.set_progress(min(1.0, state.global_step / max(1, state.max_steps)))

    def on_step_end(self, args, state, control, **kwargs):
        """Says what the merger is trained with now, for the checkpoints."""
        merger_config = self.trainer.llava_config.merger_config
        if merger_config.merger_type != "none":
            merger_config.trained_num_tokens = self.trainer.schedule.listed

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Leaves out a step whose gradients are not finite."""
        trainer = self.trainer
        if has_finite_gradients(model):
            trainer.num_bad_steps_in_a_row = 0
            return
        trainer.num_bad_steps += 1
        trainer.num_bad_steps_in_a_row += 1
        optimizer.zero_grad(set_to_none=True)  # so that the step does nothing
        logger.warning(f"Step {state.global_step} has a gradient that is not finite, and is skipped.")
        if trainer.num_bad_steps_in_a_row == MAX_BAD_STEPS:
            trainer.save_model()
            raise FloatingPointError(
                f"{MAX_BAD_STEPS} steps in a row, up to {state.global_step}, had gradients that are not finite. The "
                f"last good weights are in {args.output_dir}. Lower trained.merger_learning_rate, or train in float32 "
                f"(training.bf16=false)."
            )


def images_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of the model with the pictures of a batch, if it has any."""
    return {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}


def answer_logits(model: nn.Module, batch: dict[str, Tensor], **kwargs) -> Tensor:
    """Logits (A, vocabulary) at the A tokens of a batch (B, L) that have labels, row by row.

    Raises:
        ValueError: None has.
    """
    is_target = batch["labels"][:, 1:] != IGNORED  # of the token before
    columns = is_target.any(dim=0).nonzero()
    if not len(columns):
        raise ValueError("labels are -100 everywhere in a batch, so that there is nothing to learn from it.")
    first = int(columns[0])
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        answer_mask=batch["labels"] != IGNORED,
        logits_to_keep=batch["labels"].shape[1] - first,
        use_cache=False,
        **kwargs,
    )
    return outputs.logits[:, :-1][is_target[:, first:]]


def check_budgets(budgets: list[int], config):
    """Refuses budgets above the number N of visual tokens, or others than N where nothing is merged.

    Raises:
        ValueError: There is one.
    """
    if max(budgets) > config.num_patches or min(budgets) < 1:
        raise ValueError(
            f"budgets={sorted(set(budgets))}: each has to be from 1 to the {config.num_patches} visual tokens of an "
            f"image."
        )
    if config.merger_config.merger_type == "none" and {*budgets} != {config.num_patches}:
        raise ValueError(
            f"budgets={sorted(set(budgets))}: merger_type='none' keeps all {config.num_patches} tokens; leave budgets "
            f"out, or choose a merger."
        )
