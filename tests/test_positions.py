# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Every way to run the model against a slow reference: one row, no cache, positions and mask made token by token."""

import copy
import inspect
import itertools
import json
import math
import pickle
import random
import re
import threading
import weakref
from fractions import Fraction

import pytest
import torch
from conftest import (
    ANSWER_ID,
    EOS_ID,
    FIRST_WORD_ID,
    IMAGE_ID,
    NUM_PATCHES,
    PAD_ID,
    agnostic,
    pixels,
    prompts,
    scale_up,
    tiny_config,
    tiny_model,
    tiny_stock,
)
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM, MistralConfig, StaticCache
from transformers.utils import logging

from llava_merge import (
    LlavaMergeConfig,
    LlavaMergeForConditionalGeneration,
    MergeOutput,
    MergerConfig,
    MergingMethod,
    TokenMerger,
)
from llava_merge.model.compat import TRANSFORMERS_V5, TRANSFORMERS_VERSION
from llava_merge.model.merging_grid import slot_places, slots_per_row
from llava_merge.model.positions import find_cache, layout_of_images


pytestmark = pytest.mark.core

CACHE = "cache" if TRANSFORMERS_VERSION >= Version("5.24") else "past_key_values"
PREFILLS_IMAGES_IN_CHUNKS = TRANSFORMERS_VERSION >= Version("5.23")
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE_ID, PAD_ID]}
MODES = [
    {"position_ids": "source", "attention_mass": 0.0},
    {"position_ids": "source", "attention_mass": 1.0},
    {"position_ids": "packed", "attention_mass": 0.5},
]
MODE_NAMES = ["source", "source and mass", "packed and mass"]
M = 9


@pytest.fixture(params=MODES, ids=MODE_NAMES)
def model(request):
    return tiny_model(agnostic(M, **request.param), train_merger=True)


def slow_places(num_tokens: int, side: int = 6) -> list[int]:
    """For each slot the patch whose centre is nearest, row and column apart, the earlier of two that are as near."""

    def nearest(index: int, count: int) -> int:
        centre = Fraction(2 * index + 1, 2 * count) * side
        return min(range(side), key=lambda patch: (abs(Fraction(2 * patch + 1, 2) - centre), patch))

    lengths = slots_per_row(num_tokens)
    places = [
        nearest(row, len(lengths)) * side + nearest(column, length)
        for row, length in enumerate(lengths)
        for column in range(length)
    ]
    return list(itertools.accumulate(places, max))


def slow_positions_and_bias(
    ids: list[int], model, num_tokens: list[int], merged: list[MergeOutput] | None = None
) -> tuple[list[int], list[float]]:
    """Of one unpadded row; `merged` are its images, where they may sit elsewhere than on slots."""
    config = model.config.merger_config
    images = iter(zip(num_tokens, merged or [MergeOutput()] * len(num_tokens), strict=True))
    positions, bias, at, left = [], [], 0, 0
    for id in ids:
        if id != IMAGE_ID:
            positions.append(at)
            bias.append(0.0)
            at += 1
            continue
        if not left:
            left, image = next(images)
            size = left
            start, places = at, slow_places(size) if size < NUM_PATCHES else range(NUM_PATCHES)
            places = places if image.positions is None else image.positions[0].tolist()
            weights = [NUM_PATCHES / size] * size if image.sizes is None else image.sizes[0].tolist()
        if config.position_ids == "source":
            positions.append(start + places[size - left])
            at = start + NUM_PATCHES
        else:
            positions.append(at)
            at += 1
        bias.append(config.attention_mass * math.log(weights[size - left]))
        left -= 1
    return positions, bias


@torch.no_grad()
def slow_logits(model, ids: list[int], images: torch.Tensor, num_tokens: list[int] | None = None) -> torch.Tensor:
    """Logits (L, vocabulary) of one unpadded row with its `images`."""
    num_tokens = num_tokens or [M] * len(images)
    row = torch.tensor([ids])
    embeds = model.get_input_embeddings()(row)
    if len(images):
        features = [
            model.model.encode_images(
                image[None], num_merged_tokens="all" if size == NUM_PATCHES else size
            ).pooler_output[0]
            for image, size in zip(images, num_tokens, strict=True)
        ]
        embeds = embeds.masked_scatter((row == IMAGE_ID)[..., None], torch.cat(features).to(embeds.dtype))
    positions, bias = slow_positions_and_bias(ids, model, num_tokens)
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min)
    window = getattr(model.config.text_config, "sliding_window", None) or len(ids)
    for query in range(len(ids)):
        for key in range(max(0, query - window + 1), query + 1):
            mask[query, key] = bias[key]
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=torch.tensor([positions]), use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden)[0]


def slow_answer(model, ids: list[int], images: torch.Tensor, num_tokens=None, length: int = 5) -> list[int]:
    """Greedy ids behind a row."""
    answer = []
    while len(answer) < length and (not answer or answer[-1] != EOS_ID):
        logits = slow_logits(model, [*ids, *answer], images, num_tokens)[-1]
        logits[[IMAGE_ID, PAD_ID]] = -math.inf
        answer.append(int(logits.argmax()))
    return answer


def rows_of(batch: dict) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def images_of_rows(counts: list[int], images: torch.Tensor) -> list[torch.Tensor]:
    return list(images.split(counts))


def answers(generated: torch.Tensor, prompt_length: int) -> list[list[int]]:
    return [[id for id in row if id != PAD_ID] for row in generated[:, prompt_length:].tolist()]


def assert_answers(generated, model, batch: dict, counts: list[int], images, **kwargs):
    expected = [
        slow_answer(model, ids, own, **kwargs)
        for ids, own in zip(rows_of(batch), images_of_rows(counts, images), strict=True)
    ]
    assert answers(generated, batch["input_ids"].shape[1]) == expected


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ---- where slots lie


@pytest.mark.parametrize("num_tokens", range(1, 37))
def test_places_are_those_of_the_nearest_patches(num_tokens):
    places = slot_places((6, 6), num_tokens).tolist()
    assert places == (slow_places(num_tokens) if num_tokens < 36 else list(range(36)))
    assert places == sorted(places) and set(places) <= set(range(36))


def test_places_of_llava_sit_in_the_windows_upper_left_of_the_middle():
    assert slot_places((24, 24), 144)[:3].tolist() == [0, 2, 4] and slot_places((24, 24), 144)[12] == 48
    assert slot_places((24, 24), 64)[:2].tolist() == [25, 28]
    assert slot_places((24, 24), 1).tolist() == [11 * 24 + 11]


@pytest.mark.parametrize("grid", [(2, 18), (18, 2), (1, 5), (24, 24), (3, 7)], ids=str)
def test_places_never_fall_on_any_grid(grid):
    for num_tokens in range(1, grid[0] * grid[1] + 1):
        places = slot_places(grid, num_tokens)
        assert (places.diff() >= 0).all() and places.min() >= 0 and places.max() < grid[0] * grid[1]


