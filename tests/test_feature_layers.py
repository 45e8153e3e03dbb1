# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`feature_layers`: keys and values of V3 from several layers of the tower, by model, checkpoint and configuration."""

import pytest
import torch
from conftest import agnostic, aware, pixels, prompts, tiny_config, tiny_model, tiny_stock
from test_mergers import inputs, make

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, MergerConfig, TokenMerger
from llava_merge.model.configuration_llava_merge import default_feature_layers


pytestmark = pytest.mark.core

M = 9


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompts([1, 1], M), pixel_values=pixels(2)).logits


@pytest.mark.parametrize("init", ["average_pooling", "random"])
def test_they_add_nothing_before_training(init):
    fields = {"num_merged_tokens": M, "vision_dim": 32, "num_heads": 4, "init": init}
    with_layers = TokenMerger(MergerConfig(**fields, feature_layers=[1, 2])).eval()
    without = TokenMerger(MergerConfig(**fields)).eval()
    missing, unexpected = without.load_state_dict(with_layers.state_dict(), strict=False)
    assert not missing and {name.split(".")[2] for name in unexpected} == {"layers"}
    batch = {**inputs(), "question": None}
    assert torch.equal(with_layers(**batch).merged_features, without(**batch).merged_features)


@torch.no_grad()
def test_keys_and_values_are_sums_over_the_layers():
    """The same as one projection of features and layers side by side."""
    merger, batch = make("fixed_pooling-layers-question"), inputs()
    attention, layers = merger.method.pool_attention, batch["extras"].layers
    queries = torch.randn(3, M, merger.config.internal_dim)
    states = [attention.norm(batch["features"])]
    states += [norm(layer) for norm, layer in zip(attention.layers.norms, layers, strict=True)]
    _, *found = attention(queries, batch["features"], layers)
    for name, heads in zip(("k_proj", "v_proj"), found, strict=True):
        own, more = getattr(attention, name), getattr(attention.layers, name)
        weight = torch.cat((own.weight, more.weight), dim=1)
        expected = torch.nn.functional.linear(torch.cat(states, dim=-1), weight, own.bias)
        torch.testing.assert_close(heads.transpose(1, 2).flatten(2), expected, atol=1e-5, rtol=1e-5)


def test_they_are_read_in_the_dtype_of_the_merger():
    merger = make("fixed_pooling-layers-question")
    merged = merger(**inputs(dtype=torch.bfloat16)).merged_features
    assert merged.dtype == torch.float32 and merged.isfinite().all()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layers, indices", [([1], [1]), ([0, -1], [0, 3]), ((-2, 1), [2, 1])])
def test_the_model_fetches_them_in_the_same_pass(tower, layers, indices):
    model = tiny_model(aware(feature_layers=layers), tower=tower, train_merger=True)
    stock, seen, passes = tiny_stock(tower), [], []
    model.model.merger.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["extras"].layers), with_kwargs=True
    )
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(None))
    logits_of(model)
    with torch.no_grad():
        states = stock.model.vision_tower(pixels(2), output_hidden_states=True).hidden_states
    first_patch = 1 if tower == "clip" else 0
    for layer, index in zip(seen[0], indices, strict=True):
        torch.testing.assert_close(layer, states[index][:, first_patch:], atol=1e-5, rtol=1e-5)
    assert len(passes) == 1


@pytest.mark.parametrize("layer, built", [(1, 2), (-1, 3)])
def test_layers_that_only_the_merger_needs_are_built_and_loaded(layer, built, tmp_path):
    tiny_stock().save_pretrained(tmp_path / "stock")
    config = agnostic(feature_layers=[layer])
    model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "stock", merger_config=config).eval()
    assert model.model.vision_tower.config.num_hidden_layers == built
    torch.nn.init.normal_(model.model.merger.method.pool_attention.layers.v_proj.weight)
    torch.nn.init.normal_(model.model.merger.method.output_proj.weight)
    with torch.no_grad():
        states = tiny_stock().model.vision_tower(pixels(2), output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.model.get_merge_extras(pixels(2)).layers[0], states[layer][:, 1:])
    model.save_pretrained(tmp_path / "own")
    again = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "own").eval()
    assert again.config.merger_config.feature_layers == [layer]
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_merger_takes_its_layers_along(tmp_path):
    model = tiny_model(agnostic(feature_layers=[1]), train_merger=True)
    model.save_merger(tmp_path)
    other = tiny_model({"merger_type": "average_pooling", "num_merged_tokens": M})
    other.load_merger(tmp_path)
    assert torch.equal(logits_of(other), logits_of(model))
    other.set_merger({"merger_type": "tome"})
    assert not other.model.required_extras and not torch.equal(logits_of(other), logits_of(model))


