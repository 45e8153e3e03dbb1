# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`image_resize`: the tower sees smaller pictures, and everything behind it what it would see of a merger."""

import pytest
import torch
from conftest import answered, pixels, prompts, tiny_model, tiny_stock

from llava_merge import LlavaMergeForConditionalGeneration, MergerConfig, TokenMerger
from llava_merge.model.merging_grid import slot_geometry, window_weights
from llava_merge.model.merging_image_resize import grid_of_budget, resize_pictures


pytestmark = pytest.mark.core

N = 36
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def resizing(num_tokens: int = 9, tower: str = "clip", **fields):
    return tiny_model({"merger_type": "image_resize", "num_merged_tokens": num_tokens, **fields}, tower)


@pytest.mark.parametrize(
    "num_tokens, grid", [(9, (3, 3)), (12, (3, 4)), (36, (6, 6)), (2, (1, 2)), (1, (1, 1)), (288, (16, 18))]
)
def test_pictures_of_as_many_patches(num_tokens, grid):
    assert grid_of_budget(num_tokens) == grid
    small = resize_pictures(pixels(2), num_tokens, (14, 14))
    assert small.shape == (2, 3, 14 * grid[0], 14 * grid[1])


def test_a_pixel_is_the_mean_of_what_it_covers():
    """A checkerboard of pixels becomes grey, where resizing without antialiasing would keep one colour of it."""
    board = ((torch.arange(84)[:, None] + torch.arange(84)) % 2).float().expand(1, 3, -1, -1)
    small = resize_pictures(board, 4, (14, 14))
    assert (small - 0.5).abs().max() < 0.05
    assert resize_pictures(board, N, (14, 14)) is board
    assert resize_pictures(board.bfloat16(), 4, (14, 14)).dtype == torch.bfloat16


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("num_tokens", [36, 12, 9, 1])
@torch.no_grad()
def test_features_are_the_towers_of_a_smaller_picture(tower, num_tokens):
    model, stock = resizing(num_tokens, tower), tiny_stock(tower)
    size = [14 * length for length in grid_of_budget(num_tokens)]
    small = torch.nn.functional.interpolate(pixels(2), size=size, mode="bilinear", antialias=True)
    states = stock.model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    expected = stock.model.multi_modal_projector(states[-2][:, 1 if tower == "clip" else 0 :])
    encoded = model.model.encode_images(pixels(2))
    torch.testing.assert_close(torch.stack(encoded.pooler_output), expected)
    geometry = slot_geometry((6, 6), num_tokens, torch.device("cpu"))
    assert torch.equal(encoded.token_places.view(2, -1), geometry.places.expand(2, -1))
    assert encoded.token_sizes.tolist() == [N / num_tokens] * 2 * num_tokens and encoded.num_patches == N


@torch.no_grad()
def test_as_many_tokens_as_patches_are_stock():
    model, stock, batch = resizing(N), tiny_stock(), {**prompts([1, 1], N), "pixel_values": pixels(2)}
    assert torch.equal(model(**batch).logits, stock(**batch).logits)


def test_the_tower_gets_fewer_patches_and_runs_once_for_each_budget():
    model, seen = resizing(), []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        model(**prompts([1, 1], 9), pixel_values=pixels(2))
    assert seen == [(2, 3, 42, 42)]


@torch.no_grad()
def test_a_budget_for_each_image():
    model = resizing()
    budgets, pictures = [9, "all", 4, 9], pixels(4)
    tokens = model.model.encode_images(pictures, num_merged_tokens=budgets).pooler_output
    assert [len(each) for each in tokens] == [9, N, 4, 9]
    for index, budget in enumerate(budgets):
        alone = model.model.encode_images(pictures[index : index + 1], num_merged_tokens=budget).pooler_output[0]
        torch.testing.assert_close(tokens[index], alone, atol=1e-5, rtol=1e-5)
    with model.merger_bypassed():
        torch.testing.assert_close(model.model.encode_images(pictures).pooler_output[1], tokens[1])


