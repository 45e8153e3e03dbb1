# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The projector that was trained with a merger travels in the merger's checkpoint."""

import json
import logging
import shutil

import pytest
import torch
from conftest import agnostic, aware, pixels, prompts, tiny_model, tiny_stock, used_weights
from hub_server import HubServer, run_python
from safetensors.torch import load, load_file, save_file
from torch import nn

from llava_merge import LlavaMergeForConditionalGeneration, TokenMerger
from llava_merge.model.checkpoint_saving import PROJECTOR


BATCH = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
MERGERS = pytest.mark.parametrize(
    "merger_config", [agnostic(9), {"merger_type": "average_pooling", "num_merged_tokens": 9}], ids=["V3", "average"]
)


def trained(merger_config: dict, **kwargs):
    """A model whose projector is not the stock model's."""
    model = tiny_model(merger_config, train_merger=True, **kwargs)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@MERGERS
def test_it_comes_back_with_the_merger(merger_config, stock_dir, tmp_path):
    model = trained(merger_config)
    model.save_merger(tmp_path / "merger", projector=True)
    loaded = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=tmp_path / "merger")
    assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)
    other = tiny_model(agnostic(4))
    other.load_merger(tmp_path / "merger")
    assert torch.equal(other(**BATCH).logits, model(**BATCH).logits)
    assert not other.config.merger_config.has_projector
    assert TokenMerger.from_pretrained(tmp_path / "merger").config.has_projector


@MERGERS
def test_without_it_the_models_own_stays(merger_config, stock_dir, tmp_path):
    model = trained(merger_config)
    model.save_merger(tmp_path / "merger")
    assert not (tmp_path / "merger" / PROJECTOR).exists()
    loaded = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=tmp_path / "merger")
    for key, tensor in used_weights(tiny_stock()).items():
        assert torch.equal(loaded.state_dict()[key], tensor)


@MERGERS
def test_a_save_without_it_removes_that_of_an_older_save(merger_config, tmp_path):
    model = trained(merger_config)
    for projector, expected in ((True, True), (False, False), (True, True)):
        model.save_merger(tmp_path / "merger", projector=projector)
        assert (tmp_path / "merger" / PROJECTOR).exists() == expected
        assert json.loads((tmp_path / "merger" / "config.json").read_text())["has_projector"] == expected


def test_one_that_came_with_the_merger_is_saved_with_it(stock_dir, tmp_path):
    trained(agnostic(9)).save_merger(tmp_path / "merger", projector=True)
    model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=tmp_path / "merger")
    for projector, expected in ((None, True), (False, False), (None, True)):
        model.save_merger(tmp_path / "again", projector=projector)
        assert (tmp_path / "again" / PROJECTOR).exists() == expected
    again = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=tmp_path / "again")
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)


def test_another_merger_warns_of_the_projector_that_stays(stock_dir, tmp_path, caplog):
    trained(agnostic(9)).save_merger(tmp_path / "with", projector=True)
    tiny_model(agnostic(9), train_merger=True).save_merger(tmp_path / "without")
    model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=tmp_path / "without")
    changes = (
        lambda: model.load_merger(tmp_path / "without"),
        lambda: model.load_merger(tmp_path / "with"),
        lambda: model.load_merger(tmp_path / "with"),
        lambda: model.set_merger({"merger_type": "tome"}),
        lambda: model.load_merger(tmp_path / "without"),
    )
    warned = []
    for change in changes:
        caplog.clear()
        change()
        warned.append("The projector that came with the merger" in caplog.text)
    assert warned == [False, False, False, True, True]


def test_loading_says_so(tmp_path, caplog):
    trained(agnostic(9)).save_merger(tmp_path / "merger", projector=True)
    with caplog.at_level(logging.INFO, "transformers"):
        tiny_model(agnostic(9)).load_merger(tmp_path / "merger")
    assert f"{tmp_path / 'merger'} replaced the projector too, which was trained with its merger." in caplog.messages


def test_it_is_saved_in_the_models_dtype_and_loaded_into_that_of_another(tmp_path):
    trained(agnostic(9)).to(torch.bfloat16).save_merger(tmp_path / "merger", projector=True)
    weights = load_file(tmp_path / "merger" / PROJECTOR)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = tiny_model(agnostic(9)).train()
    model.model.multi_modal_projector.requires_grad_(False)
    model.load_merger(tmp_path / "merger")
    projector = model.model.multi_modal_projector
    assert projector.training and not any(parameter.requires_grad for parameter in projector.parameters())
    assert torch.equal(projector.linear_1.weight, weights["linear_1.weight"].float())


@pytest.mark.parametrize("widths", [{"text_hidden_size": 32}, {"vision_feature_layer": [-2, -1]}], ids=str)
def test_that_of_another_width_is_refused_and_the_model_left_as_it_was(tmp_path, widths):
    trained({"merger_type": "average_pooling", "num_merged_tokens": 9}, **widths).save_merger(
        tmp_path / "merger", projector=True
    )
    config = json.loads((tmp_path / "merger" / "config.json").read_text())
    (tmp_path / "merger" / "config.json").write_text(json.dumps({**config, "vision_dim": 32, "text_dim": 64}))
    model = tiny_model(agnostic(4), train_merger=True)
    before, config = model.state_dict(), model.config.to_dict()
    with pytest.raises(ValueError, match=r"projector in .*merger has weights .*linear_1.*this model needs .*linear_1"):
        model.load_merger(tmp_path / "merger")
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "truncated", "not safetensors", "a weight less"])
def test_a_broken_one_is_refused(tmp_path, damage):
    trained(agnostic(9)).save_merger(tmp_path / "merger", projector=True)
    file = tmp_path / "merger" / PROJECTOR
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "not safetensors":
        file.write_bytes(b"PK\x03\x04")
    else:
        weights = load_file(file)
        weights.pop("linear_2.bias")
        save_file(weights, file)
    expected = {
        "missing": "lacks multi_modal_projector.safetensors",
        "a weight less": "this model needs .*linear_2.bias",
    }
    model = tiny_model(agnostic(9))
    with pytest.raises(ValueError, match=expected.get(damage, "truncated or not a safetensors file")):
        model.load_merger(tmp_path / "merger")


