# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Training runs: what trains, what the teacher says, budgets, bad gradients, breaks, and ranks."""

import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import NUM_PATCHES, agnostic, aware, make_processor, pixels, prompts, tiny_model, tiny_stock
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from typer.testing import CliRunner

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor, TokenMerger
from llava_merge.cli import app
from llava_merge.demo import MODEL_DIR
from llava_merge.demo.scenes import ask_question, describe_scene, draw_scene, sample_scene, scene_rng
from llava_merge.model.compat import LOADS_SAVED_MODULES_OF_ADAPTERS, TRANSFORMERS_V5
from llava_merge.model.configuration_llava_merge import check_merger_fields
from llava_merge.training.budgets import BudgetSchedule
from llava_merge.training.checkpoints import last_whole_checkpoint, remove_broken_off
from llava_merge.training.collator import MergerCollator
from llava_merge.training.data import ChatDataset, ChatStream
from llava_merge.training.parts import set_modes
from llava_merge.training.run import WRITTEN, load_model, make_trainer, read_datasets, train
from llava_merge.training.settings import (
    LossSettings,
    Settings,
    TrainedSettings,
    load_settings,
    settings_of,
    training_arguments,
    typed,
)
from llava_merge.training.trainer import MAX_BAD_STEPS, MergerTrainer
from llava_merge.training.validation import AnswerScorer


EXAMPLES = Path(__file__).parents[1] / "examples"
NUM_SAMPLES = 8
WIDTHS = {"vision_dim": 32, "hidden_dim": 64}


