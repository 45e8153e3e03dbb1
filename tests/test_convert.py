# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`llava-merge convert`: a checkpoint of a stock LLaVA and a merger, without loading the LLaVA."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    BOS_ID,
    agnostic,
    as_snapshot,
    aware,
    listen_to_ctrl_c,
    make_processor,
    pixels,
    prompts,
    tiny_model,
    tiny_stock,
)
from hub_server import HubServer, run_python
from safetensors.torch import load_file, save_file
from test_hub import BLOCK_PACKAGE
from typer.testing import CliRunner

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.cli import app
from llava_merge.demo import MODEL_DIR, find_merger
from llava_merge.serving.convert import convert
from llava_merge.serving.shards import INDEX


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock LLaVA in several files, of which some hold neither merger nor projector."""
    folder = tmp_path_factory.mktemp("stock")
    tiny_stock().save_pretrained(folder, max_shard_size="40KB")
    make_processor().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A question-aware merger with a projector of its own."""
    model = tiny_model({**aware(9), "attention_mass": 0.0}, train_merger=True)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(2)
    model.save_merger(folder := tmp_path_factory.mktemp("merger"), projector=True)
    return folder


def load(folder, **kwargs):
    model, info = LlavaMergeForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **kwargs
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def assert_equal(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    fields = [model.config.merger_config.to_dict() for model in (one, other)]
    assert fields[0] == fields[1]


@pytest.mark.core
class TestConvert:
    def test_it_loads_as_base_and_merger_do(self, base, trained, tmp_path):
        convert(str(base), tmp_path / "out", str(trained), 4)
        model, reference = load(tmp_path / "out"), load(base, merger=str(trained))
        reference.set_num_merged_tokens(4)
        assert_equal(model, reference)
        processor = LlavaMergeProcessor.from_pretrained(tmp_path / "out")
        assert processor.num_merged_tokens == 4 and processor.chat_template == make_processor().chat_template
        batch = {**prompts([1, 2], 4), "pixel_values": pixels(3)}
        assert torch.equal(model(**batch).logits, reference(**batch).logits)

    @pytest.mark.parametrize("template", ["plain", "with bos", "two"])
    def test_chats_begin_as_other_prompts_do(self, template, base, trained, tmp_path, picture):
        """Servers tokenize a chat without special tokens."""
        shutil.copytree(base, tmp_path / "base")
        processor = make_processor(adds_bos=True)
        plain = processor.chat_template
        templates = {"plain": plain, "with bos": "{{ bos_token }}" + plain, "two": {"default": plain, "other": plain}}
        processor.chat_template = templates[template]
        processor.save_pretrained(tmp_path / "base")
        convert(str(tmp_path / "base"), tmp_path / "out", str(trained), 4)
        served = LlavaMergeProcessor.from_pretrained(tmp_path / "out")
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color ?"}]}]
        for name in ("default", "other") if template == "two" else (None,):
            text = served.apply_chat_template(messages, served.chat_template[name] if name else None)
            assert text.count("<s>") == 1 and text.startswith("<s>")
        text = served.apply_chat_template(messages, add_generation_prompt=True)
        ids = served(images=picture, text=text)["input_ids"][0]
        stock = LlavaMergeProcessor.from_pretrained(tmp_path / "base", num_merged_tokens=4)
        wanted = text if template == "with bos" else text.removeprefix("<s>")
        assert ids == stock(images=picture, text=wanted)["input_ids"][0] and ids.count(BOS_ID) == 1

    def test_files_without_the_projector_are_hard_links(self, base, trained, tmp_path):
        convert(str(base), tmp_path / "out", str(trained))
        inodes = {path.stat().st_ino for path in base.glob("*.safetensors")}
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        linked = [path for path in files if path.stat().st_ino in inodes]
        with_projector = [
            path for path in base.glob("*.safetensors") if "multi_modal_projector" in str(load_file(path))
        ]
        assert len(linked) == len(inodes) - len(with_projector) and len(files) == len(inodes) + 1
        names = [name for path in files for name in load_file(path)]
        assert len(names) == len(set(names))  # engines read every file, whatever the index says
        weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
        assert sorted(weight_map) == sorted(names)
        assert all(name in load_file(tmp_path / "out" / file) for name, file in weight_map.items())

    def test_a_copy_where_there_can_be_no_link(self, base, trained, tmp_path, monkeypatch):
        def refuse(*arguments):
            raise OSError("Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        convert(str(base), tmp_path / "out", str(trained), 9)
        assert_equal(load(tmp_path / "out"), load(base, merger=str(trained)))

    @pytest.mark.parametrize("merger", ["tome:position_ids=packed", "none"])
    def test_a_method_without_weights(self, merger, base, tmp_path):
        convert(str(base), tmp_path / "out", merger, None if merger == "none" else 9)
        model = load(tmp_path / "out")
        config = model.config.merger_config
        assert config.merger_type == merger.partition(":")[0]
        if merger != "none":
            assert (config.num_merged_tokens, config.position_ids) == (9, "packed")
            fields = {"merger_type": "tome", "num_merged_tokens": 9, "position_ids": "packed", "attention_mass": 0.0}
            batch = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
            assert torch.equal(model(**batch).logits, load(base, merger_config=fields)(**batch).logits)

    @pytest.mark.parametrize(
        ("merger", "is_said"),
        [("tome", True), ("fixed_pooling:num_heads=4", True), ("tome:attention_mass=0", False), ("none", False)],
    )
    def test_it_says_that_an_untrained_merger_has_lost_its_mass(self, merger, is_said, base, tmp_path, caplog):
        convert(str(base), tmp_path / "out", merger)
        said = [record.getMessage() for record in caplog.records if "attention_mass=0" in record.getMessage()]
        assert len(said) == is_said and load(tmp_path / "out").config.merger_config.attention_mass == 0

    def test_a_saved_method_without_training_loses_it_too(self, base, tmp_path, caplog):
        load(base, merger_config={"merger_type": "tome", "num_merged_tokens": 9}).save_merger(tmp_path / "saved")
        convert(str(base), tmp_path / "out", str(tmp_path / "saved"))
        assert caplog.text.count("is untrained and converted with attention_mass=0") == 1
        assert load(tmp_path / "out").config.merger_config.attention_mass == 0

    def test_a_trained_merger_is_converted_without_a_word(self, base, trained, tmp_path, caplog):
        convert(str(base), tmp_path / "out", str(trained), 9)
        assert not [record for record in caplog.records if "attention_mass" in record.getMessage()]

    def test_a_fresh_v3_pools_averages(self, base, tmp_path):
        convert(str(base), tmp_path / "out", "fixed_pooling:num_heads=4", 9)
        batch = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
        fields = {"merger_type": "average_pooling", "num_merged_tokens": 9, "attention_mass": 0}
        pooled = load(base, merger_config=fields)
        torch.testing.assert_close(load(tmp_path / "out")(**batch).logits, pooled(**batch).logits, atol=1e-5, rtol=1e-5)

    def test_a_question_aware_merger_learns_the_marks_of_the_template(self, base, tmp_path):
        convert(str(base), tmp_path / "out", "fixed_pooling:num_heads=4,question_aware=true", 9)
        assert load(tmp_path / "out").config.merger_config.question_end_token_ids

    def test_it_loads_without_the_package(self, base, trained, tmp_path, monkeypatch):
        convert(str(base), tmp_path / "out", str(trained), 9)
        batch = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
        save_file(
            {**batch, "logits": load(tmp_path / "out")(**batch).logits.detach()}, tmp_path / "expected.safetensors"
        )
        monkeypatch.chdir(tmp_path)
        code = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("out", trust_remote_code=True)
assert AutoProcessor.from_pretrained("out", trust_remote_code=True).num_merged_tokens == 9
tensors = load_file("expected.safetensors")
expected = tensors.pop("logits")
torch.testing.assert_close(model(**tensors).logits, expected, atol=1e-5, rtol=1e-5)
"""
        with HubServer() as server:
            run_python(BLOCK_PACKAGE + code, server.environment(tmp_path / "home"))

    def test_half_precision_of_the_base_is_kept(self, trained, tmp_path):
        stock = tiny_stock().to(torch.bfloat16)
        stock.save_pretrained(tmp_path / "base")
        make_processor().save_pretrained(tmp_path / "base")
        convert(str(tmp_path / "base"), tmp_path / "out", str(trained), 9)
        for options in ({"dtype": torch.float32}, {"dtype": "auto"}):
            models = [
                LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "out", **options),
                LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "base", merger=str(trained), **options),
            ]
            assert_equal(*models)
            assert models[0].lm_head.weight.dtype == (
                options["dtype"] if options["dtype"] != "auto" else torch.bfloat16
            )


def test_what_is_written_again_replaces_the_old_one(base, trained, tmp_path):
    convert(str(base), tmp_path / "out", str(trained), 9)
    before = {path: path.read_bytes() for path in base.iterdir()}
    convert(str(base), tmp_path / "out", "tome", 4)
    assert load(tmp_path / "out").config.merger_config.merger_type == "tome"
    assert before == {path: path.read_bytes() for path in base.iterdir()}  # links are replaced, not written through


def test_it_takes_the_weights_that_from_pretrained_takes(base, trained, tmp_path):
    """Of a folder that holds several, model.safetensors before an index."""
    folder, stock = shutil.copytree(base, tmp_path / "base"), tiny_stock()
    with torch.no_grad():
        stock.lm_head.weight.mul_(2)
    stock.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    convert(str(folder), tmp_path / "out", str(trained), 9)
    assert_equal(load(tmp_path / "out"), load(folder, merger=str(trained)))


def test_an_index_that_was_left_over_is_not_read(base, tmp_path):
    tiny_stock().save_pretrained(tmp_path / "base")
    make_processor().save_pretrained(tmp_path / "base")
    shutil.copy(base / INDEX, tmp_path / "base")  # of shards that are gone
    convert(str(tmp_path / "base"), tmp_path / "out", "tome", 9)
    assert load(tmp_path / "out").config.merger_config.merger_type == "tome"


def test_a_base_may_be_a_snapshot_of_the_hubs_cache(base, trained, tmp_path):
    snapshot = as_snapshot(base, tmp_path / "models--org--base")
    convert(str(snapshot), tmp_path / "out", str(trained), 9)
    assert_equal(load(tmp_path / "out"), load(base, merger=str(trained)))


def test_weights_may_be_links_to_another_folder(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.rename(tmp_path / "elsewhere" / file.name)
        file.symlink_to(tmp_path / "elsewhere" / file.name)
    convert(str(tmp_path / "base"), tmp_path / "out", "tome", 9)
    fields = {"merger_type": "tome", "num_merged_tokens": 9, "attention_mass": 0.0}
    assert_equal(load(tmp_path / "out"), load(base, merger_config=fields))


def test_a_folder_with_other_files_is_left_alone(base, trained, tmp_path):
    (tmp_path / "out").mkdir()
    convert(str(base), tmp_path / "out", "tome", 9)  # an empty one is fine
    convert(str(base), tmp_path / "out", str(trained), 9)  # and one of before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    for name in ("notes", "stock", "list"):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint of llava_merge, which could be replaced"):
            convert(str(base), tmp_path / name, "tome", 9)
        assert len(list((tmp_path / name).iterdir())) == 1


class TestRefused:
    @pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "additional_chat_templates"])
    def test_a_base_with_a_link_out_of_it(self, name, base, tmp_path):
        """What it leads to would be an ordinary file of the output, and be published with it."""
        shutil.copytree(base, tmp_path / "cloned")
        (tmp_path / "private").mkdir()
        secret = tmp_path / "private" / "secret.jinja"
        secret.write_text("secret")
        (tmp_path / "cloned" / name).unlink(missing_ok=True)
        (tmp_path / "cloned" / name).symlink_to(secret.parent if "." not in name else secret)
        with pytest.raises(ValueError, match=f"{name}.* is a link to .*secret.jinja, outside of the folder"):
            convert(str(tmp_path / "cloned"), tmp_path / "out", "tome", 9)
        assert not (tmp_path / "out").exists()

    def test_a_model_that_has_a_merger(self, tmp_path):
        tiny_model(agnostic()).save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="has a merger already. Give the stock LLaVA"):
            convert(str(tmp_path / "base"), tmp_path / "out", "tome", 9)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("merger", "num_merged_tokens", "message"),
        [
            ("nothing", 9, "neither a method"),
            ("tome:attention_mass=1", 9, "attention_mass=1: serving engines cannot .* has none unless asked for"),
            ("tome", 37, "more than the 36 visual tokens"),
            ("tome", 0, "num_merged_tokens=0"),
            ("none", 9, "merger_type='none' keeps all tokens"),
            (str(MODEL_DIR), 9, "not of a merger"),
            (
                find_merger("agnostic"),
                9,
                "has weights .* this model needs .* Use a merger that was trained with this",
            ),
        ],
    )
    def test_a_merger_that_does_not_fit(self, merger, num_merged_tokens, message, base, tmp_path):
        with pytest.raises(ValueError, match=message):
            convert(str(base), tmp_path / "out", merger, num_merged_tokens)
        assert not list(tmp_path.iterdir())

    def test_an_adapter(self, base, tmp_path):
        shutil.copytree(base, tmp_path / "base")
        (tmp_path / "base" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        with pytest.raises(ValueError, match="holds an adapter, which convert would leave out. Merge it"):
            convert(str(tmp_path / "base"), tmp_path / "out", "tome", 9)

    def test_a_base_that_lacks_weights(self, base, tmp_path):
        tiny_stock().save_pretrained(tmp_path / "base")
        make_processor().save_pretrained(tmp_path / "base")
        (file,) = (tmp_path / "base").glob("*.safetensors")
        weights = load_file(file)
        gone = next(name for name in weights if "q_proj" in name and "language" in name)
        save_file({name: tensor for name, tensor in weights.items() if name != gone}, file)
        with pytest.raises(ValueError, match="lacks weights of this model, which would stay random: .*q_proj"):
            convert(str(tmp_path / "base"), tmp_path / "out", "tome", 9)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match="truncated"):
            convert(str(tmp_path / "base"), tmp_path / "out", "tome", 9)
        file.unlink()
        with pytest.raises(ValueError, match="lacks model.safetensors: a checkpoint with safetensors is needed"):
            convert(str(tmp_path / "base"), tmp_path / "out", "tome", 9)


class TestCommand:
    def test_it_says_what_it_wrote(self, base, tmp_path):
        arguments = [
            "convert",
            str(base),
            "--merger",
            "tome",
            "--num-merged-tokens",
            "9",
            "--out",
            str(tmp_path / "out"),
        ]
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert json.loads(done.stdout) == {
            "out": str(tmp_path / "out"),
            "merger_type": "tome",
            "num_merged_tokens": 9,
        }
        assert CliRunner().invoke(app, arguments).stdout == f"{tmp_path / 'out'}: tome, 9 tokens\n"

    def test_ctrl_c_leaves_nothing(self, base, tmp_path):
        slow = """
import sys, time, signal
from llava_merge.serving import convert
write_shards = convert.write_shards
def write_and_wait(*arguments):
    write_shards(*arguments)
    print("written", flush=True)
    time.sleep(60)
convert.write_shards = write_and_wait
from llava_merge.cli import app
app()
"""
        arguments = [
            "convert",
            str(base),
            "--merger",
            "tome",
            "--num-merged-tokens",
            "9",
            "--out",
            str(tmp_path / "out"),
        ]
        running = subprocess.Popen(
            [sys.executable, "-c", slow, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=listen_to_ctrl_c,
        )
        assert running.stdout.readline() == "written\n"
        assert any(path.name.startswith(".out") for path in tmp_path.iterdir())
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 130 and errors.strip().endswith("Interrupted.")
        assert not list(tmp_path.iterdir())
