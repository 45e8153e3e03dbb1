# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Seeded random configurations, prompts, masks and image counts: each a right answer or a ValueError.

`pytest tests/test_fuzz.py --fuzz-cases 100000` runs more of them than CI does.
"""

import functools
import random

import pytest
import torch
from conftest import (
    ANSWER_ID,
    EOS_ID,
    FIRST_WORD_ID,
    IMAGE_ID,
    NUM_PATCHES,
    PAD_ID,
    USER_ID,
    WORDS,
    image_features,
    pixels,
    tiny_config,
    tiny_model,
    tiny_stock,
)
from test_positions import slow_positions_and_bias
from test_question import masks_token_by_token

from llava_merge import MERGING_METHODS, LlavaMergeConfig, MergeOutput, MergerConfig, Question, TokenMerger
from llava_merge.model.merging_base import READ_FOR_QUESTION
from llava_merge.model.questions import TurnMarks


CHUNKS = 20
PLACES = [("packed", 0.0), ("source", 0.0), ("source", 1.0), ("packed", 0.5)]
MARKED = {"question_start_token_ids": [[USER_ID]], "question_end_token_ids": [[ANSWER_ID]]}
OTHER_METHODS = sorted(MERGING_METHODS.keys() - {"none", "average_pooling", "fixed_pooling", "image_resize"})
MODELS = [
    {"merger_type": "none", "num_heads": 4},
    {"merger_type": "average_pooling", "num_merged_tokens": 4, "num_heads": 4},
    {"num_merged_tokens": 4, "num_heads": 4},
    {"num_merged_tokens": 4, "num_heads": 4, "question_aware": True, **MARKED},
    {"num_merged_tokens": 4, "num_heads": 4, "question_aware": True, "init": "random", **MARKED},
    {"num_merged_tokens": 4, "num_heads": 4, "question_aware": True},
    {"num_merged_tokens": 4, "num_heads": 4, "question_aware": True, "feature_layers": [1, 2], **MARKED},
    *({"merger_type": name, "num_merged_tokens": 4, "num_heads": 4, **MARKED} for name in OTHER_METHODS),
]


@functools.cache
def model_of(index: int):
    return tiny_model(MODELS[index], train_merger=True)


@functools.cache
def stock():
    return tiny_stock()


def random_row(rng: random.Random, budgets: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Ids, labels and tokens of each image of a random chat; sometimes one that no chat template would write."""
    ids, labels, num_tokens = [], [], []
    for turn in range(rng.randint(1, 3)):
        question = [USER_ID] if rng.random() < 0.9 else []
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            num_tokens.append(rng.choice(budgets))
            count = num_tokens[-1] if rng.random() < 0.97 else rng.randint(0, num_tokens[-1] + 2)
            question += [IMAGE_ID] * count
        question += [rng.randrange(FIRST_WORD_ID, len(WORDS)) for _ in range(rng.choice((0, 1, 3, 6)))]
        question += [ANSWER_ID] if rng.random() < 0.95 else []
        answer = [rng.randrange(FIRST_WORD_ID, len(WORDS)) for _ in range(rng.choice((0, 2, 4)))]
        answer += [EOS_ID] if rng.random() < 0.7 else []
        ids += ([1] if turn == 0 else []) + question + answer
        labels += [-100] * (len(ids) - len(labels) - len(answer)) + answer
    if rng.random() < 0.02:
        labels = [id if id != IMAGE_ID else -100 for id in ids]
    return ids, labels, num_tokens


def random_call(rng: random.Random, budgets: list[int], question_aware: bool) -> tuple[dict, list[int]]:
    """Arguments of a forward, right or wrong, and the tokens of each image."""
    rows = [random_row(rng, budgets) for _ in range(rng.randint(1, 3))]
    length, left = max(len(ids) for ids, _, _ in rows), rng.random() < 0.5

    def padded(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (length - len(values))
        return padding + values if left else values + padding

    call = {"input_ids": torch.tensor([padded(ids, PAD_ID) for ids, _, _ in rows])}
    if rng.random() < 0.9:
        call["attention_mask"] = torch.tensor([padded([1] * len(ids), 0) for ids, _, _ in rows])
    if rng.random() < 0.6:
        call["labels"] = torch.tensor([padded(labels, -100) for _, labels, _ in rows])
    if rng.random() < 0.2:
        call["question_mask"] = torch.rand(call["input_ids"].shape, generator=generator_of(rng)) < 0.7
    if rng.random() < 0.1:
        call["position_ids"] = torch.arange(length).expand(len(rows), -1)
    num_tokens = [count for *_, counts in rows for count in counts]
    num_images = len(num_tokens)
    if len(budgets) > 1 and num_tokens:
        call["num_merged_tokens"] = ["all" if count == NUM_PATCHES else count for count in num_tokens]
    if rng.random() < 0.03:
        num_images += rng.choice((-1, 1))
        if len(budgets) == 1 and num_images > 0:
            num_tokens = budgets * num_images  # which is right where placeholders are wrong too
    if num_images > 0:
        call["pixel_values"] = pixels(num_images, seed=rng.randrange(100))
    wrong = rng.random()
    if wrong < 0.01 and "pixel_values" in call:
        call["pixel_values"] = call["pixel_values"][..., :70]
    elif wrong < 0.02 and "pixel_values" in call:
        call["pixel_values"] = call["pixel_values"][0]
    elif wrong < 0.03 and {"attention_mask", "pixel_values"} <= call.keys() and question_aware:  # else stock sees it
        call["attention_mask"] = call["attention_mask"][:, None, None]
    return call, num_tokens


def generator_of(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))


