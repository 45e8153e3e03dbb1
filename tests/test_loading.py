# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    NUM_PATCHES,
    agnostic,
    aware,
    image_features,
    make_processor,
    pixels,
    prompts,
    tiny_config,
    tiny_model,
    tiny_stock,
    used_weights,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
)

import llava_merge
from llava_merge import (
    LlavaMergeConfig,
    LlavaMergeForConditionalGeneration,
    LlavaMergeModel,
    LlavaMergeProcessor,
    MergerConfig,
    TokenMerger,
)
from llava_merge.demo import MODEL_DIR
from llava_merge.model.compat import LOADS_SAVED_MODULES_OF_ADAPTERS, TRANSFORMERS_V5


pytestmark = pytest.mark.core

SAVED_ON_4_57 = Path(__file__).parent / "data" / "saved_on_4.57"
needs_saved_modules = pytest.mark.skipif(not LOADS_SAVED_MODULES_OF_ADAPTERS, reason="refused, for it loses the merger")
BATCH = {**prompts([1, 2, 0], 9), "pixel_values": pixels(3)}


def old_layout(state_dict: dict) -> dict:
    """Keys as in llava-hf/llava-1.5-7b-hf."""
    renamed = {}
    for key, tensor in state_dict.items():
        key = key.replace("model.vision_tower.vision_model.", "vision_tower.vision_model.")
        key = key.replace("model.vision_tower.", "vision_tower.vision_model.")
        key = key.replace("model.multi_modal_projector.", "multi_modal_projector.")
        key = key.replace("model.language_model.", "language_model.model.")
        renamed[key.replace("lm_head.", "language_model.lm_head.") if key.startswith("lm_head") else key] = tensor
    return {key: tensor.contiguous() for key, tensor in renamed.items()}