@pytest.fixture(autouse=True)
def leave_no_state():
    """TrainingArguments of mixed precision say so in the environment and to all of accelerate."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(True)


def rows(num_samples: int = NUM_SAMPLES) -> list[dict]:
    """Conversations of one to three turns, most with a picture, in the words of the tiny tokenizer."""
    generator = torch.Generator().manual_seed(7)
    colors, made = ["red", "blue", "star", "circles"], []
    for index in range(num_samples):
        turns = []
        for turn in range(1 + index % 3):
            answer = " ".join(colors[i] for i in torch.randint(4, (1 + index % 2,), generator=generator).tolist())
            image = "<image>\n" if turn == 0 and index != 3 else ""
            turns += [{"from": "human", "value": f"{image}what color is the star ?"}, {"from": "gpt", "value": answer}]
        pixels = torch.randint(0, 255, (90, 90, 3), dtype=torch.uint8, generator=generator).numpy()
        images = [] if index == 3 else [Image.fromarray(pixels)]
        made.append({"id": f"s{index}", "images": images, "conversations": turns})
    return made


def arguments(folder, **fields):
    fields = {"max_steps": 4, "per_device_train_batch_size": 2, "warmup_steps": 0, "use_cpu": True, **fields}
    fields |= {"output_dir": str(folder), "report_to": [], "logging_steps": 1, "dataloader_num_workers": 0}
    return training_arguments(Settings(training={"save_strategy": "no", "disable_tqdm": True, **fields}))


def trainer_of(
    folder, merger_config=None, parts="merger_projector", budgets=None, losses=None, train_merger=False, **fields
):
    torch.manual_seed(0)  # of a fresh merger
    model = tiny_model(agnostic() if merger_config is None else merger_config, train_merger=train_merger)
    fields.setdefault("train_dataset", ChatDataset(rows(), "rows"))
    return MergerTrainer(
        model,
        arguments(folder, **{name: fields.pop(name) for name in list(fields) if name in TRAINING_FIELDS}),
        budgets=budgets and BudgetSchedule(budgets),
        loss_settings=LossSettings(**(losses or {})),
        trained=TrainedSettings(parts=parts, lora_rank=2),
        data_collator=MergerCollator(make_processor(), NUM_PATCHES),
        **fields,
    )


TRAINING_FIELDS = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "save_strategy",
    "save_steps",
    "num_train_epochs",
    "bf16",
    "learning_rate",
    "optim",
)


def logged(trainer: MergerTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class TestWhatTrains:
    @pytest.mark.parametrize(
        "parts, trained",
        [
            ("merger", {"merger"}),
            ("merger_projector", {"merger", "multi_modal_projector"}),
            ("all", {"merger", "multi_modal_projector", "language_model", "lm_head"}),
        ],
    )
    def test_only_that_moves_has_state_and_is_in_training_mode(self, parts, trained, tmp_path):
        trainer = trainer_of(tmp_path, parts=parts)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        modes = {}

        def look(module, args, kwargs):
            modes.update({name: module.training for name, module in trainer.model.named_modules()})

        trainer.model.register_forward_pre_hook(look, with_kwargs=True)
        trainer.train()
        moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
        parts_moved = {part for part in (*trained, "vision_tower", "language_model") if any(part in n for n in moved)}
        assert parts_moved == trained
        wanted = {parameter for parameter in trainer.model.parameters() if parameter.requires_grad}
        assert {*trainer.optimizer.state} == wanted
        assert modes["model.merger"] and not modes["model.vision_tower"]
        assert modes["model.language_model.layers.0.mlp"] == (parts == "all")

    def test_what_trains_is_float32_beside_a_model_in_half_precision(self, tmp_path):
        model = tiny_model(agnostic()).to(torch.bfloat16)
        args = arguments(tmp_path, bf16=True)
        collator = MergerCollator(make_processor(), NUM_PATCHES)
        trainer = MergerTrainer(model, args, data_collator=collator, train_dataset=ChatDataset(rows(), "rows"))
        trainer.train()
        dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
        assert all(map(math.isfinite, logged(trainer, "loss"))) and len(logged(trainer, "loss")) == 4

    def test_each_part_has_its_learning_rate(self, tmp_path):
        trainer = trainer_of(tmp_path, parts="all")
        trainer.create_optimizer()
        rates = {}
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                rates[names[parameter].split(".")[1]] = group["lr"]
                assert (group["weight_decay"] > 0) == (parameter.ndim == 2 and "norm" not in names[parameter])
        assert rates["merger"] == 1e-3 and rates["multi_modal_projector"] == 5e-4 and rates["language_model"] == 2.5e-4

    def test_frozen_layers_recompute_their_activations_where_that_is_asked_for(self, tmp_path):
        plain = trainer_of(tmp_path / "a", max_steps=2)
        plain.train()
        saving = trainer_of(tmp_path / "b", max_steps=2, gradient_checkpointing=True)
        calls = []
        mlp = saving.model.model.language_model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda module, *_: calls.append((torch.is_grad_enabled(), module.training)))
        saving.train()
        # of each step: student without graph, teacher, and the student's layer once more with graph
        assert len(calls) == 6 and not any(training for _, training in calls)
        assert logged(plain, "loss") == pytest.approx(logged(saving, "loss"), abs=1e-5)

    def test_nothing_to_train_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="merger_type='tome' has no parameters, and trained.parts='merger' trains"):
            trainer_of(tmp_path, {"merger_type": "tome", "num_merged_tokens": 9}, parts="merger")

    def test_a_training_free_method_may_train_its_projector(self, tmp_path):
        trainer = trainer_of(tmp_path, {"merger_type": "tome", "num_merged_tokens": 9})
        trainer.train()
        trainer.save_model()
        model = tiny_model({"merger_type": "none"})
        model.load_merger(tmp_path)
        weights = trainer.model.model.multi_modal_projector.state_dict()
        loaded = model.model.multi_modal_projector.state_dict()
        assert all(torch.equal(weights[name], loaded[name]) for name in weights)


class TestTeacher:
    def test_with_nothing_merged_the_distillation_is_exactly_zero(self, tmp_path):
        trainer = trainer_of(tmp_path, {"merger_type": "none"}, losses={"cross_entropy": 0.0})
        inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(NUM_SAMPLES)])
        for model in (trainer.model.train(), trainer.model.eval()):
            assert trainer.compute_loss(model, inputs) == 0

    @pytest.mark.parametrize("parts", ["merger_projector", "merger_lora"])
    def test_it_stays_as_it_was(self, parts, tmp_path):
        trainer = trainer_of(tmp_path, parts=parts, max_steps=3, losses={"cross_entropy": 1.0})
        inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
        stock = tiny_model({"merger_type": "none"})
        keys = ("input_ids", "attention_mask", "pixel_values")
        with torch.no_grad():
            expected = stock(**{key: inputs[key] for key in keys}).logits[:, :-1][inputs["labels"][:, 1:] != -100]
        trainer.train()
        logits = trainer._teacher_logits(trainer.model, inputs, trainer.caches[True])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        student = trainer.model.eval()
        with student.merger_bypassed(), torch.no_grad():
            trained = student(**{key: inputs[key] for key in keys}).logits[:, :-1][inputs["labels"][:, 1:] != -100]
        assert (trained - expected).abs().max() > 1e-4  # that of the trained projector is another

    @pytest.mark.skipif(not TRANSFORMERS_V5, reason="the same on every release, and slow")
    def test_its_divergence_falls_five_times_on_scenes(self, tmp_path):
        """The demo model at 16 of 576 tokens, a few scenes again and again."""
        torch.manual_seed(0)
        rows = []
        for index in range(4):
            rng = scene_rng("train", index)
            scene = sample_scene(rng)
            asked = ask_question(scene, "existence", rng)
            turns = [{"from": "human", "value": f"<image>\n{asked.text}"}, {"from": "gpt", "value": asked.answer}]
            turns += [{"from": "human", "value": "Describe."}, {"from": "gpt", "value": describe_scene(scene)}]
            rows.append({"id": index, "images": [draw_scene(scene)], "conversations": turns})
        model = LlavaMergeForConditionalGeneration.from_pretrained(
            MODEL_DIR, merger_config={"num_merged_tokens": 16, "attention_mass": 1.0}, dtype=torch.float32
        )
        trainer = MergerTrainer(
            model,
            arguments(tmp_path, max_steps=25, per_device_train_batch_size=4, num_train_epochs=25),
            loss_settings=LossSettings(cache_teacher=True),
            data_collator=MergerCollator(LlavaMergeProcessor.from_pretrained(MODEL_DIR), 576),
            train_dataset=ChatDataset(rows, "scenes"),
        )
        trainer.train()
        divergence = logged(trainer, "distillation")
        assert divergence[0] > 0.3 and min(divergence[-3:]) < divergence[0] / 5

    def test_no_second_copy_of_the_weights_is_kept(self, tmp_path):
        trainer = trainer_of(tmp_path)
        kept = sum(parameter.numel() for parameter in trainer.teacher.projector.parameters())
        assert kept == sum(p.numel() for p in trainer.model.model.multi_modal_projector.parameters())
        assert trainer_of(tmp_path, parts="merger").teacher.projector is None

    def test_hooks_are_removed(self, tmp_path):
        trainer = trainer_of(tmp_path, max_steps=2, losses={"reconstruction": 0.1})
        trainer.train()
        for module in (trainer.model.model.multi_modal_projector, trainer.model.model.merger):
            assert not module._forward_hooks and not module._forward_pre_hooks

    def test_its_answers_are_computed_once_where_they_are_cached(self, tmp_path):
        calls, losses = {}, {}
        for cached in (False, True):
            trainer = trainer_of(tmp_path, max_steps=12, losses={"cache_teacher": cached})
            answering, calls[cached] = trainer.teacher.answering, []

            def counting(model, answering=answering, made=calls[cached]):
                made.append(model)
                return answering(model)

            trainer.teacher.answering = counting
            trainer.train()
            losses[cached] = logged(trainer, "loss")
        assert len(calls[False]) == 12 and 4 <= len(calls[True]) < 12
        assert losses[True] == pytest.approx(losses[False], rel=2e-2)

    def test_validation_has_samples_of_its_own(self, tmp_path):
        """Which have the same numbers as those of training."""
        fields = {"losses": {"cache_teacher": True}, "max_steps": 2, "eval_dataset": ChatDataset(rows()[::-1], "rows")}
        trainer = trainer_of(tmp_path, **fields)
        trainer.train()
        found = trainer.evaluate()
        assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(found["eval_loss"])
        uncached = trainer_of(tmp_path, **{**fields, "losses": {}})
        uncached.train()
        assert found["eval_loss"] == pytest.approx(uncached.evaluate()["eval_loss"], rel=1e-2)

    @pytest.mark.parametrize("given", [{}, {"losses": {"cache_teacher": True}}, {"parts": "all"}])
    def test_sets_by_name_are_evaluated_as_each_alone(self, given, tmp_path):
        """As transformers' Trainer takes them; their samples have the same numbers."""
        sets = {name: ChatDataset(chosen, name) for name, chosen in (("first", rows()[:4]), ("last", rows()[4:]))}
        fields = {"max_steps": 2, "budgets": [9, 4], **given}
        trainer = trainer_of(tmp_path, **fields, eval_dataset=sets)
        trainer.train()
        found = trainer.evaluate()
        for name, dataset in sets.items():
            alone = trainer_of(tmp_path, **fields, eval_dataset=dataset)
            alone.train()
            expected = {key: value for key, value in alone.evaluate().items() if key.endswith("loss")}
            assert expected.keys() == {"eval_9_loss", "eval_4_loss", "eval_loss"}
            for asked in (found, trainer.evaluate(sets), trainer.evaluate()):
                assert {key: asked[key.replace("eval", f"eval_{name}")] for key in expected} == pytest.approx(expected)
            for again in (trainer.evaluate(dataset), trainer.evaluate(name)):
                assert again["eval_loss"] == pytest.approx(expected["eval_loss"])
        assert logged(trainer, "eval_last_loss") and "eval_loss" not in found

    def test_another_set_has_answers_of_its_own(self, tmp_path):
        others = ChatDataset(rows()[2:] + rows()[:2], "rows")
        fields = {"max_steps": 2, "eval_dataset": ChatDataset(rows(), "rows"), "parts": "merger"}
        kept, asked = trainer_of(tmp_path, **fields, losses={"cache_teacher": True}), trainer_of(tmp_path, **fields)
        found = kept.evaluate()["eval_loss"]
        loss = asked.evaluate(others)["eval_loss"]
        assert kept.evaluate(others)["eval_loss"] == pytest.approx(loss, rel=1e-2)
        assert kept.evaluate()["eval_loss"] == pytest.approx(found), "those of its own set were kept"

    def test_a_trained_teacher_is_not_asked_about_another_set(self, tmp_path):
        fields = {"max_steps": 2, "eval_dataset": ChatDataset(rows(), "rows"), "parts": "all"}
        trainer, others = trainer_of(tmp_path, **fields), ChatDataset(rows()[::-1], "rows")
        trainer.evaluate(others)  # nothing is trained yet
        trainer.train()
        trainer.evaluate()
        with pytest.raises(ValueError, match="parts='all' has changed the teacher"):
            trainer.evaluate(others)

    @pytest.mark.parametrize("given", [{"losses": {"cache_teacher": True}}, {"parts": "all"}])
    def test_its_answers_to_a_stream_are_not_kept(self, tmp_path, given):
        """Whose samples are numbered by each loading process, so that one would get the answers of another."""
        with pytest.raises(ValueError, match="is a stream: .* Set losses.cache_teacher=false"):
            trainer_of(tmp_path, max_steps=2, train_dataset=ChatStream(rows(), "rows", tmp_path), **given)

    def test_where_everything_trains_it_answers_before(self, tmp_path):
        trainer = trainer_of(tmp_path, parts="all", max_steps=2)
        inputs = trainer.data_collator([trainer.train_dataset[0]])
        expected = trainer._teacher_logits(trainer.model.eval(), inputs, trainer.caches[True]).clone()
        trainer.caches[True].of_sample.clear()
        trainer.train()
        assert len(trainer.caches[True].of_sample) == NUM_SAMPLES
        torch.testing.assert_close(
            trainer._teacher_logits(trainer.model, inputs, trainer.caches[True]), expected, atol=1e-2, rtol=1e-2
        )


