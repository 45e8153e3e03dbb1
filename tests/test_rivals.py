# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Trained methods of others, against references that are built from torch's own layers."""

import pytest
import torch
from conftest import tiny_model
from test_mergers import inputs, make
from torch import nn

from llava_merge import MergerConfig, TokenMerger
from llava_merge.model import merging_quecc
from llava_merge.model.merging_grid import blend_weights, cell_weights, slot_cells, slot_geometry, window_weights
from llava_merge.model.merging_mqt import place_waves


def attention_of(part, dim: int, output_proj: nn.Linear | None = None) -> nn.MultiheadAttention:
    """torch's attention with the weights of a part that has `q_proj`, `k_proj` and `v_proj`."""
    attention = nn.MultiheadAttention(dim, 4, batch_first=True, bias=part.q_proj.bias is not None)
    projections = (part.q_proj, part.k_proj, part.v_proj)
    attention.in_proj_weight.data = torch.cat([each.weight for each in projections])
    attention.out_proj.weight.data = torch.eye(dim) if output_proj is None else output_proj.weight
    if attention.in_proj_bias is not None:
        attention.in_proj_bias.data = torch.cat([each.bias for each in projections])
    return attention


class TestMQT:
    @torch.no_grad()
    @pytest.mark.parametrize("num_tokens", [1, 4, 36])
    def test_it_equals_the_reference(self, num_tokens):
        merger, features = make("mqt"), inputs()["features"]
        method, dim = merger.method, merger.config.internal_dim
        content = method.input_proj(features)
        keys = method.key_norm(content + place_waves((6, 6), dim, content.device))
        queries = method.query_norm(method.queries[:num_tokens]).expand(3, -1, -1)
        attended, weights = attention_of(method, dim)(queries, keys, method.value_norm(content))
        output = merger(features, num_tokens=num_tokens, return_source=True)
        expected = method.output_proj(method.output_norm(attended))
        torch.testing.assert_close(output.merged_features, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.source, weights, atol=1e-5, rtol=1e-5)

    def test_a_smaller_budget_is_the_beginning_of_a_larger_one(self):
        merger, features = make("mqt"), inputs()["features"]
        few, many = (merger(features, num_tokens=number).merged_features for number in (4, 16))
        torch.testing.assert_close(few, many[:, :4])

    def test_budgets_beyond_its_queries_are_refused(self):
        merger = make("mqt")
        features = torch.randn(1, 400, 32)
        assert merger(features, num_tokens=256).merged_features.shape[1] == 256
        with pytest.raises(ValueError, match="num_merged_tokens=257: this mqt has 256 queries"):
            merger(features, num_tokens=257)
        many = make("mqt", num_merged_tokens=300)
        assert many(features).merged_features.shape[1] == 300

    @pytest.mark.parametrize("dim", [16, 18, 3])
    def test_every_place_has_waves_of_its_own(self, dim):
        waves = place_waves((5, 7), dim, torch.device("cpu"))
        assert waves.shape == (35, dim) and waves.abs().max() <= 1
        assert torch.cdist(waves, waves).add(torch.eye(35)).min() > 1e-3


@torch.no_grad()
def test_the_resampler_equals_the_reference():
    merger, batch = make("resampler"), inputs()
    method, dim = merger.method, merger.config.internal_dim
    output = merger(batch["features"], return_source=True)
    features = method.input_proj(batch["features"])
    queries = method.queries.flatten(0, 1).expand(3, -1, -1)
    for layer in method.layers:
        normed = layer.query_norm(queries)
        context = torch.cat((layer.feature_norm(features), normed), dim=1)
        attended, weights = attention_of(layer, dim, layer.output_proj)(normed, context, context)
        queries = queries + attended
        queries = queries + layer.feed_forward(queries)
    expected = method.output_proj(method.output_norm(queries))
    torch.testing.assert_close(output.merged_features, expected, atol=1e-4, rtol=1e-4)
    shares = weights[:, :, :36] / weights[:, :, :36].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(output.source, shares, atol=1e-5, rtol=1e-4)


