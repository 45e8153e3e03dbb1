# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Which patches merged tokens came from, and pictures of that.

`python tests/test_visualization.py` draws the golden pictures in tests/data anew; look at them before you commit them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_PATCHES, agnostic, aware, make_processor, pixels, prompts, tiny_model
from PIL import Image
from transformers import CLIPImageProcessor

from llava_merge import MergerConfig, TokenMerger
from llava_merge.demo.scenes import draw_scene, scene_of
from llava_merge.model.merging_divprune import divprune
from llava_merge.model.merging_grid import window_weights
from llava_merge.model.merging_tome import tome
from llava_merge.visualization import (
    CAPTION_HEIGHT,
    MERGING,
    POOLING,
    SELECTION,
    draw_merged_tokens,
    draw_merging,
    draw_token_maps,
    draw_weights,
    kind_of_source,
    lit,
    side_by_side,
    thumbnail,
    tower_box,
    tower_view,
)


GOLDEN = Path(__file__).parent / "data"
GRID = (12, 12)


class TestSources:
    def test_they_are_the_merger_s_for_the_question_of_the_prompt(self):
        model, batch = tiny_model(aware(9), train_merger=True), prompts([1, 2], 9)
        images = pixels(3)
        found = model.merge_sources(**batch, pixel_values=images)
        assert [tuple(source.shape) for source in found] == [(9, NUM_PATCHES)] * 3
        features, prompt = model.get_vision_features(images), model.model.read_prompt(batch["input_ids"], None)
        question = model.model.get_question(prompt, [9] * 3)
        expected = model.model.merger(features, question, return_source=True).source
        torch.testing.assert_close(torch.stack(found), expected)
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][0, -2] = 8 if other["input_ids"][0, -2] != 8 else 9
        asked = model.merge_sources(**other, pixel_values=images)
        assert [torch.equal(*pair) for pair in zip(found, asked, strict=True)] == [False, True, True]
        labels = torch.where(other["input_ids"] == batch["input_ids"], -100, other["input_ids"])  # answer: not read
        asked = model.merge_sources(**other, pixel_values=images, labels=labels)
        shortened = model.merge_sources(**batch, pixel_values=images, labels=labels)
        assert torch.equal(torch.stack(asked), torch.stack(shortened))
        assert not any(source.requires_grad for source in found)

    @pytest.mark.parametrize("merger_type", ["fixed_pooling", "average_pooling", "tome", "visionzip", "cdpruner"])
    def test_budgets_and_halves(self, merger_type):
        model = tiny_model(aware(9, merger_type=merger_type, question_aware=None), train_merger=True).to(torch.bfloat16)
        budgets = [4, "all", 9]
        rows = [prompts([1], NUM_PATCHES if budget == "all" else budget)["input_ids"] for budget in budgets]
        batch = {"pixel_values": pixels(3).to(torch.bfloat16), "num_merged_tokens": budgets}
        batch["input_ids"] = torch.cat([torch.nn.functional.pad(row, (60 - row.shape[1], 0)) for row in rows])
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
        found = model.merge_sources(**batch)
        assert [len(source) for source in found] == [4, NUM_PATCHES, 9]
        assert torch.equal(found[1], torch.eye(NUM_PATCHES))
        for source in found:
            assert source.dtype == torch.float32 and (source >= 0).all()
            torch.testing.assert_close(source.sum(dim=-1), torch.ones(len(source)), atol=1e-2, rtol=0)

    def test_placeholders_of_another_number_are_refused(self):
        with pytest.raises(ValueError, match="placeholders"):
            tiny_model(agnostic(9)).merge_sources(**prompts([1], 4), pixel_values=pixels(1))

    def test_v3_counts_what_its_second_attention_adds(self):
        """By hand, patch by patch and head by head."""
        merger = TokenMerger(MergerConfig(num_merged_tokens=4, vision_dim=8, internal_dim=8, num_heads=2))
        features = torch.randn(1, 9, 8)
        method = merger.method
        first = merger(features, return_source=True).source  # before training, windows alone
        torch.testing.assert_close(first[0], window_weights((3, 3), 4), atol=1e-5, rtol=0)
        with torch.no_grad():
            method.output_proj.weight.normal_()
            values = method.pool_attention.v_proj(method.pool_attention.norm(features))[0].unflatten(-1, (2, 4))
            geometry = []
            handle = method.register_forward_pre_hook(lambda _, args: geometry.append(args[1].geometry))
            found = merger(features, return_source=True).source[0]
            handle.remove()
        decay = -method.locality.abs()[:, None, None] * geometry[0].squared_distances
        weights = decay.softmax(dim=-1)  # queries are zero
        expected = first[0].clone()
        unit = features[0].norm(dim=-1).mean()
        for patch in range(9):
            for head in range(2):
                added = method.output_proj.weight[:, 4 * head : 4 * head + 4] @ values[patch, head]
                expected[:, patch] += weights[head, :, patch] * added.norm() / unit
        torch.testing.assert_close(found, expected / expected.sum(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)


# --- drawing ----------------------------------------------------------------------------------------------------------


def picture() -> Image.Image:
    return draw_scene(scene_of("test", 38, hard=True)[0])


def sources() -> dict[str, torch.Tensor]:
    """Sources of the three kinds, of the picture's mean colours as features."""
    small = picture().resize(GRID, Image.Resampling.BOX)
    features = torch.from_numpy(np.array(small)).float().reshape(1, -1, 3) / 255
    features = features - features.mean(dim=1, keepdim=True)
    blobs = torch.exp(-torch.cdist(features, features[:, [0, 40, 100, 130]]) * 6).transpose(1, 2)
    return {
        POOLING: (blobs / blobs.sum(dim=-1, keepdim=True))[0],
        MERGING: tome(features, GRID, 16, return_source=True).source[0],
        SELECTION: divprune(features, 16, return_source=True).source[0],
    }


def golden() -> dict[str, Image.Image]:
    """Pictures as they should look, small and wider than what the tower sees."""
    wide = Image.new("RGB", (220, 168), (200, 220, 255))
    wide.paste(picture().resize((168, 168)), (26, 0))
    processor = CLIPImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    drawn = {kind: draw_merging(wide, source, processor) for kind, source in sources().items()}
    drawn["weights"] = draw_weights(wide, sources()[MERGING], processor)
    drawn["token_maps"] = draw_token_maps(wide, sources()[POOLING], processor)
    return drawn


@pytest.mark.parametrize("name", [POOLING, MERGING, SELECTION, "weights", "token_maps"])
def test_golden(name):
    drawn, expected = golden()[name], Image.open(GOLDEN / f"merging_{name}.png")
    assert drawn.size == expected.size
    difference = np.abs(np.array(drawn).astype(float) - np.array(expected))
    assert difference.mean() < 0.5 and (difference > 16).mean() < 0.002


class TestDrawing:
    def test_the_kinds(self):
        assert {kind: kind_of_source(source) for kind, source in sources().items()} == {
            kind: kind for kind in (POOLING, MERGING, SELECTION)
        }
        assert kind_of_source(torch.eye(4)) == MERGING  # nothing was lost
        assert kind_of_source(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])) == POOLING

    def test_each_token_is_painted_in_the_mean_of_its_patches(self):
        image = Image.new("RGB", (80, 80), "red")
        image.paste("blue", (40, 0, 80, 80))
        drawn = draw_merged_tokens(image, window_weights((4, 4), 4), (4, 4), line=1)
        assert drawn.size == (80, 80)
        assert drawn.getpixel((10, 10)) == (255, 0, 0) and drawn.getpixel((70, 70)) == (0, 0, 255)
        assert drawn.getpixel((40, 10)) == (255, 255, 255)  # the line between two tokens
        one = draw_merged_tokens(image, window_weights((4, 4), 1), (4, 4))
        assert one.getpixel((10, 10)) == one.getpixel((70, 70)) == (128, 0, 128)

    def test_what_a_selection_drops_is_dark_and_grey(self):
        image = Image.new("RGB", (80, 80), "red")
        drawn = draw_merged_tokens(image, torch.eye(16)[[5]], (4, 4))
        assert drawn.getpixel((30, 30)) == (255, 0, 0)
        red, green, blue = drawn.getpixel((70, 70))
        assert red == green == blue < 40

    def test_brightness(self):
        drawn = lit(Image.new("RGB", (20, 10), "white"), torch.tensor([[1.0, 0.25]]))
        full, half = (drawn.getpixel((x, 5))[0] for x in (5, 15))
        dark = lit(Image.new("RGB", (20, 10), "white"), torch.tensor([[1.0, 0.0]])).getpixel((15, 5))[0]
        assert full == 255 and half == pytest.approx((255 + dark) / 2, abs=1) and dark < 90

    @pytest.mark.parametrize(
        ("source", "message"), [((4, 35), r"\(4, 35\).*5 × 5 = 25"), ((1, 4, 36), r"\(1, 4, 36\).*of one image")]
    )
    def test_sources_that_are_refused(self, source, message):
        for draw in (draw_merging, draw_weights, draw_token_maps):
            with pytest.raises(ValueError, match=message):
                draw(Image.new("RGB", (8, 8)), torch.ones(source))
        with pytest.raises(ValueError, match=r"\(4, 16\).*6 × 6 = 36"):
            draw_merged_tokens(Image.new("RGB", (8, 8)), torch.ones(4, 16), (6, 6))

    def test_side_by_side_brings_pictures_to_one_height(self):
        images = [Image.new("RGB", (50, 100)), Image.new("RGB", (100, 50))]
        assert side_by_side(images, gap=10).size == (50 + 10 + 200, 100)
        row = side_by_side(images, ["a", "a caption that is far too long for its picture"])
        assert side_by_side(images, ["a", "of\ntwo lines"]).height == 100 + 2 * CAPTION_HEIGHT
        assert row.height > 110 and np.array(row.crop((0, 0, 50, 20))).min() < 100

    def test_a_thumbnail_leaves_the_picture_as_it_is(self):
        image = Image.new("RGBA", (1000, 500))
        assert thumbnail(image, 100).size == (100, 50) and image.size == (1000, 500)