class TestLosses:
    def test_they_are_means_over_the_answer_tokens_of_a_step(self, tmp_path):
        """Two batches of two, accumulated, are one batch of four."""
        fields = {"max_steps": 2, "optim": "sgd"}  # Adam would make much of gradients that are nearly 0
        whole = trainer_of(tmp_path / "a", per_device_train_batch_size=4, **fields)
        parts = trainer_of(tmp_path / "b", gradient_accumulation_steps=2, **fields)
        for trainer in (whole, parts):
            trainer.train()
        assert logged(whole, "loss") == pytest.approx(logged(parts, "loss"), abs=1e-4)
        for name in ("cross_entropy", "distillation"):
            assert logged(whole, name) == pytest.approx(logged(parts, name), abs=1e-3)
        ours, other = (dict(t.model.model.merger.named_parameters()) for t in (whole, parts))
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, other[name], atol=1e-6, rtol=1e-5)

    def test_weights_and_parts_are_logged(self, tmp_path):
        weights = {"cross_entropy": 0.5, "distillation": 2.0, "reconstruction": 0.25}
        trainer = trainer_of(tmp_path, losses=weights, max_steps=2)
        trainer.train()
        for entry in trainer.state.log_history[:2]:
            assert entry["loss_at_9"] == pytest.approx(sum(weights[n] * entry[n] for n in weights), abs=1e-3)
            assert entry["loss"] == pytest.approx(entry["loss_at_9"], abs=1e-3) and 0 < entry["reconstruction"] < 1

    def test_reconstruction_alone_trains_the_merger(self, tmp_path):
        losses = {"cross_entropy": 0.0, "distillation": 0.0, "reconstruction": 1.0}
        trainer = trainer_of(tmp_path, losses=losses, max_steps=30, parts="merger")
        trainer.train()
        lost = logged(trainer, "reconstruction")
        assert sum(lost[-5:]) < sum(lost[:5])

    def test_a_batch_without_labels_is_refused(self, tmp_path):
        trainer = trainer_of(tmp_path)
        inputs = trainer.data_collator([trainer.train_dataset[0]])
        inputs["labels"][:] = -100
        with pytest.raises(ValueError, match="labels are -100 everywhere"):
            trainer.compute_loss(trainer.model.train(), inputs)


class TestBudgets:
    def test_each_step_has_one_and_all_are_listed(self, tmp_path):
        trainer = trainer_of(tmp_path, budgets=[4, 9, 18], max_steps=12)
        trainer.train()
        names = {name for entry in trainer.state.log_history for name in entry if name.startswith("loss_at")}
        assert names == {"loss_at_4", "loss_at_9", "loss_at_18"}
        assert all(sum(name in entry for name in names) == 1 for entry in trainer.state.log_history[:12])
        trainer.save_model()
        merger = TokenMerger.from_pretrained(tmp_path)
        assert merger.config.trained_num_tokens == [4, 9, 18] and merger.config.num_merged_tokens == 9

    def test_they_may_lie_in_a_range(self, tmp_path):
        trainer = trainer_of(tmp_path, budgets={"min": 2, "max": 30}, max_steps=4)
        assert trainer.model.config.merger_config.trained_num_tokens is None, "nothing is trained yet"
        trainer.train()
        assert trainer.model.config.merger_config.trained_num_tokens == [2, 30]

    def test_one_above_the_visual_tokens_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"budgets=\[9, 37\]: each has to be from 1 to the 36 visual tokens"):
            trainer_of(tmp_path, budgets=[9, 37])
        with pytest.raises(ValueError, match="merger_type='none' keeps all 36 tokens"):
            trainer_of(tmp_path, {"merger_type": "none"}, budgets=[9])

    def test_questions_are_dropped_for_mergers_that_read_them(self, tmp_path):
        masks = []
        trainer = trainer_of(tmp_path, aware(), question_dropout=0.5, max_steps=8, losses={"distillation": 0.0})
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["question_mask"][:, 0]), with_kwargs=True
        )
        trainer.train()
        kept = torch.cat(masks).float().mean()
        assert 0.1 < kept < 0.9 and len(masks) == 8
        assert trainer_of(tmp_path, agnostic(), question_dropout=0.5).question_dropout == 0


@pytest.mark.parametrize("marks", [{}, {"question_start_token_ids": None, "question_end_token_ids": None}])
def test_answers_and_later_turns_do_not_reach_the_merger(marks, tmp_path):
    """Other answers, later turns and rows leave the merged features of a training batch as they are."""
    trainer = trainer_of(tmp_path, aware(**marks), train_merger=True)  # without marks, labels tell answers
    seen = []
    trainer.merger.register_forward_hook(lambda module, args, output: seen.append(output.merged_features))
    conversations = rows()[2]["conversations"]  # three turns
    poisoned = [dict(turn) for turn in conversations]
    for index in (1, 2, 3, 5):  # all answers, and the second question
        poisoned[index]["value"] = "how many circles are there ?" if index == 2 else "circles"
    other = {**rows()[0], "images": []} | {"conversations": [{"from": "human", "value": "blue ?"}, conversations[1]]}
    first = {**rows()[2], "conversations": conversations}
    for batch in ([first], [{**first, "conversations": poisoned}], [first, other]):
        dataset = ChatDataset(batch, "rows")
        inputs = trainer.data_collator([dataset[index] for index in range(len(dataset))])
        trainer.compute_loss(trainer.model.train(), inputs)
    asked = ChatDataset(
        [{**first, "conversations": [{"from": "human", "value": "<image>red ?"}, *conversations[1:]]}], ""
    )
    trainer.compute_loss(trainer.model.train(), trainer.data_collator([asked[0]]))
    assert len(seen) == 4
    for features in seen[1:3]:
        torch.testing.assert_close(features, seen[0], atol=1e-6, rtol=1e-6)
    assert (seen[3] - seen[0]).abs().max() > 1e-5  # the first question does


