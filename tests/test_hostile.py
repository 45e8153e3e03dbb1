# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders from anybody: none writes outside its folder, opens a pickle, runs code or asks the network.

Each case is a folder that was changed as somebody hostile would, which is loaded in every way and saved into again, in
a process whose every file, socket, import and program is seen (`sys.addaudithook`), and whose memory is limited.
"""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import agnostic, aware, make_processor, tiny_model, tiny_stock
from safetensors.torch import load_file, save_file
from transformers import LlavaProcessor
from typer.testing import CliRunner

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, LlavaMergeProcessor, MergerConfig
from llava_merge.cli import app
from llava_merge.demo import MERGERS, MODEL_DIR, PICTURE, find_merger
from llava_merge.model.compat import TRANSFORMERS_V5
from llava_merge.model.configuration_llava_merge import AUTO_MAP


pytestmark = [pytest.mark.core, pytest.mark.skipif(sys.platform == "win32", reason="memory is limited as on POSIX")]


def watched(root: Path, *arguments: str) -> list[dict]:
    """What tests/watched_loading.py tells of the folders in `root`."""
    (root / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(root / "home"), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    command = [sys.executable, Path(__file__).parent / "watched_loading.py", root, root / "model", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def save_base(folder: Path):
    tiny_model(aware(), train_merger=True).save_pretrained(folder)
    make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9).save_pretrained(folder)


class Evil:
    """A pickle that leaves a trace where it is opened."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


PATHS = [
    "../victim",
    "../../victim",
    "/etc/passwd",
    "~/.bashrc",
    "evil/repo",
    "http://127.0.0.1:9/x",
    "\\\\host\\share",
]
VALUES = [*PATHS, -1, 0, 10**12, 1e308, None, True, [], {}, [10**6, 10**6], {"a": "../victim"}, "evil/repo--code.Evil"]
CODE = "import os\nos.mkdir({trace!r})\nclass Evil: pass\n"


