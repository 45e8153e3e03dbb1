# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Evaluations: what is asked, that answers are those of `generate`, what breaks and goes on, and what is reported."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import (
    ANSWER_ID,
    BOS_ID,
    NUM_PATCHES,
    USER_ID,
    agnostic,
    aware,
    make_processor,
    pixels,
    scale_up,
    tiny_model,
    tiny_stock,
)
from PIL import Image
from typer.testing import CliRunner

from llava_merge import LlavaMergeProcessor, TokenMerger
from llava_merge.cli import app
from llava_merge.demo import MODEL_DIR
from llava_merge.demo.scenes import HARD_QUESTION_TYPES, draw_scene, scene_of
from llava_merge.evaluation import run as run_module
from llava_merge.evaluation.candidates import Candidate, make_candidates, parse_candidate
from llava_merge.evaluation.data import PictureQuestion, demo_questions, fingerprint, read_questions
from llava_merge.evaluation.fingerprints import describe_merger
from llava_merge.evaluation.grid import Grid, make_cells, mean_divergence
from llava_merge.evaluation.protocol import EvaluationSettings, check_same_protocol
from llava_merge.evaluation.report import (
    choose_budgets,
    describe_choice,
    make_flips,
    make_results,
    make_table,
    make_warnings,
)
from llava_merge.evaluation.run import default_budgets, evaluate
from llava_merge.model.configuration_llava_merge import QUESTION_MARKS