@pytest.mark.parametrize("seed", range(30))
def test_layouts_of_any_places_token_by_token(seed):
    """Images of several sizes at places of their own, rows of several packed samples, and what follows."""
    rng = random.Random(seed)
    rows, num_tokens, places = [], [], []
    for _ in range(rng.randint(1, 3)):
        row = []  # (sample, is image) of each token
        for sample in range(rng.randint(1, 3)):
            for _ in range(rng.randint(0, 2)):
                row += [(sample, False)] * rng.randint(0, 3)
                num_tokens.append(rng.choice((1, 4, 7, NUM_PATCHES)))
                places.append(sorted(rng.choices(range(NUM_PATCHES), k=num_tokens[-1])))
                row += [(sample, True)] * num_tokens[-1]
            row += [(sample, False)] * rng.randint(1, 3)
        rows.append(row)
    width = max(map(len, rows))
    rows = [row + [(row[-1][0], False)] * (width - len(row)) for row in rows]
    shifts, biases, images = [], [], iter(zip(num_tokens, places, strict=True))
    for row in rows:
        packed = [sum(sample == before for before, _ in row[:index]) for index, (sample, _) in enumerate(row)]
        shift, bias, at, left = [], [], 0, 0
        for index, (sample, is_image) in enumerate([*row, (row[-1][0], False)]):
            if index and sample != row[min(index, width) - 1][0]:
                at = 0
            number = (packed + [packed[-1] + 1])[index]
            if not is_image:
                shift.append(at - number)
                bias.append(0.0)
                at += 1
                continue
            if not left:
                (size, own), start = next(images), at
                left = size
            shift.append(start + own[size - left] - number)
            bias.append(0.5 * math.log(NUM_PATCHES / size))
            left -= 1
            at = start + NUM_PATCHES
        shifts.append(shift)
        biases.append(bias)
    if not num_tokens:
        return
    image_mask, samples = (torch.tensor([[token[which] for token in row] for row in rows]) for which in (1, 0))
    flat = torch.tensor(sum(places, []))
    layout = layout_of_images(image_mask, flat, num_tokens, NUM_PATCHES, attention_mass=0.5, samples=samples)
    assert layout.shift(0, width + 1).tolist() == shifts and layout.shift(width + 3, 1)[:, 0].tolist() == [
        shift[-1] for shift in shifts
    ]
    torch.testing.assert_close(layout.bias, torch.tensor(biases))
    assert layout.is_packed == (set(num_tokens) == {NUM_PATCHES})


def test_a_method_says_where_its_tokens_sit():
    class LastTokens(MergingMethod):
        training_free = True

        def forward(self, features, context):
            first = features.shape[1] - context.num_tokens
            positions = torch.arange(first, features.shape[1]).expand(len(features), -1)
            return MergeOutput(merged_features=features[:, first:], positions=positions)

    model = tiny_model({"merger_type": "average_pooling", "num_merged_tokens": M})
    assert model.model.encode_images(pixels(2)).token_places.tolist() == 2 * slow_places(M)
    model.model.merger.method = LastTokens(model.config.merger_config)
    encoded = model.model.encode_images(pixels(2))
    assert encoded.token_places.tolist() == 2 * list(range(NUM_PATCHES - M, NUM_PATCHES))
    ids = prompts([1, 1], M)["input_ids"]
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**prompts([1, 1], M), pixel_values=pixels(2))
    hook.remove()
    positions = seen["position_ids"][1]
    first = ids[1].tolist().index(IMAGE_ID)
    start = int((ids[1, :first] != PAD_ID).sum())
    assert (positions[first : first + M] - start).tolist() == list(range(NUM_PATCHES - M, NUM_PATCHES))
    assert positions[first + M] == start + NUM_PATCHES


# ---- forward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_forward_of_a_padded_batch(model, pad, attention):
    model.set_attn_implementation(attention)
    counts, images = [1, 2, 0], pixels(3)
    batch = prompts(counts, M, pad)
    logits = model(**batch, pixel_values=images).logits
    for row, (ids, own) in enumerate(zip(rows_of(batch), images_of_rows(counts, images), strict=True)):
        close(logits[row][batch["attention_mask"][row].bool()], slow_logits(model, ids, own))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("given", ["mask", "nothing", "position_ids"])
def test_forward_of_one_row(model, given, use_cache):
    batch, images = prompts([2], M), pixels(2)
    ids = batch["input_ids"]
    arguments = {
        "mask": batch,
        "nothing": {"input_ids": ids},
        "position_ids": {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]},
    }[given]
    logits = model(**arguments, pixel_values=images, use_cache=use_cache).logits[0]
    close(logits, slow_logits(model, ids[0].tolist(), images))


def test_text_between_images(model):
    words = list(range(FIRST_WORD_ID, FIRST_WORD_ID + 5))
    ids = [1, *words, *[IMAGE_ID] * M, *words[:2], *[IMAGE_ID] * (2 * M), *words, ANSWER_ID]
    logits = model(torch.tensor([ids]), pixels(3)).logits[0]
    close(logits, slow_logits(model, ids, pixels(3)))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_training_rows(model, attention, use_cache):
    model.set_attn_implementation(attention)
    rows, images = rows_of(prompts([1, 2, 0, 1], M)), images_of_rows([1, 2, 0, 1], pixels(4))
    packed = torch.tensor([sum(rows, [])])
    position_ids = torch.tensor([[position for row in rows for position in range(len(row))]])
    logits = model(packed, pixels(4), position_ids=position_ids, use_cache=use_cache).logits[0]
    for actual, ids, own in zip(logits.split([len(row) for row in rows]), rows, images, strict=True):
        close(actual, slow_logits(model, ids, own))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_a_4d_mask_of_the_callers(model, kind):
    batch, images = prompts([1], M), pixels(1)
    length = batch["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if kind == torch.float32:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    logits = model(batch["input_ids"], images, attention_mask=mask).logits[0]
    close(logits, slow_logits(model, batch["input_ids"][0].tolist(), images))


def test_images_encoded_before(model):
    batch, images = prompts([1, 1], M), pixels(2)
    encoded = {"image": model.model.encode_images(images)}
    hidden = model.model(**batch, mm_encoder_outputs=encoded).last_hidden_state
    close(hidden, model.model(**batch, pixel_values=images).last_hidden_state)
    generated = model.generate(**batch, mm_encoder_outputs=encoded, **GREEDY)
    assert_answers(generated, model, batch, [1, 1], images)


# ---- generate


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 16},
    ],
    ids=str,
)
def test_greedy_answers_of_a_batch(model, options):
    if "prefill_chunk_size" in options and not PREFILLS_IMAGES_IN_CHUNKS:
        pytest.skip("stock answers such chunks wrong or refuses them")
    counts, images = [1, 2, 0], pixels(3)
    batch = prompts(counts, M)
    generated = model.generate(**batch, pixel_values=images, **GREEDY, **options)
    assert_answers(generated, model, batch, counts, images)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("with_mask", [True, False])