class TestBadGradients:
    def poisoned(self, trainer, steps):
        """Makes the gradient of one weight inf or nan in `steps`."""
        weight = next(trainer.model.model.merger.parameters())
        weight.register_hook(lambda gradient: gradient * math.nan if trainer.state.global_step in steps else gradient)
        return trainer

    def test_such_a_step_is_skipped_and_counted(self, tmp_path):
        trainer = self.poisoned(trainer_of(tmp_path, max_steps=4), {1, 2})
        seen = []

        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                seen.append([parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad])

        trainer.add_callback(Keep())
        trainer.train()
        same = [all(map(torch.equal, seen[step - 1], seen[step])) for step in (1, 2, 3)]
        assert same == [True, True, False] and all(torch.isfinite(tensor).all() for tensor in seen[-1])
        assert logged(trainer, "skipped_steps")[-1] == 2

    def test_many_that_are_not_in_a_row_do_not_end_the_run(self, tmp_path):
        trainer = self.poisoned(trainer_of(tmp_path, max_steps=30), {step for step in range(30) if step % 3})
        trainer.train()
        assert trainer.num_bad_steps == 20 > MAX_BAD_STEPS

    def test_ten_in_a_row_end_the_run_with_the_last_good_weights(self, tmp_path):
        trainer = self.poisoned(trainer_of(tmp_path, max_steps=30), range(2, 30))
        with pytest.raises(FloatingPointError, match=r"10 steps in a row, up to 11, .* Lower trained.merger_learning"):
            trainer.train()
        assert trainer.num_bad_steps == MAX_BAD_STEPS
        weights = load_file(tmp_path / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        assert all(torch.equal(weights[n], t) for n, t in trainer.model.model.merger.state_dict().items())


class TestBreaks:
    def run(self, folder, resume=False, stop_at=None, **fields):
        trainer = trainer_of(
            folder,
            aware(),
            budgets=[4, 9],
            max_steps=9,
            save_strategy="steps",
            save_steps=2,
            question_dropout=0.3,
            **fields,
        )
        if stop_at is not None:

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step == stop_at:
                        raise KeyboardInterrupt

            trainer.add_callback(Stop())
        try:
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(str(folder)) if resume else None)
        except KeyboardInterrupt:
            pass
        return trainer

    @pytest.mark.parametrize("parts", [pytest.param("merger_projector", marks=pytest.mark.core), "merger_lora"])
    def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not(self, parts, tmp_path):
        unbroken = self.run(tmp_path / "unbroken", parts=parts)
        self.run(tmp_path / "broken", stop_at=7, parts=parts)
        assert last_whole_checkpoint(str(tmp_path / "broken")).endswith("checkpoint-6")
        resumed = self.run(tmp_path / "broken", resume=True, parts=parts)
        assert logged(unbroken, "loss")[:9] == logged(resumed, "loss")[:9]
        for name, tensor in unbroken.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name

    def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(self, tmp_path):
        self.run(tmp_path)  # which keeps the last two
        assert last_whole_checkpoint(str(tmp_path)).endswith("checkpoint-9")
        state = tmp_path / "checkpoint-9" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
        assert last_whole_checkpoint(str(tmp_path)).endswith("checkpoint-8")
        (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
        assert last_whole_checkpoint(str(tmp_path)) is None

    def test_a_full_disk_leaves_the_checkpoint_before(self, tmp_path, monkeypatch):
        from llava_merge.training import trainer as module

        saved = []

        def fails_second(*args):
            saved.append(args)
            if len(saved) == 2:
                raise OSError(28, "No space left on device")
            return save_parts(*args)

        save_parts = module.save_parts
        monkeypatch.setattr(module, "save_parts", fails_second)
        with pytest.raises(OSError, match="No space left"):
            self.run(tmp_path)
        assert last_whole_checkpoint(str(tmp_path)).endswith("checkpoint-2")
        TokenMerger.from_pretrained(last_whole_checkpoint(str(tmp_path)))

    def test_another_rank_may_write_into_a_checkpoint_at_the_same_time(self, tmp_path, monkeypatch):
        def write_files(merger, *args, **kwargs):
            (tmp_path / "checkpoint-2").mkdir(exist_ok=True)
            (tmp_path / "checkpoint-2" / "rng_state_1.pth").touch()
            write(merger, *args, **kwargs)

        write = TokenMerger._write_files
        monkeypatch.setattr(TokenMerger, "_write_files", write_files)
        trainer_of(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
        assert (tmp_path / "checkpoint-2" / "rng_state_1.pth").exists()
        TokenMerger.from_pretrained(tmp_path / "checkpoint-2")

    def test_a_folder_without_weights_is_refused(self, tmp_path):
        (tmp_path / "checkpoint-1").mkdir()
        with pytest.raises(ValueError, match="holds no model.safetensors, so that training cannot go on"):
            trainer_of(tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """A stock LLaVA with its processor, and data beside it."""
    folder = tmp_path_factory.mktemp("llava")
    tiny_stock().save_pretrained(folder / "llava")
    make_processor().save_pretrained(folder / "llava")
    made = rows()
    for index, row in enumerate(made):
        images = row.pop("images")
        for image in images:
            image.save(folder / f"{index}.png")
        row |= {"image": f"{index}.png"} if images else {}
    (folder / "train.json").write_text(json.dumps(made))
    return folder


def settings_for(folder, output, method, parts="merger_projector", **sections) -> dict:
    training = {"max_steps": 10, "per_device_train_batch_size": 2, "warmup_steps": 0, "use_cpu": True}
    training |= {"output_dir": str(output), "report_to": [], "logging_steps": 1, "dataloader_num_workers": 0}
    training |= {"save_strategy": "no", **sections.pop("training", {})}
    data = {"train": str(folder / "train.json"), **sections.pop("data", {})}
    mllm = {"model": str(folder / "llava"), **WIDTHS}
    return {
        "method_settings": {"num_heads": 4, **method} if "fixed" in method["merger_type"] else method,
        "backbone_settings": {"mllm_settings": mllm},
        "data": data,
        "trained": {"parts": parts, "lora_rank": 2},
        "training": training,
        **sections,
    }


METHODS = [
    {"merger_type": "fixed_pooling"},
    pytest.param(
        {"merger_type": "fixed_pooling", "question_aware": True, "attention_mass": 1.0}, marks=pytest.mark.core
    ),
    {"merger_type": "fixed_pooling", "init": "random", "position_ids": "packed"},
    {"merger_type": "salient_pooling", "attention_mass": 1.0},
    {"merger_type": "gumbel_topk"},
    {"merger_type": "gumbel_topk", "estimator": "soft_topk"},
    {"merger_type": "gumbel_topk_question"},
    {"merger_type": "gumbel_topk_question", "estimator": "soft_topk"},
    {"merger_type": "mqt"},
    {"merger_type": "c_abstractor"},
    {"merger_type": "tokenpacker"},
    {"merger_type": "quecc"},
    {"merger_type": "fixed_pooling", "feature_layers": [1, 2]},
    {"merger_type": "resampler"},
    {"merger_type": "average_pooling"},
]


@pytest.mark.newest
class TestInputs:
    """What a run reads it does not replace; other files may lie in its folder."""

    @pytest.mark.parametrize("parts", ["merger", "merger_projector", "merger_lora", "all"])
    def test_all_that_is_written_is_known(self, parts, llava_folder, tmp_path):
        training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        plain = settings_for(llava_folder, tmp_path, METHODS[0], parts, budgets={"train": [9]}, training=training)
        train(settings_of(plain))
        known = {path for pattern in WRITTEN for path in tmp_path.glob(pattern)}
        assert {path for path in tmp_path.rglob("*") if path.is_file()} <= known

    @pytest.mark.parametrize(
        "read", ["metrics.json", "checkpoint-1/data/rows.json", "curves.png", "config.json", "adapter_config.json"]
    )
    def test_a_file_that_is_read_is_not_replaced(self, read, llava_folder, tmp_path):
        """Data, a picture of it, the settings themselves, or settings of DeepSpeed."""
        run, made = tmp_path / "run", json.loads((llava_folder / "train.json").read_text())
        (run / read).parent.mkdir(parents=True)
        data, config, training = tmp_path / "rows.json", tmp_path / "settings.yaml", {}
        if read in ("metrics.json", "checkpoint-1/data/rows.json"):
            data = run / read
        elif read == "curves.png":
            shutil.copy(llava_folder / "0.png", run / read)
            made[0]["image"] = str(run / read)
        elif read == "config.json":
            config = run / read
        else:
            training = {"accelerator_config": str(run / read)}
            (run / read).write_text("{}")
        data.write_text(json.dumps(made))
        sections = {"data": {"train": str(data), "image_folder": str(llava_folder)}, "training": training}
        config.write_text(json.dumps(settings_for(llava_folder, run, METHODS[0], **sections)))
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        done = CliRunner().invoke(app, ["train", str(config)])
        assert done.exit_code == 2 and f"{run / read} is read, and would be replaced" in done.stderr, done.output
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    def test_data_and_settings_may_lie_in_the_folder_and_training_goes_on(self, llava_folder, tmp_path):
        run, config = tmp_path / "run", tmp_path / "run" / "settings.yaml"
        shutil.copytree(llava_folder, run)
        (run / "llava").rename(tmp_path / "llava")
        training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        plain = settings_for(tmp_path, run, METHODS[0], training=training, data={"train": str(run / "train.json")})
        config.write_text(json.dumps(plain))
        before = {path: path.read_bytes() for path in run.iterdir()}
        for steps in (2, 3):
            done = CliRunner().invoke(app, ["train", str(config), "--resume", "--set", f"training.max_steps={steps}"])
            assert done.exit_code == 0, done.output
        assert (run / "checkpoint-3").is_dir()
        assert before.items() <= {path: path.read_bytes() for path in run.iterdir() if path.is_file()}.items()


@pytest.mark.newest
class TestCommand:
    @pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
    def test_every_method_trains(self, method, llava_folder, tmp_path):
        plain = settings_for(llava_folder, tmp_path / "out", method, budgets={"train": [4, 9], "validation": [4, 9]})
        plain["data"]["validation"] = plain["data"]["train"]
        metrics = train(settings_of(plain))
        assert math.isfinite(metrics["train_loss"]) and math.isfinite(metrics["eval_9_loss"])
        assert 0 <= metrics["eval_4_accuracy"] <= 1 and 0 <= metrics["eval_all_accuracy"] <= 1
        model = LlavaMergeForConditionalGeneration.from_pretrained(llava_folder / "llava", merger=tmp_path / "out")
        config = model.config.merger_config
        assert config.merger_type == method["merger_type"] and config.trained_num_tokens == [4, 9]
        assert config.num_merged_tokens == 9 and config.position_ids == method.get("position_ids", "source")
        fresh = LlavaMergeForConditionalGeneration.from_pretrained(llava_folder / "llava").model.multi_modal_projector
        assert not torch.equal(fresh.linear_1.weight, model.model.multi_modal_projector.linear_1.weight)
        for name in ("metrics.json", "curves.png", "README.md"):
            assert (tmp_path / "out" / name).stat().st_size > 100
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| steps | 10 |" in card and "| 9 accuracy |" in card and str(llava_folder / "llava") in card

    def test_pictures_are_handed_over_as_bytes(self, tmp_path):
        losses = []
        for as_bytes in (False, True):
            trainer = trainer_of(tmp_path, max_steps=2)
            trainer.data_collator = MergerCollator(make_processor(), NUM_PATCHES, as_bytes)
            losses.append(trainer.train().training_loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_an_adapter_is_saved_where_lora_trains(self, llava_folder, tmp_path, monkeypatch):
        """Which can be loaded by itself, by PEFT, and folded into its base."""
        method = {**METHODS[0], "attention_mass": 1.0}
        train(settings_of(settings_for(llava_folder, tmp_path, method, "merger_lora", budgets={"train": [4, 9]})))
        card = (tmp_path / "README.md").read_text()
        assert "Adapter of a LLaVA with a token merger" in card and "AutoModel" not in card
        merger_config = {"num_merged_tokens": 9, "num_heads": 4, "attention_mass": 1.0}
        stock = LlavaMergeForConditionalGeneration.from_pretrained(
            llava_folder / "llava", merger_config=merger_config
        ).eval()
        batch = {**prompts([1, 1], 9), "pixel_values": pixels(2)}
        with torch.no_grad():
            before = stock(**batch).logits
            by_peft = peft.PeftModel.from_pretrained(stock, tmp_path).eval()(**batch).logits
        assert (by_peft - before).abs().max() > 1e-3
        if LOADS_SAVED_MODULES_OF_ADAPTERS:
            for given in ({}, {"num_merged_tokens": 4}):  # laid over what the adapter was trained with
                laid_over = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config=given).eval()
                found = laid_over.config.merger_config
                assert found.attention_mass == 1.0 and found.num_merged_tokens == given.get("num_merged_tokens", 9)
                with torch.no_grad():
                    logits = laid_over(**{**batch, "num_merged_tokens": 9}).logits
                torch.testing.assert_close(logits, by_peft, atol=1e-5, rtol=1e-5)
            model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path).eval()
            config = model.config.merger_config
            assert config.trained_num_tokens == [4, 9] and config.attention_mass == 1.0
            with torch.no_grad():
                torch.testing.assert_close(model(**batch).logits, by_peft, atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", str(tmp_path), str(tmp_path / "whole")])
        runpy.run_path(str(EXAMPLES / "merge_lora.py"), run_name="__main__")
        whole = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
        assert LlavaMergeProcessor.from_pretrained(tmp_path / "whole").num_merged_tokens == 9
        with torch.no_grad():
            torch.testing.assert_close(whole(**batch).logits, by_peft, atol=1e-4, rtol=1e-4)

    def test_a_whole_model_is_saved_where_all_trains(self, llava_folder, tmp_path):
        train(settings_of(settings_for(llava_folder, tmp_path, METHODS[0], "all", budgets={"train": [9]})))
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path)
        assert model.config.merger_config.num_merged_tokens == 9
        assert LlavaMergeProcessor.from_pretrained(tmp_path).num_merged_tokens == 9
        stock = tiny_stock().state_dict()
        moved = [n for n, t in model.state_dict().items() if "q_proj" in n and "language" in n]
        assert moved and not any(torch.equal(model.state_dict()[name], stock[name]) for name in moved)

    def test_a_trained_merger_goes_on(self, llava_folder, tmp_path):
        train(settings_of(settings_for(llava_folder, tmp_path / "a", METHODS[0], budgets={"train": [9]})))
        plain = settings_for(llava_folder, tmp_path / "b", {"merger_type": "fixed_pooling"}, budgets={"train": [4]})
        plain["backbone_settings"]["mllm_settings"]["merger"] = str(tmp_path / "a")
        with pytest.raises(ValueError, match="brings its own configuration; leave out method_settings"):
            train(settings_of(plain))
        plain["method_settings"] = {}
        train(settings_of(plain))
        assert TokenMerger.from_pretrained(tmp_path / "b").config.trained_num_tokens == [4]

    @pytest.mark.parametrize("parts", ["merger_projector", "merger_lora"])
    def test_the_teacher_of_a_merger_that_goes_on_is_the_unmerged_model(self, parts, llava_folder, tmp_path):
        train(settings_of(settings_for(llava_folder, tmp_path / "a", METHODS[0], budgets={"train": [9]})))
        plain = settings_for(llava_folder, tmp_path / "b", METHODS[0], parts, budgets={"train": [9]})
        plain["method_settings"] = {}
        plain["backbone_settings"]["mllm_settings"]["merger"] = str(tmp_path / "a")
        settings = settings_of(plain)
        args = training_arguments(settings)
        loaded = load_model(settings, args, None)
        trainer = make_trainer(settings, args, None, loaded, *read_datasets(settings, args))
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        stock = LlavaMergeForConditionalGeneration.from_pretrained(
            loaded[0].name_or_path, merger_config={"merger_type": "none"}
        )
        with trainer.teacher.answering(trainer.model), torch.no_grad():
            found = trainer.model(**arguments).logits
        with torch.no_grad():
            assert torch.allclose(found, stock(**arguments).logits, atol=1e-5)
            weights = loaded[0].model.multi_modal_projector.state_dict()
        assert not torch.equal(next(iter(weights.values())), stock.model.multi_modal_projector.linear_1.weight)

    def test_a_merger_that_goes_on_alone_keeps_its_projector(self, llava_folder, tmp_path):
        train(settings_of(settings_for(llava_folder, tmp_path / "a", METHODS[0], budgets={"train": [9]})))
        plain = settings_for(llava_folder, tmp_path / "b", METHODS[0], "merger", budgets={"train": [9]})
        plain["method_settings"] = {}
        plain["backbone_settings"]["mllm_settings"]["merger"] = str(tmp_path / "a")
        train(settings_of(plain))
        before, behind = (load_file(tmp_path / name / "multi_modal_projector.safetensors") for name in "ab")
        assert all(torch.equal(before[name], behind[name]) for name in before)

    def test_an_agnostic_merger_learns_to_read_the_question(self, llava_folder, tmp_path):
        train(settings_of(settings_for(llava_folder, tmp_path / "a", METHODS[0], budgets={"train": [9]})))
        plain = settings_for(llava_folder, tmp_path / "b", METHODS[0], budgets={"train": [9]})
        plain["method_settings"] = {"question_aware": True}
        plain["backbone_settings"]["mllm_settings"]["merger"] = str(tmp_path / "a")
        settings = settings_of(plain)
        model, _, _ = load_model(settings, training_arguments(settings), None)
        agnostic, ours = TokenMerger.from_pretrained(tmp_path / "a"), model.model.merger
        features, question = torch.randn(2, NUM_PATCHES, 32), torch.randn(2, 5, 64)
        with torch.no_grad():
            expected, found = agnostic(features), ours(features, question)
        assert torch.equal(found.merged_features, expected.merged_features) and ours.config.question_aware
        train(settings)
        trained = TokenMerger.from_pretrained(tmp_path / "b")
        assert trained.config.question_aware and trained.method.query_modulator is not None

    def test_streamed_data(self, llava_folder, tmp_path):
        loaded = json.loads((llava_folder / "train.json").read_text())
        (llava_folder / "train.jsonl").write_text("\n".join(map(json.dumps, loaded)))
        data = {"train": str(llava_folder / "train.jsonl"), "streaming": True}
        plain = settings_for(llava_folder, tmp_path, METHODS[0], data=data, budgets={"train": [9]})
        assert train(settings_of(plain))["train_loss"] > 0
        plain["training"]["max_steps"] = -1
        with pytest.raises(ValueError, match=r"data.streaming=true: .*set training.max_steps"):
            train(settings_of(plain))

    def test_all_processes_wait_until_everything_is_written(self, llava_folder, tmp_path):
        written = []
        with mock.patch.object(
            Accelerator, "wait_for_everyone", lambda _: written.append((tmp_path / "metrics.json").exists())
        ):
            train(settings_of(settings_for(llava_folder, tmp_path, METHODS[0], budgets={"train": [9]})))
        assert written[-1]

    def test_long_samples_are_skipped(self, llava_folder, tmp_path, caplog):
        plain = settings_for(llava_folder, tmp_path, METHODS[0], data={"max_length": 60}, budgets={"train": [9]})
        with caplog.at_level("WARNING", logger="transformers.llava_merge.training.data"):
            train(settings_of(plain))
        assert "it is longer than data.max_length" in caplog.text

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"data": {"train": None}}, "data.train is missing"),
            ({"data": {"train": "gone.json"}}, "'gone.json' cannot be read"),
            ({"mllm": {"vision_dim": 1024}}, "vision_dim=1024, but .* has vision_dim=32"),
            ({"mllm": {"hidden_dim": 4096}}, "hidden_dim=4096, but .* has hidden_dim=64"),
            ({"method_settings": {"merger_type": "nonsense"}}, "'nonsense' does not exist"),
            ({"budgets": {"train": [99]}}, "99"),
            ({"training": {"lr_scheduler_type": "nonsense"}}, "training: .*nonsense"),
        ],
    )
    def test_nothing_is_trained_where_a_setting_cannot_be_used(self, change, message, llava_folder, tmp_path):
        plain = settings_for(llava_folder, tmp_path / "out", METHODS[0])
        plain["backbone_settings"]["mllm_settings"] |= change.pop("mllm", {})
        for section, values in change.items():
            plain[section] = {**plain.get(section, {}), **values}
        with pytest.raises(ValueError, match=message):
            train(settings_of(plain))
        assert not (tmp_path / "out" / "model.safetensors").exists()


