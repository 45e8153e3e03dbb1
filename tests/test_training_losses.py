# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Losses and budgets of a training step, against slow references."""

from collections import Counter

import pytest
import torch

from llava_merge.training.budgets import (
    IGNORED,
    UNSEEN,
    BudgetSchedule,
    dropped_questions,
    with_budget,
    with_unseen_image,
)
from llava_merge.training.losses import answer_cross_entropy, distillation, reconstruction


IMAGE, PAD, N = 9, 0, 6


class TestLosses:
    def test_cross_entropy_is_the_sum_over_answer_tokens(self):
        logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
        expected = sum(-row.double().log_softmax(0)[target] for row, target in zip(logits, targets, strict=True))
        torch.testing.assert_close(answer_cross_entropy(logits, targets).double(), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_distillation_is_the_divergence_from_the_teacher(self, temperature):
        ours, teacher = torch.randn(2, 5, 7).double()
        p, q = ((logits / temperature).softmax(-1) for logits in (teacher, ours))
        expected = temperature**2 * (p * (p / q).log()).sum()
        found = distillation(ours, teacher, temperature)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
        assert distillation(ours, ours, temperature) == 0

    def test_gradients_do_not_fade_with_the_temperature(self):
        teacher = torch.randn(5, 7)
        sizes = []
        for temperature in (4.0, 8.0):
            ours = torch.zeros(5, 7, requires_grad=True)
            distillation(ours, teacher, temperature).backward()
            sizes.append(ours.grad.norm())
        assert 0.8 < sizes[0] / sizes[1] < 1.25

    def test_half_precision_is_summed_in_float32(self):
        ours, teacher = (torch.randn(50, 1000) * 5 for _ in range(2))
        exact = distillation(ours.bfloat16().float(), teacher.bfloat16().float())
        torch.testing.assert_close(distillation(ours.bfloat16(), teacher.bfloat16()), exact)

    def test_reconstruction_is_the_variance_that_is_lost(self):
        features = torch.randn(2, 6, 4)
        windows = torch.zeros(2, 6)
        windows[0, :3] = windows[1, 3:] = 1 / 3
        source = windows.expand(2, 2, 6)
        expected = 0.0
        for image in features:
            means = torch.stack((image[:3].mean(0), image[3:].mean(0)))
            rebuilt = torch.cat((means[:1].expand(3, -1), means[1:].expand(3, -1)))
            expected += ((image - rebuilt) ** 2).sum() / ((image - image.mean(0)) ** 2).sum()
        torch.testing.assert_close(reconstruction(features, source @ features, source), expected)
        identity = torch.eye(6).expand(2, 6, 6)
        assert reconstruction(features, features, identity) == 0


def slow_with_budget(ids: list[int], labels: list[int], num_tokens: int) -> tuple[list[int], list[int]]:
    kept, seen = [], 0
    for id, label in zip(ids, labels, strict=True):
        if id == IMAGE:
            seen += 1
            if (seen - 1) % N >= num_tokens:
                continue
        kept.append((id, label))
    return tuple(map(list, zip(*kept, strict=True)))


class TestWithBudget:
    @pytest.mark.parametrize("num_tokens", [1, 4, N])
    def test_rows_are_cut_one_by_one(self, num_tokens):
        rows = [[1, *[IMAGE] * N, 5, 6, 2], [1, 3, *[IMAGE] * N, 5, *[IMAGE] * N, 7, 2], [1, 4, 5, 2]]
        labels = [[IGNORED] * (len(row) - 2) + row[-2:] for row in rows]
        longest = max(map(len, rows))
        batch = {
            "input_ids": torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "labels": torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
        }
        cut = with_budget(batch, IMAGE, N, num_tokens)
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            ids, kept = slow_with_budget(row, label, num_tokens)
            assert cut["input_ids"][index, : len(ids)].tolist() == ids
            assert cut["labels"][index, : len(ids)].tolist() == kept
            assert cut["attention_mask"][index].tolist() == [1] * len(ids) + [0] * (
                cut["input_ids"].shape[1] - len(ids)
            )
            assert (cut["input_ids"][index, len(ids) :] == PAD).all()
            assert (cut["labels"][index, len(ids) :] == IGNORED).all()
        assert cut["input_ids"].shape[1] == max(len(slow_with_budget(r, r, num_tokens)[0]) for r in rows)


class TestSchedule:
    def test_a_list_is_drawn_evenly_and_again_the_same(self):
        schedule = BudgetSchedule([16, 64, 4], seed=3)
        drawn = [schedule.at(step, 600) for step in range(600)]
        counts = Counter(drawn)
        assert set(counts) == {4, 16, 64} and min(counts.values()) > 150 and schedule.listed == [4, 16, 64]
        assert drawn == [BudgetSchedule([64, 4, 16], seed=3).at(step, 600) for step in range(600)]
        assert drawn != [BudgetSchedule([64, 4, 16], seed=4).at(step, 600) for step in range(600)]

    def test_a_range_has_every_budget_and_octaves_alike(self):
        schedule = BudgetSchedule({"min": 4, "max": 144})
        drawn = [schedule.at(step, 4000) for step in range(4000)]
        assert min(drawn) == 4 and max(drawn) == 144 and len(set(drawn)) > 100 and schedule.listed == [4, 144]
        octaves = Counter(budget.bit_length() for budget in drawn)
        assert max(octaves[bits] for bits in (4, 5, 6, 7)) < 1.3 * min(octaves[bits] for bits in (4, 5, 6, 7))
        assert schedule.name(4) == "4_to_7" and schedule.name(100) == "64_to_127" and schedule.name(144) == "128_to_144"

    @pytest.mark.parametrize("budgets", [[4, 16, 64, 144], {"min": 4, "max": 144}])
    def test_a_curriculum_goes_from_mild_to_strong(self, budgets):
        schedule = BudgetSchedule(budgets, curriculum=0.5)
        lowest = [min(schedule.at(step, 1000) for step in range(at, at + 100)) for at in (0, 200, 400, 500)]
        assert lowest == sorted(lowest, reverse=True) and lowest[0] > 60 and lowest[-1] <= 5
        assert any(schedule.at(step, 1000) > 100 for step in range(800, 1000))

    @pytest.mark.parametrize(
        "budgets, message",
        [
            ([], "budgets.train=.*list of whole numbers"),
            ([0, 4], "budgets.train=.*at least 1"),
            ([4.5], "budgets.train=.*whole numbers"),
            ("16", "budgets.train='16'"),
            ({"min": 4}, "a range has the keys min and max"),
            ({"min": 16, "max": 4}, "min is more than max"),
        ],
    )
    def test_what_is_none_is_refused(self, budgets, message):
        with pytest.raises(ValueError, match=message):
            BudgetSchedule(budgets)


def test_dropped_questions_depend_on_the_sample_and_not_on_its_batch():
    ids = torch.arange(400)
    dropped = dropped_questions(ids, 0.25, "0-7")
    assert 70 < dropped.sum() < 130
    assert torch.equal(dropped_questions(ids[[5, 17]], 0.25, "0-7"), dropped[[5, 17]])
    assert not torch.equal(dropped_questions(ids, 0.25, "0-8"), dropped)
    assert not dropped_questions(ids, 0.0, "0-7").any() and dropped_questions(ids, 1.0, "0-7").all()


@pytest.mark.parametrize("length", [4, 20])
def test_an_unseen_image_is_a_row_of_which_nothing_is_learnt(length):
    ids = torch.randint(1, 8, (2, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch |= {"sample_ids": torch.arange(2), "num_skipped": torch.tensor([0, 3])}
    wider = with_unseen_image(batch, IMAGE, N, (14, 28))
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(wider[name][:2, :length], batch[name]) and wider[name].shape == (3, max(length, N))
    assert (wider["input_ids"] == IMAGE).sum() == N == wider["attention_mask"][2].sum()
    assert (wider["labels"][2] == IGNORED).all() and wider["pixel_values"].shape == (1, 3, 14, 28)
    assert wider["sample_ids"].tolist() == [0, 1, UNSEEN] and wider["num_skipped"].sum() == 3
    assert dropped_questions(wider["sample_ids"], 0.0, "0").tolist() == [False, False, True]
