# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""V3 on what stands out: which patches get a slot, what a slot's window holds, and how a token starts."""

import pytest
import torch
from test_mergers import inputs, make

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MODEL_DIR
from llava_merge.demo.scenes import NEEDLE, draw_scene, scene_of
from llava_merge.model.merging_grid import patch_distances, slot_places
from llava_merge.model.merging_salient_pooling import centred, relative_differences, salient_patches


def picks_one_by_one(scores: list[float], grid: tuple[int, int], num_tokens: int) -> list[int]:
    """What `salient_patches` does, patch by patch."""
    side = len(scores) / num_tokens
    kept = []
    for patch, score in enumerate(scores):
        share = 1.0
        for other, higher in enumerate(scores):
            if (-higher, other) < (-score, patch):
                rows, columns = (
                    abs(a - b) for a, b in zip(divmod(patch, grid[1]), divmod(other, grid[1]), strict=True)
                )
                share = min(share, 1 - torch.tensor(-2 * (rows**2 + columns**2) / side).exp().item())
        kept.append(score * share)
    return sorted(sorted(range(len(scores)), key=lambda patch: (-kept[patch], patch))[:num_tokens])


@pytest.mark.parametrize("grid", [(6, 6), (4, 9)])
@pytest.mark.parametrize("num_tokens", [1, 4, 9, 35, 36])
def test_picks_are_those_of_the_definition(grid, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    spread = torch.linspace(2, 0, 30)[:, None]  # to scores that are all the same
    scores = (spread * torch.rand(30, 36, generator=generator)).exp()
    distances = patch_distances(grid, torch.device("cpu")) * (num_tokens / 36)
    picks = salient_patches(scores, distances, num_tokens)
    assert picks.tolist() == [picks_one_by_one(row.tolist(), grid, num_tokens) for row in scores]


def test_distances_of_patches():
    distances = patch_distances((2, 3), torch.device("cpu"))
    assert distances.tolist()[0] == [0, 1, 4, 1, 2, 5] and torch.equal(distances, distances.T)


def test_differences_are_squared_distances_in_units_of_the_mean_one():
    features = 1000 + torch.randn(2, 36, 8, generator=torch.Generator().manual_seed(0))
    squares = torch.cdist(features.double(), features.double()).square()
    expected = squares / squares.mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(
        relative_differences(centred(features), centred(features)).double(), expected, atol=1e-3, rtol=1e-3
    )
    assert (
        relative_differences(centred(features)[:, :4], centred(torch.ones(2, 36, 8))).isfinite().all()
    )  # a picture of one colour


def test_each_thing_in_a_picture_gets_a_token_at_its_place():
    generator = torch.Generator().manual_seed(0)
    things = torch.tensor([1, 10, 20, 33])
    features = torch.randn(32, generator=generator).expand(3, 36, 32) + 0.01 * torch.randn(
        3, 36, 32, generator=generator
    )
    features[:, things] += torch.randn(4, 32, generator=generator)
    output = make("salient_pooling", trained=False)(features, num_tokens=6, return_source=True)
    for places, source in zip(output.positions, output.source, strict=True):
        assert {*things.tolist()} < {*places.tolist()}
        own = [source[places.tolist().index(thing), thing] for thing in things]
        assert min(own) > 0.5  # mostly of itself


@pytest.mark.parametrize("name", ["salient_pooling", "salient_pooling-question", "salient_pooling-layers"])
def test_a_token_starts_as_the_mean_of_its_window(name):
    batch = inputs()
    output = make(name, trained=False)(**batch, return_source=True)
    torch.testing.assert_close(output.merged_features, output.source @ batch["features"])
    features, places = batch["features"].double(), output.positions
    squares = torch.cdist(features, features).square()
    likeness = 2 * 3 * squares / squares.mean(dim=(1, 2), keepdim=True)  # 3 is the root of 9 tokens
    logits = -likeness - patch_distances((6, 6), torch.device("cpu")) * 9 / 36
    shares = logits.gather(1, places[:, :, None].expand(-1, -1, 36)).softmax(dim=1)
    torch.testing.assert_close(output.sizes.double(), shares.sum(dim=-1), atol=1e-4, rtol=1e-4)
    expected = shares / shares.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(output.source.double(), expected, atol=1e-4, rtol=1e-4)


def test_sizes_are_all_patches_and_places_rise():
    output = make("salient_pooling")(**inputs())
    torch.testing.assert_close(output.sizes.sum(dim=1), torch.full((3,), 36.0))
    assert (output.positions.diff(dim=1) > 0).all()


def test_queries_are_those_of_the_place_shifted_by_the_patch():
    """A patch elsewhere with the same feature asks otherwise, and so does another patch there."""
    merger, batch = make("salient_pooling"), inputs()
    asked = []
    handle = merger.method.pool_attention.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    places = merger(batch["features"]).positions
    handle.remove()
    method = merger.method
    for image, token in ((0, 0), (2, 8)):
        place = int(places[image, token])
        row, column = divmod(place, 6)
        middle = [[[2 * (column + 0.5) / 6 - 1, 2 * (row + 0.5) / 6 - 1]]]
        of_place = torch.nn.functional.grid_sample(
            method.pool_queries.permute(2, 0, 1)[None],
            torch.tensor([middle]),
            padding_mode="border",
            align_corners=False,
        ).flatten()
        of_patch = method.anchor_proj(method.anchor_norm(batch["features"][image, place]))
        torch.testing.assert_close(asked[0][image, token], of_place + of_patch)


def test_gradients_reach_all_of_it_and_the_features():
    merger, batch = make("salient_pooling-question"), inputs()
    batch["features"].requires_grad_()
    output = merger(**batch)
    (output.merged_features.square().sum() + output.sizes.square().sum()).backward()
    lost = [name for name, parameter in merger.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not lost and batch["features"].grad.abs().sum() > 0


def test_things_of_hard_scenes_get_a_token_each():
    """The demo model's tower; with 16 tokens, of which slots on a grid leave most of them without one."""
    model = LlavaMergeForConditionalGeneration.from_pretrained(MODEL_DIR, merger_config={"merger_type": "none"})
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    scenes = [scene_of("train", index, hard=True)[0] for index in range(8)]
    pictures = processor.image_processor([draw_scene(scene) for scene in scenes], return_tensors="pt")
    with torch.no_grad():
        features = model.get_vision_features(pictures["pixel_values"].to(model.dtype))
    distances = patch_distances((24, 24), features.device) * (16 / 576)
    picks = salient_patches(centred(features).norm(dim=-1), distances, 16)
    of_grid = slot_places((24, 24), 16).expand_as(picks)
    assert share_with_a_token(scenes, picks) > 0.9 > 0.5 > share_with_a_token(scenes, of_grid)


def share_with_a_token(scenes, picks) -> float:
    """Share of the shapes of `scenes` with one of the `picks` on them."""
    found = []
    for scene, places in zip(scenes, picks.tolist(), strict=True):
        for thing in scene.objects:
            if thing.shape == NEEDLE or thing.span > 1:
                continue
            side = 24 / thing.grid
            middle = (thing.row + 0.5 + thing.offset[1]) * side, (thing.column + 0.5 + thing.offset[0]) * side
            radius = max(thing.radius * side, 0.7)
            centres = [[value + 0.5 for value in divmod(place, 24)] for place in places]
            found.append(
                any(sum((a - b) ** 2 for a, b in zip(middle, centre, strict=True)) < radius**2 for centre in centres)
            )
    return sum(found) / len(found)
