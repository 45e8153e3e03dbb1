# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What serving does besides the engine, without one."""

import json
import random

import pytest
import torch
from conftest import ANSWER_ID, IMAGE_ID, NUM_PATCHES, USER_ID, WORDS, agnostic, aware, make_processor, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from llava_merge import LlavaMergeConfig, LlavaMergeModel
from llava_merge.model.compat import TRANSFORMERS_V5
from llava_merge.model.merging_base import MERGING_METHODS, READ_FOR_QUESTION, MergeExtras
from llava_merge.model.positions import place_on_slots
from llava_merge.model.questions import TurnMarks, split_turns
from llava_merge.model.vision_encoding import index_on
from llava_merge.serving import requests
from llava_merge.serving.requests import (
    RequestRules,
    check_named,
    check_servable,
    num_rope_rows,
    positions_of,
    served_budgets,
)


def config(**fields) -> LlavaMergeConfig:
    """That of a tiny model with a merger of these fields."""
    return tiny_model({**agnostic(9), "attention_mass": 0.0, **fields}).config


def rules(served: LlavaMergeConfig, max_model_len: int = 512) -> RequestRules:
    return RequestRules(served, max_model_len)


class TestBudgets:
    def test_those_that_the_merger_was_trained_with(self):
        assert served_budgets(config(trained_num_tokens=[16, 4])) == [4, 9, 16]

    def test_any_where_it_was_not_trained(self):
        assert served_budgets(config()) == range(1, NUM_PATCHES + 1)

    @pytest.mark.skipif(not TRANSFORMERS_V5, reason="no vLLM that has this package takes transformers 4")
    @pytest.mark.parametrize("merger_type", ["tome", "image_resize", "fixed_pooling"])
    def test_a_request_asks_for_nothing_that_the_start_has_worked_out(self, merger_type, monkeypatch):
        """Methods were looked up for each of 576 budgets, which took most of a request's time on the host."""
        made = rules(tiny_model({"merger_type": merger_type, "num_merged_tokens": 9}).config)
        made.check_room(1, 4)  # which works out once how many positions are prepared
        for name in ("find_merging_method", "served_budgets", "turn_marks_of", "num_rope_rows", "keeps_places"):
            monkeypatch.setattr(requests, name, None)
        assert made.budget() == 9 and made.budget(4) == 4
        made.check_room(1, 4)
        made.warn_of_long_prompt([USER_ID, IMAGE_ID, ANSWER_ID], 1, 4)
        assert len(made.questions([USER_ID, IMAGE_ID, ANSWER_ID], 1)) == 1

    def test_what_is_served_is_no_list_of_all_numbers(self):
        assert isinstance(served_budgets(config()), range)

    def test_all_where_nothing_is_merged(self):
        untouched = tiny_model({"merger_type": "none"}).config
        assert served_budgets(untouched) == [NUM_PATCHES] and rules(untouched).budget() == NUM_PATCHES

    def test_the_checkpoints_by_default(self):
        assert rules(config()).budget() == 9 and rules(config()).budget(4) == 4

    @pytest.mark.parametrize("asked", [0, -1, 37, "16", "auto", 4.0, True, [4]])
    def test_others_are_refused(self, asked):
        with pytest.raises(ValueError, match="is served with whole numbers from 1 to 36"):
            rules(config()).budget(asked)

    def test_pictures_that_are_resized_have_rows_of_equal_length(self):
        resizing = tiny_model({"merger_type": "image_resize", "num_merged_tokens": 9}).config
        assert served_budgets(resizing)[-6:] == [25, 28, 30, 32, 35, 36] and rules(resizing).budget(30) == 30
        with pytest.raises(ValueError, match="num_merged_tokens=31: image_resize .* Choose 30 or 36"):
            rules(resizing).budget(31)
        with pytest.raises(ValueError, match="num_merged_tokens=41: this checkpoint is served with"):
            rules(resizing).budget(41)

    def test_those_listed_are_named(self):
        with pytest.raises(ValueError, match="num_merged_tokens=5: this checkpoint is served with 4, 9, 16"):
            rules(config(trained_num_tokens=[16, 4])).budget(5)