def command(*arguments, ranks: int = 0, **kwargs) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *launcher, "-m", "llava_merge", "train", *map(str, arguments)]


def write_yaml(plain: dict, path):
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(plain), path)
    return path


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="the same on every release, and slow")
class TestProcesses:
    def test_two_ranks_are_one_with_the_same_global_batch(self, llava_folder, tmp_path):
        losses = {}
        for ranks in (1, 2):
            output = tmp_path / f"ranks-{ranks}"
            training = {"max_steps": 4, "per_device_train_batch_size": 4 // ranks}
            training |= {"save_strategy": "steps", "save_steps": 4, "optim": "sgd"}
            plain = settings_for(llava_folder, output, METHODS[0], budgets={"train": [4, 9]}, training=training)
            del plain["training"]["use_cpu"]  # known from the machine
            file = write_yaml(plain, tmp_path / f"{ranks}.yaml")
            arguments = command(file, ranks=ranks if ranks > 1 else 0)
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
            losses[ranks] = [(e["loss"], e["distillation"], e["grad_norm"]) for e in history if "distillation" in e]
        assert len(losses[1]) == 4
        for alone, together in zip(losses[1], losses[2], strict=True):
            assert alone == pytest.approx(together, rel=1e-4, abs=1e-4)

    def test_a_run_that_was_killed_goes_on(self, llava_folder, tmp_path):
        training = {"max_steps": 400, "save_strategy": "steps", "save_steps": 5}
        plain = settings_for(llava_folder, tmp_path / "out", METHODS[0], budgets={"train": [9]}, training=training)
        file = write_yaml(plain, tmp_path / "run.yaml")
        process = subprocess.Popen(command(file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while last_whole_checkpoint(str(tmp_path / "out")) is None:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = last_whole_checkpoint(str(tmp_path / "out"))
        steps = int(found.rpartition("-")[2]) + 2
        done = subprocess.run(
            command(file, "--resume", "--set", f"training.max_steps={steps}"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        folder, model = str(tmp_path / "out"), plain["backbone_settings"]["mllm_settings"]["model"]
        last = rf"Saved to {folder} after \d+ s: from_pretrained\({model!r}, merger={folder!r}\)"
        assert re.search(last, done.stderr), done.stderr
        report = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert report["metrics"]["train_loss"] > 0 and report["settings"]["training"]["max_steps"] == steps
        state = json.loads((tmp_path / "out" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, steps + 1))


@pytest.mark.newest
class TestWhatEndsARun:
    """In one line, with exit code 2, and nothing written that looks trained."""

    @pytest.mark.parametrize("why", ["stream", "batch"])
    def test_no_step(self, why, llava_folder, tmp_path):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "what ?", "answer": "red", "image": "gone.png"}))
        given = {
            "stream": {"data": {"train": str(tmp_path / "rows.jsonl"), "streaming": True}},
            "batch": {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 1000, "max_steps": -1}},
        }[why]
        plain = settings_for(llava_folder, tmp_path / "out", METHODS[0], budgets={"train": [9]}, **given)
        done = CliRunner().invoke(app, ["train", str(write_yaml(plain, tmp_path / "run.yaml"))])
        said = {"stream": "No step was made: ", "batch": "Error: data.train has 8 samples, less than a batch of 1000"}
        assert done.exit_code == 2 and said[why] in done.stderr, done.output
        assert not (tmp_path / "out" / "model.safetensors").exists()

    @pytest.mark.parametrize("rule", ["on_broken_image", "on_broken_row"])
    def test_what_a_loading_process_says(self, rule, llava_folder, tmp_path):
        row = {"question": "what ?", "answer": "red", "image": "gone.png"} if rule == "on_broken_image" else {"a": 1}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        data = {"train": str(tmp_path / "rows.jsonl"), "streaming": True, rule: "error"}
        training = {"dataloader_num_workers": 1}
        plain = settings_for(llava_folder, tmp_path / "out", METHODS[0], data=data, training=training)
        done = CliRunner().invoke(app, ["train", str(write_yaml(plain, tmp_path / "run.yaml"))])
        assert done.exit_code == 2 and f"Error: {tmp_path / 'rows.jsonl'}, sample 1: " in done.stderr, done.output

    def test_steps_that_are_not_finite(self, llava_folder, tmp_path):
        training = {"max_steps": 30, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        plain = settings_for(llava_folder, tmp_path / "out", METHODS[0], budgets={"train": [9]}, training=training)
        plain["trained"]["merger_learning_rate"] = 1e30
        done = CliRunner().invoke(app, ["train", str(write_yaml(plain, tmp_path / "run.yaml"))])
        assert done.exit_code == 2 and "Error: 10 steps in a row" in done.stderr, done.output

    @pytest.mark.parametrize("parts", ["merger", "merger_lora", "all"])
    def test_a_full_disk(self, parts, llava_folder, tmp_path):
        """Files that may not grow stand for it: safetensors and torch say it in errors of their own."""
        training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        plain = settings_for(
            llava_folder, tmp_path / "out", METHODS[0], parts, budgets={"train": [9]}, training=training
        )
        file = write_yaml(plain, tmp_path / "run.yaml")

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        done = subprocess.run(command(file), capture_output=True, text=True, timeout=300, preexec_fn=limit)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        said = done.stderr.partition("Error: ")[2].partition("\n")[0]
        assert "File too large" in said or "cannot be written, maybe since the disk is full" in said
        assert last_whole_checkpoint(str(tmp_path / "out")) is None


class TestSettingsOfTraining:
    @pytest.mark.parametrize(
        ("name", "given", "read"),
        [
            ("learning_rate", "1e-3", 1e-3),
            ("learning_rate", 1, 1),
            ("max_steps", 30.0, 30),
            ("max_steps", "30", 30),
            ("save_steps", 5, 5),
            ("bf16", "false", False),
            ("data_seed", None, None),
            ("optim", "sgd", "sgd"),
            ("parallelism_config", None, None),
            ("report_to", ["tensorboard"], ["tensorboard"]),
        ],
    )
    def test_text_that_is_a_number_is_one(self, name, given, read):
        found = typed(name, given)
        assert found == read and type(found) is type(read)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_steps": "abc"}, "training.max_steps='abc': has to be a whole number"),
            ({"max_steps": 1.5}, "training.max_steps=1.5: has to be a whole number"),
            ({"learning_rate": [1]}, r"training.learning_rate=\[1\]: has to be a number"),
            ({"weight_decay": True}, "training.weight_decay=True: has to be a number"),
            ({"bf16": "maybe"}, "training.bf16='maybe': has to be true or false"),
            ({"max_grad_norm": None}, "training.max_grad_norm=None: has to be a number"),
            ({"torch_compile_mode": "fast"}, "training: Unrecognized mode=fast"),
            ({"parallelism_config": "a"}, "training.parallelism_config='a': it is an object of Python"),
            ({"log_level": "loud"}, "training: 'loud'"),
            ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps=0: has to be 1 or more"),
            ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size=0: has to be 1 or more"),
            ({"optim_args": [1]}, r"training.optim_args=\[1\]: has to be text"),
            ({"report_to": ["sleipnir"]}, "training.report_to: 'sleipnir' is not installed"),
            ({"lr_scheduler_type": "cosin"}, "training: '?cosin'? is not a valid SchedulerType"),
            ({"lr_scheduler_kwargs": {"a": 1}}, "training.lr_scheduler_kwargs=.*: .*unexpected keyword argument 'a'"),
            ({"lr_scheduler_kwargs": [1]}, r"training.lr_scheduler_kwargs=\[1\]: has to be "),
        ],
    )
    def test_what_is_none_is_named(self, given, message, tmp_path):
        training = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
        with pytest.raises(ValueError, match=message):
            training_arguments(Settings(training={**training, **given}))

    @pytest.mark.newest
    def test_processes_do_not_train_beside_each_other(self, llava_folder, tmp_path):
        plain = settings_for(llava_folder, tmp_path / "out", METHODS[0], training={"use_cpu": False})
        arguments = command(write_yaml(plain, tmp_path / "run.yaml"), ranks=2)
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert done.returncode and "2 processes were started (WORLD_SIZE), but training runs on 1" in done.stderr