@pytest.fixture(scope="session")
def stock_dir(tmp_path_factory) -> Path:
    """A tiny stock LLaVA checkpoint, keys and config as llava-hf publishes them."""
    directory = tmp_path_factory.mktemp("llava-tiny-hf")
    tiny_config().save_pretrained(directory)
    save_file(old_layout(tiny_stock().state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def merger_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mergers") / "trained"
    tiny_model(aware(), train_merger=True).save_merger(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llava-merge-tiny")
    tiny_model(aware(), train_merger=True).save_pretrained(directory)
    return directory


def assert_stock_weights(model):
    expected = used_weights(tiny_stock())
    actual = {key: tensor for key, tensor in model.state_dict().items() if ".merger." not in key}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


class TestOwnCheckpoint:
    def test_it_comes_back_equal(self, model_dir):
        expected = tiny_model(aware(), train_merger=True)(**BATCH).logits
        for loader in (
            LlavaMergeForConditionalGeneration,
            AutoModelForImageTextToText,
            llava_merge.AutoModelForVision2Seq,
        ):
            model = loader.from_pretrained(model_dir)
            assert type(model) is LlavaMergeForConditionalGeneration
            assert torch.equal(model(**BATCH).logits, expected)

    def test_config_values_other_than_defaults_survive(self, tmp_path):
        fields = aware(7, init="random", internal_dim=8, query_grid=[3, 5])
        tiny_model(fields, vision_feature_layer=-3).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is LlavaMergeConfig and type(config.merger_config) is MergerConfig
        assert config.vision_feature_layer == -3 and config.image_seq_length == 7
        for name, value in {**fields, "vision_dim": 32, "text_dim": 64}.items():
            assert getattr(config.merger_config, name) == value, name

    def test_auto_model_is_the_headless_model(self, model_dir):
        model = AutoModel.from_pretrained(model_dir)
        assert type(model) is LlavaMergeModel
        full = LlavaMergeForConditionalGeneration.from_pretrained(model_dir)
        assert torch.equal(model(**BATCH).last_hidden_state, full.model(**BATCH).last_hidden_state)

    def test_sharded_safetensors(self, tmp_path):
        model = tiny_model(aware(), train_merger=True)
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
        again = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)

    def test_merger_config_overrides_what_was_saved(self, model_dir):
        model = LlavaMergeForConditionalGeneration.from_pretrained(model_dir, merger_config={"num_merged_tokens": 4})
        assert model.config.merger_config.query_grid == [3, 3]
        assert image_features(model(**prompts([1], 4), pixel_values=pixels(1))).shape == (4, 64)
        model = LlavaMergeForConditionalGeneration.from_pretrained(model_dir, merger_config={"merge_ratio": 0.5})
        assert model.config.merger_config.num_merged_tokens == 18
        pooling = {"merger_type": "average_pooling", "num_merged_tokens": 9, "num_heads": 4}
        model = LlavaMergeForConditionalGeneration.from_pretrained(model_dir, merger_config=pooling)
        assert not list(model.model.merger.parameters())

    def test_auto_classes_take_a_budget_too(self, model_dir):
        model = AutoModelForImageTextToText.from_pretrained(model_dir, merger_config={"num_merged_tokens": 4})
        assert model.config.merger_config.num_merged_tokens == 4 == model.config.image_seq_length
        assert image_features(model(**prompts([1], 4), pixel_values=pixels(1))).shape == (4, 64)

    @pytest.mark.parametrize("fields", [{"init": "random"}, {"num_heads": 2}, {"question_aware": False}])
    def test_what_the_weights_were_trained_as_cannot_be_changed(self, model_dir, fields):
        with pytest.raises(ValueError, match=f"trained with {next(iter(fields))}=.* cannot be changed"):
            LlavaMergeForConditionalGeneration.from_pretrained(model_dir, merger_config=fields)

    def test_a_merger_replaces_one_of_the_same_type(self, model_dir, tmp_path):
        other = tiny_model(agnostic(4), train_merger=True)
        other.save_merger(tmp_path)
        model = LlavaMergeForConditionalGeneration.from_pretrained(model_dir, merger=str(tmp_path))
        batch = {**prompts([1, 2], 4), "pixel_values": pixels(3)}
        assert torch.equal(model(**batch).logits, other(**batch).logits)


class TestStockCheckpoint:
    def test_old_key_layout_misses_only_merger_weights(self, stock_dir):
        model, info = LlavaMergeForConditionalGeneration.from_pretrained(
            stock_dir, merger_config=aware(), output_loading_info=True
        )
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        merger_keys = {f"model.merger.{key}" for key in model.model.merger.state_dict()}
        assert set(info["missing_keys"]) == merger_keys
        assert_stock_weights(model)
        assert model.config.model_type == "llava_merge"
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_headless_model_too(self, stock_dir):
        model = LlavaMergeModel.from_pretrained(stock_dir, merger_config=aware())
        expected = used_weights(tiny_stock().model)
        assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected)

    @pytest.mark.parametrize("question_aware", [False, True])
    def test_fresh_merger_is_average_pooling(self, stock_dir, question_aware):
        fields = aware() if question_aware else agnostic()
        fresh = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=fields)
        pooling = {"merger_type": "average_pooling", "num_merged_tokens": 9, "num_heads": 4}
        pooled = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=pooling)
        torch.testing.assert_close(fresh(**BATCH).logits, pooled(**BATCH).logits, atol=1e-5, rtol=1e-5)

    def test_identity_equals_stock(self, stock_dir):
        model = LlavaMergeForConditionalGeneration.from_pretrained(
            stock_dir, merger_config={"merger_type": "none", "num_heads": 4}
        )
        batch = {**prompts([1, 2], NUM_PATCHES), "pixel_values": pixels(3)}
        assert torch.equal(model(**batch).logits, tiny_stock()(**batch).logits)

    def test_a_quarter_of_the_tokens_is_the_default(self, stock_dir):
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config={"num_heads": 4})
        assert model.config.merger_config.num_merged_tokens == 9 == model.config.image_seq_length

    def test_config_fields_can_be_given_as_in_stock(self, stock_dir):
        fields = {"merger_config": agnostic(), "vision_feature_layer": -3}
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, **fields)
        tower = tiny_stock().model.vision_tower
        hidden = tower(pixels(1), output_hidden_states=True).hidden_states[-3][:, 1:]
        assert torch.equal(model.get_vision_features(pixels(1)), hidden)

    def test_merger_checkpoint_is_laid_over_it(self, stock_dir, merger_dir):
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=str(merger_dir))
        assert torch.equal(model(**BATCH).logits, tiny_model(aware(), train_merger=True)(**BATCH).logits)

    def test_tied_embeddings_stay_tied(self, tmp_path):
        config = tiny_config(tie_word_embeddings=True)
        config.text_config.tie_word_embeddings = True
        config.save_pretrained(tmp_path)
        weights = old_layout(tiny_stock().state_dict())
        weights.pop("language_model.lm_head.weight")
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config=aware())
        assert model.lm_head.weight is model.get_input_embeddings().weight

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"])
    def test_dtype(self, stock_dir, dtype):
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=aware(), dtype=dtype)
        expected = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
    def test_device_map(self, stock_dir, merger_dir, device_map):
        model = LlavaMergeForConditionalGeneration.from_pretrained(
            stock_dir, merger=str(merger_dir), device_map=device_map
        )
        assert torch.equal(model(**BATCH).logits, tiny_model(aware(), train_merger=True)(**BATCH).logits)

    def test_offload_to_disk(self, model_dir, tmp_path):
        device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
        device_map |= {"model.merger": "disk", "model.language_model": "cpu"}
        model = LlavaMergeForConditionalGeneration.from_pretrained(
            model_dir, device_map=device_map, offload_folder=tmp_path
        )
        assert torch.equal(model(**BATCH).logits, tiny_model(aware(), train_merger=True)(**BATCH).logits)

    def test_built_on_meta(self):
        with torch.device("meta"):
            model = LlavaMergeForConditionalGeneration(tiny_model(aware()).config)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not list(model.model.merger.buffers())

    @pytest.mark.parametrize(
        "given, value_of",
        [
            ({"output_hidden_states": True}, lambda config: config.output_hidden_states),
            ({"text_config": {"rms_norm_eps": 0.5}}, lambda config: config.text_config.rms_norm_eps == 0.5),
            ({"image_token_id": 3}, lambda config: config.image_token_id == 3),
            ({"attn_implementation": "eager"}, lambda config: config._attn_implementation == "eager"),
            ({"vision_feature_select_strategy": "full"}, lambda c: c.vision_feature_select_strategy == "full"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_it_takes_what_stock_takes(self, stock_dir, given, value_of):
        stock = LlavaForConditionalGeneration.from_pretrained(stock_dir, **given)
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=agnostic(), **given)
        assert value_of(stock.config) and value_of(model.config)

    def test_a_config_may_be_a_folder_or_a_stock_config(self, stock_dir):
        fields = {"merger_config": agnostic(4)}
        for config in (str(stock_dir), LlavaConfig.from_pretrained(stock_dir), None):
            model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, config=config, **fields)
            assert type(model.config) is LlavaMergeConfig and model.config.image_seq_length == 4
            assert_stock_weights(model)

    def test_attention_implementation_reaches_the_merger(self, stock_dir):
        for asked, merger in (("eager", "eager"), ({"text_config": "eager"}, "sdpa")):
            model = LlavaMergeForConditionalGeneration.from_pretrained(
                stock_dir, merger_config=agnostic(), attn_implementation=asked
            )
            assert model.model.merger.config._attn_implementation == merger
            assert model.config.text_config._attn_implementation == "eager"

    def test_a_merger_loaded_later_gets_it_too(self, merger_dir):
        model = tiny_model(agnostic())
        model.set_attn_implementation("eager")
        model.load_merger(merger_dir)
        assert model.config.merger_config._attn_implementation == model.model.merger.config._attn_implementation
        assert model.model.merger.config._attn_implementation == "eager"

    @pytest.mark.parametrize(
        "fields, starts_as",
        [
            ({}, "equals average pooling"),
            ({"init": "random"}, "random"),
            ({"merger_type": "salient_pooling"}, "means of patches alike"),
            ({"merger_type": "c_abstractor"}, "random"),
        ],
    )
    def test_a_fresh_merger_is_one_line_of_information_and_no_warning(self, stock_dir, caplog, fields, starts_as):
        with caplog.at_level(logging.INFO, "transformers"):  # as by transformers.logging.set_verbosity_info()
            LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=agnostic(**fields))
        said = {record.getMessage() for record in caplog.records if ".llava_merge." in record.name}
        state = f"{fields.get('merger_type', 'fixed_pooling')}, fresh: {starts_as}"
        assert said == {f"{stock_dir}: 36 → 9 tokens, {state}, positions source, attention mass 1.0"}
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_merger_that_was_saved_fresh_is_not_called_trained(self, stock_dir, tmp_path, caplog):
        tiny_model(agnostic()).save_merger(tmp_path / "fresh")
        tiny_model(agnostic(trained_num_tokens=[9, 4])).save_merger(tmp_path / "trained")
        for name, state in (("fresh", "as it was saved"), ("trained", "trained with 9, 4 tokens")):
            with caplog.at_level(logging.INFO, "transformers"):
                LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=str(tmp_path / name))
            assert f"36 → 9 tokens, fixed_pooling, {state}, positions source" in caplog.text

    def test_a_configuration_may_be_an_object_or_a_name(self, stock_dir):
        given = MergerConfig(merger_type="tome", num_merged_tokens=4, vision_dim=32, text_dim=64)
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=given)
        assert (model.config.merger_config.merger_type, model.config.merger_config.num_merged_tokens) == ("tome", 4)
        assert LlavaMergeConfig.from_pretrained(stock_dir, merger_config="tome").merger_config.merger_type == "tome"

    @pytest.mark.parametrize("name", ["./gone", "../gone", "~/gone", "/gone", "my/own/merger", "tomee"])
    def test_a_folder_of_a_merger_that_is_not_there(self, name, stock_dir):
        with pytest.raises(ValueError, match=f"merger='{name}': there is no such folder, bundled merger or method"):
            LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=name)

    def test_another_architecture_is_refused(self, tmp_path):
        LlavaNextConfig().save_pretrained(tmp_path)
        for loader in (LlavaMergeForConditionalGeneration, LlavaMergeModel, LlavaMergeConfig):
            with pytest.raises(ValueError, match="model_type='llava_next'; only LLaVA"):
                loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_merge_tokens": 4}, "no field num_merge_tokens"),
        ({"num_heads": 2}, "trained with num_heads=4, which cannot be changed to 2"),
        ({"query_grid": [2, 2]}, r"trained with query_grid=\[3, 3\]"),
        ({"num_merged_tokens": 37}, "37 is more than the 36"),
        ({"merger_type": "nonsense"}, "'nonsense' does not exist"),
        ({"merger_type": "average_pooling", "question_aware": True}, "does not read the question"),
    ],
    ids=str,
)
def test_auto_classes_refuse_what_the_class_refuses(model_dir, fields, message):
    for loader in (LlavaMergeForConditionalGeneration, AutoModelForImageTextToText, LlavaMergeModel, AutoModel):
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(model_dir, merger_config=fields)