def test_an_image_that_is_encoded_once_keeps_them_for_each_question():
    model = tiny_model(aware(feature_layers=[1]), train_merger=True)
    encoded = model.encode_images(pixels(2))
    assert [layer.shape for layer in encoded.extras.layers] == [(2, 36, 32)]
    with torch.no_grad():
        again = model(**prompts([1, 1], M), mm_encoder_outputs={"image": encoded}).logits
    torch.testing.assert_close(again, logits_of(model))


def test_several_vision_feature_layers_are_wider_than_a_layer():
    model = tiny_model(agnostic(feature_layers=[1]), train_merger=True, vision_feature_layer=[-3, -2])
    config = model.config.merger_config
    assert (config.vision_dim, config.tower_dim) == (64, 32)
    assert logits_of(model).isfinite().all()
    with pytest.raises(ValueError, match="tower_dim=64, this model needs tower_dim=32"):
        model.set_merger(MergerConfig(vision_dim=64, num_merged_tokens=M, feature_layers=[1]))
    model.set_merger(MergerConfig(vision_dim=64, num_merged_tokens=M))  # without layers nothing depends on it


def test_the_default_of_a_tower_of_24_layers_is_that_of_the_papers():
    assert default_feature_layers(24) == [12, 16, 22, 23]
    for num_layers in (1, 2, 3, 12, 27):
        layers = default_feature_layers(num_layers)
        assert len({*layers}) == len(layers) and 0 <= min(layers) <= max(layers) < num_layers


class TestErrors:
    @pytest.mark.parametrize("layers", [[], 12, ["12"], [True], [1.0]])
    def test_what_is_no_list_of_layers(self, layers):
        with pytest.raises(ValueError, match="feature_layers=.*: has to be a list of hidden states"):
            MergerConfig(feature_layers=layers)

    @pytest.mark.parametrize("layer", [4, -5])
    def test_layers_that_the_tower_does_not_have(self, layer):
        fields = tiny_config().to_dict()
        fields.pop("model_type")
        with pytest.raises(ValueError, match=r"this tower has hidden states 0 to 3, .* -1 to -4"):
            LlavaMergeConfig(**fields, merger_config=agnostic(feature_layers=[layer]))

    @pytest.mark.parametrize("set_it", ["set_merger", "load_merger"])
    def test_layers_that_were_not_built_and_the_model_stays_as_it_is(self, set_it, tmp_path):
        model = tiny_model(agnostic(), train_merger=True)
        before, given = logits_of(model), agnostic(feature_layers=[3])
        if set_it == "load_merger":
            tiny_model(given).save_merger(tmp_path)
            given = tmp_path
        with pytest.raises(ValueError, match=r"\[3\]}: of the tower's 4 hidden states this model has only the first 3"):
            getattr(model, set_it)(given)
        assert torch.equal(logits_of(model), before) and model.config.merger_config.feature_layers is None

    def test_another_method_does_not_read_them(self):
        with pytest.raises(ValueError, match=r"feature_layers=\[1\]: merger_type='tome' does not read it"):
            tiny_model({"merger_type": "tome", "num_merged_tokens": M, "feature_layers": [1]})

    def test_a_trained_merger_keeps_its_layers(self, tmp_path):
        tiny_model(agnostic(feature_layers=[1]), train_merger=True).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"was trained with feature_layers=\[1\], which cannot be changed"):
            LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config={"feature_layers": [2]})
        config = MergerConfig(num_merged_tokens=4, vision_dim=32, text_dim=64, num_heads=4)
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config=config)
        assert model.config.merger_config.feature_layers == [1]

    def test_a_merger_alone_wants_as_many_of_the_same_width(self):
        merger, batch = make("fixed_pooling-layers-question"), inputs()
        with pytest.raises(ValueError, match="needs layers besides the features"):
            merger(batch["features"])
        one = {**batch, "extras": type(batch["extras"])(layers=batch["extras"].layers[:1])}
        with pytest.raises(ValueError, match=r"widths \[32\]; .* feature_layers=\[1, 2\], each tower_dim=32"):
            merger(**one)