def test_validation_asks_the_first_turn_with_its_pictures_alone():
    """Of a row whose later turns have pictures of their own."""
    turns = [turn for _ in range(2) for turn in rows(1)[0]["conversations"][:2]]
    row = {"images": rows(1)[0]["images"] * 2, "conversations": turns}
    processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9)
    scorer = AnswerScorer(ChatDataset([row, *rows(2)], "rows"), processor)
    right, asked = scorer.count(tiny_model(agnostic(9)), 9)
    assert asked == 3 and 0 <= right <= 3


class TestReconstruction:
    def test_it_does_not_depend_on_how_a_step_is_cut(self, tmp_path):
        """Mean over the step's images, whatever else is in their batches."""
        weights = []
        for size in (1, 2, 8):
            trainer = trainer_of(
                tmp_path / str(size),
                losses={"cross_entropy": 0.0, "distillation": 0.0, "reconstruction": 1.0},
                parts="merger",
                train_merger=True,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                max_steps=2,
                optim="sgd",
                learning_rate=1e-2,
            )
            before = torch.cat([weight.detach().flatten().clone() for weight in trainer.merger.parameters()])
            trainer.train()
            weights.append(torch.cat([weight.detach().flatten() for weight in trainer.merger.parameters()]))
            assert (weights[-1] - before).norm() > 1e-5
            assert logged(trainer, "loss")[:2] == pytest.approx(logged(trainer, "reconstruction")[:2], rel=1e-3)
        for other in weights[1:]:
            assert (other - weights[0]).norm() < 1e-3 * (weights[0] - before).norm()