def test_one_that_peft_trains_as_a_whole(tmp_path):
    peft = pytest.importorskip("peft")
    parts = ["merger", "multi_modal_projector"]
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=parts)
    adapted = peft.get_peft_model(tiny_model(agnostic(9), train_merger=True), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.1)
    model = adapted.get_base_model()
    model.save_merger(tmp_path / "merger", projector=True)
    loaded = tiny_model(agnostic(9))
    loaded.load_merger(tmp_path / "merger")
    assert torch.equal(loaded(**BATCH).logits, adapted(**BATCH).logits)
    model.load_merger(tmp_path / "merger")
    assert torch.equal(adapted(**BATCH).logits, loaded(**BATCH).logits)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("multi_modal_projector" in name for name in trainable)


def test_one_with_lora_layers_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["linear_1"])
    model = peft.get_peft_model(tiny_model(agnostic(9)), config).get_base_model()
    with pytest.raises(ValueError, match="linear_1 is a peft.*cannot be saved with a merger.*merge_and_unload"):
        model.save_merger(tmp_path / "lora", projector=True)
    trained(agnostic(9)).save_merger(tmp_path / "merger", projector=True)
    with pytest.raises(ValueError, match="has adapters on linear_1.base_layer"):
        model.load_merger(tmp_path / "merger")


def test_an_offloaded_model(tmp_path):
    pytest.importorskip("accelerate")
    model = trained(agnostic(9))
    model.save_pretrained(tmp_path / "model")
    tiny_model(agnostic(9)).save_pretrained(tmp_path / "other")
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    offloaded = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model", **options)
    offloaded.save_merger(tmp_path / "merger", projector=True)
    other = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "other", **options)
    other.load_merger(tmp_path / "merger")
    torch.testing.assert_close(other(**BATCH).logits, model(**BATCH).logits, atol=1e-5, rtol=1e-5)


def test_it_travels_over_the_hub(tmp_path):
    model = trained(aware(9))
    model.save_pretrained(tmp_path / "model")
    tiny_stock().save_pretrained(tmp_path / "stock")
    model.save_merger(tmp_path / "local", projector=True)
    expected = model.model.multi_modal_projector.state_dict()
    push = """
from llava_merge import LlavaMergeForConditionalGeneration
model = LlavaMergeForConditionalGeneration.from_pretrained({model!r})
model.push_merger_to_hub("org/with", projector={projector}, commit_message="Mine")
"""
    use = f"""
from llava_merge import LlavaMergeForConditionalGeneration
LlavaMergeForConditionalGeneration.from_pretrained({str(tmp_path / "stock")!r}, merger="org/with").save_pretrained(
    {str(tmp_path / "back")!r}
)
"""
    with HubServer() as server:
        run_python(push.format(model=str(tmp_path / "model"), projector=True), server.environment(tmp_path / "pusher"))
        pushed = load(server.repos["org/with"][PROJECTOR])
        assert all(torch.equal(pushed[key], tensor) for key, tensor in expected.items())
        run_python(use, server.environment(tmp_path / "user"))
        back = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "back")
        weights = back.model.multi_modal_projector.state_dict()
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
        run_python(push.format(model=str(tmp_path / "model"), projector=False), server.environment(tmp_path / "pusher"))
        assert PROJECTOR not in server.repos["org/with"] and "model.safetensors" in server.repos["org/with"]
        shutil.rmtree(tmp_path / "back")
        run_python(use, server.environment(tmp_path / "user"))
        back = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "back")
        stock = used_weights(tiny_stock())["model.multi_modal_projector.linear_1.weight"]
        assert torch.equal(back.model.multi_modal_projector.linear_1.weight, stock)


class Packed(nn.Module):
    """A quantised layer, whose weight has another name."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.qweight, self.bias = nn.Parameter(layer.weight.detach()), layer.bias

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.qweight, self.bias)


@pytest.mark.parametrize("merger", ["fixed_pooling", "cdpruner", "mmtok", "average_pooling"])
@pytest.mark.parametrize("kind", ["another", "packed", "without weights"])
def test_any_module_may_be_the_projector(kind, merger, tmp_path):
    model = tiny_model({**(aware(9) if merger in ("cdpruner", "mmtok") else agnostic(9)), "merger_type": merger})
    projector = model.model.multi_modal_projector
    if kind == "packed":
        expected = model(**BATCH).logits
        projector.linear_1 = Packed(projector.linear_1)
        torch.testing.assert_close(model(**BATCH).logits, expected)
    else:
        another = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
        model.model.multi_modal_projector = another if kind == "another" else nn.ZeroPad1d((0, 32))
        assert torch.isfinite(model(**BATCH).logits).all()
        model.generate(**BATCH, max_new_tokens=2)
    model.set_merger({"merger_type": "strided"})
    with pytest.raises(ValueError, match="multi_modal_projector"):
        model.save_merger(tmp_path / "mine", projector=True)
    trained(agnostic(9)).save_merger(tmp_path / "merger", projector=True)
    if kind != "packed":
        with pytest.raises(ValueError, match="does not replace"):
            model.load_merger(tmp_path / "merger")
