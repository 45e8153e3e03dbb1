# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What an image is merged for: the text of its turn, in training and inference, with and without cache, and packed."""

import dataclasses

import pytest
import torch
from conftest import (
    ANSWER_ID,
    CHAT_TEMPLATE,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    USER_ID,
    WORDS,
    agnostic,
    aware,
    image_features,
    make_processor,
    pixels,
    tiny_model,
    tiny_stock,
)

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MODEL_DIR
from llava_merge.model.question_marks import find_question_marks
from llava_merge.model.questions import Prompt, TurnMarks, question_of_images, split_turns


pytestmark = pytest.mark.core

FIRST = "<s> USER: <image> what color is the star ? ASSISTANT:"
SECOND = "USER: how many <image> red circles ? ASSISTANT:"
UNMARKED = {"question_start_token_ids": [], "question_end_token_ids": []}
MARKS = TurnMarks([[USER_ID]], [[ANSWER_ID]], [EOS_ID], [1])


def to_ids(text: str) -> list[int]:
    """Ids of space-separated words, 9 for each <image>."""
    return [id for word in text.split() for id in [WORDS.index(word)] * (9 if word == "<image>" else 1)]


def batch_of(*texts: str) -> dict:
    """Left-padded rows."""
    rows = [to_ids(text) for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}


def labels_of(text: str) -> torch.Tensor:
    """Labels (1, L) of a row: -100 but on the words between ASSISTANT: and the next USER:."""
    labels, is_answer = [], False
    for id in to_ids(text):
        is_answer = is_answer and id != USER_ID
        labels.append(id if is_answer else -100)
        is_answer = is_answer or id == ANSWER_ID
    return torch.tensor([labels])


def merged(model, inputs: dict, images: torch.Tensor, **kwargs) -> torch.Tensor:
    """(I, 9, 64) of a forward."""
    return image_features(model(**inputs, pixel_values=images, **kwargs)).reshape(len(images), 9, 64).detach()