def edit(path: Path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def set_anywhere(rng: random.Random, fields: dict):
    """Another value for a random field at a random depth."""
    name = rng.choice(sorted(fields))
    if isinstance(fields[name], dict) and fields[name] and rng.random() < 0.8:
        set_anywhere(rng, fields[name])
    else:
        fields[name] = rng.choice(VALUES)


def merger_fields(fields: dict) -> dict:
    return fields.get("merger_config", fields)


def weights_as_pickles(folder: Path, victim: Path):
    for name in ("model.safetensors", "pytorch_model.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Evil(victim)))


def index_of(name: str):
    def change(folder: Path, victim: Path):
        shutil.copy(folder / "model.safetensors", victim / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "model.bin")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def with_code(folder: Path, victim: Path):
    for name in ("code.py", "modeling_llava_merge.py", "torch_helper.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(CODE.format(trace=str(victim / "ran")))
    remote = {auto: "code.Evil" for auto in (*AUTO_MAP, "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")}
    for path in folder.glob("*.json"):
        if path.name != "tokenizer.json":
            edit(
                path,
                lambda fields: fields.update(auto_map=remote, custom_generate="code", custom_pipelines={"x": remote}),
            )


def link(name: str, to: str):
    def change(folder: Path, victim: Path):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim / to)

    return change


def manifest(folder: Path, victim: Path):
    """What an earlier version replayed: the rest of a save that was killed."""
    (folder / ".saved").mkdir()
    (folder / ".saved" / ".files.json").write_text(json.dumps(["../../victim/moved", "../helper.py", "config.json"]))
    (folder / "helper.py").write_text("theirs")


def field(**fields):
    def change(folder: Path, victim: Path):
        edit(folder / "config.json", lambda config: config.update(fields))

    return change


def part_field(part: str, **fields):
    def change(folder: Path, victim: Path):
        edit(folder / "config.json", lambda config: config.setdefault(part, {}).update(fields))

    return change


def weights_named(name: str):
    """A config.json may say which files transformers reads."""

    def change(folder: Path, victim: Path):
        torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
        index = dict.fromkeys(load_file(folder / "model.safetensors"), "adapter_model.bin")
        (folder / "other.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        edit(folder / "config.json", lambda config: config.update(transformers_weights=name))

    return change


def missing(pattern: str, *changes, sharded=False):
    """Weights that are missing are made by whoever loads, in the sizes that config.json names."""

    def change(folder: Path, victim: Path):
        file = folder / "model.safetensors"
        weights = {key: tensor for key, tensor in load_file(file).items() if not re.search(pattern, key)}
        weights = weights or {"x": torch.zeros(1)}
        save_file(weights, file, metadata={"format": "pt"})
        if sharded:
            file.rename(folder / "shard.safetensors")
            index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for each in changes:
            each(folder, victim)

    return change


def merger_field(**fields):
    def change(folder: Path, victim: Path):
        edit(folder / "config.json", lambda config: merger_fields(config).update(fields))

    return change


def kernels(folder: Path, victim: Path):
    def change(config):
        for part in (config, *(part for part in config.values() if isinstance(part, dict))):
            part["_attn_implementation_internal"] = "evil/kernel"

    edit(folder / "config.json", change)


def template(folder: Path, victim: Path):
    for path in (folder / "chat_template.jinja",):
        path.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}{% endfor %}")
    for path in folder.glob("*.json"):
        if path.name.startswith(("tokenizer_config", "processor_config")):
            edit(path, lambda fields: fields.update(chat_template="{{ cycler.__init__.__globals__.os.mkdir('x') }}"))


CHANGES = {
    "manifest": manifest,
    "pickles": weights_as_pickles,
    "index outside": index_of("../victim/model.safetensors"),
    "index absolute": index_of("/etc/passwd"),
    "index pickle": index_of("model.bin"),
    "index backslash": index_of("..\\victim\\model.safetensors"),
    "code": with_code,
    "kernels": kernels,
    "kernel": field(attn_implementation="evil/kernel"),
    "kernel dict": field(attn_implementation={"text_config": "evil/kernel"}),
    "kernel wrapped": field(_attn_implementation="sdpa|evil/kernel"),
    "weights elsewhere": field(transformers_weights="../victim/model.safetensors"),
    "weights named": weights_named("other.safetensors.index.json"),
    "pickle named": weights_named("adapter_model.bin"),
    "backbone": part_field("vision_config", model_type="conditional_detr", d_model=32, backbone="evil/repo"),
    "backbone of timm": part_field("vision_config", model_type="timm_wrapper", architecture="hf-hub:evil/repo"),
    "vocabulary": missing("lm_head|embed_tokens", part_field("text_config", vocab_size=10**9)),
    "wide and missing": missing("merger", merger_field(internal_dim=1 << 17, query_grid=[1 << 17, 1])),
    "wide and sharded": missing(".", merger_field(internal_dim=1 << 17, query_grid=[1 << 17, 1]), sharded=True),
    "labels": field(num_labels=10**9),
    "labels of text": part_field("text_config", num_labels=10**9),
    "layers of text": part_field("text_config", num_hidden_layers=10**9),
    "layers of the tower": part_field("vision_config", num_hidden_layers=10**9),
    "layers of features": merger_field(feature_layers=[1] * 10**6),
    "layer of features": field(vision_feature_layer=[1] * 10**6),
    "name": field(_name_or_path="../victim", name_or_path="evil/repo"),
    "tower of text": merger_field(merger_type="cdpruner", question_aware=True, text_tower="evil/clip", query_grid=None),
    "map of queries": merger_field(query_grid=[10**6, 10**6]),
    "large map": merger_field(query_grid=[1024, 1024]),
    "wide": merger_field(internal_dim=10**6, num_heads=1),
    "many tokens": merger_field(num_merged_tokens=10**12),
    "mqt": merger_field(merger_type="mqt", num_merged_tokens=10**5, query_grid=None),
    "seed": merger_field(merger_type="random", seed=10**40, query_grid=None),
    "method": merger_field(merger_type="../victim"),
    "config linked": link("config.json", "config.json"),
    "weights linked": link("model.safetensors", "elsewhere"),
    "generation linked": link("generation_config.json", "elsewhere"),
    "tokenizer linked": link("tokenizer.json", "elsewhere"),
    "templates linked": link("additional_chat_templates", "."),
    "code linked": link("modeling_llava_merge.py", "elsewhere"),
    "new linked": link(".tokenizer_config.json.new", "elsewhere"),
    "template": template,
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Folder of all cases, and what each attempt on each of them came to."""
    root = tmp_path_factory.mktemp("hostile")
    save_base(root / "model")
    tiny_model(agnostic(), train_merger=True).save_merger(root / "merger")
    changes = {f"{kind} {name}": change for kind in ("merger", "model") for name, change in CHANGES.items()}
    for number in range(60):
        rng = random.Random(number)

        def change(folder, victim, rng=rng):
            files = [path for path in sorted(folder.glob("*.json")) if path.name != "tokenizer.json"]
            for _ in range(rng.randint(1, 3)):
                edit(rng.choice([folder / "config.json", *files]), lambda fields: set_anywhere(rng, fields))

        changes[f"{rng.choice(('merger', 'model'))} random {number}"] = change
    for name, change in changes.items():
        victim = root / f"case {name}" / "victim"
        victim.mkdir(parents=True)
        for file in ("elsewhere", "config.json"):
            shutil.copy(root / name.split()[0] / "config.json", victim / file)
        shutil.copytree(root / name.split()[0], victim.parent / "folder")
        change(victim.parent / "folder", victim)
    before = {path: path.read_bytes() for path in root.glob("*/victim/*")}
    rows = watched(root)
    assert len({row["case"] for row in rows}) == len(changes) > 100
    return before, rows


def test_no_folder_writes_outside_opens_a_pickle_runs_code_or_asks_the_network(cases):
    before, rows = cases
    seen = [(row["case"], row["attempt"], row["seen"]) for row in rows if row["seen"]]
    assert not seen, "\n".join(map(str, seen))
    after = {path: path.read_bytes() for path in before}
    assert after == before
    assert {path for folder in {path.parent for path in before} for path in folder.iterdir()} == before.keys()


def test_no_folder_takes_the_machines_memory(cases):
    if not TRANSFORMERS_V5:  # 4.57 asks for the memory of each weight, which it then does not use
        cases = cases[0], [row for row in cases[1] if "vocabulary" not in row["case"]]
    words = ("MemoryError", "not enough memory", "can't allocate", "Unable to allocate", "maximum recursion")
    assert not [row for row in cases[1] if any(word in row["result"] for word in words)]


@pytest.mark.parametrize(
    "change, message",
    [
        ("pickles", "truncated or not a safetensors file"),
        ("index outside", "only safetensors in its folder are read"),
        ("index absolute", "only safetensors in its folder are read"),
        ("index backslash", "only safetensors in its folder are read"),
        ("index pickle", "only safetensors in its folder are read"),
        ("kernels", "whose code would run"),
        ("map of queries", "has to be a whole number from 1 to"),
        ("many tokens", "has to be a whole number from 1 to"),
        ("seed", "seed=1000"),
        ("wide and sharded", "a matrix of both has more than"),
        ("method", "merger_type='../victim' does not exist"),
    ],
)
def test_what_is_hostile_is_refused_by_name(cases, change, message):
    results = {row["case"]: row["result"] for row in cases[1] if row["attempt"] in ("load_merger", "model")}
    for kind in ("merger", "model"):
        assert results[f"case {kind} {change}"].startswith("ValueError"), results[f"case {kind} {change}"]
        assert message in results[f"case {kind} {change}"]


@pytest.mark.parametrize(
    "change, message",
    [
        ("weights named", "has no model.safetensors that can be had"),
        ("pickle named", "has no model.safetensors that can be had"),
        ("backbone", "may fetch a backbone from the Hub"),
        ("backbone of timm", "may fetch a backbone from the Hub"),
        pytest.param(
            *("vocabulary", "lacks weights of this model"),
            marks=pytest.mark.skipif(not TRANSFORMERS_V5, reason="4.57 asks for the memory of each weight before"),
        ),
        ("layers of text", "asks for 1000000000 layers"),
        ("layers of the tower", "asks for 1000000000 layers"),
        ("layers of features", "asks for 1000000 layers"),
        ("layer of features", "asks for 1000000 layers"),
    ],
)
def test_what_a_hostile_model_asks_for_is_refused_by_name(cases, change, message):
    (row,) = [row for row in cases[1] if row["case"] == f"case model {change}" and row["attempt"] == "model"]
    assert row["result"].startswith("ValueError") and message in row["result"], row["result"]


def test_the_watch_sees(tmp_path):
    """The folders would be harmless if the process that loads them were blind."""
    save_base(tmp_path / "model")
    (tmp_path / "case probe" / "folder").mkdir(parents=True)
    rows = watched(tmp_path, "probe")
    assert len(rows) == 8 and all(row["seen"] for row in rows), rows


@pytest.mark.parametrize("config_class", [LlavaMergeConfig, MergerConfig])
@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:attention"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"__attn_implementation_internal": "evil/kernel"},
        {"_experts_implementation_internal": "evil/kernel"},
        {"attn_implementation": {"": "sdpa", "vision_config": "sdpa|evil/kernel"}},
        {"text_config": {"model_type": "llama", "_attn_implementation_internal": "evil/kernel"}},
        {"vision_config": {"model_type": "clip_vision_model", "attn_implementation": "evil/kernel"}},
        {"merger_config": {"_attn_implementation_internal": "evil/kernel"}},
        {"text_config": {"layers": [{"_attn_implementation": "evil/kernel"}]}},
    ],
)
def test_kernels_that_a_configuration_names_are_refused(config_class, fields, tmp_path):
    """CVE-2026-4372 of transformers 4.56 to 5.2: they would be fetched and run without trust_remote_code."""
    config = {"model_type": config_class.model_type, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (lambda: config_class.from_pretrained(tmp_path), lambda: config_class.from_dict(config)):
        with pytest.raises(ValueError, match="implementation.*evil/kernel.*whose code would run"):
            read()


def test_an_attention_implementation_is_the_callers_to_choose(tmp_path):
    tiny_model(agnostic()).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda config: config["text_config"].update(_attn_implementation_internal="eager"))
    model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.model.language_model.config._attn_implementation == "eager"


def test_code_that_a_stock_checkpoint_names_is_not_handed_on(tmp_path):
    """Loaded without trust, saved and pushed, it would be run by whoever trusts the one who pushed."""
    tiny_stock().save_pretrained(tmp_path / "stock")
    edit(tmp_path / "stock" / "config.json", lambda config: config.update(auto_map={"AutoModel": "evil/repo--x.Evil"}))
    model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "stock", merger_config=agnostic())
    model.save_pretrained(tmp_path / "saved")
    assert "evil" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_text_tower_is_fetched_for_the_caller_alone(tmp_path):
    fields = {**aware(), "merger_type": "cdpruner"}
    tiny_model(fields).save_pretrained(tmp_path / "model")
    tiny_model(fields).save_merger(tmp_path / "merger")
    for name in ("model", "merger"):
        edit(tmp_path / name / "config.json", lambda config: merger_fields(config).update(text_tower="no/clip"))
    message = "text_tower='no/clip' cannot be loaded: .*is not fetched unless you ask for it: `hf download no/clip`"
    for load in (
        lambda: LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model"),
        lambda: tiny_model(agnostic()).load_merger(tmp_path / "merger"),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    with pytest.raises(ValueError, match="text_tower='no/clip' cannot be loaded") as refused:
        LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model", merger_config={"text_tower": "no/clip"})
    assert "is not fetched" not in str(refused.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock LLaVA, with a merger and a link to it beside it."""
    folder = tmp_path_factory.mktemp("inputs") / "base"
    tiny_stock().save_pretrained(folder)
    make_processor(processor_class=LlavaProcessor).save_pretrained(folder)
    tiny_model(agnostic(), train_merger=True).save_merger(folder.parent / "merger")
    (folder.parent / "linked").symlink_to(folder)
    return folder


@pytest.mark.newest
@pytest.mark.parametrize("output", ["base", "merger", ".", "base/deeper", "other/../base", "linked"])
@pytest.mark.parametrize("command", ["convert", "evaluate", "benchmark", "train", "demo"])
def test_no_command_replaces_what_it_was_given_to_read(base, command, output):
    folder = base.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments = {
        "convert": [base, "--merger", folder / "merger", "--out"],
        "evaluate": ["demo", "--model", base, "--merger", folder / "merger", "--output"],
        "benchmark": [base, "--merger", folder / "merger", "--output"],
        "train": [write_settings(base, folder / output), "--set", f"training.output_dir={folder / output}"],
        "demo": ["--model", base, "--merger", folder / "merger", "--output"],
    }[command]
    arguments = [command, *map(str, arguments), *([] if command == "train" else [str(folder / output)])]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "is, holds or lies in" in done.output, done.output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def write_settings(base: Path, output: Path) -> Path:
    settings = base.parent.parent / "settings.yaml"
    settings.write_text(f"""
backbone_settings: {{mllm_settings: {{model: {base}, merger: {base.parent / "merger"}}}}}
data: {{train: nowhere.jsonl}}
training: {{output_dir: {output}}}
""")
    return settings


@pytest.mark.newest
@pytest.mark.parametrize("named", ["by a field", "by a merger"])
@pytest.mark.parametrize("command", ["convert", "evaluate", "benchmark", "train", "demo"])
def test_no_command_replaces_a_text_tower(base, clip_folder, command, named, tmp_path):
    clip, merger = shutil.copytree(clip_folder, tmp_path / "clip"), tmp_path / "merger"
    tiny_model({**aware(9), "merger_type": "cdpruner", "text_tower": str(clip)}).save_merger(merger)
    name = f"cdpruner:text_tower={clip}" if named == "by a field" else str(merger)
    output = clip / {"demo": "demo.png", "convert": "new"}.get(command, "")  # of a full folder convert says that first
    arguments = {
        "convert": [base, "--num-merged-tokens", 9, "--merger", name, "--out", output],
        "evaluate": ["demo", "--model", base, "--num-merged-tokens", 9, "--merger", name, "--output", output],
        "benchmark": [base, "--num-merged-tokens", 9, "--merger", name, "--output", output],
        "demo": ["--model", base, "--num-merged-tokens", 9, "--merger", name, "--output", output],
        "train": [tmp_path / "settings.yaml"],
    }[command]
    conversations = [{"from": "human", "value": "what color ?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": conversations}]))
    mllm = {"model": str(base), **({"merger": str(merger)} if named == "by a merger" else {})}
    method = {} if named == "by a merger" else {"merger_type": "cdpruner", "text_tower": str(clip)}
    settings = {"backbone_settings": {"mllm_settings": mllm}, "data": {"train": str(tmp_path / "train.json")}}
    settings |= {"method_settings": method, "training": {"output_dir": str(output), "use_cpu": True}}
    (tmp_path / "settings.yaml").write_text(json.dumps({**settings, "budgets": {"train": [9]}}))
    before = {path: path.read_bytes() for path in clip.iterdir()}
    done = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert done.exit_code == 2 and f"holds or lies in {clip}, which is read" in done.stderr, done.output
    assert {path: path.read_bytes() for path in clip.iterdir()} == before


@pytest.mark.newest
def test_the_demo_does_not_replace_what_it_shows_by_default(monkeypatch):
    monkeypatch.setattr("llava_merge.training.pictures.save_picture", lambda *arguments: None)
    for output in (PICTURE, MODEL_DIR / "demo.png", Path(find_merger(MERGERS[0])) / "demo.png"):
        done = CliRunner().invoke(app, ["demo", "--output", str(output)])
        assert done.exit_code == 2 and "is, holds or lies in" in done.stderr, done.output
