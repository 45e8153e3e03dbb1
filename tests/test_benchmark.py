# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge benchmark`: phases, ratios and reports, on tiny models."""

import json
import sys

import pytest
import torch
from conftest import NUM_PATCHES, agnostic, aware, load_example, make_processor, tiny_model, tiny_stock
from PIL import Image
from typer.testing import CliRunner

from llava_merge import MERGING_METHODS, compile_for_inference
from llava_merge.benchmark import memory, run
from llava_merge.benchmark.models import SHAPES, make_inputs, make_model
from llava_merge.benchmark.report import make_tables
from llava_merge.benchmark.run import BenchmarkSettings, benchmark, kv_bytes_of_token
from llava_merge.benchmark.timing import (
    Stopwatch,
    time_generate,
    time_graphs,
    timed_calls,
    wall_time,
    with_encoded_images,
)
from llava_merge.cli import app
from llava_merge.compiled.graphs import InferenceGraphs


pytestmark = pytest.mark.newest
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_stock().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def settings_for(base, **fields) -> BenchmarkSettings:
    fields = {"mergers": ["tome"], "budgets": [9, 4], "text_tokens": 6, "new_tokens": 3, "rounds": 2, **fields}
    return BenchmarkSettings(str(base), **fields)


class TestTiming:
    def test_the_phases_are_parts_of_the_first_token(self):
        model = tiny_model(agnostic(9))
        times = [time_generate(model, make_inputs(model, 2, 9, 6, 0), 3) for _ in range(2)][1]  # the first warms up
        parts = ("vision_tower", "merger", "multi_modal_projector", "prefill", "rest")
        assert sum(times[name] for name in parts) == pytest.approx(times["first_token"])
        assert all(times[name] > 0 for name in (*parts, "answer"))
        assert times["decode"] == pytest.approx((times["answer"] - times["first_token"]) / 2)

    def test_graphs_alone_are_parts_of_the_answer(self):
        model = tiny_model(agnostic(9))
        fast = compile_for_inference(model, prompt_lengths=[15], max_new_tokens=8, backend=None)
        time_generate(fast, make_inputs(model, 1, 9, 6, 0), 3)
        answered = [recorded() for recorded in fast.graphs.prefills.values()]
        rounds = [time_graphs(fast.graphs, Stopwatch(model.device)) for _ in range(5)]
        assert min(times["prompt_graph"] for times in rounds) > min(times["token_graph"] for times in rounds) > 0
        (prompt,) = fast.graphs.prefills.values()
        assert torch.equal(prompt(), answered[0])  # what they answer does not depend on it

    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_answer_does_not_end_early(self, compiled, monkeypatch):
        model, answers = tiny_model(agnostic(9)), []
        inputs = make_inputs(model, 1, 9, 6, 0)
        length = inputs["input_ids"].shape[1]
        first = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, length]
        model.generation_config.eos_token_id = first.item()
        assert model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0).shape[1] == length + 1
        if compiled:
            model = compile_for_inference(model, prompt_lengths=[length], max_new_tokens=8, backend=None)
        generate = type(model).generate
        monkeypatch.setattr(
            type(model), "generate", lambda self, **given: answers.append(generate(self, **given)) or answers[-1]
        )
        wall_time(model, inputs, 8, Stopwatch(model.device))
        assert answers[0].shape[1] == length + 8

    def test_hooks_are_removed(self):
        model = tiny_model(agnostic(9))
        with (
            pytest.raises(RuntimeError),
            timed_calls({"merger": model.model.merger}, Stopwatch(model.device)) as moments,
        ):
            model.model.merger(torch.zeros(1, NUM_PATCHES, 32))
            raise RuntimeError
        assert len(moments["merger"]) == 1 and len(moments["merger"][0]) == 2
        assert not model.model.merger._forward_hooks and not model.model.merger._forward_pre_hooks

    def test_another_question_spares_the_tower(self):
        model, passes = tiny_model(aware(9)), []
        inputs = with_encoded_images(model, make_inputs(model, 2, 9, 6, 0))
        model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
        model.generate(**inputs, max_new_tokens=2)
        assert not passes and "pixel_values" not in inputs

    def test_prompts_have_just_their_placeholders(self):
        model = tiny_model(agnostic(9))
        inputs = make_inputs(model, 3, 9, 7, 0)
        is_image = inputs["input_ids"] == model.config.image_token_index
        assert inputs["input_ids"].shape == (3, 16) and (is_image.sum(dim=1) == 9).all()
        assert inputs["pixel_values"].shape == (3, 3, 84, 84)


