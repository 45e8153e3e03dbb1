# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Images that are encoded before they are asked about: several questions, and one pass of the tower."""

import gc
import weakref

import pytest
import torch
from conftest import IMAGE_ID, agnostic, aware, make_processor, pixels, prompts, tiny_model
from torch.utils import _pytree as pytree

from llava_merge import LlavaMergeProcessor
from llava_merge.model.compat import CACHE_ARGUMENT
from llava_merge.model.positions import EncodedImages
from llava_merge.model.vision_encoding import TowerFeatures


pytestmark = pytest.mark.core

NUM_TOKENS = 9
MERGERS = {
    "agnostic": agnostic(),
    "aware": aware(),
    "aware, mass": aware(attention_mass=1.0),
    "tome": {"merger_type": "tome", "num_merged_tokens": NUM_TOKENS, "attention_mass": 1.0},
    "visionzip": {"merger_type": "visionzip", "num_merged_tokens": NUM_TOKENS},
    "cdpruner": {"merger_type": "cdpruner", "num_merged_tokens": NUM_TOKENS},
    "none": {"merger_type": "none"},
}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def asking(model, counts: list[int], seed: int, num_tokens: int | None = None) -> dict:
    number = num_tokens or (36 if model.config.merger_config.merger_type == "none" else NUM_TOKENS)
    batch = prompts(counts, number, text=6 + seed, seed=seed)
    if model.config.merger_config.merger_type == "cdpruner" or model.config.merger_config.question_aware:
        batch["question_mask"] = batch["attention_mask"].bool()
    return batch


@pytest.mark.parametrize("budget", [None, 4, [4, 1], ["all", 9]], ids=str)
@torch.no_grad()
def test_prompts_of_encoded_images_need_their_number_alone(budget, picture):
    model, processor = (
        tiny_model(agnostic()),
        make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=NUM_TOKENS),
    )
    texts = ["USER: <image> what color ? ASSISTANT:", "USER: <image> how many circles ? ASSISTANT:"]
    options = {"num_merged_tokens": budget, "padding": True, "return_tensors": "pt"}
    with_pictures = processor(images=[picture, picture], text=texts, **options)
    inputs = processor(images=2, text=texts, **options)
    pixel_values = with_pictures.pop("pixel_values")
    assert inputs.keys() == with_pictures.keys()
    assert all(torch.equal(inputs[name], with_pictures[name]) for name in ("input_ids", "attention_mask"))
    given = {} if budget is None else {"num_merged_tokens": budget}
    encoded = {"image": model.encode_images(pixel_values, **given)}
    plain = model.generate(**with_pictures, pixel_values=pixel_values, **GREEDY)
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs=encoded, **GREEDY), plain)
    assert processor(images=1, text=texts[0])["input_ids"] == processor(images=picture, text=texts[0])["input_ids"]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_number_has_to_be_that_of_the_prompts(number):
    processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=4)
    with pytest.raises(ValueError, match=f"The prompts hold 2 <image> for {number} images"):
        processor(images=number, text="USER: <image> <image> what ? ASSISTANT:")


@pytest.mark.parametrize("name", ["agnostic", "aware", "none"])
def test_prompts_of_images_without_any_are_refused(name):
    """The placeholders would be read as text, and the answer be about nothing."""
    model = tiny_model(MERGERS[name])
    batch = asking(model, [1, 1], 0)
    with pytest.raises(ValueError, match=r"The prompts hold \d+ image placeholders, and no images come with them"):
        model.generate(**batch, **GREEDY)
    assert model.generate(**prompts([0, 0], 9), **GREEDY).shape[0] == 2
    output = model.generate(**batch, pixel_values=pixels(2), return_dict_in_generate=True, **GREEDY)
    ids = torch.cat((output.sequences, torch.full((2, 3), 7)), dim=1)  # the next turn, with the images in the cache
    model.generate(ids, **{CACHE_ARGUMENT: output.past_key_values}, **GREEDY)


def test_they_are_found_by_their_key():
    model = tiny_model(agnostic())
    encoded, batch = model.encode_images(pixels(1)), asking(model, [1], 0)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="mm_encoder_outputs has 'images': .* belongs to the key 'image'"):
            call(**batch, mm_encoder_outputs={"images": encoded})


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("counts", [[1], [2, 1]])
@torch.no_grad()
def test_every_question_gets_the_plain_answer_and_the_tower_runs_once(name, counts):
    model, images = tiny_model(MERGERS[name]), pixels(sum(counts))
    passes = []
    encoded = {"image": model.encode_images(images)}
    handle = model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    logits, answers = [], []
    for seed in range(3):
        batch = asking(model, counts, seed)
        logits.append(model(**batch, mm_encoder_outputs=encoded).logits)
        answers.append(model.generate(**batch, mm_encoder_outputs=encoded, **GREEDY))
    assert not passes
    handle.remove()
    for seed in range(3):
        batch = asking(model, counts, seed)
        assert torch.equal(logits[seed], model(**batch, pixel_values=images).logits)
        assert torch.equal(answers[seed], model.generate(**batch, pixel_values=images, **GREEDY))
    assert list(encoded) == ["image"]  # as it was, for the next