@pytest.mark.parametrize(
    "fields", [{"merge_ratio": 0.5}, {"merger_type": "average_pooling", "num_merged_tokens": 4}, {"query_grid": (3, 3)}]
)
def test_auto_classes_lay_a_merger_config_over_as_the_class_does(model_dir, fields):
    loaders = (LlavaMergeForConditionalGeneration, AutoModelForImageTextToText)
    models = [loader.from_pretrained(model_dir, merger_config=fields) for loader in loaders]
    assert models[0].config.to_dict() == models[1].config.to_dict()
    num_tokens = models[0].config.image_seq_length
    batch = {**prompts([1], num_tokens), "pixel_values": pixels(1)}
    assert torch.equal(models[0](**batch).logits, models[1](**batch).logits)


def test_the_feature_layer_may_be_changed_in_the_config():
    config = tiny_model(agnostic()).config
    config.vision_feature_layer = [-2, -3]
    assert (config.merger_config.vision_dim, config.merger_config.internal_dim) == (64, 32)
    model = LlavaMergeForConditionalGeneration(config)
    assert image_features(model(**prompts([1], 9), pixel_values=pixels(1))).shape == (9, 64)


class TestMergerCheckpoint:
    def test_it_is_config_and_safetensors(self, merger_dir):
        assert {"config.json", "model.safetensors"} <= {path.name for path in merger_dir.iterdir()}
        merger = AutoModel.from_pretrained(merger_dir)
        assert type(merger) is TokenMerger
        expected = tiny_model(aware(), train_merger=True).model.merger.state_dict()
        assert all(torch.equal(merger.state_dict()[key], expected[key]) for key in expected)

    def test_load_merger_replaces_type_and_budget(self, merger_dir, tmp_path):
        model = tiny_model({"merger_type": "average_pooling", "num_merged_tokens": 4, "num_heads": 4})
        model.load_merger(merger_dir)
        assert model.config.merger_config.num_merged_tokens == 9 == model.config.image_seq_length
        assert model.config.merger_config is model.model.merger.config
        expected = tiny_model(aware(), train_merger=True)(**BATCH).logits
        assert torch.equal(model(**BATCH).logits, expected)
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForImageTextToText.from_pretrained(tmp_path)(**BATCH).logits, expected)

    def test_a_whole_model_is_no_merger(self, model_dir):
        with pytest.raises(ValueError, match="'llava_merge', not of a merger. .*save_merger"):
            tiny_model(aware()).load_merger(model_dir)

    def test_an_adapter_is_no_merger(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="has no config.json of a model. A PEFT adapter .* as the model"):
            tiny_model(aware()).load_merger(tmp_path)

    def test_an_agnostic_merger_fits_a_language_model_of_another_width(self, tmp_path):
        config = MergerConfig(num_merged_tokens=9, num_heads=4, vision_dim=32, text_dim=4096)
        TokenMerger(config).save_pretrained(tmp_path)
        model = tiny_model(aware(4))
        model.load_merger(tmp_path)
        assert image_features(model(**prompts([1], 9), pixel_values=pixels(1))).shape == (9, 64)

    def test_a_full_precision_merger_works_in_a_half_precision_model(self):
        model = tiny_model(aware(), train_merger=True).to(torch.bfloat16)
        model.model.merger.float()
        output = model(**{**BATCH, "pixel_values": pixels(3).to(torch.bfloat16)})
        assert image_features(output).dtype == torch.bfloat16 and output.logits.isfinite().all()

    def test_it_takes_the_dtype_of_the_model(self, merger_dir):
        model = tiny_model(agnostic()).to(torch.bfloat16)
        model.load_merger(merger_dir)
        assert {parameter.dtype for parameter in model.model.merger.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("widths", [{"vision_dim": 64, "text_dim": 64}, {"vision_dim": 32, "text_dim": 128}])
    def test_other_widths_are_refused_and_the_model_is_left_as_it_was(self, stock_dir, tmp_path, widths):
        config = MergerConfig(num_merged_tokens=4, num_heads=4, question_aware=True, **widths)
        TokenMerger(config).save_pretrained(tmp_path)
        name, width = next((n, w) for n, w in widths.items() if w != {"vision_dim": 32, "text_dim": 64}[n])
        message = f"The merger has {name}={width}, this model needs {name}={width // 2}"
        model = tiny_model(aware(), train_merger=True)
        before, merger, budget = model(**BATCH).logits, model.model.merger, model.config.to_dict()
        with pytest.raises(ValueError, match=message):
            model.load_merger(tmp_path)
        assert model.model.merger is merger and model.config.to_dict() == budget
        assert torch.equal(model(**BATCH).logits, before)
        with pytest.raises(ValueError, match=message):
            LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=str(tmp_path))

    def test_a_failed_save_leaves_the_old_checkpoint(self, tmp_path, monkeypatch):
        model = tiny_model(aware(), train_merger=True)
        model.save_merger(tmp_path / "merger")
        before = {path.name: path.read_bytes() for path in (tmp_path / "merger").iterdir()}

        def fail_half_way(directory, *args, **kwargs):
            (Path(directory) / "model.safetensors").write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(model.model.merger, "_write_files", fail_half_way)
        with pytest.raises(OSError, match="No space left"):
            model.save_merger(tmp_path / "merger")
        assert {path.name: path.read_bytes() for path in (tmp_path / "merger").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["merger"]


class TestAdapter:
    @pytest.fixture
    def adapter(self, model_dir, tmp_path):
        """An adapter dir of the saved model with trained LoRA and merger weights, and the logits it has to give."""
        peft = pytest.importorskip("peft")
        model = LlavaMergeForConditionalGeneration.from_pretrained(model_dir)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["merger"])
        config.exclude_modules = r".*(merger|vision_tower).*"
        model = peft.get_peft_model(model, config)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("lora" in name for name, _ in trained) and any("merger" in name for name, _ in trained)
        with torch.no_grad():
            for _, parameter in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model(**BATCH).logits

    @needs_saved_modules
    @pytest.mark.parametrize("loader", [LlavaMergeForConditionalGeneration, AutoModelForImageTextToText])
    def test_adapter_directory_loads(self, adapter, loader):
        directory, expected = adapter
        torch.testing.assert_close(loader.from_pretrained(directory)(**BATCH).logits, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.skipif(LOADS_SAVED_MODULES_OF_ADAPTERS, reason="works there")
    def test_an_adapter_whose_merger_would_be_left_out_is_refused(self, adapter, model_dir):
        directory, expected = adapter
        for load in (LlavaMergeForConditionalGeneration.from_pretrained, tiny_model(aware()).load_adapter):
            with pytest.raises(ValueError, match="holds merger .*PeftModel.from_pretrained"):
                load(str(directory))
        peft = pytest.importorskip("peft")
        base = LlavaMergeForConditionalGeneration.from_pretrained(model_dir)
        model = peft.PeftModel.from_pretrained(base, directory).eval()
        torch.testing.assert_close(model(**BATCH).logits, expected, atol=1e-5, rtol=1e-5)

    @needs_saved_modules
    def test_adapter_of_a_stock_base_needs_the_merger_it_was_trained_with(self, adapter, stock_dir):
        directory, expected = adapter
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(stock_dir)})
        )
        with pytest.raises(ValueError, match="Pass merger_config"):
            LlavaMergeForConditionalGeneration.from_pretrained(directory)
        model = LlavaMergeForConditionalGeneration.from_pretrained(directory, merger_config=aware())
        torch.testing.assert_close(model(**BATCH).logits, expected, atol=1e-5, rtol=1e-5)

    @needs_saved_modules
    def test_a_merger_over_an_adapter_is_refused(self, adapter, merger_dir):
        with pytest.raises(ValueError, match="would replace the merger .* model.load_adapter"):
            LlavaMergeForConditionalGeneration.from_pretrained(adapter[0], merger=str(merger_dir))

    @needs_saved_modules
    def test_the_budget_can_be_changed_with_an_adapter(self, adapter):
        model = LlavaMergeForConditionalGeneration.from_pretrained(adapter[0])
        model.set_num_merged_tokens(4)
        assert image_features(model(**prompts([1], 4), pixel_values=pixels(1))).shape == (4, 64)

    @needs_saved_modules
    def test_a_truncated_base_is_refused_with_its_path(self, adapter, model_dir, tmp_path):
        directory, _ = adapter
        base = Path(shutil.copytree(model_dir, tmp_path / "base"))
        (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
        with pytest.raises(ValueError, match=f"{base}/model.safetensors"):
            LlavaMergeForConditionalGeneration.from_pretrained(directory)

    def test_a_pickled_adapter_is_never_opened(self, adapter):
        directory, _ = adapter
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
        for loader in (LlavaMergeForConditionalGeneration, AutoModelForImageTextToText):
            with pytest.raises(ValueError, match="An adapter_model.bin is a pickle"):
                loader.from_pretrained(directory)


class TestBrokenCheckpoint:
    @pytest.fixture
    def copy(self, model_dir, tmp_path) -> Path:
        return Path(shutil.copytree(model_dir, tmp_path / "copy"))

    @staticmethod
    def without(directory: Path, part: str):
        weights = load_file(directory / "model.safetensors")
        kept = {key: tensor for key, tensor in weights.items() if part not in key}
        assert len(kept) < len(weights)
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})

    @pytest.mark.parametrize("part", ["multi_modal_projector", "layers.1.mlp", "merger.method.pool_queries", "lm_head"])
    def test_missing_weights_raise_unless_asked_for(self, copy, part):
        self.without(copy, part)
        with pytest.raises(ValueError, match="lacks weights .*allow_missing_weights"):
            LlavaMergeForConditionalGeneration.from_pretrained(copy)
        LlavaMergeForConditionalGeneration.from_pretrained(copy, allow_missing_weights=True)

    def test_missing_merger_weights_of_a_merger_checkpoint_raise(self, merger_dir, tmp_path):
        directory = Path(shutil.copytree(merger_dir, tmp_path / "copy"))
        self.without(directory, "k_proj")
        with pytest.raises(ValueError, match="lacks weights .*k_proj"):
            TokenMerger.from_pretrained(directory)

    @pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
    def test_broken_safetensors_are_refused_with_their_path(self, copy, merger_dir, damage):
        path = copy / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"x" * 500, "empty": b""}[damage])
        with pytest.raises(ValueError, match=f"{path}.*truncated or not a safetensors file"):
            LlavaMergeForConditionalGeneration.from_pretrained(copy)
        merger = Path(shutil.copytree(merger_dir, copy / "merger")) / "model.safetensors"
        merger.write_bytes(path.read_bytes())
        with pytest.raises(ValueError, match=f"{merger}.*truncated"):
            tiny_model(aware()).load_merger(merger.parent)

    def test_a_pickle_is_never_opened(self, copy):
        class Exploit:
            def __reduce__(self):
                return (Path.touch, (copy / "exploited",))

        (copy / "model.safetensors").unlink()
        torch.save({"weight": Exploit()}, copy / "pytorch_model.bin")
        with pytest.raises(
            ValueError, match="no model.safetensors that can be had .*is a pickle, which is never opened"
        ):
            LlavaMergeForConditionalGeneration.from_pretrained(copy)
        with pytest.raises(
            ValueError, match="no model.safetensors that can be had .*is a pickle, which is never opened"
        ):
            TokenMerger.from_pretrained(copy, config=tiny_model(aware()).config.merger_config)
        assert not (copy / "exploited").exists()

    def test_merger_and_merger_config_exclude_each_other(self, stock_dir, merger_dir):
        with pytest.raises(ValueError, match="leave out either"):
            LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=str(merger_dir), merger_config=aware())


