# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""torch.jit.trace, torch.export and transformers' exporters: what they record also answers other prompts."""

import warnings

import pytest
import torch
from conftest import ANSWER_ID, USER_ID, agnostic, aware, pixels, prompts, tiny_model, tiny_stock
from packaging.version import Version
from torch import nn

from llava_merge import list_mergers
from llava_merge.model.compat import TRANSFORMERS_VERSION


M = 9
METHODS = {method.name: method for method in list_mergers()}
WITHOUT_QUESTION = sorted({*METHODS} - {"cdpruner", "mmtok"})
# those two go back through the projector, which torch.export cannot follow
READING = sorted({name for name, method in METHODS.items() if method.question_aware} - {"cdpruner", "mmtok"})
NOT_IN_ONNX = {"searchsorted", "cummax", "cummin", "bucketize"}  # of those that we would have a use for
exports_any_length = pytest.mark.skipif(
    Version(torch.__version__).release < (2, 13), reason="torch 2.11 cannot prove that min(16 n, 32 n) is 16 n"
)
WITH_HEADS = ("fixed_pooling", "mqt", "quecc", "resampler", "salient_pooling", "tokenpacker")


def merger(name: str, question_aware: bool = False, **fields) -> dict:
    """Configuration of any method."""
    fields = {"merger_type": name, "question_aware": question_aware, **fields}
    if name != "none":
        fields["num_merged_tokens"] = M
    if name in WITH_HEADS:
        fields["num_heads"] = 4
    if question_aware:
        fields |= {"question_start_token_ids": [[USER_ID]], "question_end_token_ids": [[ANSWER_ID]]}
    return fields


