# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Asks a model the same questions with all visual tokens and with merged ones."""

import statistics
import time
from dataclasses import dataclass

import torch
from PIL import Image

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor, list_mergers
from llava_merge.demo import MODEL_DIR
from llava_merge.evaluation.candidates import OWN, Candidate, parse_candidate, put_merger
from llava_merge.model.placeholders import ALL_TOKENS
from llava_merge.visualization import draw_merging, thumbnail


@dataclass(frozen=True)
class Answer:
    """An answer, the image tokens it was given from, and the milliseconds from prompt to last token."""

    text: str
    num_image_tokens: int
    milliseconds: float


class Comparison:
    """A LLaVA that answers with one merger after the other and, by the budget of a call, without: the same weights.

    Args:
        model_dir: Directory or Hub repo of a LLaVA; default the embedded one.
        num_merged_tokens: Tokens per image after merging; may be set anew between calls.
        attention_mass: What merged tokens weigh, instead of what a merger says; see [`MergerConfig`].
        merger: The first merger, see [`use`]; default the model's own, which in a stock LLaVA pools averages.
    """

    def __init__(
        self,
        model_dir: str = str(MODEL_DIR),
        num_merged_tokens: int | None = None,
        merger: str | None = None,
        attention_mass: float | None = None,
    ):
        given = {"num_merged_tokens": num_merged_tokens, "attention_mass": attention_mass}
        self.given = {name: value for name, value in given.items() if value is not None}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        self.model = LlavaMergeForConditionalGeneration.from_pretrained(
            model_dir, dtype=dtype, merger_config=self.given
        ).to(self.device)
        self.processor = LlavaMergeProcessor.from_pretrained(model_dir)
        self.own = self.used = Candidate.of(OWN, self.model)
        self.num_merged_tokens = self.own.config.num_merged_tokens
        self.candidates = {OWN: self.own}
        if merger is not None:
            self.use(merger)

    def use(self, merger: str):
        """Answers with another merger from now on.

        Args:
            merger: Name of a method or of a bundled merger, or directory or Hub repo of a merger checkpoint, or "own";
                `NAME:FIELD=VALUE,FIELD=VALUE` sets fields.

        Raises:
            ValueError: It is none of these.
        """
        if merger not in self.candidates:
            self.candidates[merger] = self._make(merger)
        self.used = self.candidates[merger]
        if parse_candidate(merger)[0] not in [method.name for method in list_mergers()]:
            self.num_merged_tokens = self.given.get("num_merged_tokens", self.used.config.num_merged_tokens)

    def _make(self, merger: str) -> Candidate:
        """The merger, on the device, and the model as it was."""
        mass = {name: value for name, value in self.given.items() if name == "attention_mass"}
        name, fields = parse_candidate(merger)
        with self.own.answering(self.model):
            put_merger(self.model, self.processor, name, {**mass, **fields}, places={})
            return Candidate.of(merger, self.model)

    @property
    def name(self) -> str:
        """The method of the present merger."""
        return self.used.config.merger_type

    def with_all_tokens(self, image: Image.Image, question: str, repeats: int = 3) -> Answer:
        """The answer without merging; its time is the median of `repeats` runs."""
        with self.own.answering(self.model):
            return self._answer(image, question, ALL_TOKENS, repeats)

    def with_merged_tokens(self, image: Image.Image, question: str, repeats: int = 3) -> Answer:
        """The answer with the present merger; its time is the median of `repeats` runs."""
        with self.used.answering(self.model):
            return self._answer(image, question, self.num_merged_tokens, repeats)

    def _answer(self, image: Image.Image, question: str, num_merged_tokens: int | str, repeats: int) -> Answer:
        """Greedy answer; the median time of `repeats` runs after one to warm up."""
        inputs = self._inputs(image, question, num_merged_tokens)
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            output = self.model.generate(**inputs, max_new_tokens=32, do_sample=False)
            times.append(1000 * (time.perf_counter() - start))
        text = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        num_image_tokens = int((inputs["input_ids"] == self.processor.image_token_id).sum())
        return Answer(text, num_image_tokens, statistics.median(times[1:]))

    def _inputs(self, image: Image.Image, question: str, num_merged_tokens: int | str):
        """What the processor makes of a question about a picture, on the model's device.

        Raises:
            ValueError: The question holds the image placeholder, so that there would be more of them than pictures.
        """
        if self.processor.image_token in question:
            raise ValueError(
                f"The question {question!r} holds {self.processor.image_token}, which stands for a picture. Leave it "
                f"out: the picture is put before the question."
            )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        budget = {"num_merged_tokens": num_merged_tokens}
        inputs = self.processor(images=image.convert("RGB"), text=prompt, return_tensors="pt", **budget)
        return inputs.to(self.device, self.model.dtype)

    def source(self, image: Image.Image, question: str) -> torch.Tensor:
        """Which patches each token of the present merger came from: (M, N)."""
        with self.used.answering(self.model):
            (source,) = self.model.merge_sources(**self._inputs(image, question, self.num_merged_tokens))
        return source

    def picture(self, image: Image.Image, question: str, size: int = 336) -> Image.Image:
        """What the present merger's tokens keep of the picture, not larger than `size`."""
        return draw_merging(thumbnail(image, size), self.source(image, question), self.processor)
