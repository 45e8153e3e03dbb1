# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The budget in the call: of all images, or of each, without a trace on model or processor."""

import threading

import numpy as np
import pytest
import torch
from conftest import IMAGE_ID, NUM_PATCHES, PAD_ID, agnostic, aware, make_processor, pixels, tiny_model
from PIL import Image
from test_positions import CACHE, assert_answers, rows_of
from torch._dynamo.testing import CompileCounter
from transformers import pipeline
from transformers.utils import logging

from llava_merge import LlavaMergeProcessor, MergerConfig
from llava_merge.model.compat import TRANSFORMERS_V5
from llava_merge.model.placeholders import budget_of_each_image
from llava_merge.model.positions import find_cache
from llava_merge.model.processing_llava_merge import check_proportions


pytestmark = pytest.mark.core

GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE_ID, PAD_ID]}
PROMPTS = ["USER: <image> what color ASSISTANT:", "USER: <image> <image> how many red circles ASSISTANT:"]
MODES = [{"position_ids": "packed"}, {"position_ids": "source"}, {"position_ids": "source", "attention_mass": 1.0}]
CONFIGS = pytest.mark.parametrize(
    "config",
    [make(9, **mode) for make in (agnostic, aware) for mode in MODES],
    ids=[f"{make}, {mode}" for make in ("agnostic", "aware") for mode in ("packed", "source", "source and mass")],
)


@pytest.fixture
def processor():
    return make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9)


@pytest.fixture
def pictures(picture):
    return [picture, picture.rotate(90), picture.rotate(180)]


def rows_by_hand(batch: dict, counts: list[int], images, budgets: list) -> list[dict]:
    """The rows of a batch as calls of their own."""
    first, calls = 0, []
    for ids, count in zip(rows_of(batch), counts, strict=True):
        own = slice(first, first + count)
        row = torch.tensor([ids])
        calls.append(
            {
                "input_ids": row,
                "attention_mask": torch.ones_like(row),
                "pixel_values": images[own],
                "num_merged_tokens": budgets[own],
            }
        )
        first += count
    return calls


@pytest.mark.parametrize("budget, each", [(16, 16), (1, 1), ("all", NUM_PATCHES), ([4, 9, "all"], None)], ids=str)
def test_the_processor_writes_placeholders_and_returns_the_budget(processor, pictures, budget, each):
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens=budget)
    counts = [each, 2 * each] if each else [4, 9 + NUM_PATCHES]
    assert (inputs["input_ids"] == IMAGE_ID).sum(dim=1).tolist() == counts
    assert inputs["num_merged_tokens"] == budget and inputs["pixel_values"].shape[0] == 3
    assert inputs.to("cpu", torch.bfloat16)["num_merged_tokens"] == budget
    after = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert processor.num_merged_tokens == 9 and "num_merged_tokens" not in after
    assert (after["input_ids"] == IMAGE_ID).sum(dim=1).tolist() == [9, 18]


def test_text_without_images_has_no_budget(processor):
    assert "num_merged_tokens" not in processor(text="USER: what ASSISTANT:", num_merged_tokens=16)


@CONFIGS
@pytest.mark.parametrize("budget", [4, "all", [4, 16, 4], ["all", 4, 9]], ids=str)
def test_a_batch_equals_its_rows_alone(config, budget, processor, pictures):
    model = tiny_model(config, train_merger=True)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens=budget)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs, question_mask=kept).logits  # there is nothing but prompt
    together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    budgets = budget_of_each_image(budget, 3)
    for row, call in enumerate(rows_by_hand(inputs, [1, 2], inputs["pixel_values"], budgets)):
        with torch.no_grad():
            alone = model(**call, question_mask=call["attention_mask"].bool()).logits[0]
        torch.testing.assert_close(logits[row][kept[row]], alone, atol=1e-4, rtol=1e-4)
        answer = model.generate(**call, **GREEDY)[0, call["input_ids"].shape[1] :]
        assert together[row, : len(answer)].tolist() == answer.tolist()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_mixed_budgets_in_generate_equal_the_slow_reference(mode, options, processor, pictures):
    model = tiny_model(agnostic(9, **mode), train_merger=True)
    budgets = [4, 16, "all"]
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens=budgets)
    generated = model.generate(**inputs, **GREEDY, **options)
    times = options.get("num_return_sequences", 1)
    if not options:
        sizes = iter([[4], [16, NUM_PATCHES]])
        for row, (ids, own) in enumerate(zip(rows_of(inputs), inputs["pixel_values"].split([1, 2]), strict=True)):
            one = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            assert_answers(
                generated[row : row + 1, -len(ids) - 5 :], model, one, [len(own)], own, num_tokens=next(sizes)
            )
        return
    calls = rows_by_hand(inputs, [1, 2], inputs["pixel_values"], budgets)
    for row, call in enumerate(calls):
        alone = model.generate(**call, **GREEDY, **options)[:, call["input_ids"].shape[1] :]
        both = generated[row * times : (row + 1) * times, inputs["input_ids"].shape[1] :]
        assert torch.equal(both[:, : alone.shape[1]], alone)