def test_leftovers_of_a_save_are_removed_when_training_goes_on(tmp_path):
    name = "0123456789abcdef" * 2
    left = tmp_path / "checkpoint-2" / f".saving-{name}"
    kept = tmp_path / f".saving-{name}"
    for folder in (left / "a", kept / "replaced", tmp_path / ".cache-of-somebody", tmp_path / f".checkpoint-4-{name}"):
        folder.mkdir(parents=True)
    (tmp_path / f".{name}-metrics.json").write_text("")
    (tmp_path / f".{name[:-1]}-mine.json").write_text("")
    remove_broken_off(str(tmp_path))
    assert not left.exists() and left.parent.is_dir()
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"checkpoint-2", kept.name, ".cache-of-somebody", f".{name[:-1]}-mine.json"}


def test_the_command_ends_its_process_group(tmp_path):
    """torchrun stops all processes where one aborts, and a group that is left open can make it do so when it ends."""

    def in_a_group(settings, resume, config):
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)

    file = tmp_path / "run.yaml"
    file.write_text("{}")
    with mock.patch("llava_merge.training.run.train", in_a_group):
        done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 0, done.output
    assert not torch.distributed.is_initialized()


def test_bad_input_is_one_line(tmp_path):
    file = tmp_path / "bad.yaml"
    for content, message in (
        ("data:\n  trian: x\n", "bad.yaml, data: there is no key 'trian'; did you mean 'train'?"),
        ("data: [\n", "bad.yaml is no YAML of settings: "),
        ("- data\n", "bad.yaml holds list; settings are sections with keys."),
        ("losses:\n  temperature: 0\n", "bad.yaml: losses.temperature=0.0: has to be above 0."),
        ("data:\n  num_validation: 0\n", "bad.yaml: data.num_validation=0: has to be 1 or more."),
        ("data:\n  max_length: -1\n", "bad.yaml: data.max_length=-1: has to be 1 or more."),
        ("training:\n  label_smoothing_factor: 0.1\n", "training.label_smoothing_factor: it would not be read"),
        ("{}", "data.train is missing: the dataset to train on."),
        (None, "bad.yaml cannot be read: "),
    ):
        file.unlink(missing_ok=True) if content is None else file.write_text(content)
        done = CliRunner().invoke(app, ["train", str(file), "--set", f"training.output_dir={tmp_path}"])
        assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_modules_keep_their_mode_where_a_dropout_trains(tmp_path):
    """LoRA's dropout drops; that of frozen layers does not."""
    trainer = trainer_of(tmp_path, parts="merger_lora")
    trainer.model.model.model.vision_tower.dropout = nn.Dropout()
    set_modes(trainer.model.train())
    drops = {name: m.training for name, m in trainer.model.named_modules() if isinstance(m, (nn.Dropout, nn.Identity))}
    assert all(training for name, training in drops.items() if "lora_dropout" in name) and len(drops) > 5
    assert not trainer.model.model.model.vision_tower.dropout.training


