# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Pushing and loading through the real huggingface_hub client, against a server on this machine."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import agnostic, as_snapshot, aware, make_processor, pixels, prompts, tiny_model
from hub_server import HubServer, run_python
from safetensors.torch import load, load_file, save_file

import llava_merge
from llava_merge import LlavaMergeProcessor
from llava_merge.model.configuration_llava_merge import QUESTION_METHODS


pytestmark = pytest.mark.core

PACKAGE = Path(llava_merge.__file__).parent / "model"  # what travels
SAVED_BY_0_1_0 = Path(__file__).parent / "data" / "saved_on_4.57"
ENTRY_FILES = (
    "configuration_llava_merge",
    "modeling_llava_merge",
    "modeling_token_merger",
    "processing_llava_merge",
)
BATCH = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
BLOCK_PACKAGE = """
import sys
sys.modules["llava_merge"] = None  # import llava_merge raises ImportError
"""
COMPARE = """
import torch
from safetensors.torch import load_file
tensors = load_file({file!r})
expected = tensors.pop("logits")
torch.testing.assert_close(model(**tensors).logits, expected, atol=1e-5, rtol=1e-5)
assert type(model).__module__.startswith("transformers_modules"), type(model)
"""


def relative_imports(file: Path) -> set[str]:
    return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", file.read_text(), flags=re.MULTILINE))


def all_relative_imports(entry: Path) -> set[str]:
    found, queue = set(), [entry]
    while queue:
        new = relative_imports(queue.pop()) - found
        found |= new
        queue += [entry.with_name(f"{name}.py") for name in new]
    return found


def check_code(folder: Path, entries: set[str], methods: set[str], most_files: int, most_bytes: int):
    """The folder holds the code of its entry files and of `methods`, and no more."""
    code = {file.stem: file for file in folder.glob("*.py")}
    reached = set()
    for entry in entries:
        # transformers 4.57 copies no deeper than the imports of the entry file when it loads a folder
        assert all_relative_imports(code[entry]) == relative_imports(code[entry]) <= code.keys(), entry
        reached |= {entry, *relative_imports(code[entry])}
    assert code.keys() == reached
    assert {name for name in code if name.startswith("merging_")} == {"merging_base", "merging_grid", *methods}
    size = sum(file.stat().st_size for file in code.values())
    assert len(code) <= most_files and size <= most_bytes, (len(code), size)


ALSO_NEEDED = {
    "cdpruner": {"merging_selection", "relevance"},
    "mmtok": {"merging_selection", "relevance"},
    "fixed_pooling": {"merging_attention"},
    "image_resize": set(),
    "average_pooling": set(),
    "quecc": {"merging_attention", "merging_fixed_pooling", "merging_tokenpacker"},
    "visionzip": {"merging_selection"},
}


@pytest.mark.parametrize("name", ALSO_NEEDED)
def test_a_checkpoint_brings_the_code_of_its_own_method_alone(name, tmp_path):
    """The aim is 15 files and 150 KB, 8 and 60 of a merger alone; raise no figure here."""
    fields = {"merger_type": name, "num_merged_tokens": 9, "num_heads": 4}
    fields |= {"feature_layers": [1, 2]} if name == "quecc" else {}
    fields |= {"question_end_token_ids": [[6]]} if name in QUESTION_METHODS else {}
    model = tiny_model(fields)
    model.save_pretrained(tmp_path / "model")
    model.save_merger(tmp_path / "merger")
    more = len(ALSO_NEEDED[name])
    methods = {f"merging_{name}", *ALSO_NEEDED[name]} - {"relevance"}
    entries = {"configuration_llava_merge", "modeling_llava_merge", "modeling_token_merger"}
    check_code(tmp_path / "model", entries, methods, 14 + more, 270_000)
    check_code(tmp_path / "merger", entries - {"modeling_llava_merge"}, methods, 8 + len(methods), 150_000)
    assert (tmp_path / "model" / "relevance.py").exists() == ("relevance" in ALSO_NEEDED[name])
    model.save_pretrained(tmp_path / "model")  # over the one before
    check_code(tmp_path / "model", entries, methods, 14 + more, 270_000)