@CONFIGS
def test_all_tokens_equal_the_bypassed_merger(config, processor, pictures):
    model = tiny_model(config, train_merger=True)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens="all")
    generated = model.generate(**inputs, **GREEDY)
    plain = {name: value for name, value in inputs.items() if name != "num_merged_tokens"}
    with model.merger_bypassed():
        assert torch.equal(generated, model.generate(**plain, **GREEDY))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_budgets_of_a_chat_may_differ_from_turn_to_turn(mode, processor, pictures):
    model = tiny_model(agnostic(9, **mode), train_merger=True)
    first = processor(images=pictures[:1], text=PROMPTS[0], return_tensors="pt", num_merged_tokens=4)
    output = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    new = processor(images=pictures[1:2], text=PROMPTS[0], return_tensors="pt", num_merged_tokens=16)
    ids = torch.cat((output.sequences, new["input_ids"]), dim=1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = torch.cat((first["pixel_values"], new["pixel_values"]))
    fresh = model.generate(**whole, pixel_values=images, num_merged_tokens=[4, 16], **GREEDY)
    for given, budgets in ((images, [4, 16]), (new["pixel_values"], 16)):
        again = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        cached = {CACHE: find_cache(again)}
        assert torch.equal(
            model.generate(**whole, pixel_values=given, num_merged_tokens=budgets, **cached, **GREEDY), fresh
        )


def test_six_threads_at_six_budgets(processor, pictures):
    model = tiny_model(aware(9, attention_mass=1.0), train_merger=True)
    budgets = [1, 4, 9, 16, [16, 1], "all"]

    def answer(budget):
        text = "USER: <image> <image> how many red circles ASSISTANT:"
        inputs = processor(images=pictures[:2], text=text, return_tensors="pt", num_merged_tokens=budget)
        return model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True).logits[0]

    expected = [answer(budget) for budget in budgets]
    wrong = []

    def run(index):
        for _ in range(4):
            if not torch.equal(answer(budgets[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(budgets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len({tuple(logits[0].tolist()) for logits in expected}) == len(budgets)


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="stock's forward of 4.57 breaks the graph")
def test_each_budget_compiles_to_one_graph(processor, pictures):
    model = tiny_model(agnostic(9, attention_mass=1.0), train_merger=True)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for budget in (4, 16, 9, [4, 16, 4]):
        for text in (PROMPTS, PROMPTS[::-1]):
            order = pictures if text is PROMPTS else pictures[::-1]
            inputs = processor(images=order, text=text, padding=True, return_tensors="pt", num_merged_tokens=budget)
            with torch.no_grad():
                expected = model(**inputs, use_cache=False).logits
                torch.testing.assert_close(
                    compiled(**inputs, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4, equal_nan=True
                )
    assert counter.frame_count <= 4


@pytest.mark.parametrize(
    "kind",
    ["one", "list", "nested", "paths", "nested paths", "arrays", "tensors", "batch of arrays", "batch of tensors"],
)
def test_pictures_as_stock_processors_take_them(processor, pictures, kind, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    path, array = str(tmp_path / "a.png"), np.asarray(pictures[0].resize((84, 84)))
    tensor = torch.tensor(array).permute(2, 0, 1)
    images, count = {
        "one": (pictures[0], 1),
        "list": (pictures[:2], 2),
        "nested": ([pictures[:1], pictures[:2]], 3),
        "paths": ([path, path], 2),
        "nested paths": ([[path], [path, path]], 3),
        "arrays": ([array, array], 2),
        "tensors": ([tensor, tensor], 2),
        "batch of arrays": (np.stack([array, array]), 2),
        "batch of tensors": (torch.stack([tensor, tensor]), 2),
    }[kind]
    for budget, expected in ((4, 4 * count), ([4, 9, "all"][:count], sum([4, 9, NUM_PATCHES][:count]))):
        inputs = processor(images=images, text="<image> " * count, return_tensors="pt", num_merged_tokens=budget)
        assert len(inputs["pixel_values"]) == count and (inputs["input_ids"] == IMAGE_ID).sum() == expected


def test_get_image_features_and_encode_images_take_budgets(pictures):
    model = tiny_model(agnostic(9), train_merger=True)
    encoded = model.model.encode_images(pixels(3), num_merged_tokens=[4, "all", 1])
    assert [len(features) for features in encoded.pooler_output] == [4, NUM_PATCHES, 1]
    features = model.get_image_features(pixels(3), num_merged_tokens=4)
    assert [len(image) for image in (features.pooler_output if TRANSFORMERS_V5 else features)] == [4, 4, 4]


def test_chat_templates_and_pipelines(processor, picture):
    model = tiny_model(agnostic(9), train_merger=True)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what color"}]
    chat = [{"role": "user", "content": content}]

    def budget() -> dict:  # pipelines write into what they are given, here and below
        return {"processor_kwargs": {"num_merged_tokens": 16}} if TRANSFORMERS_V5 else {"num_merged_tokens": 16}

    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **budget()
    )
    assert (inputs["input_ids"] == IMAGE_ID).sum() == 16 and inputs["num_merged_tokens"] == 16
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)

    def options() -> dict:
        return {"generate_kwargs": {"do_sample": False, "max_new_tokens": 3}, "return_full_text": False, **budget()}

    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    answers = [pipe(images=picture, text=prompt, **options())]
    if TRANSFORMERS_V5:  # 4.57 hands a chat no keyword for the processor
        answers.append(pipe(text=chat, **options()))
    for answer in answers:
        assert answer[0]["generated_text"].strip() == processor.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    "budget, message",
    [
        (0, "num_merged_tokens=0: the tokens of an image are a whole number of at least 1, or 'all'"),
        (2.5, "num_merged_tokens=2.5: the tokens"),
        ("most", "num_merged_tokens='most': the tokens"),
        (True, "num_merged_tokens=True: the tokens"),
        ([4, None, 4], r"num_merged_tokens=\[4, None, 4\]: the tokens"),
        ([4, 4], r"num_merged_tokens=\[4, 4\] is for 2 images, but there are 3"),
    ],
)
def test_no_budget(processor, pictures, budget, message):
    model = tiny_model(agnostic(9))
    with pytest.raises(ValueError, match=message):
        processor(images=pictures, text=PROMPTS, padding=True, num_merged_tokens=budget)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens=4)
    inputs["num_merged_tokens"] = budget
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_budgets_that_are_not_those_of_the_prompts(processor, pictures):
    model = tiny_model(agnostic(9))
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens=[4, 9, 16])
    for wrong, message in (
        ([9, 4, 16], r"3 images give \[9, 4, 16\] tokens, 29 in all, and none may lie in two rows"),
        (4, "made for another number of tokens per image. Give the model what the processor returned"),
        (None, "made for another number of tokens per image"),
    ):
        inputs["num_merged_tokens"] = wrong
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**inputs)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens="all")
    with pytest.raises(ValueError, match="num_tokens=37: has to be from 1 to the 36 visual tokens"):
        model.model.merge_features(model.get_vision_features(inputs["pixel_values"]), num_merged_tokens=37)