def test_greedy_answers_of_one_row(model, with_mask, options):
    batch, images = prompts([2], M), pixels(2)
    inputs = batch if with_mask else {"input_ids": batch["input_ids"]}
    assert_answers(model.generate(**inputs, pixel_values=images, **GREEDY, **options), model, batch, [2], images)


def test_eager_attention(model):
    model.set_attn_implementation("eager")
    batch, images = prompts([1, 2], M), pixels(3)
    assert_answers(model.generate(**batch, pixel_values=images, **GREEDY), model, batch, [1, 2], images)


@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_scores_of_beams(model, num_return_sequences):
    counts, images = [2, 1], pixels(3)
    batch = prompts(counts, M)
    beams = {"num_beams": 2, "num_return_sequences": num_return_sequences, "length_penalty": 0.0}
    wanted = {"output_scores": True, "return_dict_in_generate": True}
    output = model.generate(**batch, pixel_values=images, **GREEDY, **beams, **wanted)
    length = batch["input_ids"].shape[1]
    expected = []
    for index, answer in enumerate(answers(output.sequences, length)):
        row = index // num_return_sequences
        ids, own = rows_of(batch)[row], images_of_rows(counts, images)[row]
        logits = slow_logits(model, [*ids, *answer], own)[len(ids) - 1 : -1]
        scores = logits.log_softmax(dim=-1)
        expected.append(scores.gather(1, torch.tensor(answer)[:, None]).sum())
    close(output.sequences_scores, torch.stack(expected))


def test_sampling_several_answers(model):
    batch, images = prompts([2, 1], M), pixels(3)
    options = {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    generated = model.generate(**batch, pixel_values=images, **options)
    greedy = model.generate(**batch, pixel_values=images, **GREEDY)
    assert torch.equal(generated, greedy.repeat_interleave(3, dim=0))
    assert_answers(greedy, model, batch, [2, 1], images)


def test_assisted_decoding(model):
    draft = copy.deepcopy(model)
    with torch.no_grad():
        draft.lm_head.weight.add_(0.05 * torch.randn_like(draft.lm_head.weight))
    batch, images = prompts([2], M), pixels(2)
    generated = model.generate(**batch, pixel_values=images, **GREEDY, assistant_model=draft)
    assert_answers(generated, model, batch, [2], images)


@pytest.mark.skipif(TRANSFORMERS_VERSION < Version("5.18"), reason="stock gives a text model the pictures")
def test_a_draft_that_is_a_text_model(model):
    batch, images = prompts([2], M), pixels(2)
    text_model = LlamaForCausalLM(model.config.text_config).eval()
    text_model.model.load_state_dict(tiny_stock().model.language_model.state_dict())
    generated = model.generate(**batch, pixel_values=images, **GREEDY, assistant_model=text_model)
    assert_answers(generated, model, batch, [2], images)


def test_prompts_given_as_embeddings(model):
    batch, images = prompts([2, 1], M), pixels(3)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    generated = model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], pixel_values=images, **GREEDY
    )
    expected = [
        slow_answer(model, ids, own) for ids, own in zip(rows_of(batch), images_of_rows([2, 1], images), strict=True)
    ]
    assert answers(generated, 0) == expected


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="4.57 does not count on from given positions")
def test_positions_of_the_callers_count_placeholders_as_one(model):
    batch, images = prompts([2], M), pixels(2)
    position_ids = torch.arange(batch["input_ids"].shape[1])[None]
    wanted = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**batch, pixel_values=images, **wanted)
    moved = model.generate(**batch, pixel_values=images, position_ids=position_ids + 100, **wanted)
    assert torch.equal(plain.sequences, moved.sequences)
    for one, other in zip(plain.logits, moved.logits, strict=True):  # rotary embeddings see differences only
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


# ---- caches


TURNS = {  # of three rows: images in front, words behind
    "text, image": [([0, 0, 0], [3, 5, 4]), ([1, 0, 2], [2, 1, 3]), ([0, 0, 0], [1, 2, 1])],
    "image, text": [([1, 0, 2], [3, 1, 2]), ([0, 0, 0], [2, 3, 1]), ([0, 1, 1], [2, 4, 1])],
    "text, text, image": [([0, 0, 0], [4, 1, 2]), ([0, 0, 0], [1, 3, 2]), ([1, 1, 0], [2, 1, 3])],
}


def turns_of_rows(turns, pad: str) -> list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """Of each turn ids and mask (3, L), padded, and the new images of each row."""
    generator, made = torch.Generator().manual_seed(0), []
    for number, (counts, words) in enumerate(turns):
        rows = []
        for count, length in zip(counts, words, strict=True):
            text = torch.randint(FIRST_WORD_ID, 20, (length,), generator=generator).tolist()
            rows.append([*([] if number else [1]), *[IMAGE_ID] * (M * count), *text])
        width = max(map(len, rows))
        filling = [[PAD_ID] * (width - len(row)) for row in rows]
        ids = torch.tensor(
            [fill + row if pad == "left" else row + fill for row, fill in zip(rows, filling, strict=True)]
        )
        images = pixels(sum(counts), seed=number)
        made.append((ids, (ids != PAD_ID).long(), images_of_rows(counts, images)))
    return made


@torch.no_grad()
def take_turns(model, turns, calls: str, cache=None, given: str = "   "):
    """Turn by turn by forward (f) or generate (g), each row against itself alone.

    Args:
        given: p where a forward is given position_ids, which begin at 50.
    """
    for number, call in enumerate(calls):
        ids, mask, images = turns[number]
        until = turns[: number + 1]
        masks = torch.cat([mask for _, mask, _ in until], dim=1)
        inputs = {"pixel_values": torch.cat(images)} if sum(map(len, images)) else {}
        if cache is not None:
            inputs[CACHE] = cache
        if given[number] == "p":
            inputs["position_ids"] = (masks.cumsum(1) + 49)[:, -ids.shape[1] :]
        if call == "f":
            output = model(ids, attention_mask=masks, use_cache=True, **inputs)
            logits = output.logits
        else:
            whole = torch.cat([ids for ids, _, _ in until], dim=1)
            wanted = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1, "do_sample": False}
            output = model.generate(whole, attention_mask=masks, **inputs, **wanted)
            logits = output.logits[0][:, None].float()  # of the last token
        cache = find_cache(output)
        for row in range(len(ids)):
            known = torch.cat([ids[row][mask[row].bool()] for ids, mask, _ in until]).tolist()
            kept = mask[row, -logits.shape[1] :].bool()  # in generate, where it is no padding
            expected = slow_logits(model, known, torch.cat([images[row] for _, _, images in until]))
            close(logits[row][kept], expected[len(known) - int(kept.sum()) :])
    return cache


@pytest.mark.parametrize("calls", ["fff", "ffg", "fgf", "gff", "ggf", "gfg"])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("turns", TURNS)
def test_rows_of_a_conversation_do_not_depend_on_their_batch(model, turns, pad, calls):
    take_turns(model, turns_of_rows(TURNS[turns], pad), calls)