def test_a_checkpoint_saved_on_4_57_loads_here():
    """tests/data/save.py wrote it, with the logits, on transformers 4.57.6."""
    model = AutoModelForImageTextToText.from_pretrained(SAVED_ON_4_57)
    expected = load_file(SAVED_ON_4_57 / "expected.safetensors")["logits"]
    question_mask = BATCH["attention_mask"].bool()  # 0.1.0 knew no marks of the chat template
    logits = model(**BATCH, question_mask=question_mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert model.config.merger_config.question_aware


def test_weights_of_a_fresh_model_are_initialised(stock_dir):
    """No parameter is left as uninitialised memory, whichever way the model is built."""
    config = tiny_model(aware(init="random")).config
    built = LlavaMergeForConditionalGeneration(config)
    loaded = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=aware(init="random"))
    for model in (built, loaded):
        for name, parameter in model.model.merger.named_parameters():
            assert parameter.isfinite().all() and parameter.abs().max() < 10, name
        assert 0.01 < model.model.merger.method.pool_queries.std() < 0.03


def test_the_configuration_of_a_model_s_merger_is_read_from_the_model_s_folder(tmp_path):
    """As CLIPVisionConfig reads that of a CLIP."""
    model = tiny_model(aware(), train_merger=True)
    model.save_pretrained(tmp_path)
    assert MergerConfig.from_pretrained(tmp_path).to_dict() == model.config.merger_config.to_dict()
    with pytest.raises(ValueError, match="is a checkpoint of 'llava_merge', not of a merger"):
        TokenMerger.from_pretrained(tmp_path)