@pytest.mark.parametrize("entry", ENTRY_FILES)
def test_files_that_travel_import_only_the_core_dependencies(entry):
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub", "packaging"}
    standard = {
        "ast",
        "contextlib",
        "contextvars",
        "copy",
        "collections",
        "dataclasses",
        "functools",
        "importlib",
        "inspect",
        "itertools",
        "json",
        "math",
        "operator",
        "os",
        "pathlib",
        "re",
        "shutil",
        "string",
        "sys",
        "tempfile",
        "threading",
        "uuid",
    }
    for name in {entry, *all_relative_imports(PACKAGE / f"{entry}.py")}:
        source = (PACKAGE / f"{name}.py").read_text()
        packages = re.findall(
            r"^\s*(?:from|import)\s+([a-z_0-9]+)(?:\.\S+)?(?:\s+import|\s*$)", source, flags=re.MULTILINE
        )
        assert set(packages) <= allowed | standard, name


@pytest.mark.parametrize("name", ["aware", "cdpruner", "tome"])
def test_code_without_the_package_answers_saves_and_loads_as_the_package(name, server, tmp_path, monkeypatch):
    """Also of a checkpoint that does not know the marks of a question: the code finds them in its chat template."""
    fields = {"merger_type": name, "num_merged_tokens": 9, "num_heads": 4}
    fields = {**aware(), "question_end_token_ids": None} if name == "aware" else fields
    folder, file = tmp_path / "saved", tmp_path / "expected.safetensors"
    tiny_model(fields, train_merger=True).save_pretrained(folder)
    make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9).save_pretrained(folder)
    assert (folder / "question_marks.py").exists() == (name != "tome")
    model = llava_merge.LlavaMergeForConditionalGeneration.from_pretrained(folder)
    assert (model.config.merger_config.question_end_token_ids is None) == (name == "tome")
    batch = prompts([1, 2], 9)
    batch["question_mask"] = batch["attention_mask"].bool()
    batch["pixel_values"] = pixels(3)
    save_file({**batch, "logits": model(**batch).logits.detach()}, file)
    monkeypatch.chdir(tmp_path)
    code = f"""
from transformers import AutoModel, AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert model.config.merger_config.question_end_token_ids == {model.config.merger_config.question_end_token_ids!r}
model.model.merger.save_pretrained("merger")
AutoModel.from_pretrained("merger", trust_remote_code=True)
model.save_pretrained("again")
for name in ("set_merger", "load_merger", "save_merger", "set_question_marks"):
    try:
        getattr(model, name)("tome")
    except ValueError as error:
        assert "Install the package llava_merge" in str(error), error
    else:
        raise SystemExit(name)
model = AutoModelForImageTextToText.from_pretrained("again", trust_remote_code=True)
"""
    run_python(BLOCK_PACKAGE + code + COMPARE.format(file=str(file)), server.environment(tmp_path / "home"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model with its processor, and a file with inputs and the logits they have to give."""
    directory = tmp_path_factory.mktemp("saved") / "llava-merge-tiny"
    model = tiny_model(aware(), train_merger=True)
    model.save_pretrained(directory)
    make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9).save_pretrained(directory)
    file = directory.parent / "expected.safetensors"
    save_file({**BATCH, "logits": model(**BATCH).logits.detach()}, file)
    return directory, file


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


AUTO_CLASSES = ["AutoModelForImageTextToText"]
AUTO_CLASSES += [] if llava_merge.model.compat.TRANSFORMERS_V5 else ["AutoModelForVision2Seq"]


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_a_saved_folder_loads_without_the_package(saved, auto_class, server, tmp_path, monkeypatch):
    directory, file = saved
    monkeypatch.chdir(tmp_path)
    code = f"""
from transformers import {auto_class}, AutoModel, AutoProcessor
model = {auto_class}.from_pretrained({str(directory)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(directory)!r}, trust_remote_code=True)
assert processor.num_merged_tokens == 9 and type(processor).__name__ == "LlavaMergeProcessor"
assert type(AutoModel.from_pretrained({str(directory)!r}, trust_remote_code=True)).__name__ == "LlavaMergeModel"
"""
    run_python(BLOCK_PACKAGE + code + COMPARE.format(file=str(file)), server.environment(tmp_path / "home"))


def test_a_pushed_repo_loads_without_the_package_and_can_be_saved_again(saved, server, tmp_path, monkeypatch):
    directory, file = saved
    push = f"""
import llava_merge
model = llava_merge.LlavaMergeForConditionalGeneration.from_pretrained({str(directory)!r})
model.push_to_hub("org/llava-merge")
llava_merge.LlavaMergeProcessor.from_pretrained({str(directory)!r}).push_to_hub("org/llava-merge")
"""
    run_python(push, server.environment(tmp_path / "pusher"))
    files = server.repos["org/llava-merge"]
    code = {file.name for file in directory.glob("*.py")}
    assert (
        len(code) > 10
        and code | {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= files.keys()
    )
    card = files["README.md"].decode()
    assert "- token-merging" in card and "- merge\n" not in card
    assert 'from_pretrained("org/llava-merge", trust_remote_code=True)' in card and "| tokens per image | 9 |" in card

    monkeypatch.chdir(tmp_path)
    load = """
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("org/llava-merge", trust_remote_code=True)
assert AutoProcessor.from_pretrained("org/llava-merge", trust_remote_code=True).num_merged_tokens == 9
"""
    again = """
model.save_pretrained("again")
model = AutoModelForImageTextToText.from_pretrained("again", trust_remote_code=True)
"""
    compare = COMPARE.format(file=str(file))
    run_python(BLOCK_PACKAGE + load + compare + again + compare, server.environment(tmp_path / "loader"))


def test_mergers_are_pushed_alone_and_loaded_over_a_base(saved, server, tmp_path):
    directory, file = saved
    push = f"""
import llava_merge
model = llava_merge.LlavaMergeForConditionalGeneration.from_pretrained({str(directory)!r})
model.push_merger_to_hub("org/some-merger")
"""
    run_python(push, server.environment(tmp_path / "pusher"))
    files = server.repos["org/some-merger"]
    code = {name for name in files if name.endswith(".py")}
    assert files.keys() - {".gitattributes"} == code | {"config.json", "model.safetensors", "README.md"}
    for part in ("modeling_llava_merge", "loading", "generation", "vision_encoding", "processing"):
        assert not any(part in name for name in code)
    merger = tiny_model(aware(), train_merger=True).model.merger.state_dict()
    pushed = load(files["model.safetensors"])
    assert pushed.keys() == merger.keys() and all(torch.equal(pushed[key], merger[key]) for key in merger)
    assert "token-merging" in files["README.md"].decode() and 'merger="org/some-merger"' in files["README.md"].decode()

    other = tmp_path / "other"
    tiny_model({"merger_type": "average_pooling", "num_merged_tokens": 4, "num_heads": 4}).save_pretrained(other)
    use = f"""
import torch
from transformers import AutoModel
from safetensors.torch import load_file
from llava_merge import LlavaMergeForConditionalGeneration, TokenMerger
tensors = load_file({str(file)!r})
expected = tensors.pop("logits")
model = LlavaMergeForConditionalGeneration.from_pretrained({str(other)!r}, merger="org/some-merger")
torch.testing.assert_close(model(**tensors).logits, expected, atol=1e-5, rtol=1e-5)
model = LlavaMergeForConditionalGeneration.from_pretrained({str(other)!r})
model.load_merger("org/some-merger")
torch.testing.assert_close(model(**tensors).logits, expected, atol=1e-5, rtol=1e-5)
assert type(AutoModel.from_pretrained("org/some-merger")) is TokenMerger
"""
    run_python(use, server.environment(tmp_path / "loader"))


def test_a_merger_repo_loads_without_the_package(saved, server, tmp_path, monkeypatch):
    directory, _ = saved
    merger = tmp_path / "merger"
    tiny_model(aware(), train_merger=True).save_merger(merger)
    monkeypatch.chdir(tmp_path)
    code = f"""
import torch
from transformers import AutoModel
merger = AutoModel.from_pretrained({str(merger)!r}, trust_remote_code=True)
assert merger(torch.randn(1, 36, 32)).merged_features.shape == (1, 9, 32)
"""
    run_python(BLOCK_PACKAGE + code, server.environment(tmp_path / "home"))


def test_a_checkpoint_of_0_1_0_loads_with_the_code_of_today(saved, server, tmp_path, monkeypatch):
    directory, _ = saved
    old = Path(shutil.copytree(SAVED_BY_0_1_0, tmp_path / "old"))
    logits = load_file(old / "expected.safetensors")["logits"]
    (old / "expected.safetensors").unlink()
    for code in directory.glob("*.py"):
        shutil.copy(code, old)
    batch = prompts([1, 2, 0], 9)
    batch["question_mask"] = batch["attention_mask"].bool()  # 0.1.0 knew no marks of the chat template
    save_file({**batch, "pixel_values": pixels(3), "logits": logits}, tmp_path / "expected.safetensors")
    monkeypatch.chdir(tmp_path)
    code = f"""
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(old)!r}, trust_remote_code=True)
"""
    compare = COMPARE.format(file=str(tmp_path / "expected.safetensors")).replace("1e-5", "1e-4")
    run_python(BLOCK_PACKAGE + code + compare, server.environment(tmp_path / "home"))


@pytest.mark.parametrize("method", ["push_to_hub", "push_merger_to_hub"])
def test_a_users_model_card_is_never_overwritten(saved, server, tmp_path, method):
    directory, _ = saved
    server.put("org/mine", {"README.md": b"---\nlicense: mit\n---\n\n# My own words\n"})
    push = f"""