class TestBenchmark:
    def test_the_report(self, base, tmp_path):
        report = benchmark(settings_for(base, batch_sizes=[1, 2]), tmp_path, "the command")
        assert json.loads((tmp_path / "report.json").read_text()) == report and report["command"] == "the command"
        assert list(report["results"]) == ["1", "2"] and report["throughput"] is None
        rows = report["results"]["1"]
        assert list(rows) == ["none@all", "tome@9", "tome@4"]
        assert rows["none@all"]["answer_ratio"] == rows["none@all"]["first_token_ratio"] == 1
        assert [row["tokens_entered"] for row in rows.values()] == [42, 15, 10]
        assert [row["tokens_cached"] for row in rows.values()] == [44, 17, 12]
        stock = tiny_stock().config.text_config
        of_token = 2 * stock.num_hidden_layers * stock.num_key_value_heads * stock.head_dim * 4
        assert [row["kv_bytes_of_image"] for row in rows.values()] == [number * of_token for number in (36, 9, 4)]
        for row in rows.values():
            assert row["peak_memory_bytes"] is None
            assert all(each["low"] <= each["median"] <= each["high"] for each in row["milliseconds"].values())
        for size, rows in report["results"].items():
            for row in rows.values():
                tokens, seconds = int(size) * 3, row["milliseconds"]["answer"]["median"] / 1000
                assert row["tokens_per_second"] == round(tokens / seconds, 1)
        protocol = report["protocol"]
        assert protocol["rounds"] == 2 and protocol["attention"] == {"vision_tower": "sdpa", "language_model": "sdpa"}
        text = (tmp_path / "report.md").read_text()
        assert text == make_tables(report) and "| tome | 4 |" in text and "## 2 at once" in text
        assert "| tokens/s |" in text
        assert Image.open(tmp_path / "times.png").width > 500

    def test_what_was_measured_is_left_where_the_run_is_cut_short(self, base, tmp_path, monkeypatch):
        measure_cells = run.measure_cells

        def interrupted(model, cells, size, settings):
            if size == 2:
                raise KeyboardInterrupt
            return measure_cells(model, cells, size, settings)

        monkeypatch.setattr(run, "measure_cells", interrupted)
        with pytest.raises(KeyboardInterrupt):
            benchmark(settings_for(base, batch_sizes=[1, 2]), tmp_path, "the command")
        assert list(json.loads((tmp_path / "report.json").read_text())["results"]) == ["1"]
        assert "## 1 at once" in (tmp_path / "report.md").read_text() and (tmp_path / "times.png").exists()

    def test_without_matplotlib_there_is_one_warning_and_no_picture(self, base, tmp_path, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.delitem(sys.modules, "llava_merge.benchmark.plot", raising=False)
        run.logger.warning_once.cache_clear()
        benchmark(settings_for(base, batch_sizes=[1, 2]), tmp_path, "the command")
        assert not (tmp_path / "times.png").exists()
        said = [record.getMessage() for record in caplog.records if "was drawn" in record.getMessage()]
        assert said == ["No times.png was drawn, since matplotlib.figure is not installed."]

    def test_cells_take_turns_at_being_first(self, base, tmp_path, monkeypatch):
        order, measure_once = [], run.measure_once

        def listed(model, cell, *arguments):
            order.append(cell.key)
            return measure_once(model, cell, *arguments)

        monkeypatch.setattr(run, "measure_once", listed)
        benchmark(settings_for(base), tmp_path)
        keys = ["none@all", "tome@9", "tome@4"]
        assert order == keys + keys[1:] + keys[:1] + keys[2:] + keys[:2]

    def test_each_is_measured_compiled_too_and_only_there_from_graphs(self, base, tmp_path, monkeypatch):
        calls, prefill = [], InferenceGraphs.prefill

        def counted(graphs, shape, *arguments):
            calls.append(shape)
            return prefill(graphs, shape, *arguments)

        monkeypatch.setattr(InferenceGraphs, "prefill", counted)
        report = benchmark(settings_for(base, batch_sizes=[2], compile="none"), tmp_path)
        rows = report["results"]["2"]
        keys = ["none@all", "tome@9", "tome@4"]
        assert list(rows) == keys + [f"{key}, compiled" for key in keys]
        assert {(shape.batch_size, shape.length, shape.budget) for shape in calls} == {
            (2, 42, "all"),
            (2, 15, 9),
            (2, 10, 4),
        }
        assert len(calls) == 3 * 3 * 2  # cells, rounds with the first, and a first token and an answer
        assert (
            rows["none@all, compiled"]["answer_ratio_of_compiled"] == 1 and "prefill" in rows["tome@9"]["milliseconds"]
        )
        times = rows["tome@9, compiled"]["milliseconds"]
        assert list(times) == ["first_token", "decode", "answer", "prompt_graph", "token_graph", "rest"]
        table = (tmp_path / "report.md").read_text()
        assert "| tome, compiled | 9 |" in table and "| graph of the prompt | rest |" in table
        assert rows["tome@9"]["compile_seconds"] is None and rows["tome@9, compiled"]["compile_seconds"] >= 0
        assert "| compiling, s |" in table

    def test_merging_shows_where_the_prompt_is_long(self, tmp_path, monkeypatch):
        text = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        monkeypatch.setitem(SHAPES, "small", (SMALL, text))
        settings = BenchmarkSettings("small", ["average_pooling"], [16], text_tokens=8, new_tokens=2, rounds=3)
        report = benchmark(settings, tmp_path)
        prefill = [row["milliseconds"]["prefill"]["median"] for row in report["results"]["1"].values()]
        assert prefill[1] < prefill[0] / 2 and report["protocol"]["weights"] == "random"

    def test_the_small_shape_has_0_2_billion_parameters(self):
        assert 1.5e8 < sum(each.numel() for each in make_model("0.2b", torch.float32, "meta").parameters()) < 2.5e8

    def test_the_shape_of_7b_is_that_of_llava(self, monkeypatch):
        vision, text = SHAPES["llava-1.5-7b"]
        monkeypatch.setitem(SHAPES, "llava-1.5-7b", (vision, {**text, "num_hidden_layers": 1}))
        model = make_model("llava-1.5-7b", torch.float32, "meta")
        assert model.config.num_patches == 576 and model.config.vision_config.hidden_size == 1024
        assert model.model.multi_modal_projector.linear_2.weight.shape == (4096, 4096)

    def test_a_question_aware_merger_without_a_processor(self, tmp_path, monkeypatch):
        monkeypatch.setitem(SHAPES, "small", (SMALL, SMALL))
        mergers = ["fixed_pooling:question_aware=true,num_heads=4"]
        report = benchmark(settings_for("small", mergers=mergers, rounds=1), tmp_path)
        assert list(report["results"]["1"]) == ["none@all", f"{mergers[0]}@9", f"{mergers[0]}@4"]

    def test_bytes_of_a_token_follow_the_dtype(self):
        model = tiny_model(agnostic(9))
        assert kv_bytes_of_token(model.to(torch.bfloat16)) * 2 == kv_bytes_of_token(model.to(torch.float32))


class TestThroughput:
    """With made-up memory, since the CPU does not tell its own."""

    def largest(self, monkeypatch, limit: float, seen: list | None = None) -> dict:
        def made_up(model, cell, size, settings):
            (seen if seen is not None else []).append(size)
            if size > 40:
                raise torch.cuda.OutOfMemoryError
            return size / 100, int((2 + 0.1 * size + 0.001 * size**2) * memory.GIB)

        monkeypatch.setattr(memory, "run", made_up)
        return memory.measure_largest(None, None, BenchmarkSettings("x", [], memory=limit))

    def test_the_largest_batch_that_fits(self, monkeypatch):
        found = self.largest(monkeypatch, 5.0)
        assert found["peak_memory_bytes"] <= 5 * memory.GIB and found["requests_per_second"] == 100
        assert 18 <= found["batch_size"] <= 24

    def test_out_of_memory_takes_a_smaller_one(self, monkeypatch):
        seen = []
        found = self.largest(monkeypatch, 100.0, seen)
        assert seen[2] > 40 and 30 <= found["batch_size"] <= 40

    def test_memory_in_which_nothing_fits(self, monkeypatch):
        with pytest.raises(ValueError, match="not one request fits"):
            self.largest(monkeypatch, 1.0)


class TestCommand:
    def test_json(self, base, tmp_path):
        arguments = ["benchmark", str(base), "--merger", "tome", "--num-merged-tokens", "9", "--rounds", "1"]
        arguments += ["--new-tokens", "2", "--text-tokens", "4", "--output", str(tmp_path), "--json"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert list(json.loads(done.stdout)["results"]["1"]) == ["none@all", "tome@9"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rounds", "0"], "rounds=0: has to be 1 or more"),
            (["--compile", "foo"], "compile='foo': has to be one of none, "),
            (["--new-tokens", "1"], "new_tokens=1: has to be 2 or more"),
            (["--num-merged-tokens", "0"], "budgets=[0]: has to be whole numbers of 1 or more"),
            (["--num-merged-tokens", "577"], "num_merged_tokens=577 is more than the 576 tokens"),
            (["--batch-size", "0"], "batch_sizes=[0]"),
            (["--dtype", "int8"], "dtype='int8'"),
            (["--memory", "8", "--device", "cpu"], "memory=8.0: can be measured on a GPU only"),
            (["--merger", "nothing"], "neither a method"),
            (["/nowhere/at/all"], "/nowhere/at/all"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, message, tmp_path):
        done = CliRunner().invoke(app, ["benchmark", *arguments, "--output", str(tmp_path / "out")])
        assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


class TestOverheadOfMergers:
    def test_every_method_is_measured(self, base, tmp_path):
        module = load_example("benchmark_mergers")
        options = ["--model", str(base), "--batch-sizes", "2", "--num-merged-tokens", "9", "4", "--repeats", "1"]
        module.main(module.parse([*options, "--output", str(tmp_path / "overhead.json")]))
        results = json.loads((tmp_path / "overhead.json").read_text())["results"]
        assert {name.partition(":")[0] for name in results["methods"]} == {*MERGING_METHODS} - {"none", "image_resize"}
        assert results["stock_prefill"]["2"]["median"] > 0
        assert all(
            set(found) == {"2 x 9", "2 x 4"} and min(cell["eager"]["median"] for cell in found.values()) > 0
            for found in results["methods"].values()
        )

    def test_it_merges_as_the_model_does(self):
        """With what the method asks of tower and question, from the very images."""
        module, pixels = load_example("benchmark_mergers"), torch.randn(2, 3, *tiny_model(None).config.image_shape)
        for merger_type in ("visionzip", "mmtok"):
            model = tiny_model({**aware(9), "merger_type": merger_type, "question_aware": merger_type == "mmtok"})
            with torch.no_grad():
                merge, inputs = module.merging_call(model, pixels, 9)
                features = model.get_image_features(pixels, question=inputs["question"]).pooler_output
                projected = model.model.multi_modal_projector(merge(**inputs))
            torch.testing.assert_close(torch.stack([*features]), projected)


def test_loading_and_importing_are_measured(tmp_path, capsys):
    module = load_example("benchmark_loading")
    options = ["--model", "0.2b", "--text-layers", "1", "--rounds", "1", "--device", "cpu"]
    module.main(module.parse([*options, "--scratch", str(tmp_path), "--output", str(tmp_path / "loading.json")]))
    results = json.loads((tmp_path / "loading.json").read_text())["results"]
    assert len(results["load_seconds"]["merged"]) == 1 and results["load_ratio"] > 0
    assert 0 < results["import_median"] < 5 and "Loading takes" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["loading.json"]