def test_weights_of_a_whole_tower_go_into_one_without_its_last_layers():
    model, stock = tiny_model(agnostic()), tiny_stock()
    tower = stock.model.vision_tower
    weights = {name: weight + 1 for name, weight in tower.state_dict().items()}
    assert len(weights) > len(model.model.vision_tower.state_dict())
    model.model.vision_tower.load_state_dict(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.vision_tower.state_dict().items())
    copy.deepcopy(model).model.vision_tower.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.model.vision_tower.load_state_dict({**weights, "other": torch.ones(1)})


def test_a_configuration_by_position():
    stock = tiny_stock().config
    config = LlavaMergeConfig(stock.vision_config, stock.text_config)
    assert config.vision_config.to_dict() == stock.vision_config.to_dict()
    assert config.text_config.to_dict() == stock.text_config.to_dict()


@pytest.mark.parametrize("merger", [None, "cpu"])
def test_a_device_map_of_a_llava_s_parts(tmp_path, merger):
    model = tiny_model(agnostic(), train_merger=True)
    model.save_pretrained(tmp_path)
    parts = dict.fromkeys(
        ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"), "cpu"
    )
    parts |= {} if merger is None else {"model.merger": merger}
    in_layers = {name.replace("projector", "projector.linear_1"): device for name, device in parts.items()}
    in_layers |= {"model.multi_modal_projector.linear_2": "cpu"}
    for device_map in (parts, in_layers):
        loaded = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