def merged_alone(model, call: dict, num_tokens: list[int], answers: torch.Tensor | None) -> list[MergeOutput]:
    """What each image becomes, merged by itself for the text that the rule gives it token by token."""
    ids, merger_config = call["input_ids"], model.config.merger_config
    questions = [None] * len(num_tokens)
    if merger_config.question_aware:
        marks = TurnMarks(*(merger_config.to_dict()[name] or [] for name in MARKED), [EOS_ID], [1])
        attended = call.get("attention_mask", torch.ones_like(ids)).bool()
        wanted = call.get("question_mask", torch.ones_like(ids)).bool()
        answers = torch.zeros_like(attended) if answers is None else answers
        tokens = masks_token_by_token(ids, attended, answers, call.get("position_ids"), marks)
        rows = (ids == IMAGE_ID).nonzero()[:, 0].tolist()
        for image in range(len(num_tokens)):
            first = sum(num_tokens[:image])  # its first placeholder
            row, text = rows[first], tokens[first]
            text = [token for token in text if wanted[row, token]]
            embeds = model.get_input_embeddings()(ids[row, text or [0]])[None]
            questions[image] = Question.of_each_image(embeds, torch.full(embeds.shape[:2], bool(text)))
    return [
        merge_one(model, image[None], question, count)
        for image, question, count in zip(call["pixel_values"], questions, num_tokens, strict=True)
    ]


def merge_one(model, image: torch.Tensor, question: Question | None, num_tokens: int) -> MergeOutput:
    """`image` (1, 3, H, W) in `num_tokens`."""
    features = model.get_vision_features(image)
    if num_tokens == NUM_PATCHES:
        return MergeOutput(features)
    extras = model.model.get_merge_extras(image, question=question)
    return model.model.merger(features, question, num_tokens, extras=extras)


def projected(model, merged: list[MergeOutput]) -> list[torch.Tensor]:
    """(M, hidden) of each image."""
    return [model.model.multi_modal_projector(of_image.merged_features[0]) for of_image in merged]


def hold_text_inside_an_image(ids: torch.Tensor, num_tokens: list[int]) -> bool:
    """Whether an image has too many placeholders and another too few, so that one is torn apart."""
    places = (ids.flatten() == IMAGE_ID).nonzero()[:, 0].split(num_tokens)
    return any(bool((of_image.diff() != 1).any()) for of_image in places)


def expected_logits(
    model, call: dict, num_tokens: list[int], merged: list[MergeOutput], embeds: torch.Tensor
) -> list[torch.Tensor]:
    """(L, vocabulary) of each row without its padding, with positions and mask made token by token."""
    attended = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
    left, images, logits = iter(num_tokens), iter(merged), []
    for ids, kept, row in zip(call["input_ids"], attended, embeds, strict=True):
        ids = ids[kept].tolist()
        counts, placeholders = [], ids.count(IMAGE_ID)
        while sum(counts) < placeholders:
            counts.append(next(left))
        if "pixel_values" in call:
            positions, bias = slow_positions_and_bias(ids, model, counts, [next(images) for _ in counts])
        else:  # placeholders are text then
            positions, bias = list(range(len(ids))), [0.0] * len(ids)
        mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1) + torch.tensor(bias)
        inputs = {"inputs_embeds": row[kept][None], "position_ids": torch.tensor([positions])}
        mask = mask.clamp(min=torch.finfo(torch.float32).min)[None, None]
        logits.append(stock()(**inputs, attention_mask=mask, use_cache=False).logits[0])
    return logits


def random_model(rng: random.Random):
    """A model and the budgets that its images are to have, several where the call says so."""
    model = model_of(rng.randrange(rng.choice((7, len(MODELS)))))  # V3 in half of the cases or more
    merger_config = model.config.merger_config
    merger_config.position_ids, merger_config.attention_mass = rng.choice(PLACES)
    if merger_config.merger_type == "none":
        return model, [NUM_PATCHES]
    budgets = [rng.choice((1, 2, 4, 7, 9))]
    model.set_num_merged_tokens(budgets[0])
    return model, rng.sample((1, 2, 4, 7, 9, NUM_PATCHES), 3) if rng.random() < 0.3 else budgets