def attended_windows(method, queries: torch.Tensor, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Each of 9 queries (3, 9, dim) attends to its own 2 × 2 patches of 6 × 6, cut out and batched: (3, 9, dim)."""
    attention, dim = method.window_attention, queries.shape[-1]
    joined = torch.cat(layers, dim=-1)
    keys, values = (
        projection(joined).view(3, 3, 2, 3, 2, dim).transpose(2, 3).reshape(27, 4, dim)
        for projection in (attention.keys, attention.values)
    )
    reference = attention_of(attention, dim, attention.output_proj)
    reference.out_proj.bias.data = attention.output_proj.bias
    return reference(queries.reshape(27, 1, dim), keys, values, need_weights=False)[0].view(3, 9, -1)


@torch.no_grad()
def test_tokenpacker_equals_the_reference():
    merger, batch = make("tokenpacker", internal_dim=32), inputs()
    method = merger.method
    picture = batch["features"].transpose(1, 2).unflatten(2, (6, 6))
    small = nn.functional.interpolate(picture, size=(3, 3), mode="bilinear", align_corners=False)
    queries = method.query_norm(method.query_proj(small.flatten(2).transpose(1, 2)))
    output = merger(**batch, return_source=True)
    expected = attended_windows(method, queries, batch["extras"].layers)
    torch.testing.assert_close(output.merged_features, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(output.source > 0, (slot_geometry((6, 6), 9, torch.device("cpu")).windows > 0).expand(3, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["quecc", "quecc-question"])
def test_quecc_equals_the_reference(name, monkeypatch):
    monkeypatch.setattr(merging_quecc, "CELLS", 2)  # so that a cell of 2 × 2 patches is one
    merger, batch = make(name, internal_dim=32), inputs()
    method = merger.method
    features = batch["features"]
    if name == "quecc-question":
        features = features + method.query_modulator(batch["question"])[:, None]
    patches = method.query_proj(features).transpose(1, 2).unflatten(2, (6, 6))
    kernel = method.fold.weight.T.reshape(32, 1, 2, 2)
    queries = nn.functional.conv2d(patches, kernel, method.fold.bias, stride=2, groups=32).flatten(2).transpose(1, 2)
    expected = attended_windows(method, queries, batch["extras"].layers)
    torch.testing.assert_close(merger(**batch).merged_features, expected, atol=1e-4, rtol=1e-4)


def convolved(blocks, maps: torch.Tensor) -> torch.Tensor:
    """Blocks of RegNet on maps (I, dim, rows, columns), of torch's convolutions."""

    def norm(maps, layer):
        return layer(maps.transpose(1, -1)).transpose(1, -1)

    for block in blocks:
        mixed = nn.functional.conv2d(maps, block.mix[0].weight[:, :, None, None])
        near = nn.functional.silu(
            norm(block.neighbours(nn.functional.silu(norm(mixed, block.mix[1]))), block.neighbours_norm)
        )
        gates = block.gates(nn.functional.adaptive_avg_pool2d(near, 1).flatten(1))[:, :, None, None]
        out = nn.functional.conv2d(near * gates, block.output[0].weight[:, :, None, None])
        maps = nn.functional.silu(maps + norm(out, block.output[1]))
    return maps


@torch.no_grad()
def test_c_abstractor_equals_the_reference():
    merger, batch = make("c_abstractor"), inputs(num_patches=24)
    method = merger.method
    places = nn.functional.interpolate(method.places.permute(2, 0, 1)[None], size=(4, 6), mode="bilinear")
    patches = batch["features"].transpose(1, 2).unflatten(2, (4, 6)) + places
    patches = method.input_proj(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    slots = nn.functional.adaptive_avg_pool2d(convolved(method.patch_blocks, patches), (2, 2))
    expected = method.output_proj(convolved(method.slot_blocks, slots).flatten(2).transpose(1, 2))
    output = merger(batch["features"], grid=(4, 6), num_tokens=4, return_source=True)
    torch.testing.assert_close(output.merged_features, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(output.source[1], window_weights((4, 6), 4))


@torch.no_grad()
def test_c_abstractor_ends_short_rows_as_a_border():
    """Seven slots are rows of 3, 2 and 2: the cells that are left are zero to their neighbours, and in no mean."""
    method = make("c_abstractor").method
    (rows, columns), cells = slot_cells(7, torch.device("cpu"))
    assert (rows, columns) == (3, 3) and cells.tolist() == [0, 1, 2, 3, 4, 6, 7]
    maps, is_slot = torch.randn(2, 3, 3, 16), torch.ones(3, 3, 1)
    is_slot[1:, 2] = 0
    block, other = method.slot_blocks[0], maps + 100 * (1 - is_slot)
    found, expected = (block(each, is_slot) * is_slot for each in (other, maps))
    torch.testing.assert_close(found, expected)
    means = []
    block.gates.register_forward_pre_hook(lambda _, args: means.append(args[0].flatten(1)))
    block(maps, is_slot)
    near = block.neighbours((block.mix(maps) * is_slot).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    near = nn.functional.silu(block.neighbours_norm(near)).flatten(1, 2)
    torch.testing.assert_close(means[0], near[:, cells].mean(dim=1))


@pytest.mark.parametrize("grid, num_tokens", [((24, 24), 36), ((24, 24), 64), ((6, 9), 7), ((5, 4), 20)])
def test_cells_of_a_slot_are_its_area(grid, num_tokens):
    weights = cell_weights(grid, num_tokens, 4, torch.device("cpu")).unflatten(0, (num_tokens, 16))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(num_tokens, 16))
    torch.testing.assert_close(weights.mean(dim=1), window_weights(grid, num_tokens))
    if num_tokens == 36:
        assert torch.equal(weights[7].nonzero()[:, 1].view(4, 4), torch.arange(4) + 100 + 24 * torch.arange(4)[:, None])


@pytest.mark.parametrize("grid", [(6, 6), (2, 18)])
@pytest.mark.parametrize("size", [(3, 3), (2, 2), (4, 5), (6, 6), (1, 1)])
def test_blending_is_bilinear_resizing(size, grid):
    picture = torch.randn(1, 5, *grid)
    expected = nn.functional.interpolate(picture, size=size, mode="bilinear", align_corners=False)
    weights = blend_weights(grid, size[0] * size[1])
    torch.testing.assert_close(picture.flatten(2) @ weights.T, expected.flatten(2))


@pytest.mark.parametrize("name", ["tokenpacker", "quecc"])
@pytest.mark.parametrize("given, layers", [({}, [1, 2]), ({"feature_layers": [0]}, [0])])
def test_layers_of_a_tower_of_any_depth(name, given, layers):
    model = tiny_model({"merger_type": name, "num_merged_tokens": 9, "num_heads": 4, **given})
    assert model.config.merger_config.feature_layers == layers
    assert MergerConfig(merger_type=name).feature_layers == [12, 16, 22, 23]
    model.set_merger({"merger_type": "average_pooling"})
    assert model.config.merger_config.feature_layers is None
    with pytest.raises(ValueError, match=r"feature_layers=\[12, 16, 22, 23\]: this tower has .* such as \[1, 2\]"):
        model.set_merger(MergerConfig(merger_type=name, num_merged_tokens=9, vision_dim=32, text_dim=64))


@pytest.mark.parametrize("name", ["mqt", "quecc", "resampler", "tokenpacker"])
def test_heads_have_to_divide_the_width(name):
    with pytest.raises(ValueError, match="internal_dim=18 cannot be split into num_heads=4"):
        TokenMerger(MergerConfig(merger_type=name, num_merged_tokens=9, vision_dim=32, internal_dim=18, num_heads=4))
