# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The `llava-merge` command as a program: its help, its JSON, its exit codes, Ctrl-C, and pushing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import typer
from conftest import agnostic, listen_to_ctrl_c, make_processor, tiny_model, tiny_stock
from hub_server import HubServer, run_python
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llava_merge import LlavaMergeProcessor, __version__, list_mergers
from llava_merge.cli import app
from llava_merge.cli.common import one_line_errors
from llava_merge.demo import MODEL_DIR, find_merger
from llava_merge.evaluation.candidates import Candidate
from llava_merge.evaluation.cards import add_evaluation
from llava_merge.evaluation.fingerprints import check_is_of_report, describe_merger, hash_of_text_model
from llava_merge.evaluation.report import read_evaluation
from llava_merge.evaluation.run import settings_of_options
from llava_merge.model.model_card import MERGER, make_card
from llava_merge.serving.pushing import SavedFolder


pytestmark = pytest.mark.newest
RESULTS = Path(__file__).parents[1] / "examples" / "results"
COMMANDS = typer.main.get_command(app).commands


def llava_merge(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "llava_merge", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_and_option_is_explained(self, name):
        assert len(COMMANDS[name].help) > 40
        for parameter in COMMANDS[name].params:
            assert parameter.help and parameter.help.endswith((".", ".)")), parameter.name

    def test_short_and_version(self):
        assert CliRunner().invoke(app, ["-h"]).output == CliRunner().invoke(app, ["--help"]).output
        assert CliRunner().invoke(app, ["demo", "-h"]).exit_code == 0
        assert CliRunner().invoke(app, ["--version"]).output == f"llava-merge {__version__}\n"

    def test_nobody_reads(self):
        """As `llava-merge mergers | head -1`, where the pipe is closed."""
        process = llava_merge("mergers", env={**os.environ, "PYTHONUNBUFFERED": "1"})
        process.stdout.close()
        assert process.wait(60) == 141 and process.stderr.read() == ""

    def test_exit_codes_are_named(self):
        assert "Exit codes: 0 done" in CliRunner().invoke(app, ["--help"]).output.replace("\n", " ")


class TestKnownAtTheStart:
    """In one line, before a model is loaded."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("evaluate", "--device", "foo"), "device='foo' cannot be used (Expected one of cpu, cuda"),
            (("benchmark", "--device", "foo"), "device='foo' cannot be used (Expected one of cpu, cuda"),
            (("evaluate", "--metric", "pope"), "scene 1 of test: metric 'pope': the right answer 'star' has to be"),
            (("evaluate", "--choose", "5"), "choose=5.0: has to be above 0 and up to 1"),
            (("evaluate", "--choose", "0"), "choose=0.0: has to be above 0 and up to 1"),
            (("evaluate", "--flips", "-1"), "flips=-1: has to be 0 or more"),
            (("demo", "--output", "x.abc"), "x.abc: give the name of a file that ends with .png"),
            (("demo", "--output", "nowhere/x.png"), "nowhere/x.png: there is no folder nowhere"),
            (("demo", "--question", " "), "question=' ' is empty"),
        ],
    )
    def test_it_is(self, arguments, message, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("llava_merge.LlavaMergeForConditionalGeneration.from_pretrained", None)
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and done.stderr.startswith(f"Error: {message}"), done.output
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
    def test_a_gpu_that_is_not_there(self):
        done = CliRunner().invoke(app, ["evaluate", "--device", "cuda"])
        assert done.exit_code == 2 and done.stderr.startswith("Error: device='cuda' cannot be used (Torch not compiled")

    def test_line_breaks_in_a_prompt_are_those_of_the_shell(self):
        """bash passes a backslash and an n."""
        asked = settings_of_options(
            {"prompt": r"{question}\nShort.", "merger": None, "num_merged_tokens": None, "image_folder": None}
            | {"device": "cpu", "dtype": None, "model": None, "data": "demo"}
        )
        assert asked.prompt == "{question}\nShort."


class TestJson:
    def test_demo(self, tmp_path):
        output = ("--output", str(tmp_path / "demo.png"))
        done = CliRunner().invoke(app, ["demo", "--json", "--question", "What color is the star?", *output])
        found = json.loads(done.stdout)
        assert found["questions"] == ["What color is the star?"] and Path(found["picture"]).exists()
        assert list(found["answers"]) == ["none", "question_aware", "random"]
        assert found["answers"]["none"][0]["text"] == "yellow"
        assert found["answers"]["random"][0]["num_image_tokens"] == 16

    def test_mergers(self):
        found = json.loads(CliRunner().invoke(app, ["mergers", "--json"]).stdout)
        assert [each["name"] for each in found] == [each.name for each in list_mergers()]
        assert all(each["summary"] for each in found)


class TestCtrlC:
    def test_an_evaluation_ends_and_goes_on(self, tmp_path):
        arguments = ("evaluate", "--limit", 2, "--merger", "tome", "--num-merged-tokens", 16, "--batch-size", 2)
        running = llava_merge(*arguments, "--output", tmp_path, preexec_fn=listen_to_ctrl_c)
        answers, start = tmp_path / "answers.jsonl", time.monotonic()
        while not (answers.exists() and answers.read_text().count("\n") > 2):
            assert running.poll() is None and time.monotonic() - start < 240
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 130 and errors.strip().endswith("Interrupted.") and "Traceback" not in errors
        assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl"}
        lines = answers.read_text().splitlines()
        assert len([json.loads(line) for line in lines]) > 2
        going_on = llava_merge(*arguments, "--output", tmp_path)
        going_on.communicate(timeout=240)
        assert going_on.returncode == 0 and answers.read_text().splitlines()[: len(lines)] == lines
        assert {"report.json", "report.md"} <= {path.name for path in tmp_path.iterdir()}

    def test_without_work_done(self, monkeypatch, tmp_path):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("llava_merge.demo.compare.Comparison.with_all_tokens", interrupt)
        done = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "demo.png")])
        assert done.exit_code == 130 and done.stderr == "Interrupted.\n" and not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "llava_merge.demo.browser", raising=False)
    done = CliRunner().invoke(app, ["app"])
    assert (
        done.exit_code == 2
        and done.stderr == "Error: This needs gradio: pip install '.[app]' in a clone of llava_merge\n"
    )


class TestNetwork:
    """What fails on the way is one line, exit code 2, also with --json."""

    def fetch(self, answer: bytes, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=self.serve, args=(server, answer), daemon=True).start()
            url = f"http://127.0.0.1:{server.getsockname()[1]}/x.png"
            output = str(tmp_path / "demo.png")
            return url, CliRunner().invoke(app, ["demo", "--image", url, "--json", "--output", output])

    def serve(self, server, answer):
        asked, _ = server.accept()
        with asked:
            asked.recv(1 << 16)
            asked.sendall(answer)

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n\x89PNG",
            b"HTTP/1.1 302 Found\r\nLocation: gopher://x\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno",
        ],
    )
    def test_a_picture_whose_download_breaks_off(self, answer, tmp_path):
        url, done = self.fetch(answer, tmp_path)
        assert done.exit_code == 2 and done.stderr.startswith(f"Error: {url} is not a picture"), done.stderr
        assert done.stderr.count("\n") == 1 and not done.stdout

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.png", "http://a..b/x.png", "ftp://127.0.0.1/x.png"])
    def test_a_picture_that_cannot_be_reached(self, url):
        done = CliRunner().invoke(app, ["demo", "--image", url, "--json"])
        assert done.exit_code == 2 and done.stderr.startswith(f"Error: {url} is not a picture"), done.stderr

    def test_a_hub_that_cannot_be_reached(self, tmp_path):
        with HubServer() as server:
            environment = {**server.environment(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = llava_merge("push", find_merger("agnostic"), "org/no", env=environment)
        _, errors = done.communicate(timeout=240)
        assert done.returncode == 2 and errors.startswith("Error: ") and errors.count("\n") == 1, errors

    def test_an_error_without_words(self):
        with pytest.raises(typer.Exit), one_line_errors():
            raise TimeoutError


class TestPush:
    @pytest.fixture
    def server(self):
        with HubServer() as running:
            yield running

    def push(self, server, home, *arguments) -> str:
        done = llava_merge("push", *arguments, env=server.environment(home))
        output, errors = done.communicate(timeout=240)
        assert done.returncode == 0, errors
        return output

    @pytest.fixture(scope="class", params=["float32", "bfloat16"])
    def report(self, request, tmp_path_factory):
        """Of two bundled mergers, which were asked a few questions."""
        folder = tmp_path_factory.mktemp("evaluated")
        options = [f"--merger={find_merger(name)}" for name in ("agnostic", "salient")] + ["--merger=tome"]
        options += ["--num-merged-tokens=16", "--num-merged-tokens=4", "--limit=1", f"--dtype={request.param}"]
        done = CliRunner().invoke(app, ["evaluate", *options, "--output", str(folder)])
        assert done.exit_code == 0, done.output
        return folder / "report.json"

    def test_a_merger_with_its_evaluation(self, server, report, tmp_path):
        asked = ("--report", report, "--merger", find_merger("agnostic"))
        output = self.push(server, tmp_path, find_merger("agnostic"), "org/merger", *asked, "--json")
        files = server.repos["org/merger"]
        assert {"config.json", "model.safetensors", "multi_modal_projector.safetensors", "README.md"} <= set(files)
        assert json.loads(output)["repo_id"] == "org/merger"
        card = ModelCard(files["README.md"].decode())
        assert "| none | all |" in card.text and "mergers/agnostic | 16 |" in card.text and "tome" not in card.text
        scores = {each.metric_name: each.metric_value for each in card.data.eval_results}
        row = json.loads(report.read_text())["results"][f"{find_merger('agnostic')}@16"]
        assert scores["exact_match, 16 tokens"] == round(100 * row["scores"]["all"]["score"], 2) and len(scores) == 2

    def test_results_of_another_merger_are_refused(self, report, tmp_path):
        """Before the Hub is asked, which is out of reach here."""

        def refusal(folder, merger, source=report):
            arguments = ["push", str(folder), "org/no", "--report", str(source), "--merger", merger]
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 2 and done.stderr.count("\n") == 1
            return done.stderr

        agnostic, salient = find_merger("agnostic"), find_merger("salient")
        assert "is another than the folder's (merger_type: 'salient_pooling' there" in refusal(agnostic, salient)
        assert "is another than the folder's (merger_type: 'tome' there" in refusal(agnostic, "tome")
        shutil.copytree(agnostic, tmp_path / "trained")
        weights = load_file(tmp_path / "trained" / "model.safetensors")
        next(iter(weights.values())).add_(1)
        save_file(weights, tmp_path / "trained" / "model.safetensors", metadata={"format": "pt"})
        assert re.search(r"\(merger_sha256: '\w{64}' there, '\w{64}' here\)", refusal(tmp_path / "trained", agnostic))
        earlier = RESULTS / "evaluation_demo.json"
        assert "does not say which weights" in refusal(agnostic, "llava_merge/demo/mergers/agnostic", earlier)

    @staticmethod
    def report_of(model) -> dict:
        text = hash_of_text_model(dict(model.named_parameters()))
        described = {"own": describe_merger(Candidate.of("own", model), model)}
        return {"candidates": described, "protocol": {"dtype": "float32"}, "language_model_sha256": text}

    @pytest.mark.parametrize("kind", ["model", "adapter", "tome"])
    def test_results_of_models_and_adapters_are_theirs(self, kind, tmp_path):
        from peft import LoraConfig, get_peft_model

        model = tiny_model({"merger_type": "tome"} if kind == "tome" else agnostic(), train_merger=kind != "tome")
        report, folder = self.report_of(model), tmp_path / kind
        if kind == "model":
            model.save_pretrained(folder, max_shard_size="50KB")
        elif kind == "tome":
            model.save_merger(folder)
        else:
            tiny_stock().save_pretrained(tmp_path / "base")
            fields = model.config.merger_config.to_dict()
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["merger"])).save_pretrained(
                folder
            )
            adapter = json.loads((folder / "adapter_config.json").read_text())
            adapter["base_model_name_or_path"] = str(tmp_path / "base")
            (folder / "adapter_config.json").write_text(json.dumps(adapter))
            (folder / "merger_config.json").write_text(json.dumps(fields))
        saved = SavedFolder.read(folder)
        check_is_of_report(saved, report, "own")
        report["candidates"]["own"]["merger_sha256"] = "0"
        with pytest.raises(ValueError, match="is another than the folder's .merger_sha256"):
            check_is_of_report(saved, report, "own")

    def test_a_method_without_weights_belongs_to_its_model(self, tmp_path):
        model, other = (tiny_model({"merger_type": "tome"}) for _ in range(2))
        with torch.no_grad():
            other.model.language_model.norm.weight.mul_(2)
        model.save_pretrained(tmp_path / "model")
        saved = SavedFolder.read(tmp_path / "model")
        check_is_of_report(saved, self.report_of(model), "own")
        with pytest.raises(ValueError, match="is another than the folder's .language_model_sha256"):
            check_is_of_report(saved, self.report_of(other), "own")
        wide = tiny_model({"merger_type": "tome"}, vision_feature_layer=[-2, -1])
        model.save_merger(tmp_path / "merger")
        with pytest.raises(ValueError, match="vision_dim: 64 there, 32 here"):
            check_is_of_report(SavedFolder.read(tmp_path / "merger"), self.report_of(wide), "own")

    def test_a_projector_belongs_to_its_merger(self, tmp_path):
        model = tiny_model(agnostic(), train_merger=True)
        model.save_merger(tmp_path / "with", projector=True)
        model.save_merger(tmp_path / "without")
        model.load_merger(tmp_path / "with")
        check_is_of_report(SavedFolder.read(tmp_path / "with"), self.report_of(model), "own")
        with pytest.raises(ValueError, match="projector_sha256: '.*' there, None here"):
            check_is_of_report(SavedFolder.read(tmp_path / "without"), self.report_of(model), "own")

    def test_a_model_without_what_does_not_belong_there(self, server, tmp_path):
        folder = tmp_path / "model"
        tiny_model(agnostic()).save_pretrained(folder)
        make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9).save_pretrained(folder)
        for name in ("training_args.bin", "optimizer.pt", "checkpoint-5/model.safetensors", ".cache/x.json", "runs/x"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
        before = """
from huggingface_hub import HfApi
HfApi().create_repo("org/model")
for name, content in (("model-00001-of-00002.safetensors", b"x"), ("README.md", b"My own.")):
    HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="org/model")