@torch.no_grad()
def test_generate_forward_and_images_that_are_encoded_before_agree():
    model = resizing(attention_mass=1.0)
    batch = prompts([2, 1], 9)
    plain = model.generate(**batch, pixel_values=pixels(3), **GREEDY)
    encoded = {"image": model.encode_images(pixels(3))}
    assert torch.equal(plain, model.generate(**batch, mm_encoder_outputs=encoded, **GREEDY))
    logits = model(**batch, pixel_values=pixels(3)).logits
    assert torch.equal(logits, model(**batch, mm_encoder_outputs=encoded).logits)
    assert torch.equal(logits[:, -1].argmax(dim=-1), plain[:, batch["input_ids"].shape[1]])
    other = model(**batch, pixel_values=pixels(3, seed=1)).logits
    assert not torch.allclose(logits, other, atol=1e-3)


@torch.no_grad()
def test_an_output_of_the_tower_for_the_whole_picture_is_not_used():
    """As an evaluation gives it to all methods alike."""
    model, batch = resizing(), prompts([1], 9)
    whole = model.model.vision_tower(pixels(1), output_hidden_states=True)
    prompt = model.model.read_prompt(batch["input_ids"], None, attention_mask=batch["attention_mask"])
    encoded = model.model.encode_images_of_prompt(pixels(1), prompt, 9, tower_outputs=whole)
    assert torch.equal(encoded.pooler_output[0], model.model.encode_images(pixels(1)).pooler_output[0])


def test_the_projector_trains():
    model = resizing().train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model(**answered(prompts([1, 1], 9)), pixel_values=pixels(2)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.multi_modal_projector.parameters())


def test_sources_are_the_windows_of_the_picture_as_it_was():
    model, batch = resizing(), prompts([2], 9)
    batch["input_ids"] = torch.cat((batch["input_ids"][:, :10], batch["input_ids"][:, 19:]), dim=1)
    sources = model.merge_sources(input_ids=batch["input_ids"], pixel_values=pixels(1))
    assert len(sources) == 1 and torch.equal(sources[0], window_weights((6, 6), 9))


def test_saved_and_loaded(tmp_path):
    model, batch = resizing(), {**prompts([1], 9), "pixel_values": pixels(1)}
    model.save_pretrained(tmp_path)
    again = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


class TestErrors:
    @pytest.mark.parametrize(
        "num_tokens, fix", [(7, "Choose 6 or 9"), (37, "Choose 36 or 42"), (31, "Choose 30 or 36")]
    )
    def test_budgets_that_are_no_picture(self, num_tokens, fix):
        with pytest.raises(ValueError, match=f"num_merged_tokens={num_tokens}: image_resize .* {fix}"):
            TokenMerger(MergerConfig(merger_type="image_resize", num_merged_tokens=num_tokens))
        if num_tokens < N:
            with pytest.raises(ValueError, match=fix):
                resizing().model.encode_images(pixels(1), num_merged_tokens=num_tokens)

    def test_there_is_nothing_to_merge_behind_the_tower(self):
        model = resizing()
        with pytest.raises(ValueError, match="makes pictures smaller before the tower"):
            model.model.merge_features(model.get_vision_features(pixels(1)))

    def test_placeholders_of_another_budget(self):
        with pytest.raises(ValueError, match="num_merged_tokens"):
            resizing()(**prompts([1], 8), pixel_values=pixels(1))

    def test_pictures_of_another_size(self):
        with pytest.raises(ValueError, match="the tower takes images as"):
            resizing().model.encode_images(pixels(1)[:, :, :70])

    def test_a_tower_of_another_kind(self):
        model = resizing()
        model.model.vision_tower.config.model_type = "vit"
        with pytest.raises(ValueError, match="known of clip_vision_model and siglip_vision_model only, not of 'vit'"):
            model.model.encode_images(pixels(1))
