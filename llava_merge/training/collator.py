# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Conversations as batches, with labels on the answers alone."""

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_merge.model.processing_llava_merge import bos_options
from llava_merge.training.budgets import IGNORED
from llava_merge.training.samples import Sample


class MergerCollator:
    """Makes batches of what a [`ChatDataset`] gives, padded on the right.

    Prompts are those of the chat template. An answer, and the end-of-sequence token behind it, which is added where the
    template writes none, has labels; everything else has -100.

    Args:
        processor: Of the LLaVA.
        num_tokens: Placeholders of an image: N, all its visual tokens, for [`MergerTrainer`], which cuts them down to
            the budget of the step; M for a trainer of your own.
        as_bytes: Leave `pixel_values` as uint8, for [`MergerTrainer`], which normalises them on its device: a quarter
            of what loading processes hand over, and most of their work.

    Raises:
        ValueError: The tokenizer cannot say which characters its tokens are of.
    """

    def __init__(self, processor, num_tokens: int, as_bytes: bool = False):
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"{type(processor.tokenizer).__name__} cannot say which characters a token is of, so that answers "
                f"cannot be told from questions. Load the processor with use_fast=True."
            )
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.num_tokens = num_tokens
        image_processor = processor.image_processor
        normalizes = image_processor.do_rescale and image_processor.do_normalize
        self.image_options = {"do_rescale": False, "do_normalize": False} if as_bytes and normalizes else {}
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (B, L), `sample_ids` and `num_skipped` (B,), and, where there are
        pictures, `pixel_values` (I, 3, H, W)."""
        encoded = [self.encode(item["sample"]) for item in items]
        ids, labels = zip(*encoded, strict=True)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "sample_ids": torch.tensor([item["index"] for item in items]),
            "num_skipped": torch.tensor([item["num_skipped"] for item in items]),
        }
        pictures = [picture for item in items for picture in item["pictures"]]
        if pictures:
            encoded = self.processor.image_processor(pictures, return_tensors="pt", **self.image_options)
            batch["pixel_values"] = encoded["pixel_values"]
        return batch

    def encode(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Ids and labels of a sample: (L,) each.

        Raises:
            ValueError: The chat template makes it a prompt without answers, or refuses its messages.
        """
        try:
            pieces = self.pieces(sample)
        except TemplateError as error:
            raise ValueError(f"{sample.name}: the chat template refuses its messages: {error}") from error
        text = "".join(piece for piece, _ in pieces)
        encoding = self.tokenizer(
            text,
            **bos_options(self.tokenizer, text),
            return_offsets_mapping=True,
            return_tensors="pt",
            verbose=False,
        )
        ids, (starts, ends) = encoding["input_ids"][0], encoding["offset_mapping"][0].T
        is_answer = torch.zeros_like(ids, dtype=torch.bool)
        position = 0
        for piece, answers in pieces:
            if answers:
                is_answer |= (ends > position) & (ends <= position + len(piece)) & (ends > starts)
            position += len(piece)
        if not is_answer.any():
            raise ValueError(
                f"{sample.name}: the chat template writes none of its answers, so that all its labels would be masked. "
                f"Set another processor.chat_template."
            )
        times = torch.ones_like(ids).masked_fill(ids == self.image_token_id, self.num_tokens)
        labels = ids.masked_fill(~is_answer, IGNORED)
        return ids.repeat_interleave(times), labels.repeat_interleave(times)

    def pieces(self, sample: Sample) -> list[tuple[str, bool]]:
        """The text of a sample in pieces, each with whether it is answer.

        Raises:
            ValueError: The chat template writes earlier turns otherwise once a later one is there.
        """
        messages, pieces, written = sample.messages, [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], add_generation_prompt=True)
            behind = self.render(messages[: index + 1])
            if not (before.startswith(written) and behind.startswith(before)):
                raise ValueError(
                    f"{sample.name}: the chat template changes earlier turns where a later one is added, so that its "
                    f"answers cannot be found. Set another processor.chat_template."
                )
            answer = self.ended(behind[len(before) :])
            pieces += [(before[len(written) :], False), (answer, index not in sample.untrained)]
            written = behind
        return pieces

    def render(self, messages: list[dict], **kwargs) -> str:
        """Messages as the chat template writes them."""
        return self.processor.apply_chat_template(messages, tokenize=False, **kwargs)

    def ended(self, answer: str) -> str:
        """An answer with the end-of-sequence token behind it, as a model has to write it to stop."""
        eos = self.tokenizer.eos_token
        return answer if not eos or eos in answer else answer.rstrip() + eos

    def length(self, sample: Sample) -> int:
        """Tokens of a sample with all its placeholders."""
        return len(self.encode(sample)[0])

    def normalized(self, pixel_values: Tensor) -> Tensor:
        """Pictures (I, 3, H, W) of uint8 as the image processor would have made them, float32."""
        image_processor, device = self.processor.image_processor, pixel_values.device
        mean, std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        return (pixel_values * image_processor.rescale_factor - mean) / std