"""
        run_python(before, server.environment(tmp_path))
        self.push(server, tmp_path, folder, "org/model")
        files = server.repos["org/model"]
        assert files["README.md"].decode().endswith("My own.")
        assert {"config.json", "model.safetensors", "modeling_llava_merge.py", "processor_config.json"} <= set(files)
        assert not {"training_args.bin", "optimizer.pt", "model-00001-of-00002.safetensors", "runs/x"} & set(files)
        assert not any(name.startswith((".cache", "checkpoint-")) for name in files)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("/nowhere/at/all",), "/nowhere/at/all: there is no such folder"),
            ((RESULTS,), f"{RESULTS} has no config.json. Give the folder of a merger"),
            ((MODEL_DIR,), "holds a 'llava', not a merger or a LLaVA with one"),
            ((find_merger("agnostic"), "--report", MODEL_DIR / "config.json"), "is no report.json of an evaluation"),
            (
                (find_merger("agnostic"), "--report", RESULTS / "evaluation_demo.json"),
                "say which of its mergers this is",
            ),
        ],
    )
    def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(self, arguments, message):
        """Which is out of reach here: huggingface_hub would say so."""
        directory, *rest = map(str, arguments)
        done = CliRunner().invoke(app, ["push", directory, "org/no", *rest])
        assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_results_in_a_card_are_replaced_by_newer_ones():
    report = read_evaluation(RESULTS / "evaluation_lora_agnostic_demo.json")
    card = make_card(tiny_model(agnostic()).config, "org/mine", MERGER)
    plain = card.text
    add_evaluation(card, report)
    once = str(card)
    add_evaluation(card, report, "own")
    assert str(card) == once and card.text.startswith(plain.rstrip()) and once.count("## Evaluation") == 1
    with pytest.raises(ValueError, match="has the mergers own: it has no merger 'tome'"):
        add_evaluation(card, report, "tome")