def merged_by_generate(model, inputs: dict, images: torch.Tensor, **kwargs):
    """(I, 9, 64) of `generate`, and what it returns."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *args: seen.append(args[-1].detach()))
    result = model.generate(**inputs, pixel_values=images, max_new_tokens=3, do_sample=False, **kwargs)
    hook.remove()
    return seen[0], result


@pytest.fixture
def model():
    return tiny_model(aware(), train_merger=True)


@pytest.fixture
def images():
    return pixels(2)


@pytest.fixture
def expected(model, images):
    """The image of the first turn, in that turn alone."""
    return merged(model, batch_of(FIRST), images[:1])[0]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


CHATS = {
    "in training": f"{FIRST} red </s>",
    "with an answer that was cut off": f"{FIRST} red",
    "first of a longer chat": f"{FIRST} red </s> {SECOND}",
    "first of a longer chat without end of sequence": f"{FIRST} red {SECOND} blue {SECOND}",
}


class TestATurnIsTheSameEverywhere:
    @pytest.mark.parametrize("labelled", [True, False])
    @pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
    def test_in_a_row(self, model, expected, images, chat, labelled):
        number = chat.count("<image>")
        inputs = batch_of(chat) | ({"labels": labels_of(chat)} if labelled else {})
        assert_same(merged(model.train(), inputs, images[[0, 1, 1][:number]])[0], expected)

    @pytest.mark.parametrize("labelled", [True, False])
    def test_second_turn(self, model, images, labelled):
        chat = f"{FIRST} red </s> {SECOND} blue </s>"
        inputs = batch_of(chat) | ({"labels": labels_of(chat)} if labelled else {})
        assert_same(merged(model, inputs, images)[1], merged(model, batch_of(SECOND), images[1:])[0])

    def test_without_marks_the_labels_tell(self, images):
        model = tiny_model(aware(**UNMARKED), train_merger=True)
        chat = f"{FIRST} red </s> {SECOND} blue </s>"
        in_chat = merged(model.train(), batch_of(chat), images, labels=labels_of(chat))
        for image, turn in enumerate((FIRST, SECOND)):
            alone, _ = merged_by_generate(model.eval(), batch_of(turn), images[image : image + 1])
            assert_same(in_chat[image], alone[0])

    def test_labels_on_the_last_answer_alone(self, model, expected, images):
        chat = f"{FIRST} red </s> {SECOND} blue </s>"
        labels = labels_of(chat)
        labels[:, : len(to_ids(FIRST)) + 2] = -100
        assert_same(merged(model, batch_of(chat), images, labels=labels)[0], expected)

    def test_in_generate(self, model, expected, images):
        assert_same(merged_by_generate(model, batch_of(FIRST), images[:1])[0][0], expected)
        chat, _ = merged_by_generate(model, batch_of(f"{FIRST} red </s> {SECOND}"), images)
        assert_same(chat[0], expected)

    @pytest.mark.parametrize("given", ["all images", "new images"])
    def test_with_a_filled_cache(self, model, images, given):
        options = {"return_dict_in_generate": True, "suppress_tokens": [IMAGE_ID, USER_ID, ANSWER_ID]}
        _, first = merged_by_generate(model, batch_of(FIRST), images[:1], **options)
        ids = torch.cat((first.sequences, torch.tensor([to_ids(SECOND)])), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        uncached, without = merged_by_generate(model, inputs, images)
        given_images = images if given == "all images" else images[1:]
        cached, with_cache = merged_by_generate(model, inputs, given_images, past_key_values=first.past_key_values)
        assert len(cached) == 1
        assert_same(cached[0], uncached[1])
        assert torch.equal(without, with_cache)

    @pytest.mark.parametrize("marks", [{}, UNMARKED], ids=["marks", "no marks"])
    def test_packed(self, images, marks):
        model = tiny_model(aware(**marks), train_merger=True)
        samples = [f"{FIRST} red </s>", f"<s> {SECOND} blue </s>"]
        labels = [labels_of(sample) for sample in samples]
        alone = [
            merged(model, batch_of(sample), image[None], labels=mask)[0]
            for sample, image, mask in zip(samples, images, labels, strict=True)
        ]
        position_ids = torch.cat([torch.arange(len(to_ids(sample))) for sample in samples])[None]
        row = {"input_ids": batch_of(" ".join(samples))["input_ids"], "position_ids": position_ids}
        packed = merged(model, row, images, labels=torch.cat(labels, dim=1))
        assert_same(packed, torch.stack(alone))

    def test_in_a_batch(self, model, expected, images):
        inputs = batch_of(FIRST, f"<s> {SECOND}", "<s> USER: what ? ASSISTANT:")
        assert_same(merged(model, inputs, images)[0], expected)
        assert_same(merged_by_generate(model, inputs, images)[0][0], expected)

    def test_as_embeddings(self, model, expected, images):
        inputs = batch_of(f"{FIRST} red </s> {SECOND}", f"{FIRST} red")
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        features = merged(model, inputs, images[[0, 1, 0]])
        assert_same(features[0], expected)
        assert_same(features[2], expected)


def test_images_of_a_turn_share_its_question_and_those_of_others_do_not(model):
    image = pixels(1).expand(3, -1, -1, -1)
    two = "<s> USER: <image> what <image> color ? ASSISTANT:"
    features = merged(model, batch_of(f"{two} red </s> {SECOND}"), image)
    assert_same(features[0], features[1])
    assert (features[2] - features[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "changed",
    [
        f"{FIRST} blue blue </s> {SECOND}",
        f"{FIRST} red </s> USER: are there <image> how many star ? ASSISTANT:",
        f"{FIRST} red </s> {SECOND} blue </s> USER: is there ? ASSISTANT:",
    ],
)
def test_answers_and_later_turns_never_move_an_image(model, expected, images, changed):
    assert_same(merged(model, batch_of(changed), images)[0], expected)


def test_earlier_turns_never_move_an_image(model, images):
    before = merged(model, batch_of(f"{FIRST} red </s> {SECOND}"), images)[1]
    changed = f"<s> USER: <image> how many ? ASSISTANT: blue </s> {SECOND}"
    assert_same(merged(model, batch_of(changed), images)[1], before)


def test_the_own_turn_does_move_it(model, expected, images):
    changed = merged(model, batch_of(FIRST.replace("color", "circles")), images[:1])[0]
    assert (changed - expected).abs().max() > 1e-2


class TestRefusals:
    @pytest.mark.parametrize("training", [True, False])
    def test_no_labels_and_no_mark(self, images, training):
        model = tiny_model(aware(**UNMARKED)).train(training)
        with pytest.raises(ValueError, match=r"in rows 0, 1 .*neither labels nor.*set_question_marks"):
            merged(model, batch_of(FIRST, f"<s> {SECOND}"), images)
        merged(model, batch_of(FIRST), images[:1], question_mask=torch.ones(1, len(to_ids(FIRST)), dtype=torch.bool))
        merged_by_generate(model, batch_of(FIRST), images[:1])

    def test_a_row_whose_answer_is_not_marked(self, model, images):
        with pytest.raises(ValueError, match="in rows 1 .*neither labels nor"):
            merged(model, batch_of(FIRST, "<s> <image> what color is red"), images)

    @pytest.mark.parametrize("training", [True, False])
    def test_labels_on_everything(self, model, images, training):
        inputs = batch_of(f"<s> {SECOND} blue", f"{FIRST} red </s>")
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)
        labels[1] = -100
        with pytest.raises(ValueError, match="in rows 0 have no question.*question_aware=False"):
            merged(model.train(training), inputs, images, labels=labels)

    def test_a_question_left_out_on_purpose(self, model, images):
        inputs = batch_of(FIRST)
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        left_out = merged(model.train(), inputs, images[:1], question_mask=mask)
        plain = model.model.multi_modal_projector(
            model.model.merger(model.get_vision_features(images[:1])).merged_features
        )
        assert_same(left_out, plain.detach())

    def test_agnostic_mergers_ask_for_nothing(self, images):
        merged(tiny_model(agnostic()).train(), batch_of("<s> <image> red"), images[:1])

    @pytest.mark.parametrize("ids", [[6], [[]], [["a"]], [[-1]]])
    def test_marks_that_are_no_lists_of_ids(self, ids):
        with pytest.raises(ValueError, match="question_end_token_ids=.*has to be a list of lists of token ids"):
            tiny_model(aware(question_end_token_ids=ids))


def masks_token_by_token(ids, attended, answers, positions, marks: TurnMarks) -> list[list[int]]:
    """The rule, slowly: for each image placeholder, in reading order, where in its row its question is."""
    found = []
    for row in range(len(ids)):
        turns, marked, was_answer = [], False, False
        start_end = end_end = 0  # behind the marks so far
        sequence = ids[row].tolist()
        for index, id in enumerate(sequence):
            previous = sequence[index - 1] if index else None
            sample_start = index == 0 or id in marks.bos
            sample_start |= previous in marks.eos and index - 1 >= max(start_end, end_end)
            if positions is not None and index:
                sample_start |= bool(positions[row, index] == 0 or positions[row, index] < positions[row, index - 1])
            starts, ends = (
                [index + len(mark) for mark in of_a_kind if sequence[index : index + len(mark)] == mark]
                for of_a_kind in (marks.question_start, marks.question_end)
            )
            start_end, end_end = max([start_end, *starts]), max([end_end, *ends])
            if sample_start or starts:
                marked = False
            elif ends and index >= start_end:
                marked = True
            is_answer = marked or bool(answers[row, index])
            if sample_start or (was_answer and not is_answer):
                turns.append({"images": 0, "before start": [], "text": [], "started": False})
            was_answer, turn = is_answer, turns[-1]
            turn["started"] |= bool(starts)
            if id == IMAGE_ID:
                turn["images"] += 1
            elif not is_answer and index >= start_end and attended[row, index] and id not in marks.eos + marks.bos:
                turn["text" if turn["started"] else "before start"].append(index)
        for turn in turns:
            text = turn["text"] if turn["started"] else turn["before start"]
            found += [text] * turn["images"]
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sequences", [([[5]], [[6]]), ([[5, 7], [2, 5]], [[7, 6], [6], [2, 8]]), ([], [])])
def test_the_masks_are_those_of_the_rule_token_by_token(seed, sequences):
    marks = TurnMarks(*sequences, [EOS_ID], [1])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (4, 40), generator=generator)
    answers = torch.rand(4, 40, generator=generator) < 0.2 if seed % 2 else torch.zeros(4, 40, dtype=torch.bool)
    positions = torch.randint(0, 6, (4, 40), generator=generator).cumsum(1) % 50 if seed % 3 else None
    attended = torch.rand(4, 40, generator=generator) < 0.9
    image_mask = ids == IMAGE_ID
    turns = split_turns(ids, image_mask, marks, attended, answers, positions)
    images = Prompt(ids, ids, image_mask).first_placeholders([1] * int(image_mask.sum()))
    question = question_of_images(torch.zeros(4, 40, 1), turns, images)
    rows = images // 40
    expected = masks_token_by_token(ids, attended, answers, positions, marks)
    for image, mask in enumerate(question.mask.reshape(-1, 4, 40)):
        assert not mask[[row for row in range(4) if row != rows[image]]].any()
        assert mask[rows[image]].nonzero()[:, 0].tolist() == expected[image]


def test_an_end_within_a_start_ends_nothing():
    """Else a mark that ends a message would part it from the user's next one."""
    ids = torch.tensor([[5, 8, 9, 6, 7, 8, 9]])
    turns = split_turns(ids, ids < 0, TurnMarks([[5], [9, 6, 7]], [[6]], [], []))
    assert turns.number.max() == 1 and turns.is_text.tolist() == [[False, True, False, False, False, True, True]]
    assert not turns.opens_answer.any()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TestMarksOfAChatTemplate:
    def test_word_level(self):
        processor = make_processor(processor_class=LlavaMergeProcessor)
        marks = find_question_marks(processor)
        assert marks == {"question_start_token_ids": [[USER_ID]], "question_end_token_ids": [[ANSWER_ID]]}

    def test_they_are_in_prompts_by_the_template_and_by_hand(self):
        processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
        marks = find_question_marks(processor)
        text = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        by_template = processor.apply_chat_template(text, add_generation_prompt=True)
        answer = f"{by_template} red</s>"
        for prompt in (by_template, "USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nWhat?\nASSISTANT:"):
            ids = processor.tokenizer(prompt)["input_ids"]
            assert any(ids[-len(mark) :] == mark for mark in marks["question_end_token_ids"])
        for chat in (answer + by_template, answer.removesuffix("</s>") + " " + by_template):
            ids = torch.tensor([processor.tokenizer(chat)["input_ids"]])
            turn_marks = TurnMarks(*marks.values(), [processor.tokenizer.eos_token_id], [])
            assert split_turns(ids, ids == processor.image_token_id, turn_marks).number.max() == 2

    def test_chatml(self):
        """Its end of sequence also stands behind questions, where it ends nothing."""
        processor = make_processor(processor_class=LlavaMergeProcessor)
        processor.chat_template = CHATML
        processor.tokenizer.add_special_tokens(
            {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
        )
        processor.tokenizer.add_tokens(["user\n", "assistant\n", "system\n", "\n"])
        marks = TurnMarks(*find_question_marks(processor).values(), [processor.tokenizer.eos_token_id], [])
        roles = ("system", "user", "assistant", "user")
        chat = [{"role": role, "content": [{"type": "text", "text": "star"}]} for role in roles]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
        turns = split_turns(ids, torch.zeros_like(ids, dtype=torch.bool), marks)
        assert turns.number[turns.is_text & (ids == WORDS.index("star"))].tolist() == [1, 2]

    def test_loading_finds_them(self, tmp_path, images, caplog):
        tiny_stock().save_pretrained(tmp_path)
        fields = aware(question_start_token_ids=None, question_end_token_ids=None)
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config=fields)
        assert "no chat template" in caplog.text
        assert model.config.merger_config.question_end_token_ids is None  # no chat template there
        with pytest.raises(ValueError, match="set_question_marks"):
            merged(model, batch_of(FIRST), images[:1])
        model.set_question_marks(make_processor(processor_class=LlavaMergeProcessor))
        merged(model, batch_of(FIRST), images[:1])
        make_processor().save_pretrained(tmp_path)
        model = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config=fields)
        merger_config = model.config.merger_config
        assert merger_config.question_start_token_ids == [[USER_ID]]
        assert merger_config.question_end_token_ids == [[ANSWER_ID]]
        assert model.model.merger.config is merger_config

    def test_they_are_saved_and_a_merger_without_them_keeps_the_models(self, tmp_path):
        model = tiny_model(aware())
        model.save_merger(tmp_path / "with")
        unmarked = tiny_model(aware(question_start_token_ids=None, question_end_token_ids=None))
        unmarked.save_merger(tmp_path / "without")
        unmarked.load_merger(tmp_path / "with")
        model.load_merger(tmp_path / "without")
        for loaded in (unmarked, model):
            assert loaded.config.merger_config.question_end_token_ids == [[ANSWER_ID]]

    @pytest.mark.parametrize(
        "template, message",
        [
            (None, "has no chat template"),
            (CHAT_TEMPLATE.replace("{{ message['role'].upper() }}:", ""), "nothing between"),
        ],
    )
    def test_templates_that_mark_nothing(self, template, message):
        processor = make_processor(processor_class=LlavaMergeProcessor)
        processor.chat_template = template
        with pytest.raises(ValueError, match=message):
            find_question_marks(processor)