def check_forward(rng: random.Random):
    model, budgets = random_model(rng)
    call, num_tokens = random_call(rng, budgets, model.config.merger_config.question_aware)
    try:
        output = model(**call)
    except ValueError:
        return "refused"
    kept = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
    embeds, merged = model.get_input_embeddings()(call["input_ids"]), []
    if "pixel_values" in call:
        answers = call["labels"] != -100 if "labels" in call else None
        merged = merged_alone(model, call, num_tokens, answers)
        features = torch.cat(projected(model, merged))
        actual = image_features(output)
        torch.testing.assert_close(actual, features, atol=1e-4, rtol=1e-4)
        if hold_text_inside_an_image(call["input_ids"], num_tokens):
            return "answered"  # as the number of tokens is right, but with positions that no rule gives
        embeds = embeds.masked_scatter((call["input_ids"] == IMAGE_ID)[:, :, None], actual)
    expected = expected_logits(model, call, num_tokens, merged, embeds)
    for logits, tokens, row in zip(output.logits, kept, expected, strict=True):
        torch.testing.assert_close(logits[tokens], row, atol=1e-4, rtol=1e-4)
    return "answered"


def check_generate(rng: random.Random):
    model, budgets = random_model(rng)
    call, num_tokens = random_call(rng, budgets, model.config.merger_config.question_aware)
    call = {name: value for name, value in call.items() if name in GENERATE}
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *args: seen.append(args[-1]))
    try:
        output = model.generate(**call, max_new_tokens=2, do_sample=False, num_beams=rng.choice((1, 1, 2)))
    except ValueError:
        return "refused"
    finally:
        hook.remove()
    assert output.shape[1] > call["input_ids"].shape[1]
    if model.model.required_extras & READ_FOR_QUESTION and {*num_tokens} != {NUM_PATCHES}:
        seen = seen[1:]  # the first call was to learn what matters for the question
    assert len(seen) == ("pixel_values" in call) * len({*num_tokens})
    if seen:
        call.setdefault("attention_mask", call["input_ids"] != PAD_ID)  # as generate does
        expected = projected(model, merged_alone(model, call, num_tokens, None))
        for features in seen:  # of the images with one budget
            same = torch.stack([image for image in expected if len(image) == features.shape[1]])
            torch.testing.assert_close(features, same, atol=1e-4, rtol=1e-4)
    return "answered"


GENERATE = ("input_ids", "attention_mask", "pixel_values", "question_mask", "num_merged_tokens")
VALUES = {
    "merger_type": ("none", "average_pooling", "fixed_pooling", "fixed_pooling", "nonsense", None, 3),
    "num_merged_tokens": (None, 1, 4, 9, 36, 37, 0, -1, 2.5, "9", True, [4]),
    "merge_ratio": (None, 0.25, 0.5, 1.0, 1, 0, 0.0, -0.5, 1.5, "0.5", float("nan"), [0.5]),
    "num_heads": (1, 2, 4, 8, 5, 0, None, "4"),
    "internal_dim": (None, 8, 16, 24, 7, 0, "16"),
    "question_aware": (True, False, None, "yes"),
    "init": ("average_pooling", "random", "zeros", None, 1),
    "query_grid": (None, (2, 2), [3, 4], (1, 1), (0, 2), (2,), (2, 2, 2), "33", 4, (2.5, 2)),
    "question_end_token_ids": (None, [], [[6]], [[6, 7]], [6], [[]], "6", [["a"]], [[-2]]),
    "question_start_token_ids": (None, [], [[5]], [5], 5),
    "position_ids": ("source", "packed", "both", None, 1),
    "attention_mass": (0, 0.0, 0.5, 1, 1.5, -1, None, "1", True, float("nan")),
    "trained_num_tokens": (None, [4], [9, 4], [], [0], 4, ["4"], (4,)),
    "vision_dim": (32, 64, 0, "32", None),
    "num_merge_tokens": (4,),
}


def check_config(rng: random.Random):
    fields = {name: rng.choice(VALUES[name]) for name in rng.sample(sorted(VALUES), rng.randint(0, 4))}
    stock_fields = {**tiny_config().to_dict(), "model_type": "llava_merge"}
    try:
        config = LlavaMergeConfig.from_dict(stock_fields, merger_config=fields)
        merger = TokenMerger(config.merger_config)
        question = torch.randn(2, 3, config.text_config.hidden_size)
        output = merger(torch.randn(2, NUM_PATCHES, config.merged_vision_dim), question)
    except ValueError as error:
        assert str(error), fields
        return "refused"
    num_tokens = config.merger_config.num_tokens(NUM_PATCHES)
    assert output.merged_features.shape == (2, num_tokens, 32), fields
    assert MergerConfig(**config.merger_config.to_dict()).to_dict() == config.merger_config.to_dict(), fields
    return "answered"


@pytest.mark.parametrize("chunk", range(CHUNKS))
@torch.no_grad()
def test_every_case_is_a_right_answer_or_a_value_error(chunk, pytestconfig):
    outcomes = set()
    for case in range(chunk, pytestconfig.getoption("fuzz_cases"), CHUNKS):
        rng = random.Random(case)
        check = rng.choices((check_forward, check_generate, check_config), (6, 1, 3))[0]
        try:
            outcomes.add((check.__name__, check(rng)))
        except Exception as error:
            raise AssertionError(f"case {case} of {check.__name__}: {type(error).__name__}: {error}") from error
    assert len(outcomes) >= 5  # cases of each kind are answered and refused, but perhaps one