@pytest.mark.parametrize("name", ["question_input_ids", "picture_ids", "size", "crop_size", "do_resize"])
def test_a_request_says_its_budget_alone(name):
    """Ids past the vocabulary would end the engine, and a size of its own would take the machine's memory."""
    check_named({})
    check_named({"num_merged_tokens": 4})
    with pytest.raises(ValueError, match=f"mm_processor_kwargs has {name}; a request .* num_merged_tokens alone"):
        check_named({"num_merged_tokens": 4, name: [10**9]})


class TestQuestions:
    def ids(self, text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    def test_each_image_has_that_of_its_turn(self):
        first, second = "what color is the star ?", "how many circles ?"
        prompt = f"<s> USER: <image> {first} ASSISTANT: red </s> USER: <image> <image> {second} ASSISTANT:"
        found = rules(config(**aware(9))).questions(self.ids(prompt), 3)
        assert found == [self.ids(first), self.ids(second), self.ids(second)]

    def test_a_later_turn_changes_nothing(self):
        turn = "USER: <image> what color ? ASSISTANT:"
        found = [
            rules(config(**aware(9))).questions(self.ids(prompt), 1)
            for prompt in (turn, f"{turn} red </s> USER: how many ? ASSISTANT:")
        ]
        assert found[0] == found[1] == [self.ids("what color ?")]

    def test_none_at_all(self):
        assert rules(config(**aware(9))).questions([USER_ID, IMAGE_ID, ANSWER_ID], 1) == [[]]

    def test_it_is_what_the_model_reads(self):
        model = tiny_model(aware(9))
        ids = self.ids("USER: <image> what color ? ASSISTANT: red </s> USER: <image> how many ? ASSISTANT:")
        expanded = [id for each in ids for id in ([IMAGE_ID] * 9 if each == IMAGE_ID else [each])]
        question = model.model.get_question(
            model.model.read_prompt(torch.tensor([expanded]), None, may_hold_answers=False), [9, 9]
        )
        read = [torch.tensor(expanded)[mask].tolist() for mask in question.mask]
        assert read == rules(model.config).questions(ids, 2)

    @pytest.mark.parametrize(
        "marks",
        [
            TurnMarks([[1, 2]], [[3, 4]], [5], [6]),
            TurnMarks([[1], [1, 2]], [[3, 1], [4]], [5, 4], []),
            TurnMarks([[1, 2], [7, 2]], [[2, 3]], [3], [1]),
        ],
    )
    def test_of_any_prompt_they_are_those_of_its_turns(self, marks, monkeypatch):
        monkeypatch.setattr(requests, "turn_marks_of", lambda config: marks)
        made, rng = rules(config(**aware(9))), random.Random(0)
        seen = set()
        for _ in range(2000):
            ids = rng.choices([*range(1, 12), 10**6, IMAGE_ID], k=rng.randint(1, 24))
            row = torch.tensor([ids])
            turns = split_turns(row, row == IMAGE_ID, marks)
            numbers, is_text = turns.number[0].tolist(), turns.is_text[0].tolist()
            of_turn = [
                [
                    id
                    for id, number, text in zip(ids, numbers, is_text, strict=True)
                    if text and number == numbers[index]
                ]
                for index, id in enumerate(ids)
                if id == IMAGE_ID
            ]
            assert made.questions(ids, len(of_turn)) == of_turn
            seen |= {len(question) for question in of_turn}
        assert len(seen) > 8 and made.runs_of_questions.cache_info().hits > 50

    def test_the_same_chat_with_other_words_is_read_once(self, monkeypatch):
        monkeypatch.setattr(requests, "turn_marks_of", lambda config: TurnMarks([[21, 22]], [[23, 24]], [25], [26]))
        made = rules(config(**aware(9)))
        assert made.questions([26, 21, 22, IMAGE_ID, 39, 38, 23, 24], 1) == [[39, 38]]
        monkeypatch.setattr(requests, "split_turns", None)
        for words in ([37], [22, 39, 21, 24, 23], [39] * 99):  # also with parts of marks
            assert made.questions([26, 21, 22, IMAGE_ID, *words, 23, 24], 1) == [words]

    def test_other_numbers_of_images_are_refused(self):
        with pytest.raises(ValueError, match="2 image placeholders for 1 images"):
            rules(config(**aware(9))).questions([IMAGE_ID, IMAGE_ID], 1)


def test_indices_are_made_on_the_host():
    with torch.device("meta"):
        assert index_on(torch.device("cpu"), [2, 0]).tolist() == [2, 0]


def test_extras_of_images_that_were_encoded_apart():
    whole = MergeExtras(torch.rand(5, 6), torch.rand(5, 6, 4), 2, (torch.rand(5, 6, 3), torch.rand(5, 6, 3)))
    parts = [whole.of_images(torch.arange(5)[part]) for part in (slice(0, 2), slice(2, 4), slice(4, 5))]
    joined = MergeExtras.joined(parts)
    for name in ("cls_attention", "keys"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert all(map(torch.equal, joined.layers, whole.layers)) and joined.num_heads == 2
    assert MergeExtras.joined([MergeExtras(), MergeExtras()]) == MergeExtras() and parts[0].first(1).keys.shape[0] == 1


class TestPlaces:
    def test_the_same_prompt_is_worked_out_once(self):
        positions, moved = positions_of(14, ((1, 9),), (6, 6))
        mask = (torch.arange(14) >= 1) & (torch.arange(14) < 10)
        expected, places, skipped = place_on_slots(mask[None], [9], (6, 6))
        assert torch.equal(positions[0], expected) and torch.equal(positions[1], expected - places)
        assert torch.equal(positions[2], positions[1]) and moved == int(skipped) == NUM_PATCHES - 9
        assert positions_of(14, ((1, 9),), (6, 6))[0] is positions

    @pytest.mark.parametrize("num_tokens", [[9], [4, 9], [36, 1], [7]])
    def test_they_are_those_of_the_model(self, num_tokens):
        model = tiny_model(agnostic(9))
        ids = [1, *(id for number in num_tokens for id in [5, *[IMAGE_ID] * number]), 8, 9]
        mask = torch.tensor([ids]) == IMAGE_ID
        images = model.model.encode_images(torch.randn(len(num_tokens), 3, 84, 84), num_merged_tokens=num_tokens)
        layout = model.model.layout_of_prompt(mask, images, None)
        positions, places, moved = place_on_slots(mask, num_tokens, (6, 6))
        assert torch.equal(positions, torch.arange(len(ids)) + layout.shift(0, len(ids))[0])
        assert int(moved) == sum(NUM_PATCHES - number for number in num_tokens) == int(positions[-1]) + 1 - len(ids)
        starts = (positions - places)[mask[0]]
        assert [int(starts[sum(num_tokens[:index])]) for index in range(len(num_tokens))] == [
            2 + index * (1 + NUM_PATCHES) for index in range(len(num_tokens))
        ]

    def test_text_alone(self):
        positions, places, moved = place_on_slots(torch.zeros(1, 4, dtype=torch.bool), [], (6, 6))
        assert positions.tolist() == [0, 1, 2, 3] and not places.any() and not moved

    @pytest.mark.parametrize("name", sorted(MERGING_METHODS))
    def test_a_method_that_sits_on_slots_says_no_places(self, name):
        method = MERGING_METHODS[name]
        fields = {"question_aware": True} if method.requires & READ_FOR_QUESTION else {}
        budget = {} if name == "none" else {"num_merged_tokens": 9}
        model = tiny_model({"merger_type": name, **budget, **fields})
        question = torch.randn(3, 5, 64) if fields else None
        encoded = model.model.encode_images(torch.randn(3, 3, 84, 84), question=question)
        places = torch.arange(36).expand(3, -1) if name == "none" else encoded.token_places.view(3, 9)
        slots = model.model.merger.method.sits_on_slots
        mask = torch.ones(1, places.shape[1], dtype=torch.bool)
        assert slots <= all(torch.equal(where, place_on_slots(mask, [places.shape[1]], (6, 6))[1]) for where in places)
        on_slots = {"average_pooling", "c_abstractor", "fixed_pooling", "image_resize", "mqt", "none", "quecc"}
        on_slots |= {"resampler", "tokenpacker"}
        assert method.sits_on_slots == (name in on_slots)


@pytest.mark.skipif(not TRANSFORMERS_V5, reason="no vLLM that has this package takes transformers 4")
class TestRoom:
    def test_rope_is_prepared_for_four_times_the_length(self):
        assert num_rope_rows(config(), 512) == 4 * 512 and num_rope_rows(config(), 64) == 1024

    def test_but_not_where_its_frequencies_would_change(self):
        scaled = config()
        scaled.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        assert num_rope_rows(scaled, 512) == scaled.text_config.max_position_embeddings == 1024
        rules(scaled, 512).check_room(18, 9)
        with pytest.raises(ValueError, match="19 images could reach position 1025.*1024 are prepared"):
            rules(scaled, 512).check_room(19, 9)

    def test_longer_prompts_than_the_language_model_was_made_for_are_warned_of(self, said_of_positions):
        served = config()
        limit = served.text_config.max_position_embeddings
        fitting = (limit - 5) // NUM_PATCHES
        ids = [5, *[IMAGE_ID] * (fitting + 1), 7, 7, 7, 6]
        rules(served).warn_of_long_prompt([5, *[IMAGE_ID] * fitting, 7, 7, 7, 6], fitting, 9)
        rules(config(position_ids="packed")).warn_of_long_prompt(ids, fitting + 1, 9)
        assert not said_of_positions
        rules(served).warn_of_long_prompt(ids, fitting + 1, 9)
        assert f"skip {(fitting + 1) * (NUM_PATCHES - 9)} positions" in said_of_positions[0]

    def test_packed_tokens_need_none(self):
        rules(config(position_ids="packed"), 512).check_room(10_000, 9)


class TestRefusals:
    def test_attention_mass(self):
        with pytest.raises(ValueError, match="attention_mass=0.5: serving engines cannot.*go on training"):
            check_servable(config(attention_mass=0.5))
        check_servable(config())


@pytest.fixture
def served(tmp_path):
    """A folder with a checkpoint and its processor, and its configuration as vLLM's Transformers backend sets it."""

    def make(**fields) -> LlavaMergeConfig:
        tiny_model({**agnostic(9), "attention_mass": 0.0, **fields}).save_pretrained(tmp_path)
        make_processor().save_pretrained(tmp_path)
        edit(tmp_path / "processor_config.json", num_merged_tokens=9)
        return load(tmp_path)

    return make


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(folder) -> LlavaMergeConfig:
    loaded = AutoConfig.from_pretrained(folder)
    loaded.text_config._attn_implementation = "vllm"
    return loaded


class TestTransformersBackend:
    """What the model's own code refuses there; tests/test_vllm.py runs it."""

    def refusal(self, loaded: LlavaMergeConfig) -> str:
        with pytest.raises(ValueError) as caught:
            LlavaMergeModel(loaded)
        return str(caught.value)

    def test_a_merger_without_weights(self, served, tmp_path):
        served()
        weights = load_file(tmp_path / "model.safetensors")
        lost = [name for name in weights if "merger." in name and "output_proj" in name]
        save_file({name: weights[name] for name in weights if name not in lost}, tmp_path / "model.safetensors")
        assert lost and lost[0].partition("merger.")[2] in self.refusal(load(tmp_path))

    def test_also_where_an_index_names_them(self, served, tmp_path):
        loaded = served()
        index = {"weight_map": dict.fromkeys(load_file(tmp_path / "model.safetensors"), "model.safetensors")}
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "merger." not in name}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "lacks weights of this model" in self.refusal(loaded)

    def test_a_processor_of_another_number(self, served, tmp_path):
        loaded = served()
        edit(tmp_path / "processor_config.json", num_merged_tokens=4)
        assert "the processor writes 4 tokens per image, the merger makes 9" in self.refusal(loaded)

    def test_a_merger_that_reads_the_question(self, served):
        assert "pip install '.[serve]' in a clone of llava_merge" in self.refusal(served(**aware(9)))

    def test_places_that_depend_on_the_picture(self, served):
        refusal = self.refusal(served(**{"merger_type": "divprune", "num_heads": 16}))
        assert "depends on the picture" in refusal and "position_ids='packed'" in refusal

    def test_attention_mass(self, served):
        assert "attention_mass=1.0" in self.refusal(served(attention_mass=1.0))
