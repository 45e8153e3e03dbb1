# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The code in README, guides, docstrings and model cards, run as it stands, with the bundled model for LLaVA-1.5-7B."""

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, run_python
from PIL import Image

import llava_merge
from llava_merge.demo import MODEL_DIR, PICTURE
from llava_merge.training.settings import load_settings


ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "examples" / "guides").glob("*.md")),
    ROOT / ".github" / "CONTRIBUTING.md",
]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
SEVEN_B = "llava-hf/llava-1.5-7b-hf"
START = f"""
import os
from llava_merge import LlavaMergeForConditionalGeneration
os.chdir({{folder!r}})
model = LlavaMergeForConditionalGeneration.from_pretrained({str(MODEL_DIR)!r})
model.push_merger_to_hub("org/another-merger")
"""


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub after the Python of README and guides was run against it, all blocks in one process, in turn."""
    folder = tmp_path_factory.mktemp("readme")
    Image.open(PICTURE).save(folder / "my.png")
    code = "\n".join([START.format(folder=str(folder)), *python_blocks(TEXT)]).replace(SEVEN_B, str(MODEL_DIR))
    with HubServer() as server:
        environment = server.environment(folder / "home")
        answer = run_python(code, environment).stdout
        yield server, environment, folder, answer


def test_readme(hub):
    server, _, folder, answer = hub
    assert "ASSISTANT:" in answer
    assert {path.name for path in folder.iterdir()} >= {"merged.png", "tokens.png", "my-merger", "my-llava-merge"}
    assert set(server.repos) == {"org/another-merger", "org/my-merger", "org/llava-merge"}


@pytest.mark.parametrize("repo", ["org/llava-merge", "org/my-merger"])
def test_the_snippet_of_a_model_card_runs_as_pasted(hub, repo):
    server, environment, _, _ = hub
    (snippet,) = python_blocks(server.repos[repo]["README.md"].decode())
    check = "print(type(model).__name__, model.config.merger_config.merger_type, processor.num_merged_tokens)"
    found = run_python(f"{snippet}\n{check}".replace(SEVEN_B, str(MODEL_DIR)), environment).stdout
    assert found.split() == ["LlavaMergeForConditionalGeneration", "fixed_pooling", "64"]


def docstring_examples() -> list[doctest.DocTest]:
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for module in pkgutil.walk_packages(llava_merge.__path__, "llava_merge."):
        if not module.name.endswith(("__main__", "lmms_eval", "serving.vllm")):
            found += [test for test in finder.find(importlib.import_module(module.name)) if test.examples]
    return found


@pytest.mark.parametrize("test", docstring_examples(), ids=lambda test: test.name)
def test_docstring(test):
    names = {name: getattr(llava_merge, name) for name in llava_merge.__all__}
    image = Image.open(PICTURE).convert("RGB")
    test.globs |= {**names, "torch": torch, "image": image, "prompt": "USER: <image>\nWhat is it? ASSISTANT:"}
    for example in test.examples:
        example.source = example.source.replace(SEVEN_B, str(MODEL_DIR))
    report = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.attempted and not result.failed, "".join(report)


def test_docstrings_have_examples():
    names = {test.name.rpartition(".")[2] for test in docstring_examples()}
    assert names >= {"LlavaMergeForConditionalGeneration", "LlavaMergeProcessor", "TokenMerger"}


COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.strip().splitlines()
    for command in line.split(" && ")
]
SHORTER = {  # what makes a command of README one of seconds
    "llava-merge demo": "",
    "python examples/make_demo_data.py": "--num-train 12 --num-validation 2",
    "llava-merge train examples/configs/demo.yaml": "--set training.max_steps=2",
    "llava-merge evaluate": "--limit 1",
    "llava-merge convert": "",
}
FOR_7B = ("llava-merge train examples/configs/llava_7b.yaml", "torchrun --nproc-per-node 8 -m llava_merge train")
BY_CI = ("pip install", "pytest", "pre-commit install", "vllm serve")  # the last by tests/test_vllm.py


def commands_of(*starts: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(starts)]


def test_every_command_of_the_readme_is_run_somewhere():
    assert len(COMMANDS) == len(commands_of(*SHORTER, *FOR_7B, *BY_CI)) and len(commands_of(*SHORTER)) == len(SHORTER)


@pytest.mark.newest
def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    """One after the other in a new folder, since one makes what the next one reads."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for folder in ("examples", "llava_merge"):  # configs name the bundled model by its path in a clone
        (tmp_path / folder).symlink_to(ROOT / folder)
    for command in commands_of(*SHORTER):
        (options,) = (options for start, options in SHORTER.items() if command.startswith(start))
        program = command.replace("llava-merge ", "python -m llava_merge ", 1).replace("python", sys.executable, 1)
        program = program.replace(SEVEN_B, str(MODEL_DIR))
        done = subprocess.run(
            [*shlex.split(program), *shlex.split(options)], cwd=tmp_path, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if "llava-merge train" in command:
            assert re.search(
                r"Saved to demo_merger .*\n  .* all tokens: 100.0%\n  .* 16 tokens: [\d.]+% → [\d.]+%", done.stderr
            )
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"llava_merge_demo.png", "demo_data", "demo_merger", "llava_merge_evaluation", "llava-64"}
    assert (tmp_path / "demo_merger" / "metrics.json").exists()


@pytest.mark.parametrize("command", commands_of(*FOR_7B))
def test_the_commands_for_7b_have_settings_that_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    given = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    settings = load_settings(Path(words[words.index("train") + 1]), given)
    assert settings.backbone_settings.mllm_settings.model == SEVEN_B and Path(settings.data.train).suffix == ".json"