pytestmark = pytest.mark.newest
PLACES = {"position_ids": "source", "attention_mass": 1.0}
MERGERS = ["fixed_pooling:question_aware=true,num_heads=4", "cdpruner", "visionzip", "tome:attention_mass=0", "own"]


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 255, (90, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def question(text: str, *images, answers=(), kind: str = "all") -> PictureQuestion:
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    return PictureQuestion(text, [{"role": "user", "content": content}], list(images), tuple(answers), kind)


QUESTIONS = [
    question("what color is the star ?", picture(0)),
    question("how many circles are there ?", picture(1), picture(2)),
    question("what is red ?", picture(3)),
]


@pytest.fixture(scope="module")
def model():
    model = tiny_model(agnostic(), train_merger=True)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture(scope="module")
def processor():
    return make_processor(processor_class=LlavaMergeProcessor)


@pytest.fixture(scope="module")
def grid(model, processor):
    candidates = make_candidates(model, processor, MERGERS, PLACES)
    return Grid(model, processor, make_cells(candidates, [9, 4]), max_new_tokens=6)


class TestGrid:
    @pytest.mark.core
    def test_answers_are_those_of_processor_and_generate(self, grid, model, processor):
        report = grid.answer(QUESTIONS)
        assert list(report["cells"]) == [cell.key for cell in grid.cells]
        written = set()
        for cell in grid.cells:
            texts = [processor.apply_chat_template(each.messages, add_generation_prompt=True) for each in QUESTIONS]
            pictures = [each for asked in QUESTIONS for each in asked.images]
            inputs = processor(
                images=pictures,
                text=texts,
                num_merged_tokens=cell.budget,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            with cell.candidate.answering(model):
                output = model.generate(
                    **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0
                )
            ids = output.sequences[:, inputs["input_ids"].shape[1] :]
            expected = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
            row = report["cells"][cell.key]
            assert row["answers"] == expected, cell.key
            assert row["entered"] == inputs["attention_mask"].sum(dim=1).tolist()
            padding = (inputs["attention_mask"] == 0).sum(dim=1)
            longest = max(cached + int(pad) for cached, pad in zip(row["cached"], padding, strict=True))
            assert longest <= output.past_key_values.get_seq_length()
            if ids.shape[1] == 6 and not (ids == 2).any():
                assert longest == output.past_key_values.get_seq_length()
            written.add(tuple(expected))
        assert len(written) > 4  # the mergers do not all say the same

    def test_the_tower_runs_once_an_image(self, grid, model):
        seen = []
        handle = model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        grid.answer(QUESTIONS)
        handle.remove()
        assert seen == [4]

    def test_the_model_is_as_before(self, grid, model):
        before = model.model.merger, model.model.multi_modal_projector, model.config.merger_config
        grid.answer(QUESTIONS[:1])
        assert before == (model.model.merger, model.model.multi_modal_projector, model.config.merger_config)

    def test_the_divergence_is_that_of_the_unmerged_answer(self, grid, model, processor):
        """Against one prompt without padding, token by token."""
        cells = grid.answer(QUESTIONS)["cells"]
        assert max(cells["none@all"]["kl"]) < 1e-6
        one = QUESTIONS[2]
        logits, answer = [], None
        for name, budget in (("none", "all"), ("cdpruner", 4)):
            cell = next(cell for cell in grid.cells if cell.key == f"{name}@{budget}")
            text = processor.apply_chat_template(one.messages, add_generation_prompt=True)
            inputs = processor(images=one.images, text=text, num_merged_tokens=budget, return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            if answer is None:
                with cell.candidate.answering(model):
                    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, length:]
            ids = torch.cat((inputs["input_ids"], answer), dim=1)
            given = {"pixel_values": inputs["pixel_values"], "num_merged_tokens": budget}
            with cell.candidate.answering(model), torch.no_grad():
                output = model(input_ids=ids, answer_mask=torch.arange(ids.shape[1])[None] >= length, **given)
            logits.append(output.logits[0, length - 1 : -1].log_softmax(-1))
        wanted, found = logits
        each = (wanted.exp() * (wanted - found)).sum(-1)
        assert len(each) > 2 and each.mean() > 0.01
        assert cells["cdpruner@4"]["kl"][2] == pytest.approx(each.mean().item(), rel=1e-3)

    def test_the_mean_leaves_out_what_follows_the_answer(self):
        logits = torch.randn(2, 2, 3, 5).log_softmax(-1)
        mask = torch.tensor([[True, True, False], [True, False, False]])
        found = mean_divergence(logits[0], logits[1], mask)
        one = (logits[1, 1, 0].exp() * (logits[1, 1, 0] - logits[0, 1, 0])).sum()
        assert found.shape == (2,) and found[1] == pytest.approx(one.item(), rel=1e-5)

    def test_text_behind_the_end_of_an_answer_does_not_count(self, grid):
        ids = torch.tensor([[9, 2, 0, 0], [9, 9, 9, 9], [2, 2, 9, 9]])
        assert grid._is_written(ids).sum(dim=1).tolist() == [2, 4, 1]

    def test_questions_without_pictures(self, grid):
        cells = grid.answer([question("what is red ?")])["cells"]
        assert len({tuple(row["answers"]) for row in cells.values()}) == 1


class TestCandidates:
    def test_unmerged_random_and_average_pooling_are_always_there(self, model, processor):
        names = [each.name for each in make_candidates(model, processor, ["tome", "random"], PLACES)]
        assert names == ["none", "random", "average_pooling", "tome"]

    def test_fields_and_places(self, model, processor):
        layers = "fixed_pooling:feature_layers=[1, 2],num_heads=4"
        mergers = ["random:seed=3", "tome:position_ids=packed,attention_mass=0.5", "own:attention_mass=0.75", layers]
        places = {**PLACES, "attention_mass": 0.25}
        found = {each.name: each.config for each in make_candidates(model, processor, mergers, places, seed=2)}
        assert (found["random"].seed, found["random:seed=3"].seed) == (2, 3)
        tome = found[mergers[1]]
        assert (tome.position_ids, tome.attention_mass) == ("packed", 0.5)
        assert (found[layers].feature_layers, found[layers].num_heads) == ([1, 2], 4)
        assert found[mergers[2]].attention_mass == 0.75
        assert found["average_pooling"].attention_mass == 0.25 and model.config.merger_config.attention_mass == 1.0

    def test_a_checkpoint_with_its_projector(self, processor, tmp_path):
        model = tiny_model(agnostic(attention_mass=0.0), train_merger=True)
        with torch.no_grad():
            model.model.multi_modal_projector.linear_1.weight.mul_(2)
        model.save_merger(tmp_path / "trained", projector=True)
        fresh = tiny_model(agnostic())
        before = fresh.model.multi_modal_projector
        *_, trained = make_candidates(fresh, processor, [str(tmp_path / "trained")], PLACES)
        assert torch.equal(trained.projector.linear_1.weight, 2 * before.linear_1.weight)
        assert fresh.model.multi_modal_projector is before and trained.config.attention_mass == 0.0

    def test_questions_are_found(self, model, processor):
        *_, own = make_candidates(model, processor, ["fixed_pooling:question_aware=true,num_heads=4"], PLACES)
        marks = {name: getattr(own.config, name) for name in QUESTION_MARKS}
        assert marks["question_end_token_ids"] == [[ANSWER_ID]] and [USER_ID] in marks["question_start_token_ids"]

    def test_values_are_read_as_json(self):
        text = "visionzip:faithful=true,important_ratio=0.5,position_ids=packed"
        fields = {"faithful": True, "important_ratio": 0.5, "position_ids": "packed"}
        assert parse_candidate(text) == ("visionzip", fields)

    @pytest.mark.parametrize(
        ("merger", "message"),
        [
            ("topme", "neither a method"),
            ("tome:seed", "'seed' has no value"),
            ("tome:faithful=true", "faithful"),
            ("own:seed=1", "of a saved merger position_ids, attention_mass may be set, not 'seed'"),
            ("own:attention_mass=3", "attention_mass"),
        ],
    )
    def test_others_are_refused_and_nothing_changes(self, merger, message, model, processor):
        before = model.model.merger, model.config.merger_config.to_dict()
        with pytest.raises(ValueError, match=message):
            make_candidates(model, processor, [merger], PLACES)
        assert before == (model.model.merger, model.config.merger_config.to_dict())


class TestQuestions:
    def write(self, folder: Path, rows: list[dict], name: str = "rows.json") -> str:
        picture(0).save(folder / "a.png")
        file = folder / name
        text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
        file.write_text(text)
        return str(file)

    @pytest.mark.parametrize(
        ("row", "answers", "kind"),
        [
            ({"question": "what?", "image": "a.png", "answer": 4, "type": "count"}, ("4",), "count"),
            ({"text": "what?", "image": "a.png", "label": "no", "category": "adversarial"}, ("no",), "adversarial"),
            ({"question": "what?", "image": "a.png", "answers": [{"answer": "a"}, {"answer": "b"}]}, ("a", "b"), "all"),
            ({"question": "<image>\nwhat?", "images": ["a.png"], "answers": ["a"]}, ("a",), "all"),
        ],
    )
    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
    def test_rows(self, row, answers, kind, name, tmp_path):
        found = read_questions(self.write(tmp_path, [row], name))
        content = [{"type": "image"}, {"type": "text", "text": "what?"}]
        assert found[0].messages == [{"role": "user", "content": content}]
        assert (found[0].answers, found[0].type) == (answers, kind)
        assert found[0].open_images()[0].size == (90, 90)

    def test_conversations_are_asked_their_first_turn(self, tmp_path):
        turns = ["<image>\nwhat?", "red", "and?", "blue"]
        row = {
            "image": "a.png",
            "conversations": [{"from": f, "value": v} for f, v in zip(["human", "gpt"] * 2, turns, strict=True)],
        }
        found = read_questions(self.write(tmp_path, [row]))[0]
        assert found.answers == ("red",) and len(found.messages) == 1

    def test_a_prompt_is_written_around_the_question(self, tmp_path):
        file = self.write(tmp_path, [{"question": "what?", "image": "a.png"}])
        found = read_questions(file, prompt="{question}\nOne word.")[0]
        assert found.messages[0]["content"][1]["text"] == "what?\nOne word."

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([], {}, "holds no questions"),
            (
                [{"question": "a", "answer": "b"}, {"question": "a", "id": 7}],
                {},
                "sample 7: it has no answer, but others",
            ),
            ([{"question": "<image><image> a", "image": "a.png"}], {}, "1 images for 2 placeholders"),
            ([{"image": "a.png"}], {}, "sample 1: it has the columns image"),
            ([{"question": "a"}], {"prompt": "say"}, "has to hold {question}"),
            ([{"question": "a", "image": 3}], {}, "3.jpg: there is no such file"),
        ],
    )
    def test_what_cannot_be_asked_is_named(self, rows, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            read_questions(self.write(tmp_path, rows), **options)

    def test_a_missing_picture_is_named(self, tmp_path):
        file = self.write(tmp_path, [{"question": "a", "image": "b.png", "id": "x"}])
        with pytest.raises(ValueError, match=r"rows.json, sample 'x': .*b.png: there is no such file"):
            read_questions(file)[0].open_images()

    def test_drawn_scenes(self):
        found = demo_questions("validation", 2)
        assert sorted(each.type for each in found) == sorted(
            2 * ["color", "count", "digit", "existence", "position", "shape"]
        )
        assert found[0].open_images()[0].size == (336, 336)
        hard = read_questions("demo-hard", "validation", limit=1)
        assert sorted(each.type for each in hard) == sorted(HARD_QUESTION_TYPES)
        assert (
            fingerprint(found) == fingerprint(demo_questions("validation", 2)) != fingerprint(demo_questions("test", 2))
        )

    def test_the_fingerprint_knows_pictures_and_answers(self):
        one = question("a", picture(0), answers=["x"])
        others = [replace(one, images=[picture(1)]), replace(one, answers=("y",)), replace(one, type="b")]
        assert len({fingerprint([each]) for each in [one, *others]}) == 4


def settings(**fields) -> EvaluationSettings:
    fields = {"limit": 1, "mergers": ["tome"], "budgets": [16, 4], "batch_size": 2, "max_new_tokens": 8, **fields}
    return EvaluationSettings(**{"model": str(MODEL_DIR), "data": "demo", **fields})


def without_times(results: dict) -> dict:
    return {key: {**row, "milliseconds": None} for key, row in results.items()}


class TestRun:
    def test_a_run_that_was_killed_goes_on_with_the_same_result(self, tmp_path, monkeypatch):
        whole = evaluate(settings(flips=2), tmp_path / "whole", choose=0.9)
        answer, calls = Grid.answer, []

        def fails(grid, *args):
            calls.append(args)
            if len(calls) == 4:  # the first is to warm up
                raise KeyboardInterrupt
            return answer(grid, *args)

        monkeypatch.setattr(Grid, "answer", fails)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings(flips=2), tmp_path / "broken", choose=0.9)
        file = tmp_path / "broken" / "answers.jsonl"
        assert len(file.read_text().splitlines()) == 3 and not (tmp_path / "broken" / "report.json").exists()
        with file.open("a") as half:
            half.write('{"batch": "asked-4", "cel')
        del calls[:]
        monkeypatch.setattr(Grid, "answer", answer)
        again = evaluate(settings(flips=2), tmp_path / "broken", choose=0.9)
        assert without_times(again["results"]) == without_times(whole["results"])
        assert again["flips"] == whole["flips"] and again["choice"] == whole["choice"]
        assert [json.loads(line) for line in file.read_text().splitlines()]

    def test_nothing_is_asked_again(self, tmp_path, monkeypatch):
        first = evaluate(settings(), tmp_path)
        monkeypatch.setattr(Grid, "answer", lambda *args: pytest.fail("asked again"))
        assert evaluate(settings(), tmp_path)["results"] == first["results"]

    def test_the_report_says_how(self, tmp_path):
        report = evaluate(settings(flips=2), tmp_path)
        protocol, results = report["protocol"], report["results"]
        assert json.loads((tmp_path / "report.json").read_text()) == report
        assert protocol["attention"] == {"vision_tower": "sdpa", "language_model": "sdpa"}
        assert protocol["prompt"].startswith("USER: <image>\n") and protocol["questions"] == 6
        assert {"torch", "transformers", "llava_merge"} <= set(protocol["versions"])
        assert results["none@all"]["scores"]["all"]["score"] == 1.0 and results["none@all"]["agreement"]["score"] == 1.0
        assert results["none@all"]["tokens_entered"] - results["tome@16"]["tokens_entered"] == 576 - 16
        assert set(report["flips"]["cells"]) == set(results)
        described = report["candidates"]["tome"]
        hashes = (described.pop("sha256"), described.pop("merger_sha256"), report["language_model_sha256"])
        assert [len(each) for each in hashes] == [64] * 3 and described.pop("projector_sha256") is None
        fields = {"merger_type": "tome", "position_ids": "source", "attention_mass": 1.0}
        assert described == {**fields, "vision_dim": 192}
        Image.open(tmp_path / "scores.png").load()
        table = (tmp_path / "report.md").read_text()
        assert "| tome | 16 |" in table and "95 %" in table
        assert not list(tmp_path.glob("*.tmp"))

    def test_answers_of_another_protocol_are_refused(self, tmp_path):
        evaluate(settings(), tmp_path)
        with pytest.raises(
            ValueError, match="answers.jsonl was made by another protocol.*batch_size: 2 there, 6 here.*Give"
        ):
            evaluate(settings(batch_size=6), tmp_path)
        with pytest.raises(ValueError, match="answers of other mergers or budgets: none@all, random@16"):
            evaluate(settings(budgets=[16]), tmp_path)
        with pytest.raises(ValueError, match="answers of mergers that were made otherwise"):
            evaluate(settings(attention_mass=0.5), tmp_path)

    def test_a_merger_that_was_trained_on_is_another(self, model, processor):
        one, other = (make_candidates(model, processor, ["own"], PLACES)[-1] for _ in range(2))
        assert describe_merger(one, model) == describe_merger(other, model)
        other = replace(other, merger=copy.deepcopy(other.merger))
        with torch.no_grad():
            next(other.merger.parameters())[0] += 1
        assert describe_merger(one, model) != describe_merger(other, model)

    def test_a_merger_s_description_does_not_say_where_it_lies(self, model, processor, tmp_path):
        folders = [str(tmp_path / name) for name in ("one", "other")]
        for folder in folders:
            model.save_merger(folder)
        *_, one, other = make_candidates(model, processor, folders, PLACES)
        assert describe_merger(one, model) == describe_merger(other, model)
        assert "num_heads" in describe_merger(one, model)

    def test_reports_are_shown_along_where_the_protocol_is_the_same(self, tmp_path):
        evaluate(settings(), tmp_path / "one")
        earlier = [tmp_path / "one" / "report.json"]
        evaluate(settings(mergers=["strided"]), tmp_path / "two", against=earlier)
        table = (tmp_path / "two" / "report.md").read_text()
        assert "| tome (one) | 16 |" in table and "| strided | 16 |" in table and table.count("| none") == 1
        with pytest.raises(ValueError, match="report.json was made by another protocol.*split: 'test' there"):
            evaluate(settings(split="validation"), tmp_path / "three", against=earlier)
        with pytest.raises(ValueError, match="is no report.json of an evaluation"):
            evaluate(settings(), tmp_path / "four", against=[tmp_path / "missing.json"])

    def test_without_labels_there_is_agreement(self, tmp_path):
        rows = [{"question": "What color is the star?", "image": str(MODEL_DIR.parent / "picture.png")}]
        (tmp_path / "mine.json").write_text(json.dumps(rows))
        mine = replace(settings(), data=str(tmp_path / "mine.json"), limit=None)
        report = evaluate(mine, tmp_path / "out", choose=0.98)
        assert report["protocol"]["metric"] is None and "scores" not in report["results"]["tome@16"]
        assert report["choice"] == {"agreement": 0.98, "budgets": report["choice"]["budgets"]}
        assert report["choice"]["budgets"]["tome"] in (16, 4)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"metric": "bleu"}, "metric='bleu': has to be one of exact_match"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"limit": 0}, "limit=0"),
            ({"dtype": "int8"}, "dtype='int8'"),
            ({"attention_mass": 2.0}, "attention_mass=2.0"),
            ({"budgets": [577]}, "from 1 to the 576 tokens"),
            ({"split": "holdout"}, "split is 'holdout'"),
        ],
    )
    def test_settings_that_cannot_be_used_are_refused(self, fields, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            evaluate(settings(**fields), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_default_is_the_model_s_own_merger(self, tmp_path):
        model = tiny_model(aware(), train_merger=True)
        model.save_pretrained(tmp_path / "model")
        assert run_module.default_mergers(str(tmp_path / "model")) == ["own"]
        tiny_stock().save_pretrained(tmp_path / "stock")
        assert run_module.default_mergers(str(tmp_path / "stock")) == ["tome"]
        assert run_module.default_mergers(str(MODEL_DIR)) == ["question_aware", "agnostic", "salient"]
        assert default_budgets(576) == [288, 144, 72, 36, 16] and default_budgets(NUM_PATCHES) == [18, 9, 4, 2, 1]


def batch(unmerged: list[str], merged: list[str], seconds=(1.0, 0.5)) -> dict:
    counts = {"kl": [0.1] * len(merged), "entered": [20] * len(merged), "cached": [22] * len(merged)}
    cells = {
        "none@all": {"answers": unmerged, "seconds": seconds[0], **counts},
        "tome@4": {"answers": merged, "seconds": seconds[1], **counts},
    }
    return {"tower_seconds": 0.5, "cells": cells}


class TestReport:
    asked = [question("a", answers=["yes"], kind="x"), question("b", answers=["no"], kind="y")]
    cells = ["none@all", "tome@4"]

    def test_results(self):
        rows = [batch(["yes"], ["Yes."]), batch(["yes"], ["no"])]
        results = make_results(self.asked, rows, self.cells, "exact_match")
        none, tome = results.values()
        assert (none["scores"]["x"]["score"], none["scores"]["y"]["score"]) == (1.0, 0.0)
        assert tome["scores"]["all"] == {"score": 1.0, "n": 2, "ci95": [0.3424, 1.0]}
        assert tome["agreement"]["score"] == 0.5
        assert (none["milliseconds"], tome["milliseconds"]) == (1500, 1000)
        assert "pope" not in tome
        pope = make_results(self.asked, rows, self.cells, "pope")["none@all"]["pope"]
        assert pope == {"precision": 0.5, "recall": 1.0, "f1": 0.6667, "yes_ratio": 1.0}

    def test_a_merger_that_beats_the_unmerged_model_is_doubted(self):
        def results(unmerged: float, merged: float) -> dict:
            rows = {}
            for key, score in (("none@all", unmerged), ("tome@4", merged)):
                interval = [score - 0.02, score + 0.02]
                rows[key] = {"scores": {"all": {"score": score, "ci95": interval}}}
            return rows

        assert not list(make_warnings(results(0.9, 0.91), None))
        assert "tome@4 scores 95.0%, above the interval" in next(make_warnings(results(0.9, 0.95), None))

    def test_flips(self):
        by_size = {1: [batch(["a"], ["a"]), batch(["b"], ["b"])], 2: [batch(["a", "b"], ["a", "c"])]}
        flips = make_flips(by_size, self.cells)
        assert flips["batch_sizes"] == [1, 2]
        assert [flips["cells"][key]["score"] for key in self.cells] == [0.0, 0.5]
        rows = {key: {} for key in self.cells}
        assert "tome@4: 50.0% of the answers depend on the batch size, 0.0% without" in next(make_warnings(rows, flips))

    def test_the_smallest_budget_that_holds(self):
        shares = {"tome": {64: 1.0, 16: 0.985, 4: 0.9}, "random": {64: 0.97, 16: 0.5}}
        results = {"none@all": {"merger": "none", "budget": "all"}}
        for name, rows in shares.items():
            for budget, share in rows.items():
                agreement = {"score": share, "n": 200, "ci95": [share - 0.01, 1.0]}
                results[f"{name}@{budget}"] = {"merger": name, "budget": str(budget), "agreement": agreement}
        chosen = choose_budgets(results, 0.98)
        assert chosen == {"tome": 16, "random": None}
        lines = list(describe_choice({"results": results, "choice": {"agreement": 0.98, "budgets": chosen}}))
        assert lines[0].startswith("tome: 16 tokens keep 98.5%") and lines[0].endswith("the interval reaches below.")
        assert lines[1] == "random: no budget that was tried keeps 98.0% of the answers."

    def test_the_table(self):
        rows = [batch(["yes"], ["Yes."]), batch(["yes"], ["no"])]
        lines = make_table(make_results(self.asked, rows, self.cells, "exact_match")).splitlines()
        assert lines[0] == "| merger | tokens | x | y | all | agreement | token KL | entered | cached | ms |"
        assert lines[2].startswith(
            "| none | all | 100.0 (20.6–100.0) | 0.0 (0.0–79.3) | 50.0 (9.4–90.5) | 100.0 (34.2–100.0) | 0.1000 | 20 |"
        )
        assert len(lines) == 4

    def test_protocols_that_differ_are_not_compared(self):
        check_same_protocol({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}, "x")
        with pytest.raises(ValueError, match="x was made by another protocol.*b: None there, 2 here"):
            check_same_protocol({"a": 1, "b": 2}, {"a": 1}, "x")


class TestCommand:
    def test_it_prints_the_table_and_chooses(self, tmp_path):
        arguments = [
            "evaluate",
            "--merger",
            "tome",
            "--limit",
            "1",
            "--num-merged-tokens",
            "16",
            "--num-merged-tokens",
            "4",
        ]
        done = CliRunner().invoke(app, [*arguments, "--choose", "0.5", "--output", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert "| tome | 16 |" in done.output and "tome: 16 tokens keep" in done.output

    def test_json(self, tmp_path):
        arguments = ["evaluate", "--limit", "1", "--num-merged-tokens", "16", "--json", "--output", str(tmp_path)]
        done = CliRunner().invoke(app, arguments)
        results = json.loads(done.stdout)["results"]
        assert [row["merger"] for row in results.values()][3:] == ["question_aware", "agnostic", "salient"]
        assert results["agnostic@16"]["budget"] == "16"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["missing.json"], "Error: data: 'missing.json' cannot be read"),
            (["--metric", "bleu"], "Error: metric='bleu'"),
            (["--merger", "nothing"], "Error: merger 'nothing' is neither"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, ["evaluate", *arguments])
        assert done.exit_code == 2 and done.output.strip().startswith(message) and len(done.output.splitlines()) == 1
        assert not list(tmp_path.iterdir())


class TestInputs:
    """What is read is not replaced; what lies beside it is nobody's business."""

    def rows_in(self, folder: Path, data: str, picture: str) -> str:
        draw_scene(scene_of("test", 0)[0]).save(folder / picture)
        row = {"question": "What color is the star?", "image": picture, "answer": "red"}
        (folder / data).write_text(json.dumps([row] if data.endswith(".json") else row) + "\n")
        return str(folder / data)

    @pytest.mark.parametrize(
        ("data", "picture", "read"),
        [("report.json", "a.png", "report.json"), ("rows.json", "scores.png", "scores.png")]
        + [("answers.jsonl", "a.png", "answers.jsonl"), ("answers.jsonl", "a.png", "")],
    )
    def test_a_file_that_is_read_is_not_replaced(self, data, picture, read, tmp_path):
        """Also where data is a folder, of which the datasets library takes the files."""
        path = self.rows_in(tmp_path, data, picture)
        if not read:
            (tmp_path / "a.png").rename(tmp_path.parent / "a.png")  # which would be taken for data
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        given = settings(data=path if read else str(tmp_path), split="train", mergers=["tome"])
        given.image_folder = None if read else str(tmp_path.parent)
        with pytest.raises(ValueError, match=f"{read or data} is read, and would be replaced by what is written into"):
            evaluate(given, tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_a_link_to_what_is_written_is_not_replaced_either(self, tmp_path):
        path = self.rows_in(tmp_path, "report.json", "a.png")
        (tmp_path / "rows.json").symlink_to(path)
        with pytest.raises(ValueError, match="rows.json is read, and would be replaced"):
            evaluate(settings(data=str(tmp_path / "rows.json"), mergers=["tome"]), tmp_path)

    def test_results_may_lie_beside_the_data_and_earlier_reports(self, tmp_path):
        given = settings(data=self.rows_in(tmp_path, "rows.json", "a.png"), mergers=["tome"], budgets=[16])
        evaluate(given, tmp_path / "first")
        before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        for _ in range(2):  # it goes on with its own
            evaluate(given, tmp_path, against=[tmp_path / "first" / "report.json"])
        assert before.items() <= {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}.items()
        with pytest.raises(ValueError, match="report.json is read, and would be replaced"):
            evaluate(given, tmp_path / "first", against=[tmp_path / "first" / "report.json"])


def test_a_saved_merger_is_evaluated_with_its_own_places(tmp_path):
    merger = TokenMerger.from_pretrained  # a checkpoint of the demo's widths
    model = run_module.load_model(settings())[0]
    model.set_merger({"merger_type": "average_pooling", "num_merged_tokens": 16, "position_ids": "packed"})
    model.save_merger(tmp_path / "packed")
    assert merger(tmp_path / "packed").config.position_ids == "packed"
    report = evaluate(settings(mergers=[str(tmp_path / "packed")], limit=1), tmp_path / "out")
    candidates = list(report["candidates"].values())
    assert (candidates[-1]["position_ids"], candidates[2]["position_ids"]) == ("packed", "source")


class TestWhatAnswers:
    def prompts_of(self, model, processor, question):
        grid = Grid(model, processor, make_cells([Candidate.of("own", model)], [9]), max_new_tokens=2)
        pixel_values = grid._pixels(question.open_images())
        text = processor.apply_chat_template(question.messages, add_generation_prompt=True)
        return grid._prompts(9, [text], pixel_values, grid._run_tower(pixel_values)), text

    @pytest.fixture
    def asked(self):
        content = [{"type": "image"}, {"type": "text", "text": "what color is the star ?"}]
        return PictureQuestion("q", [{"role": "user", "content": content}], [picture(0)])

    def test_an_override_that_changes_pixels_is_heard(self, asked):
        """Though the tower runs once for all mergers."""
        model, processor = tiny_model(agnostic(9)), make_processor(processor_class=LlavaMergeProcessor)
        stock, flips = model.model.get_image_features, []

        def own(pixel_values, **kwargs):
            flips.append(len(pixel_values))
            return stock(pixel_values.flip(-1), **kwargs)

        model.model.get_image_features = own
        found, text = self.prompts_of(model, processor, asked)
        inputs = processor(images=asked.images, text=text, num_merged_tokens=9, return_tensors="pt")
        wanted = model.encode_images(inputs["pixel_values"], num_merged_tokens=9)
        torch.testing.assert_close(found.images["image"].pooler_output, wanted.pooler_output)
        del model.model.get_image_features
        plain = model.encode_images(inputs["pixel_values"], num_merged_tokens=9)
        assert len(flips) == 2 and not torch.allclose(plain.pooler_output[0], wanted.pooler_output[0])

    def test_a_template_s_bos_is_the_only_one(self, asked):
        model, processor = tiny_model(agnostic(9)), make_processor(True, processor_class=LlavaMergeProcessor)
        for template in (processor.chat_template, "{{ bos_token }}" + processor.chat_template):
            processor.chat_template = template
            found, _ = self.prompts_of(model, processor, asked)
            assert (found.input_ids == BOS_ID).sum() == 1

    def test_an_adapter_s_merger_and_others_answer_in_turn(self):
        """PEFT keeps two mergers in a wrapper, in which another is put in the place of both."""
        model = tiny_model(agnostic(9))
        lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["merger"])
        wrapped = peft.get_peft_model(model, lora)
        trained = model.model.merger.modules_to_save["default"]
        scale_up(trained, merger=True)
        wanted = model.encode_images(pixels(2)).pooler_output
        places = {"position_ids": "source", "attention_mass": 0.0}
        candidates = make_candidates(model, None, ["tome", "own", "divprune"], places)
        types = [candidate.merger.config.merger_type for candidate in candidates]
        assert types == ["none", "random", "average_pooling", "tome", "fixed_pooling", "divprune"]
        seen = []
        for candidate in candidates[1:]:
            with candidate.answering(model):
                seen.append(model.encode_images(pixels(2), num_merged_tokens=9).pooler_output[0])
        torch.testing.assert_close(seen[3], wanted[0])
        assert not any(torch.allclose(one, other) for one, other in itertools.combinations(seen, 2))
        assert model.model.merger.modules_to_save["default"] is trained  # back in its place
        with wrapped.disable_adapter():
            assert Candidate.of("own", model).merger is model.model.merger.original_module
