# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from conftest import IMAGE_ID, agnostic, aware, image_features, pixels, prompts, tiny_model
from packaging.version import Version

from llava_merge.model.compat import CACHE_ARGUMENT, TRANSFORMERS_V5, TRANSFORMERS_VERSION
from llava_merge.model.placeholders import repeat_rows_together


pytestmark = pytest.mark.core

PREFILLS_IMAGES_IN_CHUNKS = TRANSFORMERS_VERSION >= Version("5.23")
CONFIGS = pytest.mark.parametrize("config", [agnostic(), aware()], ids=["agnostic", "aware"])


@pytest.fixture
def model():
    return tiny_model(aware(), train_merger=True)


def generate(model, batch, images, **kwargs):
    return model.generate(**batch, pixel_values=images, max_new_tokens=6, **{"do_sample": False, **kwargs})


def merged_features_of(model, call):
    """What the projector is given while `call` runs, one tensor a call."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    call()
    hook.remove()
    return seen


@CONFIGS
def test_generate_gives_the_merger_the_same_question_as_forward(config):
    model = tiny_model(config, train_merger=True)
    batch, images = prompts([1, 2, 0], 9), pixels(3)
    in_forward = merged_features_of(model, lambda: model(**batch, pixel_values=images))
    in_generate = merged_features_of(model, lambda: generate(model, batch, images))
    assert len(in_generate) == 1
    assert torch.equal(in_generate[0], in_forward[0])


@CONFIGS
def test_generate_equals_the_argmax_of_forward_step_by_step(config):
    model = tiny_model(config, train_merger=True)
    batch, images = prompts([2], 9), pixels(2)
    generated = generate(model, batch, images, suppress_tokens=[IMAGE_ID])
    length = batch["input_ids"].shape[1]
    mask = torch.ones_like(generated)
    prompt_only = torch.zeros_like(generated, dtype=torch.bool)
    prompt_only[:, :length] = True
    logits = model(generated, images, attention_mask=mask, question_mask=prompt_only).logits
    logits[..., IMAGE_ID] = -torch.inf
    assert torch.equal(logits[:, length - 1 : -1].argmax(-1), generated[:, length:])


@CONFIGS
@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_two_images_a_prompt_with_beams_equals_the_rows_one_by_one(config, num_return_sequences):
    model = tiny_model(config, train_merger=True)
    counts, images = [2, 1, 2], pixels(5)
    batch = prompts(counts, 9)
    beams = {"num_beams": 2, "num_return_sequences": num_return_sequences}
    together = generate(model, batch, images, **beams)[:, batch["input_ids"].shape[1] :]
    first = 0
    for row, count in enumerate(counts):
        keep = batch["attention_mask"][row].bool()
        one = {name: tensor[row][keep][None] for name, tensor in batch.items()}
        alone = generate(model, one, images[first : first + count], **beams)[:, one["input_ids"].shape[1] :]
        expected = together[row * num_return_sequences : (row + 1) * num_return_sequences, : alone.shape[1]]
        assert torch.equal(alone, expected), f"row {row}"
        first += count


def test_use_cache_false_gives_the_same_ids(model):
    batch, images = prompts([1, 2], 9), pixels(3)
    cached, uncached = (
        generate(model, batch, images, use_cache=use_cache, suppress_tokens=[IMAGE_ID]) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_static_cache_gives_the_same_ids(model):
    batch, images = prompts([1, 2], 9), pixels(3)
    assert torch.equal(generate(model, batch, images), generate(model, batch, images, cache_implementation="static"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_static_cache(model, dtype):
    model = model.to(dtype)
    batch, images = prompts([1, 2], 9), pixels(3).to(dtype)
    output = model(**batch, pixel_values=images)
    assert image_features(output).dtype == dtype and output.logits.isfinite().all()
    assert torch.equal(generate(model, batch, images), generate(model, batch, images, cache_implementation="static"))


def test_sampling_with_several_return_sequences_sees_the_right_images(model):
    counts, images = [2, 1], pixels(3)
    batch = prompts(counts, 9)
    torch.manual_seed(0)
    output = generate(model, batch, images, do_sample=True, top_k=1, num_return_sequences=3)
    greedy = generate(model, batch, images)
    assert torch.equal(output, greedy.repeat_interleave(3, dim=0))


def test_assisted_decoding_gives_the_greedy_ids(model):
    batch, images = prompts([2], 9), pixels(2)
    greedy = generate(model, batch, images)
    assert torch.equal(generate(model, batch, images, prompt_lookup_num_tokens=3), greedy)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.mul_(0.5).add_(0.01 * torch.randn_like(assistant.lm_head.weight))
    assert torch.equal(generate(model, batch, images, assistant_model=assistant), greedy)


def continued(model, batch, images, next_text: list[int], next_images):
    """Second turn of a conversation on the cache of the first: its ids, and those without a cache."""
    first = generate(model, batch, images, return_dict_in_generate=True, suppress_tokens=[IMAGE_ID])
    second = torch.cat((first.sequences, torch.tensor([next_text])), dim=1)
    batch = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    return generate(model, batch, next_images, past_key_values=first.past_key_values)[:, second.shape[1] :], second


def test_a_second_turn_with_a_new_image_on_a_filled_cache():
    model = tiny_model(agnostic(), train_merger=True)
    images = pixels(2)
    ids, second = continued(model, prompts([1], 9), images[:1], [IMAGE_ID] * 9 + [7, 8], images[1:])
    whole = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    assert torch.equal(ids, generate(model, whole, images)[:, second.shape[1] :])


@pytest.mark.parametrize("given", ["all images", "new images"])
def test_a_chat_goes_on_with_the_images_of_all_turns_or_of_the_new_one(model, given):
    """Also where a turn brings none: the pictures of the chat are passed again with every call."""
    images = pixels(2)
    seen = merged_features_of(
        model,
        lambda: continued(
            model, prompts([1], 9), images[:1], [IMAGE_ID] * 9 + [7, 8], images if given == "all images" else images[1:]
        ),
    )
    assert [len(features) for features in seen] == [1, 1]  # nothing is encoded twice
    ids, second = continued(model, prompts([1], 9), images[:1], [7, 8, 9], images[:1])
    mask = torch.zeros_like(second, dtype=torch.bool)
    mask[:, : prompts([1], 9)["input_ids"].shape[1]] = True  # what the image was merged for
    whole = {"input_ids": second, "attention_mask": torch.ones_like(second), "question_mask": mask}
    assert torch.equal(ids, generate(model, whole, images[:1])[:, second.shape[1] :])


@pytest.mark.skipif(PREFILLS_IMAGES_IN_CHUNKS, reason="chunks are given their images")
def test_chunked_prefill_is_refused_where_chunks_lack_their_images(model):
    batch, images = prompts([1, 2], 9), pixels(3)
    with pytest.raises(ValueError, match="prefill_chunk_size=7: .* gives chunks no images"):
        generate(model, batch, images, prefill_chunk_size=7)
    text = prompts([0], 9, text=12)
    assert torch.equal(generate(model, text, None, prefill_chunk_size=7), generate(model, text, None))
    embeds = {"inputs_embeds": model.get_input_embeddings()(text["input_ids"]), **text}
    with pytest.raises(ValueError, match="no embeddings and no places behind a cache"):
        generate(model, embeds, None, prefill_chunk_size=7)
    first = model.generate(**batch, pixel_values=images, max_new_tokens=2, return_dict_in_generate=True)
    more = {"input_ids": torch.cat((first.sequences, first.sequences[:, -2:]), dim=1)}
    more |= {"attention_mask": torch.ones_like(more["input_ids"]), CACHE_ARGUMENT: first[CACHE_ARGUMENT]}
    with pytest.raises(ValueError, match="no embeddings and no places behind a cache"):
        generate(model, more, None, prefill_chunk_size=1)


@pytest.mark.skipif(not PREFILLS_IMAGES_IN_CHUNKS, reason="stock answers such chunks wrong or refuses them")
def test_chunked_prefill_gives_the_same_ids(model):
    batch, images = prompts([2], 9), pixels(2)
    assert torch.equal(generate(model, batch, images, prefill_chunk_size=7), generate(model, batch, images))


@pytest.mark.skipif(not PREFILLS_IMAGES_IN_CHUNKS, reason="stock answers such chunks wrong or refuses them")
@pytest.mark.parametrize("chunk", [5, 7, 16])
def test_chunks_with_images_in_several_rows_give_the_same_ids(model, chunk):
    batch, images = prompts([2, 1, 1], 9), pixels(4)
    assert torch.equal(generate(model, batch, images, prefill_chunk_size=chunk), generate(model, batch, images))


def test_left_and_right_padding_give_the_same_first_token(model):
    images = pixels(3)
    left, right = prompts([1, 2], 9, "left"), prompts([1, 2], 9, "right")
    last = right["attention_mask"].sum(dim=1) - 1
    next_left = model(**left, pixel_values=images).logits[:, -1]
    next_right = model(**right, pixel_values=images).logits[torch.arange(2), last]
    torch.testing.assert_close(next_left, next_right, atol=1e-4, rtol=1e-4)


def test_compiled_image_features_have_no_graph_break(model):
    batch = prompts([1, 1], 9)

    def features(input_ids, attention_mask, pixel_values):
        prompt = model.model.read_prompt(input_ids, None, attention_mask=attention_mask)
        return torch.stack(list(model.model.encode_images_of_prompt(pixel_values, prompt).pooler_output))

    with torch.no_grad():
        expected = features(
            batch["input_ids"], batch["attention_mask"], pixels(2)
        )  # transformers 5 needs one eager call
        compiled = torch.compile(features, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(batch["input_ids"], batch["attention_mask"], pixels(2)), expected)


def test_rows_are_repeated_with_all_their_images():
    assert repeat_rows_together(torch.tensor([2, 0, 1]), 2).tolist() == [0, 1, 0, 1, 2, 2]
    assert repeat_rows_together(torch.tensor([1, 1]), 3).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="4.57 warns of such settings and takes them over")
def test_settings_of_generate_in_the_config_are_found_without_making_another(model, monkeypatch):
    """Releases before 5.23 compare with a whole default configuration, in each call."""
    batch, images = prompts([1], 9), pixels(1)
    with monkeypatch.context() as patched:
        patched.setattr(type(model.config), "__init__", None)
        generate(model, batch, images)
    model.config.repetition_penalty = 2.0
    with pytest.raises(ValueError, match="repetition_penalty"):
        generate(model, batch, images)
