# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Answers of every merger at every budget, behind one pass of the tower an image."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.evaluation.candidates import Candidate, budgets_of
from llava_merge.evaluation.data import PictureQuestion
from llava_merge.model.placeholders import tokens_of_budget
from llava_merge.model.processing_llava_merge import bos_options


@dataclass(frozen=True)
class Cell:
    """A candidate at a budget; `key` is its name in files."""

    candidate: Candidate
    budget: int | str

    @property
    def key(self) -> str:
        """What reports call it, such as `tome@16`."""
        return f"{self.candidate.name}@{self.budget}"


def make_cells(candidates: list[Candidate], budgets: list[int]) -> list[Cell]:
    """Every merger at each of its budgets."""
    return [Cell(candidate, budget) for candidate in candidates for budget in budgets_of(candidate, budgets)]


@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch with M tokens an image: ids and mask (B, L), padded on the left, and the images by cell."""

    input_ids: Tensor
    attention_mask: Tensor
    images: dict


class Grid:
    """Asks a model the same questions with each candidate and budget.

    Args:
        model: In eval mode; its merger is as before after each call.
        processor: Of the model.
        cells: The first one merges nothing: the others are compared with it.
        max_new_tokens: Of an answer.
    """

    def __init__(
        self,
        model: LlavaMergeForConditionalGeneration,
        processor: LlavaMergeProcessor,
        cells: list[Cell],
        max_new_tokens: int = 32,
    ):
        self.model, self.processor, self.cells, self.max_new_tokens = model, processor, cells, max_new_tokens
        ends = model.generation_config.eos_token_id
        self.end_ids = torch.tensor([ends] if isinstance(ends, int) else list(ends or ()), device=model.device)
        self.pad_token_id = processor.tokenizer.pad_token_id

    @torch.inference_mode()
    def answer(self, questions: list[PictureQuestion], with_divergence: bool = True) -> dict:
        """Greedy answers of a batch.

        Args:
            with_divergence: Also take the divergence of each cell's next-token distributions from the unmerged one's,
                along the unmerged answer.

        Returns:
            `{"tower_seconds", "cells": {key: {"answers", "kl", "entered", "cached", "seconds"}}}`; `entered` counts the
            tokens of each prompt in the language model, `cached` those in its cache behind the last answered token.
        """
        texts = [self.processor.apply_chat_template(q.messages, add_generation_prompt=True) for q in questions]
        pictures = [picture for question in questions for picture in question.open_images()]
        pixel_values = self._pixels(pictures)
        start = time.perf_counter()
        tower = None if pixel_values is None else self._run_tower(pixel_values)
        report = {"tower_seconds": self._since(start), "cells": {}}
        unmerged_ids = unmerged = None
        for cell in self.cells:
            with cell.candidate.answering(self.model):
                start = time.perf_counter()
                prompts = self._prompts(cell.budget, texts, pixel_values, tower)
                ids = self._generate(prompts)  # (B, answer)
                seconds = self._since(start)
                unmerged_ids = ids if unmerged_ids is None else unmerged_ids
                divergence = None
                if with_divergence:
                    log_probs = self._answer_log_probs(prompts, unmerged_ids)
                    unmerged = log_probs if unmerged is None else unmerged
                    divergence = mean_divergence(log_probs, unmerged, self._is_written(unmerged_ids))
            report["cells"][cell.key] = self._row(prompts, ids, seconds, divergence)
        return report

    def _pixels(self, pictures) -> Tensor | None:
        if not pictures:
            return None
        pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def _run_tower(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        return self.model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)

    def _since(self, start: float) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - start

    def _prompts(self, budget: int | str, texts: list[str], pixel_values: Tensor | None, tower) -> Prompts:
        """What the processor would make of the texts at a budget, with the images merged from the tower's output."""
        num_tokens = tokens_of_budget(budget, self.model.config.num_patches)
        mark = self.processor.image_token
        texts = [text.replace(mark, mark * num_tokens) for text in texts]
        options = {"padding": True, "padding_side": "left", **bos_options(self.processor.tokenizer, texts)}
        batch = self.processor.tokenizer(texts, **options, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self.model.device), batch["attention_mask"].to(self.model.device)
        if tower is None:
            return Prompts(ids, mask, {})
        prompt = self.model.model.read_prompt(ids, None, attention_mask=mask, may_hold_answers=False)
        outputs = BaseModelOutputWithPooling(tower.last_hidden_state, hidden_states=tower.hidden_states)
        tower = pixel_values, outputs
        encoded = self.model.model.encode_images_of_prompt(pixel_values, prompt, budget, tower_outputs=tower)
        return Prompts(ids, mask, {"image": encoded})

    def _generate(self, prompts: Prompts) -> Tensor:
        output = self.model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            mm_encoder_outputs=prompts.images or None,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.pad_token_id,
        )
        return output[:, prompts.input_ids.shape[1] :]

    def _answer_log_probs(self, prompts: Prompts, answers: Tensor) -> Tensor:
        """(B, A, vocabulary) float32: log-probabilities of each token of `answers` (B, A) behind the prompts."""
        outputs = self.model(
            input_ids=torch.cat((prompts.input_ids, answers), dim=1),
            attention_mask=torch.cat((prompts.attention_mask, self._is_written(answers).long()), dim=1),
            mm_encoder_outputs=prompts.images or None,
            logits_to_keep=answers.shape[1] + 1,
            use_cache=False,
        )
        return outputs.logits[:, :-1].float().log_softmax(dim=-1)

    def _is_written(self, answers: Tensor) -> Tensor:
        """(B, A) bool: tokens of answers up to the one that ends them; padding, which may be the same one, follows."""
        is_end = torch.isin(answers, self.end_ids)
        return is_end.cumsum(dim=1) - is_end.long() == 0

    def _row(self, prompts: Prompts, ids: Tensor, seconds: float, divergence: Tensor | None) -> dict:
        entered = prompts.attention_mask.sum(dim=1)
        written = self._is_written(ids).sum(dim=1)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return {
            "answers": [text.strip() for text in texts],
            "kl": None if divergence is None else divergence.tolist(),
            "entered": entered.tolist(),
            "cached": (entered + written - 1).tolist(),  # the last token is never fed back
            "seconds": seconds,
        }


def mean_divergence(log_probs: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """(B,): KL of `wanted` (B, A, vocabulary) from `log_probs`, in nats, mean over the tokens of a mask (B, A)."""
    each = F.kl_div(log_probs, wanted, reduction="none", log_target=True).sum(dim=-1)
    return (each * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