import llava_merge
llava_merge.LlavaMergeForConditionalGeneration.from_pretrained({str(directory)!r}).{method}("org/mine")
"""
    run_python(push, server.environment(tmp_path / "pusher"))
    assert "model.safetensors" in server.repos["org/mine"]
    assert server.repos["org/mine"]["README.md"].decode().endswith("# My own words\n")


def test_a_pickled_adapter_on_the_hub_is_never_opened(server, tmp_path):
    """Neither from the Hub nor, offline, from the cache."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "target_modules": ["q_proj"]}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.bin": pickle.dumps(Evil())}
    server.put("org/pickled", files)
    code = """
import huggingface_hub
from llava_merge import LlavaMergeForConditionalGeneration
huggingface_hub.snapshot_download("org/pickled")
try:
    LlavaMergeForConditionalGeneration.from_pretrained("org/pickled")
except ValueError as error:
    assert "An adapter_model.bin is a pickle" in str(error), error
else:
    raise SystemExit("it was loaded")
"""
    for offline in ("0", "1"):
        run_python(code, {**server.environment(tmp_path / "home"), "HF_HUB_OFFLINE": offline})
    assert not (tmp_path / "opened").exists()


OWN_METHOD = """
from llava_merge import MergeOutput, MergingMethod, register_merging_method

@register_merging_method("first_tokens")
class FirstTokens(MergingMethod):
    training_free = True

    def forward(self, features, context):
        return MergeOutput(merged_features=features[:, : context.num_tokens])
"""
PUSH_OF_ONE_OF_OWN = """
import sys
sys.path.insert(0, {folder!r})
import first_tokens
from llava_merge import LlavaMergeForConditionalGeneration
model = LlavaMergeForConditionalGeneration.from_pretrained({saved!r}, merger_config={{
    "merger_type": "first_tokens", "num_merged_tokens": 4, "num_heads": 4}})
model.save_pretrained("out", push_to_hub=True, repo_id="org/own", commit_message="Mine", revision="next")
model.model.merger.save_pretrained("own-merger", push_to_hub=True)
"""