@pytest.mark.parametrize("name", MERGERS)
@torch.no_grad()
def test_no_hidden_state_of_the_tower_outlives_encoding_that_is_not_needed(name):
    model, states = tiny_model(MERGERS[name]), []
    for module in model.model.vision_tower.modules():
        module.register_forward_hook(
            lambda *call: states.extend(weakref.ref(each) for each in pytree.tree_leaves(call) if torch.is_tensor(each))
        )
    encoded = model.encode_images(pixels(2))
    tokens = [encoded.features] if isinstance(encoded, TowerFeatures) else encoded.pooler_output
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tokens}
    gc.collect()
    weights = {each.data_ptr() for each in [*model.parameters(), *model.buffers()]}
    alive = [state() for state in states if state() is not None]
    alive = {state.untyped_storage().data_ptr() for state in alive} - weights
    assert states and alive <= storages.keys()
    kept = [tensor for tensor in pytree.tree_leaves(vars(encoded)) if torch.is_tensor(tensor)]
    extras = getattr(encoded, "extras", None)
    kept += [] if extras is None else pytree.tree_leaves(vars(extras))
    kept = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in kept if torch.is_tensor(each)}
    assert sum(storage.nbytes() for storage in kept.values()) < 2 * sum(storages.values())


def test_hidden_states_are_kept_where_they_are_asked_for():
    encoded = tiny_model(agnostic()).encode_images(pixels(2), output_hidden_states=True)
    assert len(encoded.hidden_states) == 3 and len(encoded.pooler_output) == 2


def test_what_is_kept():
    images = pixels(2)
    assert isinstance(tiny_model(agnostic()).encode_images(images), EncodedImages)
    kept = tiny_model(aware()).encode_images(images)
    assert isinstance(kept, TowerFeatures) and len(kept) == 2 and kept.features.shape == (2, 36, 32)
    model = tiny_model(MERGERS["cdpruner"])
    with model.merger_bypassed():
        assert len(model.encode_images(images).pooler_output[0]) == 36


@torch.no_grad()
def test_one_image_for_several_rows_and_another_budget():
    model, images = tiny_model(aware(attention_mass=1.0)), pixels(2)
    kept = model.encode_images(images)
    batch = asking(model, [1, 1], 3, 4)
    twice = {"image": kept[[1, 1]]}
    expected = model(**batch, pixel_values=images[[1, 1]], num_merged_tokens=4).logits
    assert torch.equal(model(**batch, mm_encoder_outputs=twice, num_merged_tokens=4).logits, expected)
    answer = model.generate(**batch, mm_encoder_outputs=twice, num_merged_tokens=4, **GREEDY)
    plain = model.generate(**batch, pixel_values=images[[1, 1]], num_merged_tokens=4, **GREEDY)
    assert torch.equal(answer, plain)


@torch.no_grad()
def test_what_a_method_requires_of_the_tower_goes_with_its_image():
    model, images = tiny_model(MERGERS["visionzip"]), pixels(3)
    kept = {"image": model.model.run_tower(images)[[2, 0]]}
    batch = asking(model, [1, 1], 0)
    expected = model(**batch, pixel_values=images[[2, 0]]).logits
    torch.testing.assert_close(model(**batch, mm_encoder_outputs=kept).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_chat_goes_on_with_the_images_of_all_turns():
    model, images = tiny_model(aware()), pixels(2)
    kept, words = model.encode_images(images), {**GREEDY, "suppress_tokens": [IMAGE_ID]}

    def second_answer(first_image: dict, both_images: dict) -> torch.Tensor:
        said = model.generate(**prompts([1], NUM_TOKENS), **first_image, **words, return_dict_in_generate=True)
        ids = torch.cat((said.sequences, prompts([1], NUM_TOKENS, seed=5)["input_ids"][:, 1:]), dim=1)
        cache = {CACHE_ARGUMENT: said[CACHE_ARGUMENT]}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **both_images, **cache, **words)

    encoded = second_answer({"mm_encoder_outputs": {"image": kept[[0]]}}, {"mm_encoder_outputs": {"image": kept}})
    assert torch.equal(encoded, second_answer({"pixel_values": images[:1]}, {"pixel_values": images}))


def test_wrong_ones_are_refused():
    model = tiny_model(aware())
    kept = {"image": model.encode_images(pixels(1))}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="The prompts hold 18 image placeholders"):
            call(**asking(model, [2], 0), mm_encoder_outputs=kept)
        with pytest.raises(ValueError, match="not both"):
            call(**asking(model, [1], 0), mm_encoder_outputs=kept, pixel_values=pixels(1))


def test_gradients_reach_the_merger_behind_a_tower_that_ran_before():
    model = tiny_model(aware())
    with torch.no_grad():
        kept = {"image": model.encode_images(pixels(1))}
    model(**asking(model, [1], 0), mm_encoder_outputs=kept).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.merger.parameters())