def test_arguments_of_a_configuration_by_position():
    """As 4.57's LlavaConfig takes them."""
    stock = tiny_stock().config
    config = LlavaMergeConfig(stock.vision_config, stock.text_config, 4, "relu", "full", -1)
    found = config.image_token_id, config.projector_hidden_act, config.vision_feature_select_strategy
    assert (*found, config.vision_feature_layer) == (4, "relu", "full", -1)
    with pytest.raises(TypeError, match="takes at most 6 more by position: image_token_index"):
        LlavaMergeConfig(stock.vision_config, stock.text_config, *range(7))


@pytest.mark.parametrize("own_type", [False, True])
def test_a_configuration_may_be_subclassed(own_type):
    fields = {"model_type": "somebodys_llava"} if own_type else {}
    subclass = type("Subclass", (LlavaMergeConfig,), fields)
    stock = tiny_stock().config
    config = subclass(vision_config=stock.vision_config, text_config=stock.text_config, merger_config=agnostic(9))
    assert config.merger_config.num_merged_tokens == 9 and config.model_type == fields.get("model_type", "llava_merge")
    assert subclass.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.skipif(TRANSFORMERS_V5, reason="writes safetensors alone")
def test_pickles_are_not_written(tmp_path):
    for save in (tiny_model(agnostic()).save_pretrained, tiny_model(agnostic()).model.merger.save_pretrained):
        with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
            save(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        tiny_model(agnostic()).push_to_hub("somebody/model", safe_serialization=False)  # asks no Hub


class TestWordsOfAMerger:
    """What is meant is done, or said."""

    def test_a_method_by_its_name(self, tmp_path):
        tiny_stock().save_pretrained(tmp_path)
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config="tome")
        assert model.config.merger_config.merger_type == "tome"
        model.set_merger("strided")
        assert model.config.merger_config.merger_type == "strided"
        with pytest.raises(ValueError, match="merger_type='tomato'"):
            model.set_merger("tomato")

    def test_a_method_or_a_bundled_merger_as_merger(self, tmp_path):
        tiny_stock().save_pretrained(tmp_path)
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger="tome")
        assert model.config.merger_config.merger_type == "tome"
        with pytest.raises(ValueError, match="'tome' is a method and no checkpoint of a merger: call"):
            model.load_merger("tome")
        bundled = LlavaMergeForConditionalGeneration.from_pretrained(MODEL_DIR, merger="salient")
        assert bundled.config.merger_config.merger_type == "salient_pooling"
        assert bundled.config.merger_config.trained_num_tokens
        bundled.load_merger("agnostic")
        assert bundled.config.merger_config.merger_type == "fixed_pooling"

    def test_a_field_where_none_is(self, tmp_path):
        for fields in ({"num_merged_tokens": 64}, {"attention_mass": 1.0}):
            ((name, value),) = fields.items()
            with pytest.raises(ValueError, match=rf"{name}={value} is a field of the merger: pass merger_config="):
                LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, **fields)

    def test_no_number(self):
        model = tiny_model(agnostic())
        with pytest.raises(ValueError, match="num_merged_tokens=None: give a number; to keep all tokens"):
            model.set_num_merged_tokens(None)

    @pytest.mark.parametrize("budget", [NUM_PATCHES + 1, 10**9])
    def test_more_tokens_than_an_image_has(self, budget, picture):
        processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9)
        with pytest.raises(ValueError, match=f"an image has {NUM_PATCHES} visual tokens, and merging makes no more"):
            processor(images=picture, text="<image> what", num_merged_tokens=budget)
        processor.num_merged_tokens = budget
        with pytest.raises(ValueError, match=f"an image has {NUM_PATCHES} visual tokens"):
            processor(images=picture, text="<image> what")