CROPS = [
    {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}},
    {"size": {"shortest_edge": 96}, "crop_size": {"height": 84, "width": 84}},
    {"size": {"height": 84, "width": 84}, "do_center_crop": False},
    {"size": {"shortest_edge": 70}, "crop_size": {"height": 84, "width": 84}},  # padded
]


class TestCropAndResize:
    @pytest.mark.parametrize("options", CROPS, ids=range(len(CROPS)))
    @pytest.mark.parametrize("size", [(200, 120), (120, 200), (84, 84)])
    def test_the_view_is_what_the_tower_gets(self, options, size):
        """Compared with the processor's own pixels, without normalising."""
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        processor = CLIPImageProcessor(**options, do_normalize=False)
        given = processor(image, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy() * 255
        view = np.array(tower_view(image, processor).resize(given.shape[1::-1], Image.Resampling.BICUBIC))
        assert np.abs(view - given).mean() < 6

    def test_a_processor_of_a_model_is_taken_too(self):
        processor = make_processor()
        assert tower_view(picture(), processor).size == tower_view(picture(), processor.image_processor).size

    def test_padding_to_a_square(self):
        class PadsToSquare(CLIPImageProcessor):
            def to_dict(self):
                return {**super().to_dict(), "do_pad": True}

        assert tower_box((200, 100), PadsToSquare()) == (0, -50, 200, 150)
        assert tower_box((100, 200), PadsToSquare()) == (-50, 0, 150, 200)


if __name__ == "__main__":
    for name, drawn in golden().items():
        drawn.save(GOLDEN / f"merging_{name}.png")