@pytest.mark.parametrize("calls, given", [("fff", "p  "), ("fff", "p p"), ("fff", "pp "), ("fgf", "p  ")])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("turns", TURNS)
def test_turns_go_on_from_positions_that_were_given(model, turns, pad, calls, given):
    take_turns(model, turns_of_rows(TURNS[turns], pad), calls, given=given)


@pytest.mark.parametrize("calls", ["fff", "ffg", "gfg"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_row_that_has_nothing_new_in_a_turn_stays_where_it_was(model, pad, calls):
    turns = [([0, 0, 1], [3, 1, 2]), ([0, 1, 0], [0, 2, 4]), ([1, 0, 0], [2, 3, 1])]
    take_turns(model, turns_of_rows(turns, pad), calls)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("turns", TURNS)
@torch.no_grad()
def test_a_turn_with_a_4d_mask_goes_on_as_with_a_2d_one(model, turns, pad):
    turns = turns_of_rows(TURNS[turns], pad)[:2]
    cache = take_turns(model, turns, "ff")
    ids = torch.tensor([[7, 9]] * 3)  # without padding, which such a mask does not tell
    masks = torch.cat([mask for _, mask, _ in [*turns, (ids, torch.ones_like(ids), [])]], dim=1)
    seen = torch.ones(2, masks.shape[1], dtype=torch.bool).tril(masks.shape[1] - 2) & masks[:, None].bool()
    expected = model(ids, attention_mask=masks, **{CACHE: copy.deepcopy(cache)}).logits
    close(model(ids, attention_mask=seen[:, None], **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("turns", TURNS)
def test_rows_of_a_conversation_on_a_static_cache(model, turns, pad):
    static = StaticCache(config=model.config.text_config, max_cache_len=80)
    take_turns(model, turns_of_rows(TURNS[turns], pad), "fff", static)


def first_turn(model, images, **options):
    batch = prompts([1], M)
    output = model.generate(**batch, pixel_values=images, **GREEDY, return_dict_in_generate=True, **options)
    return output.sequences[0].tolist(), find_cache(output)


@pytest.mark.parametrize("given", ["all images", "the new image"])
@pytest.mark.parametrize("text_first", [True, False])
def test_a_second_turn_with_a_new_image(model, given, text_first):
    images = pixels(2)
    ids, cache = first_turn(model, images[:1])
    new = [*([7, 8] if text_first else []), *[IMAGE_ID] * M, 9, ANSWER_ID]
    whole = [*ids, *new]
    batch = {"input_ids": torch.tensor([whole]), "attention_mask": torch.ones(1, len(whole), dtype=torch.long)}
    passed = images if given == "all images" else images[1:]
    generated = model.generate(**batch, pixel_values=passed, **{CACHE: cache}, **GREEDY)
    assert answers(generated, len(whole)) == [slow_answer(model, whole, images)]


def test_a_second_turn_of_text_alone(model):
    ids, cache = first_turn(model, pixels(1))
    whole = [*ids, 7, 8, 9, ANSWER_ID]
    batch = {"input_ids": torch.tensor([whole]), "attention_mask": torch.ones(1, len(whole), dtype=torch.long)}
    generated = model.generate(**batch, **{CACHE: cache}, **GREEDY)
    assert answers(generated, len(whole)) == [slow_answer(model, whole, pixels(1))]


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="stock raises IndexError")
@pytest.mark.parametrize("with_image", [True, False])
def test_a_second_turn_with_only_its_new_tokens(model, with_image):
    images = pixels(2)[: 1 + with_image]
    ids, cache = first_turn(model, images[:1])
    ids = ids[: int(cache.get_seq_length())]  # the last token of the answer was never read
    new = [7, *([IMAGE_ID] * M if with_image else []), 9, ANSWER_ID]
    whole = [*ids, *new]
    inputs = {"input_ids": torch.tensor([new]), "attention_mask": torch.ones(1, len(whole), dtype=torch.long)}
    if with_image:
        inputs["pixel_values"] = images[1:]
    generated = model.generate(**inputs, **{CACHE: cache}, **GREEDY)
    assert answers(generated, len(new)) == [slow_answer(model, whole, images)]


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("new_image", [True, False])
def test_a_decode_loop_by_hand(model, with_mask, new_image):
    """The third forward brings an image where `new_image`."""
    images = pixels(2)
    batch = prompts([1], M)
    ids = batch["input_ids"][0].tolist()
    steps = [[7], [IMAGE_ID] * M if new_image else [8], [9], [10, 11]]
    output = model(batch["input_ids"], images[:1], use_cache=True)
    for step in steps:
        ids += step
        inputs = {"input_ids": torch.tensor([step])}
        if with_mask:
            inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        if IMAGE_ID in step:
            inputs["pixel_values"] = images[1:]
        output = model(**inputs, **{CACHE: find_cache(output)})
        expected = slow_logits(model, ids, images[: 1 + (ids.count(IMAGE_ID) > M)])
        close(output.logits[0], expected[-len(step) :])


def test_a_cache_that_is_cropped_to_before_its_image(model):
    batch, images = prompts([1], M), pixels(2)
    output = model(batch["input_ids"], images[:1], use_cache=True)
    cache = find_cache(output)
    cache.crop(1 - cache.get_seq_length())  # leaves <s>
    ids = [1, 7, *[IMAGE_ID] * M, 9]
    output = model(torch.tensor([ids[1:]]), images[1:], **{CACHE: cache})
    close(output.logits[0], slow_logits(model, ids, images[1:])[1:])
    cache = find_cache(output)
    cache.crop(1 - cache.get_seq_length())
    output = model(torch.tensor([[7, 8, 9]]), **{CACHE: cache})
    close(output.logits[0], slow_logits(model, [1, 7, 8, 9], images[:0])[1:])
    output = model(torch.tensor([[10]]), **{CACHE: find_cache(output)})
    close(output.logits[0], slow_logits(model, [1, 7, 8, 9, 10], images[:0])[-1:])


@pytest.mark.parametrize("how", ["deepcopy", "repeat"])
def test_one_cache_for_several_questions(model, how):
    batch, image = prompts([1], M), pixels(1)
    prefix = batch["input_ids"][:, : 1 + M]
    with torch.no_grad():
        cache = find_cache(model(prefix, image, use_cache=True))
    questions = torch.tensor([[7, 8, ANSWER_ID], [9, 7, ANSWER_ID], [10, 11, ANSWER_ID]])
    rows = [[*prefix[0].tolist(), *question] for question in questions.tolist()]
    if how == "repeat":
        cache.batch_repeat_interleave(3)
        logits = model(questions, **{CACHE: cache}).logits
    else:
        logits = torch.cat([model(row[None], **{CACHE: copy.deepcopy(cache)}).logits for row in questions])
    for actual, ids in zip(logits, rows, strict=True):
        close(actual, slow_logits(model, ids, image)[-3:])


def test_a_static_cache_that_is_used_again(model):
    images = pixels(2)
    batch = prompts([1], M)
    static = StaticCache(config=model.config.text_config, max_cache_len=64)
    for image in images:
        generated = model.generate(**batch, pixel_values=image[None], **{CACHE: static}, **GREEDY)
        assert_answers(generated, model, batch, [1], image[None])
        static.reset()
    text = {"input_ids": torch.tensor([[1, 7, 8, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert_answers(model.generate(**text, **{CACHE: static}, **GREEDY), model, text, [0], images[:0])


def test_a_cache_that_forgot_its_images_is_refused(model):
    batch = prompts([1], M)
    cache = find_cache(model(batch["input_ids"], pixels(1), use_cache=True))
    del cache.token_layout
    with pytest.raises(ValueError, match="does not know where its merged images sit.*whole conversation"):
        model(torch.tensor([[7]]), **{CACHE: cache})


def test_a_cache_of_other_rows_is_refused(model):
    """Its layers were changed one by one, of which it knows nothing."""
    batch = prompts([1, 1], M)
    cache = find_cache(model(**batch, pixel_values=pixels(2), use_cache=True))
    for layer in cache.layers:
        layer.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match="filled with 2 rows, and now there are 1.*batch_select_indices"):
        model(torch.tensor([[7]]), **{CACHE: cache})


ROWS = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "reorder_cache, twice the same": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    "select one": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "select some": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


def assert_continued(model, cache, turns, order):
    """Two more turns of the rows that a cache holds after its first turn, in this `order`."""
    picked = [(ids[order], mask[order], [images[row] for row in order]) for ids, mask, images in turns]
    ids, mask, images = picked[1]
    masks = torch.cat([mask for _, mask, _ in picked[:2]], dim=1)
    inputs = {"pixel_values": torch.cat(images)} if sum(map(len, images)) else {}
    logits = model(ids, attention_mask=masks, **inputs, **{CACHE: cache}).logits
    for row in range(len(order)):
        known = torch.cat([ids[row][mask[row].bool()] for ids, mask, _ in picked[:2]]).tolist()
        kept = mask[row].bool()
        expected = slow_logits(model, known, torch.cat([images[row] for _, _, images in picked[:2]]))
        close(logits[row][kept], expected[len(known) - int(kept.sum()) :])


@pytest.mark.parametrize("how", ROWS)
@pytest.mark.parametrize("by", ["forward", "generate", "deepcopy", "pickle", "static"])
@pytest.mark.parametrize("turns", ["image, text", "text, image"])
@torch.no_grad()
def test_rows_of_a_cache_take_their_images_along(model, turns, by, how):
    turns, (change, order) = turns_of_rows(TURNS[turns], "left"), ROWS[how]
    if by == "static" and not how.startswith("reorder"):
        return  # it has no more of these methods
    static = StaticCache(config=model.config.text_config, max_cache_len=80) if by == "static" else None
    cache = take_turns(model, turns, "g" if by == "generate" else "f", static)
    cache = copy.deepcopy(cache) if by == "deepcopy" else pickle.loads(pickle.dumps(cache)) if by == "pickle" else cache
    change(cache)
    assert_continued(model, cache, turns, order)


def crop_to(cache, length: int):
    """The first `length` tokens; 4.57 takes that number, 5.x that of the tokens to remove."""
    cache.crop(length - int(cache.get_seq_length()) if TRANSFORMERS_V5 else length)


@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
@torch.no_grad()
def test_a_turn_behind_drafts(model, how):
    """Those that were refused are cropped from the cache."""
    images, batch, draft = pixels(2), prompts([1], M), copy.deepcopy(model)
    draft.lm_head.weight.add_(0.05 * torch.randn_like(draft.lm_head.weight))
    drafts = {how: draft if how == "assistant_model" else 3}
    output = model.generate(**batch, pixel_values=images[:1], **GREEDY, **drafts, return_dict_in_generate=True)
    cache, ids = find_cache(output), output.sequences[0].tolist()
    crop_to(cache, len(ids) - 3)
    whole = [*ids[:-3], 7, *[IMAGE_ID] * M, 9]
    logits = model(torch.tensor([whole[len(ids) - 3 :]]), images[1:], **{CACHE: cache}).logits[0]
    close(logits, slow_logits(model, whole, images)[len(ids) - 3 :])


@torch.no_grad()
def test_a_turn_behind_beams(model):
    """One beam of each prompt is kept, the later prompt first."""
    images, batch, rows = pixels(4), prompts([1, 2], M), rows_of(prompts([1, 2], M))
    output = model.generate(**batch, pixel_values=images[:3], **GREEDY, num_beams=2, return_dict_in_generate=True)
    cache, length = find_cache(output), batch["input_ids"].shape[1]
    crop_to(cache, length)
    cache.batch_select_indices(torch.tensor([2, 0]))
    new = [*[IMAGE_ID] * M, 7, 9]
    mask = torch.nn.functional.pad(batch["attention_mask"][[1, 0]], (0, len(new)), value=1)
    logits = model(torch.tensor([new, new]), images[[3, 3]], attention_mask=mask, **{CACHE: cache}).logits
    for actual, row, own in ((logits[0], 1, [1, 2, 3]), (logits[1], 0, [0, 3])):
        close(actual, slow_logits(model, [*rows[row], *new], images[own])[-len(new) :])


@torch.no_grad()
def test_a_cache_stays_what_it_was(model):
    """Of its class, which code asks for by isinstance and by name; nothing but the layout is added."""
    cache = find_cache(model(**prompts([1], M), pixel_values=pixels(1), use_cache=True))
    plain = find_cache(tiny_stock()(**prompts([0], M), use_cache=True))
    again = copy.deepcopy(cache)
    for each in (cache, again):
        assert isinstance(each, type(plain)) and type(each).__name__ == type(plain).__name__
        assert vars(each).keys() - vars(plain).keys() == {"token_layout"}
    assert type(again) is type(cache) and again.token_layout is not cache.token_layout
    gone = weakref.ref(cache)
    del cache, each
    assert gone() is None  # without the garbage collector, which memory on a GPU cannot wait for


@torch.no_grad()
def test_a_cache_that_was_reset_begins_anew(model):
    static = StaticCache(config=model.config.text_config, max_cache_len=80)
    model(**prompts([1, 1], M), pixel_values=pixels(2), **{CACHE: static})
    static.reset()
    assert static.token_layout is None
    batch = prompts([0, 0], M)
    close(model(**batch, **{CACHE: static}).logits, tiny_stock()(**batch).logits)


@torch.no_grad()
def test_rows_that_are_repeated_and_picked_within_generate(model, monkeypatch):
    """As contrastive search does, which transformers keeps on the Hub: candidates of each row, of which one is kept."""
    update = model._update_model_kwargs_for_generation

    def search(outputs, *args, **kwargs):
        cache = find_cache(outputs)
        cache.batch_repeat_interleave(3)
        assert len(cache.token_layout.skipped) == 6
        cache.batch_select_indices(torch.tensor([1, 5]))
        return update(outputs, *args, **kwargs)

    monkeypatch.setattr(model, "_update_model_kwargs_for_generation", search)
    batch, images = prompts([1, 2], M), pixels(3)
    output = model.generate(**batch, pixel_values=images, return_dict_in_generate=True, **GREEDY)
    assert_answers(output.sequences, model, batch, [1, 2], images)
    assert len(find_cache(output).token_layout.skipped) == 2


# ---- more positions than the language model was made for


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate_warns_of_positions_that_the_tokens_do_not_tell(options, said_of_positions):
    model, images = tiny_model(agnostic(M)), pixels(3)
    batch = prompts([0, 1, 2], M)  # at most 9 + 2 M tokens, at 9 + 2 N positions
    reached = int(batch["attention_mask"][2].sum()) + 2 * (NUM_PATCHES - M) + 4
    for limit, warns in ((reached, False), (reached - 1, True)):
        model.config.text_config.max_position_embeddings = limit
        model.generate(**batch, pixel_values=images, max_new_tokens=4, do_sample=False, **options)
        assert bool(said_of_positions) == warns
    room = limit - 2 * (NUM_PATCHES - M)
    found = f"max_position_embeddings={limit}.*skip {2 * (NUM_PATCHES - M)} positions, which leaves room for {room} tok"
    assert len(said_of_positions) == 1 and re.search(found, said_of_positions[0])


def test_rows_of_a_batch_are_counted_one_by_one(said_of_positions):
    """Neither padding nor the images of other rows."""
    model, batch = tiny_model(agnostic(M)), prompts([2, 2, 0], M, text=4)
    model.config.text_config.max_position_embeddings = 6 + 1 + 2 * NUM_PATCHES + 4
    model.generate(**batch, pixel_values=pixels(4), max_new_tokens=4, do_sample=False)
    assert not said_of_positions


def test_a_second_turn_is_warned_of_with_the_first(said_of_positions):
    model, images = tiny_model(agnostic(M)), pixels(2)
    ids, cache = first_turn(model, images[:1])
    model.config.text_config.max_position_embeddings = len(ids) + 2 * NUM_PATCHES - M + 6  # 7 more tokens
    whole = torch.tensor([[*ids, *[IMAGE_ID] * M, 9, ANSWER_ID]])
    model.generate(whole, attention_mask=torch.ones_like(whole), pixel_values=images, **{CACHE: cache}, **GREEDY)
    assert len(said_of_positions) == 1


def test_packed_positions_are_not_warned_of(said_of_positions):
    model = tiny_model(agnostic(M, position_ids="packed", attention_mass=0.5))
    model.config.text_config.max_position_embeddings = 24
    model.generate(**prompts([1], M), pixel_values=pixels(1), max_new_tokens=4)
    assert not said_of_positions


def test_prompts_that_fit_cost_no_look_at_the_device(monkeypatch, said_of_positions):
    """Counts of images and tokens are known on the host; only a batch that may be too long is looked at."""
    model, batch, images = tiny_model(agnostic(M)), prompts([1, 2], M), pixels(3)
    looks = []
    item = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: looks.append(1) or item(tensor))
    model.generate(**batch, pixel_values=images, **GREEDY)
    fitting = len(looks)
    model.config.text_config.max_position_embeddings = 64
    model.generate(**batch, pixel_values=images, **GREEDY)
    assert len(looks) - fitting == fitting + 3 and len(said_of_positions) == 1


# ---- text models and attention kinds of other sorts


def mistral(mode: dict, window: int | None):
    fields = {name: value for name, value in tiny_config().text_config.to_dict().items() if "rope" not in name}
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "head_dim", "architectures")}
    text = MistralConfig(**fields, sliding_window=window)
    stock = {**tiny_config().to_dict(), "text_config": text}
    stock.pop("model_type")
    config = LlavaMergeConfig(merger_config=agnostic(M, **mode), **stock)
    return scale_up(LlavaMergeForConditionalGeneration(config), merger=True)


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("window", [None, 12], ids=str)
def test_a_text_model_with_a_sliding_window(mode, window):
    model, counts, images = mistral(mode, window), [1, 2, 0], pixels(3)
    batch = prompts(counts, M)
    logits = model(**batch, pixel_values=images).logits
    for row, (ids, own) in enumerate(zip(rows_of(batch), images_of_rows(counts, images), strict=True)):
        close(logits[row][batch["attention_mask"][row].bool()], slow_logits(model, ids, own))
    assert_answers(model.generate(**batch, pixel_values=images, **GREEDY), model, batch, counts, images)
    if window is None:  # stock's static sliding cache forgets what a padded row still needs
        static = model.generate(**batch, pixel_values=images, **GREEDY, cache_implementation="static")
        assert_answers(static, model, batch, counts, images)


def test_layers_with_and_without_a_window_take_positions_but_no_mass():
    model = tiny_model(agnostic(M, attention_mass=1.0))
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="layers of full_attention, sliding_attention, but attention_mass"):
        model(**prompts([1], M), pixel_values=pixels(1))


def varlen_attention(query, key, value, attention_mask, query_length, **kwargs):
    """What FlashAttention computes, (B, L, heads, dim), told the samples as it is told them."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (
        tensor.transpose(1, 2).repeat_interleave(times, dim=1)
        for tensor, times in ((query, 1), (key, groups), (value, groups))
    )
    num_queries, num_keys = query.shape[2], key.shape[2]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)[None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, -num_keys:].bool()
    elif kwargs.get("cu_seq_lens_q") is not None:
        starts, key_starts = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        assert starts[-1] == num_queries and key_starts[-1] == num_keys and starts.dtype == torch.int32
        assert kwargs["max_length_q"] == starts.diff().max() and kwargs["max_length_k"] == key_starts.diff().max()
        number, key_number = (
            torch.bucketize(torch.arange(length), ends[1:], right=True)
            for length, ends in ((num_queries, starts), (num_keys, key_starts))
        )
        seen = seen & (number[:, None] == key_number)
    else:
        positions = kwargs.get("position_ids")
        guessed = query.shape[0] == 1 and positions is not None and (positions.diff(dim=-1) != 1).any()
        assert not guessed, "FlashAttention takes a jump in the positions for the next sample"
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output.transpose(1, 2)


@pytest.fixture
def flash_model(monkeypatch):
    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", varlen_attention)
    model = tiny_model(agnostic(M, attention_mass=0), train_merger=True)
    model.config.text_config._attn_implementation = "flash_attention_2"
    assert model.model.language_model.config._attn_implementation == "flash_attention_2"
    return model


def without_flash(model):
    same = copy.deepcopy(model)
    same.config.text_config._attn_implementation = "sdpa"
    same.model.language_model.config._attn_implementation = "sdpa"
    return same


def test_flash_attention_is_told_the_samples(flash_model):
    slow = without_flash(flash_model)
    images = pixels(4)
    batch = prompts([2], M)
    close(flash_model(batch["input_ids"], images[:2]).logits[0], slow_logits(slow, rows_of(batch)[0], images[:2]))
    rows, own = rows_of(prompts([1, 2, 0, 1], M)), images_of_rows([1, 2, 0, 1], images)
    packed = torch.tensor([sum(rows, [])])
    position_ids = torch.tensor([[position for row in rows for position in range(len(row))]])
    logits = flash_model(packed, images, position_ids=position_ids, use_cache=False).logits[0]
    for actual, ids, few in zip(logits.split([len(row) for row in rows]), rows, own, strict=True):
        close(actual, slow_logits(slow, ids, few))


def test_flash_attention_in_generate(flash_model):
    slow, images = without_flash(flash_model), pixels(2)
    for counts in ([1, 1], [2], [1]):
        batch = prompts(counts, M)
        generated = flash_model.generate(**batch, pixel_values=images[: sum(counts)], **GREEDY)
        assert_answers(generated, slow, batch, counts, images[: sum(counts)])
    ids, cache = first_turn(flash_model, images[:1])
    whole = [*ids, 7, *[IMAGE_ID] * M, 9, ANSWER_ID]
    batch = {"input_ids": torch.tensor([whole]), "attention_mask": torch.ones(1, len(whole), dtype=torch.long)}
    generated = flash_model.generate(**batch, pixel_values=images, **{CACHE: cache}, **GREEDY)
    assert answers(generated, len(whole)) == [slow_answer(slow, whole, images)]


class TestMassThatNobodyChose:
    """A merger that was not trained starts with the mass of its patches, wherever attention can add it."""

    @pytest.fixture(autouse=True)
    def nothing_was_said_before(self):
        logging.warning_once.cache_clear()

    def fields(self, model):
        assert model.config.merger_config.attention_mass in (None, model.model.attention_mass)
        return model.config.merger_config.attention_mass, model.model.attention_mass

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("merger_type", ["fixed_pooling", "tome", "divprune", "mqt"])
    def test_is_1(self, attention, merger_type, stock_dir, caplog):
        fields = {"merger_type": merger_type, "num_merged_tokens": M, "num_heads": 4}
        options = {"attn_implementation": attention}
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=fields, **options)
        trains = merger_type in ("fixed_pooling", "mqt")
        assert self.fields(model) == (1.0 if trains else None, 1.0) and "attention_mass" not in caplog.text
        chosen = {**fields, "attention_mass": 1.0}
        same = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger_config=chosen, **options)
        batch = {**prompts([1, 2], M), "pixel_values": pixels(3)}
        if merger_type != "mqt":  # which starts random
            assert torch.equal(model(**batch).logits, same(**batch).logits)

    def test_is_0_with_a_warning_where_attention_takes_no_bias(self, stock_dir, caplog):
        for fields, number in (({"attention_mass": 0}, 0), ({}, 1), ({}, 1), ({"merger_type": "none"}, 1)):
            merger_config = fields if "merger_type" in fields else agnostic(M, **fields)
            options = {"attn_implementation": {"text_config": "flex_attention"}, "merger_config": merger_config}
            model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, **options)
            assert self.fields(model)[1] == 0.0 or fields == {"merger_type": "none"}
            assert caplog.text.count("this model has 'flex_attention'") == number

    def test_is_0_where_layers_differ(self, caplog):
        from test_backbones import make_stock

        config = LlavaMergeConfig.from_dict(make_stock(text="gemma2").config.to_dict(), merger_config=agnostic(M))
        assert self.fields(LlavaMergeForConditionalGeneration(config)) == (0.0, 0.0)
        assert "full_attention, sliding_attention" in caplog.text

    def test_trained_mergers_keep_theirs(self, stock_dir, tmp_path):
        tiny_model(agnostic(M, attention_mass=0), train_merger=True).save_merger(tmp_path / "merger")
        tiny_model(agnostic(M, attention_mass=0), train_merger=True).save_pretrained(tmp_path / "model")
        from_merger = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=tmp_path / "merger")
        assert self.fields(from_merger) == (0.0, 0.0)
        from_merger.set_merger("tome")  # untrained
        assert self.fields(from_merger) == (None, 1.0)
        from_merger.load_merger(tmp_path / "merger")
        assert self.fields(from_merger) == (0.0, 0.0)
        fields = {"num_merged_tokens": 4, "vision_dim": 32, "num_heads": 4}
        for given in (None, {"num_merged_tokens": 4}, MergerConfig(**fields), MergerConfig(**fields).to_dict()):
            if isinstance(given, dict):  # of another model, and not of its grid
                given = {name: given[name] for name in (*fields, "attention_mass") if name in given}
            model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model", merger_config=given)
            assert self.fields(model) == (0.0, 0.0)
        config = LlavaMergeConfig.from_pretrained(stock_dir, merger_config=agnostic(4))
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model", config=config)
        assert self.fields(model) == (0.0, 0.0)
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "model", merger_config="tome")
        assert self.fields(model) == (None, 1.0)

    @pytest.mark.parametrize("kind", ["model", "merger"])
    def test_of_a_method_without_training_it_is_what_attention_allows_again(self, kind, stock_dir, tmp_path, caplog):
        """Wherever it was saved: nothing was trained with the mass that it had there."""
        flex = {"attn_implementation": {"text_config": "flex_attention"}}
        load = LlavaMergeForConditionalGeneration.from_pretrained
        for options, others, mass in (({}, flex, 0.0), (flex, {}, 1.0)):
            model = load(stock_dir, merger_config={"merger_type": "tome", "num_merged_tokens": M}, **options)
            folder = tmp_path / f"{kind}-{mass}"
            (model.save_pretrained if kind == "model" else model.save_merger)(folder)
            again = load(folder, **others) if kind == "model" else load(stock_dir, merger=folder, **others)
            assert self.fields(again) == (None, mass)
        assert caplog.text.count("this model has 'flex_attention'") == 1

    @pytest.mark.parametrize("name", ["merger", "model"])
    def test_checkpoints_of_0_1_0_have_none(self, name, stock_dir, tmp_path):
        saved = tiny_model(agnostic(M), train_merger=True)
        (saved.save_merger if name == "merger" else saved.save_pretrained)(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text())
        del (fields if name == "merger" else fields["merger_config"])["attention_mass"]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        where = {"merger": tmp_path} if name == "merger" else {}
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir if where else tmp_path, **where)
        assert self.fields(model) == (0.0, 0.0)

    def test_is_kept_by_a_merger_alone_until_a_model_has_it(self, stock_dir, tmp_path):
        merger = TokenMerger(MergerConfig(num_merged_tokens=M, vision_dim=32, text_dim=64, num_heads=4))
        merger.save_pretrained(tmp_path)
        assert TokenMerger.from_pretrained(tmp_path).config.attention_mass is None
        model = LlavaMergeForConditionalGeneration.from_pretrained(stock_dir, merger=tmp_path)
        assert self.fields(model) == (1.0, 1.0)


def test_mass_with_flash_attention_is_refused(flash_model):
    flash_model.config.merger_config.attention_mass = 0.5
    inputs = {**prompts([1], M), "pixel_values": pixels(1)}
    for call in (flash_model, flash_model.generate):
        with pytest.raises(ValueError, match="attention_mass=0.5 with attn_implementation='flash_attention_2'.*'sdpa'"):
            call(**inputs)


def test_a_mask_that_takes_no_mass_is_refused():
    model = tiny_model(agnostic(M, attention_mass=1.0))
    batch = prompts([1], M)
    with pytest.raises(ValueError, match="attention_mass with a dict as attention_mask"):
        model(batch["input_ids"], pixels(1), attention_mask={"full_attention": batch["attention_mask"]})


# ---- no change where nothing is merged, or nothing is asked for


@pytest.mark.parametrize("mode", [*MODES, {"position_ids": "packed"}], ids=[*MODE_NAMES, "packed"])
def test_all_tokens_are_stock_bit_for_bit(mode):
    merger_config = {"merger_type": "average_pooling", "num_merged_tokens": NUM_PATCHES, **mode}
    ours, stock = tiny_model(merger_config), tiny_stock()
    for pad in ("left", "right"):
        batch = {**prompts([1, 2, 0], NUM_PATCHES, pad), "pixel_values": pixels(3)}
        assert torch.equal(ours(**batch).logits, stock(**batch).logits)
    batch = {**prompts([1, 2, 0], NUM_PATCHES), "pixel_values": pixels(3)}
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        wanted = {**GREEDY, **options, "output_scores": True, "return_dict_in_generate": True}
        one, other = (model.generate(**batch, **wanted) for model in (ours, stock))
        assert torch.equal(one.sequences, other.sequences)
        assert all(torch.equal(*pair) for pair in zip(one.scores, other.scores, strict=True))


@pytest.mark.parametrize("with_mask", [True, False])
def test_packed_positions_without_mass_are_0_1_0_bit_for_bit(with_mask):
    """Which gave stock's forward the merged features, and nothing else."""
    fields = agnostic(M, position_ids="packed", attention_mass=0)
    ours, stock = tiny_model(fields, train_merger=True), tiny_stock()
    batch, images = prompts([1, 2, 0], M), pixels(3)
    embeds = stock.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(ours.model.encode_images(images).pooler_output)
    embeds = embeds.masked_scatter((batch["input_ids"] == IMAGE_ID)[..., None], features)
    mask = {"attention_mask": batch["attention_mask"]} if with_mask else {}
    expected = stock(inputs_embeds=embeds, **mask).logits
    assert torch.equal(ours(batch["input_ids"], images, **mask).logits, expected)
    if not with_mask:
        return  # generate would take the padding for text, in stock by the ids, which embeddings do not have
    wanted = {**GREEDY, **mask, "output_scores": True, "return_dict_in_generate": True}
    one = ours.generate(batch["input_ids"], pixel_values=images, **wanted)
    other = stock.generate(inputs_embeds=embeds.detach(), **wanted)
    assert torch.equal(one.sequences[:, batch["input_ids"].shape[1] :], other.sequences)
    assert all(torch.equal(*pair) for pair in zip(one.scores, other.scores, strict=True))


def test_text_alone_is_stock(model):
    batch = prompts([0, 0], M)
    close(model(**batch).logits, tiny_stock()(**batch).logits)
    assert torch.equal(model.generate(**batch, **GREEDY), tiny_stock().generate(**batch, **GREEDY))


def test_source_positions_change_the_answer():
    batch, images = prompts([2], M), pixels(2)
    packed, source = (
        tiny_model(agnostic(M, position_ids=position_ids), train_merger=True)(**batch, pixel_values=images).logits
        for position_ids in ("packed", "source")
    )
    assert (packed - source).abs().max() > 0.1


# ---- precision, training, compilation, threads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype):
    batch, images = prompts([1, 2], M), pixels(3)
    expected = model(**batch, pixel_values=images).logits
    with torch.autocast("cpu", dtype):
        automatic = model(**batch, pixel_values=images).logits
    half = model.to(dtype)(**batch, pixel_values=images.to(dtype)).logits
    kept = batch["attention_mask"].bool()
    for logits in (automatic, half):
        assert logits.isfinite().all()
        close_in_half = (logits.float() - expected)[kept].abs().mean() / expected[kept].abs().mean()
        assert close_in_half < 0.1
    generated = model.generate(**batch, pixel_values=images.to(dtype), **GREEDY)
    static = model.generate(**batch, pixel_values=images.to(dtype), **GREEDY, cache_implementation="static")
    assert torch.equal(generated, static)


@pytest.mark.parametrize("with_mask", [True, False])
def test_gradient_checkpointing_changes_nothing(model, with_mask):
    batch, images = prompts([2, 2], M, text=6), pixels(4)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, -100)
    inputs = {"input_ids": batch["input_ids"], "pixel_values": images, "labels": labels}
    if with_mask:
        inputs["attention_mask"] = batch["attention_mask"]
    results = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        loss = trained(**inputs).loss
        loss.backward()
        results.append((loss, trained.model.merger.method.pool_queries.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="stock's forward of 4.57 breaks the graph")
@pytest.mark.parametrize("with_mask", [True, False])
def test_forward_compiles_to_one_graph_for_prompts_of_one_shape(model, with_mask):
    images = pixels(2)
    batches = [prompts([1, 1], M, seed=seed, text=8) for seed in range(3)]
    for batch in batches:  # the same number of words in both rows
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    inputs = [batch if with_mask else {"input_ids": batch["input_ids"]} for batch in batches]
    with torch.no_grad():
        expected = [model(**one, pixel_values=images, use_cache=False).logits for one in inputs]
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for one, logits in zip(inputs, expected, strict=True):
            close(compiled(**one, pixel_values=images, use_cache=False).logits, logits)
    assert counter.frame_count == 1


def test_a_static_decode_step_compiles_once(model, monkeypatch):
    """As `generate` compiles it on an accelerator: the prefill eagerly, all steps of all prompts with one graph."""
    images, counter = pixels(3), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    eager = model.forward
    steps = []

    def forward(*args, **kwargs):
        is_step = kwargs["input_ids"].shape[1] == 1
        steps.append(is_step)
        return compiled(*args, **kwargs) if is_step else eager(*args, **kwargs)

    forward.__signature__ = inspect.signature(eager)
    for text in (6, 9):
        batch = prompts([1, 2], M, text=text)
        static = StaticCache(config=model.config.text_config, max_cache_len=64)
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", forward)
            generated = model.generate(**batch, pixel_values=images, **{CACHE: static}, **GREEDY)
        assert_answers(generated, model, batch, [1, 2], images)
    assert sum(steps) > 4 and counter.frame_count == 1


def test_threads_do_not_see_each_other(model):
    counts = [[1], [2], [1, 2], [0, 1], [2, 2], [1, 1, 1]]
    jobs = [(prompts(count, M, seed=index), pixels(sum(count), seed=index)) for index, count in enumerate(counts)]
    expected = [model.generate(**batch, pixel_values=images, **GREEDY) for batch, images in jobs]
    results = [None] * len(jobs)

    def run(index):
        batch, images = jobs[index]
        for _ in range(3):
            results[index] = model.generate(**batch, pixel_values=images, **GREEDY)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