def test_a_model_without_a_merger(processor, pictures):
    model = tiny_model({"merger_type": "none"})
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens=4)
    with pytest.raises(ValueError, match="num_merged_tokens=4: this model has merger_type='none'"):
        model(**inputs)
    everything = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt", num_merged_tokens="all")
    assert model(**everything).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["picture", "array", "channels first", "tensor", "batch", "path", "in a list"])
@pytest.mark.parametrize("num_merged_tokens", [None, 4])
def test_images_that_would_become_huge_are_refused(kind, num_merged_tokens, tmp_path):
    """Where its shorter side is made the tower's, a picture of 1 × 3000 takes a minute and gigabytes."""
    long = Image.new("RGB", (3000, 1))
    images = {"picture": long, "array": np.asarray(long), "channels first": np.zeros((3, 1, 3000), np.uint8)}
    long.save(tmp_path / "long.png")
    images |= {"tensor": torch.zeros(3, 1, 110), "batch": torch.zeros(1, 3, 1, 110), "path": str(tmp_path / "long.png")}
    images["in a list"] = [[Image.new("RGB", (100, 1)), long]]
    text = "USER: " + "<image> " * (2 if kind == "in a list" else 1) + "what ? ASSISTANT:"
    processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9)
    with pytest.raises(ValueError, match=r"An image of 1 × (3000|110) pixels: its longer side may be 100 times"):
        processor(images=images[kind], text=text, num_merged_tokens=num_merged_tokens)


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (100, 1)), np.zeros((3, 1, 100)), np.zeros((2, 150, 4))],
    ids=["picture", "first", "last"],
)
def test_others_are_not(image):
    check_proportions(image)


@pytest.mark.parametrize("budget", [np.int64(1000), "16", 1000.0, 0, True], ids=repr)
def test_a_processor_s_own_budget_is_a_number(budget, picture):
    processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=budget)
    with pytest.raises(ValueError, match="num_merged_tokens=.*: has to be a whole number of at least 1; None"):
        processor(images=picture, text="USER: <image> what ? ASSISTANT:")


def test_budgets_below_the_trained_ones_warn_once(caplog):
    logging.warning_once.cache_clear()
    merger_config = agnostic(9, trained_num_tokens=[16, 4])
    model = tiny_model(merger_config, train_merger=True)
    counts = []
    for budget in (16, 9, 4, 3, 2, 3):
        model.model.encode_images(pixels(1), num_merged_tokens=budget)
        counts.append(sum("trained with 4, 16 tokens" in message for message in caplog.messages))
    assert counts == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"trained_num_tokens=\[0\]: has to be a list"):
        MergerConfig(trained_num_tokens=[0])