@pytest.mark.parametrize("file", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_ready_configs_can_be_used(file):
    settings = load_settings(file, ["training.bf16=false", "training.use_cpu=true"])
    training_arguments(settings)
    assert settings.backbone_settings.mllm_settings.hidden_dim in (256, 4096, 5120)
    BudgetSchedule(settings.budgets.train or [1])
    check_merger_fields(settings.method_settings)


def test_the_document_s_own_file_needs_no_more_than_data():
    settings = load_settings(EXAMPLES / "configs" / "vision_token_pruning.yaml", ["data.train=data.json"])
    assert settings.method_settings == {"merger_type": "fixed_pooling", "merge_ratio": 0.5}
    assert settings.backbone_settings.mllm_settings.vision_dim == 1024 and settings.data.train == "data.json"
    assert settings.trained.parts == "merger_projector" and settings.budgets.train is None


def test_the_example_trains_by_hand(llava_folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", llava_folder / "llava", "--data", llava_folder / "train.json", "--output", tmp_path]
    arguments += ["--budgets", 9, 4, "--steps", 2, "--batch-size", 2]
    monkeypatch.setattr(sys, "argv", ["train_merger.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "train_merger.py"), run_name="__main__")
    assert "Trains " in capsys.readouterr().out
    assert TokenMerger.from_pretrained(tmp_path).config.trained_num_tokens == [4, 9]
