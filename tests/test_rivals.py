# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Trained methods of others, against references that are built from torch's own attention."""

import pytest
import torch
from test_mergers import inputs, make
from torch import nn

from llava_merge import MergerConfig, TokenMerger
from llava_merge.merging_mqt import place_waves


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


@pytest.mark.parametrize("name", ["mqt", "resampler"])
def test_heads_have_to_divide_the_width(name):
    with pytest.raises(ValueError, match="internal_dim=18 cannot be split into num_heads=4"):
        TokenMerger(MergerConfig(merger_type=name, num_merged_tokens=9, vision_dim=32, internal_dim=18, num_heads=4))
