# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Batches as the collators of TRL and LLaMA-Factory make them: right, or an error that says what to change."""

import pytest
import torch
from conftest import ANSWER_ID, IMAGE_ID, NUM_PATCHES, WORDS, agnostic, aware, make_processor, tiny_model

from llava_merge import LlavaMergeProcessor


M = 9


@pytest.fixture
def processor():
    return make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=M)


def question(text: str = "what color is the star ?") -> dict:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def answer(text: str = "red") -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class TestTRL:
    """SFTTrainer's collator, which calls our processor."""

    @pytest.fixture
    def collate(self, processor):
        sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")

        def collate(examples, **kwargs):
            return sft_trainer.DataCollatorForVisionLanguageModeling(processor, **kwargs)(examples)

        return collate

    def test_prompts_and_completions(self, collate, picture):
        rows = [{"images": [picture], "prompt": [question()], "completion": [answer(text)]} for text in ("red", "blue")]
        batch = collate(rows, completion_only_loss=True)
        assert (batch["input_ids"] == IMAGE_ID).sum(dim=1).tolist() == [M, M]
        assert (batch["labels"] != -100).sum(dim=1).max() <= 3  # the answer and what ends it
        for config in (agnostic(M), aware(M)):
            model = tiny_model(config, train_merger=True).train()
            loss = model(**batch).loss
            loss.backward()
            assert loss.isfinite() and model.model.merger.method.pool_queries.grad.abs().sum() > 0
        poisoned = {**batch, "input_ids": batch["input_ids"].clone()}
        poisoned["input_ids"][batch["labels"] != -100] = WORDS.index("circles")
        features = [model.model(**{k: b[k] for k in b if k != "labels"}, answer_mask=b["labels"] != -100)
                    for b in (batch, poisoned)]  # fmt: skip
        before_answers = batch["input_ids"] == ANSWER_ID
        torch.testing.assert_close(*(output.last_hidden_state[before_answers] for output in features))

    def test_whole_conversations(self, collate, picture):
        """Everything has a label there, so that a question-aware merger would train without question."""
        batch = collate([{"images": [picture], "messages": [question(), answer()]}])
        assert tiny_model(agnostic(M)).train()(**batch).loss.isfinite()
        with pytest.raises(
            ValueError, match="images in rows 0 have no question: .* Set the labels of the prompt to -100"
        ):
            tiny_model(aware(M)).train()(**batch)

    def test_a_stock_processor_is_named_as_the_fault(self, picture):
        sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
        collator = sft_trainer.DataCollatorForVisionLanguageModeling(make_processor())
        batch = collator([{"images": [picture], "messages": [question(), answer()]}])
        with pytest.raises(ValueError, match=r"Give the model what the processor returned for .*num_merged_tokens=M"):
            tiny_model(agnostic(M))(**batch)


class TestLlamaFactory:
    """Its LLaVA template writes as many placeholders as the tower has patches, whatever the processor says."""

    def test_it_is_told_what_to_change(self, processor, picture):
        mm_plugin = pytest.importorskip("llamafactory.data.mm_plugin")
        plugin = mm_plugin.get_mm_plugin(name="llava", image_token="<image>")
        turns = [{"role": "user", "content": "<image> what color ?"}, {"role": "assistant", "content": "red"}]
        processor.image_max_pixels, processor.image_min_pixels = 10**6, 1
        written = plugin.process_messages(turns, [picture], [], [], processor)
        ids = processor.tokenizer(f"USER: {written[0]['content']} ASSISTANT: red", return_tensors="pt")
        pixel_values = plugin.get_mm_inputs([picture], [], [], [1], [0], [0], [], processor)["pixel_values"]
        if (ids["input_ids"] == IMAGE_ID).sum() == M:
            assert tiny_model(agnostic(M))(**ids, pixel_values=pixel_values).logits.isfinite().all()
            return
        assert (ids["input_ids"] == IMAGE_ID).sum() == NUM_PATCHES
        with pytest.raises(ValueError, match="the prompts were made for another number of tokens per image"):
            tiny_model(agnostic(M))(**ids, pixel_values=pixel_values)
        merged_in_no_image = tiny_model(agnostic(M))(**ids, pixel_values=pixel_values, num_merged_tokens="all")
        assert merged_in_no_image.logits.isfinite().all()
