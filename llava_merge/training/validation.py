# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of written answers during training, on short answers that can be compared word for word."""

import torch
from torch import nn

from llava_merge.evaluation.metrics import exact_match
from llava_merge.training.data import ChatDataset
from llava_merge.training.samples import first_turn


class AnswerScorer:
    """Counts the samples whose first answer the model writes as it is in the data.

    Args:
        dataset: Of validation.
        processor: A [`LlavaMergeProcessor`].
        batch_size: Prompts of one call of `generate`.
        max_new_tokens: Of an answer.
    """

    def __init__(self, dataset: ChatDataset, processor, batch_size: int = 16, max_new_tokens: int = 32):
        self.dataset, self.processor = dataset, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    @torch.no_grad()
    def count(self, model: nn.Module, budget: int | str, rank: int = 0, num_ranks: int = 1) -> tuple[int, int]:
        """Right answers with M = `budget` tokens an image, and those asked for, of the samples of a rank."""
        indices = range(rank, len(self.dataset), num_ranks)
        num_right = 0
        for start in range(0, len(indices), self.batch_size):
            num_right += self._count_batch(model, budget, indices[start : start + self.batch_size])
        return num_right, len(indices)

    def _count_batch(self, model, budget, indices) -> int:
        prompts, expected, pictures = [], [], []
        for item in map(self.dataset.__getitem__, indices):
            messages, shown, answer = first_turn(item["sample"].messages, item["pictures"])
            prompts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True))
            expected.append(answer)
            pictures += shown
        inputs = self.processor(
            images=pictures or None,
            text=prompts,
            num_merged_tokens=budget,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        written = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(int(exact_match(answer, [right])) for answer, right in zip(written, expected, strict=True))