def test_label_smoothing_reads_no_answer(tmp_path):
    """It takes the labels away before the forward, in training and evaluation."""
    from test_pipelines import Rows
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        tmp_path,
        label_smoothing_factor=0.1,
        remove_unused_columns=False,
        report_to=[],
        max_steps=1,
        save_strategy="no",
        use_cpu=True,
    )
    model, rows = tiny_model(aware(), train_merger=True), Rows()
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    trainer = Trainer(model=model, args=arguments, eval_dataset=rows)
    trainer.evaluate()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model(**batch)
    assert_same(seen[0], seen[-1])
    unmarked = Trainer(model=tiny_model(aware(**UNMARKED)), args=arguments, eval_dataset=rows)
    with pytest.raises(ValueError, match="neither labels nor a mark"):
        unmarked.evaluate()


def test_a_question_can_be_moved_and_keeps_its_dtype_where_none_is_given(model):
    prompt = model.model.read_prompt(**batch_of(FIRST), inputs_embeds=None)
    question = model.model.get_question(prompt, [9])
    moved = question.to("cpu", torch.bfloat16)
    assert moved.embeds.dtype == torch.bfloat16 and moved.token_turns.dtype == torch.int64
    assert question.to("cpu").embeds.dtype == torch.float32
    assert dataclasses.is_dataclass(moved)