class Pictures(nn.Module):
    """Tower, merger and projector, as exporters of encoders take them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        features = self.model.get_image_features(pixel_values)
        return torch.stack(list(getattr(features, "pooler_output", features)))


class Whole(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return self.model(**inputs, use_cache=False).logits


def batch(length: int, num_images: int = 1, seed: int = 0) -> dict:
    """A prompt of `length` words; its placeholders are in front of the words."""
    inputs = prompts([num_images], M, seed=seed, text=length)
    inputs["input_ids"] = torch.cat((torch.tensor([[USER_ID]]), inputs["input_ids"]), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return {**inputs, "pixel_values": pixels(num_images, seed)}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_merger_says_where_it_is(name):
    """Also one without parameters, whose device and dtype tracing asks for."""
    part = tiny_model(merger(name, question_aware=name in ("cdpruner", "mmtok"))).model.merger
    assert (part.device, part.dtype) == (torch.device("cpu"), torch.float32)
    if [*part.parameters()]:
        assert part.to(torch.bfloat16).dtype == torch.bfloat16
        assert part.to("meta").device.type == "meta"


@pytest.mark.parametrize("name", WITHOUT_QUESTION)
def test_traced_tower_merger_and_projector(name):
    part = Pictures(tiny_model(merger(name), train_merger=True)).eval()
    other = pixels(2, seed=7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, as they shall
        traced = torch.jit.trace(part, (pixels(2),), check_trace=False)
        torch.testing.assert_close(traced(other), part(other))


@pytest.mark.parametrize("name", WITHOUT_QUESTION)
def test_exported_tower_merger_and_projector_are_made_of_what_onnx_has(name):
    part = Pictures(tiny_model(merger(name), train_merger=True)).eval()
    other = pixels(2, seed=7)
    with torch.no_grad():
        exported = torch.export.export(part, (pixels(2),), strict=False)
        torch.testing.assert_close(exported.module()(other), part(other))
        functional = exported.run_decompositions()  # fails where a view is written to
    operators = {node.target for node in functional.graph.nodes if node.op == "call_function"}
    assert not NOT_IN_ONNX & {getattr(each, "__name__", "").split(".")[0] for each in operators}
    assert "sort.stable" not in {getattr(each, "__name__", "") for each in operators}


@exports_any_length
@pytest.mark.parametrize("fields", [{}, {"position_ids": "packed"}, {"attention_mass": 0.5}], ids=str)
@pytest.mark.parametrize("name", READING)
def test_prompts_of_any_length_with_a_merger_that_reads_them(name, fields):
    whole = Whole(tiny_model(merger(name, question_aware=True, **fields), train_merger=True)).eval()
    length = torch.export.Dim("length", min=M + 4, max=400)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "pixel_values": {}}
    example, others = batch(3), [batch(8, seed=1), batch(25, seed=2)]
    with torch.no_grad():
        exported = torch.export.export(whole, (), kwargs=example, dynamic_shapes=shapes, strict=False).module()
        for other in others:
            torch.testing.assert_close(exported(**other), whole(**other))
    assert not torch.allclose(whole(**others[0])[:, -1], whole(**{**others[0], "pixel_values": pixels(1, 5)})[:, -1])


@exports_any_length
@pytest.mark.parametrize("num_images", [1, 2])
def test_several_images_in_a_prompt_of_any_length(num_images):
    whole = Whole(tiny_model(aware(M), train_merger=True)).eval()
    length = torch.export.Dim("length", min=2 * M + 4, max=400)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "pixel_values": {}}
    other = batch(20, num_images, seed=1)
    with torch.no_grad():
        exported = torch.export.export(whole, (), batch(12, num_images), dynamic_shapes=shapes, strict=False).module()
        torch.testing.assert_close(exported(**other), whole(**other))


@pytest.mark.skipif(TRANSFORMERS_VERSION < Version("5.24"), reason="earlier exporters return and split otherwise")
class TestExporters:
    """Those of transformers, which ask every model with a `get_rope_index` for positions."""

    @pytest.fixture
    def dynamo(self):
        return pytest.importorskip("transformers.exporters.exporter_dynamo")

    @pytest.mark.parametrize("config", [agnostic(M), aware(M), merger("average_pooling", attention_mass=0.5)], ids=str)
    @pytest.mark.parametrize("part", ["whole", "headless"])
    def test_dynamo(self, dynamo, config, part):
        model = tiny_model(config, train_merger=True)
        model = model if part == "whole" else model.model
        output = "logits" if part == "whole" else "last_hidden_state"
        other = batch(9, seed=1)
        exported = dynamo.DynamoExporter().export(model, batch(4), config=dynamo.DynamoConfig(dynamic=True))
        with torch.no_grad():
            torch.testing.assert_close(exported(**other)[output], model(**other)[output], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("config", [agnostic(M), aware(M), merger("strided", attention_mass=0.5)], ids=str)
    def test_onnx(self, config):
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        exporter = pytest.importorskip("transformers.exporters.exporter_onnx")
        assert runtime
        model, inputs = tiny_model(config, train_merger=True), batch(4)
        exported = exporter.OnnxExporter().export(model, dict(inputs), config=exporter.OnnxConfig(dynamic=False))
        with torch.no_grad():
            logits = torch.as_tensor(exported(**inputs)["logits"])
            torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-3, rtol=1e-3)

    def test_the_parts_of_a_generation(self, dynamo):
        utils = pytest.importorskip("transformers.exporters.utils")
        model, stock = tiny_model(agnostic(M)), tiny_stock()
        inputs = batch(4)
        ours = utils.decompose_for_generation(model, dict(inputs))
        many = prompts([1], 36, text=4)
        theirs = utils.decompose_for_generation(stock, {**many, "pixel_values": inputs["pixel_values"]})
        assert [*ours] == [*theirs]

    def test_only_vllm_finds_positions_of_m_rope(self):
        model = tiny_model(agnostic(M)).model
        assert not hasattr(model, "get_rope_index")
        model.config.text_config._attn_implementation_internal = "vllm"
        positions, moved = model.get_rope_index(**{"input_ids": torch.zeros(1, M + 2, dtype=torch.long),
                                                   "mm_token_type_ids": torch.tensor([[0, *[1] * M, 0]])})  # fmt: skip
        assert positions.shape == (3, 1, M + 2) and int(moved) == 36 - M and int(positions[0, 0, -1]) == 37