def test_a_save_that_pushes_brings_the_file_of_its_method_to_its_branch(saved, server, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "first_tokens.py").write_text(OWN_METHOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.txt").write_text("not of this save")
    monkeypatch.chdir(tmp_path)
    code = PUSH_OF_ONE_OF_OWN.format(folder=str(tmp_path / "code"), saved=str(saved[0]))
    environment = server.environment(tmp_path / "home")
    environment["PYTHONPATH"] = str(PACKAGE.parents[1])
    run_python(code, environment)
    pushed = server.branch("org/own", "next")
    assert pushed["first_tokens.py"].decode() == OWN_METHOD
    assert {"config.json", "model.safetensors", "modeling_llava_merge.py", "README.md"} <= pushed.keys()
    assert "private.txt" not in pushed and not server.repos["org/own"], "main stays as it was, without a card too"
    assert {"first_tokens.py", "config.json", "README.md"} <= server.repos["tester/own-merger"].keys()


@pytest.mark.parametrize("block", [BLOCK_PACKAGE, ""], ids=["without the package", "where it is not imported"])
def test_a_method_of_one_s_own_loads_as_code_of_a_checkpoint(block, saved, tmp_path):
    """Its file was saved with it; nobody imports it before, and no file of the package knows it."""
    (tmp_path / "first_tokens.py").write_text(
        OWN_METHOD.replace("FirstTokens", "TokenMerger")
    )  # as a class of the code
    fields = {"merger_type": "first_tokens", "num_merged_tokens": 4, "num_heads": 4}
    save = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import first_tokens
from safetensors.torch import load_file, save_file
from llava_merge import LlavaMergeForConditionalGeneration
model = LlavaMergeForConditionalGeneration.from_pretrained({str(saved[0])!r}, merger_config={fields})
model.save_pretrained({str(tmp_path / "model")!r})
model.save_merger({str(tmp_path / "merger")!r})
batch = {{name: load_file({str(saved[1])!r})[name] for name in ("pixel_values",)}}
features = model.model.encode_images(**batch).pooler_output
save_file({{str(number): each.detach() for number, each in enumerate(features)}}, {str(tmp_path / "features")!r})
"""
    run_python(save, {"PYTHONPATH": str(PACKAGE.parents[1])})
    load = f"""
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
features = model.model.encode_images(load_file({str(saved[1])!r})["pixel_values"]).pooler_output
expected = load_file({str(tmp_path / "features")!r})
assert len(features) == len(expected)
assert all(torch.equal(each, expected[str(number)]) for number, each in enumerate(features))
merger = AutoModel.from_pretrained({str(tmp_path / "merger")!r}, trust_remote_code=True)
assert merger.config.merger_type == "first_tokens"
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert again.config.merger_config.merger_type == "first_tokens"
"""
    run_python(block + load, {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PACKAGE.parents[1])})


def test_push_leaves_what_it_does_not_replace(saved, server, tmp_path):
    """`llava-merge push` to a branch: other folders, variants and main's card stay, old shards go."""
    theirs = {
        "README.md": b"# Theirs\n",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "model.fp16.safetensors": b"half",
        "models/run/model.safetensors": b"deeper",
        "model_backup/model.safetensors": b"deeper",
    }
    server.put("org/full", theirs)
    push = f"""
from pathlib import Path
from llava_merge.serving.pushing import push_directory
push_directory(Path({str(saved[0])!r}), "org/full", revision="next")
"""
    run_python(push, server.environment(tmp_path / "pusher"))
    pushed = server.branch("org/full", "next")
    assert theirs.keys() - pushed.keys() == {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert pushed["model.safetensors"] == (saved[0] / "model.safetensors").read_bytes()
    assert b"# Theirs" in pushed["README.md"] and server.repos["org/full"] == theirs


@pytest.mark.parametrize("name", ["notes.txt", "README.md"])
def test_a_link_out_of_the_folder_is_not_published(name, saved, tmp_path):
    from llava_merge.serving.pushing import SavedFolder, push_directory

    shutil.copytree(saved[0], tmp_path / "cloned")
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "cloned" / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ValueError, match=f"{name} is a link to .*id_rsa, outside of the folder"):
        push_directory(tmp_path / "cloned", "org/no")  # before the Hub is asked, which is out of reach
    (tmp_path / "cloned" / name).unlink()
    (tmp_path / "cloned" / name).symlink_to(tmp_path / "cloned" / "config.json")
    assert name in SavedFolder.read(tmp_path / "cloned").files()


def test_links_of_a_snapshot_lead_into_the_blobs_of_its_repo(saved, tmp_path):
    from llava_merge.serving.pushing import SavedFolder

    snapshot = as_snapshot(saved[0], tmp_path / "models--org--x")
    assert "config.json" in SavedFolder.read(snapshot).files()
    as_snapshot(saved[0], tmp_path / "models--org--other")
    (snapshot / "notes.txt").symlink_to(tmp_path / "models--org--other" / "blobs" / "config.json")
    with pytest.raises(ValueError, match="notes.txt is a link to .*outside of the folder"):
        SavedFolder.read(snapshot).files()


@pytest.mark.parametrize("push", ["push_to_hub", "push_merger_to_hub"])
def test_a_push_with_an_unknown_option_is_refused_before_the_hub_is_asked(push, monkeypatch):
    """Before, the repo was made, and got its card."""
    monkeypatch.setattr("llava_merge.model.model_card.HfApi", None)
    with pytest.raises(ValueError, match="foo=1: a push takes .*commit_message, .*Leave it out"):
        getattr(tiny_model(agnostic()), push)("org/no", foo=1)
