# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The `llava_merge` model of lmms-eval (`pip install lmms-eval`), found by its entry point `lmms_eval.models`.

    lmms-eval --model llava_merge --tasks pope --batch_size 16 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,merger=tome,num_merged_tokens=64
"""

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm import tqdm

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.evaluation.candidates import UNMERGED, put_merger
from llava_merge.model.placeholders import ALL_TOKENS


MODEL_ID = "llava_merge"
MANIFEST = ModelManifest(model_id=MODEL_ID, chat_class_path=f"{__name__}.LlavaMergeChat")
DEFAULT_MAX_NEW_TOKENS = 256


class LlavaMergeChat(lmms):
    """A LLaVA with a merger, asked in batches through its own chat template.

    Args:
        pretrained: Directory or Hub repo of a LLaVA.
        merger: A method, a bundled merger, a directory or Hub repo of one, "own" for the model's, or "none".
        num_merged_tokens: Tokens of an image; default the merger's.
        position_ids: Of a method; a saved merger has its own.
        attention_mass: The same; None leaves it to the model, see [`MergerConfig`].
        dtype: Of the model.
        attn_implementation: As in `from_pretrained`.
        device: "cuda", or "cpu"; with several processes each has the GPU of its rank.
        batch_size: Documents at once.

    Raises:
        ValueError: The merger cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        merger: str = "own",
        num_merged_tokens: int | None = None,
        position_ids: str = "source",
        attention_mass: float | None = None,
        dtype: str = "bfloat16",
        attn_implementation: str | None = None,
        device: str = "cuda",
        batch_size: int = 1,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if self._world_size == 1 else self.accelerator.device
        self.batch_size = int(batch_size)
        self.model = LlavaMergeForConditionalGeneration.from_pretrained(
            pretrained, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )
        self.processor = LlavaMergeProcessor.from_pretrained(pretrained)
        places = {"position_ids": position_ids, "attention_mass": attention_mass}
        put_merger(self.model, self.processor, merger, {}, places, seed=0)
        self.model.to(self.device).eval()
        self.budget = ALL_TOKENS
        if self.model.config.merger_config.merger_type != UNMERGED:
            self.budget = num_merged_tokens or self.model.config.merger_config.num_merged_tokens
            self.model.set_num_merged_tokens(self.budget)

    @property
    def rank(self) -> int:
        """Of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, in the order of the requests."""
        order = Collator([each.args for each in requests], lambda x: -len(x[0]), lambda x: x[2], grouping=True)
        written = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="answering")
        for batch in order.get_batched(n=self.batch_size):
            written += self._answer(batch)
            bar.update(len(batch))
        bar.close()
        return order.get_original(written)

    def _answer(self, batch: list[tuple]) -> list[str]:
        conversations = [
            ChatMessages(messages=messages_of(self.task_dict[task][split][document]))
            for _, messages_of, _, document, task, split in batch
        ]
        inputs = self._encode(conversations)
        options, until = generation_options(batch[0][2])
        ids = self.model.generate(**inputs, pad_token_id=self.processor.tokenizer.pad_token_id, **options)
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [cut_at(text, until).strip() for text in texts]

    def _encode(self, conversations: list[ChatMessages]) -> dict:
        """Inputs of the model; the pictures of all conversations one after the other."""
        pictures = [picture for each in conversations for picture in each.extract_media()[0]]
        texts = [
            self.processor.apply_chat_template(each.to_hf_messages(), add_generation_prompt=True)
            for each in conversations
        ]
        return self.processor(
            images=pictures or None,
            text=texts,
            num_merged_tokens=self.budget,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device, self.model.dtype)

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its document, and whether it is the greedy one."""
        found = []
        for request in tqdm(requests, "scoring"):
            context, target_of, visuals_of, document, task, split = request.args
            row = self.task_dict[task][split][document]
            target = target_of if isinstance(target_of, str) else target_of(row)
            found.append(self._score(context, visuals_of(row), target))
        return found

    def _score(self, context: str, pictures: list, target: str) -> tuple[float, bool]:
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": context}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(
            images=pictures or None, text=prompt, num_merged_tokens=self.budget, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        answer = self.processor.tokenizer(f" {target}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        answer, length = answer.to(self.device), inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat((inputs["input_ids"], answer), dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        is_answer = torch.arange(inputs["input_ids"].shape[1], device=self.device)[None] >= length
        logits = self.model(**inputs, answer_mask=is_answer, use_cache=False).logits[:, length - 1 : -1].float()
        likelihood = logits.log_softmax(-1).gather(2, answer[..., None]).sum()
        return likelihood.item(), bool((logits.argmax(-1) == answer).all())

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused.

        Raises:
            ValueError: Always: documents of several rounds are asked one answer at a time.
        """
        raise ValueError(f"The {MODEL_ID} model of lmms-eval does not do tasks of several rounds; choose another task.")


def generation_options(given: dict) -> tuple[dict, list[str]]:
    """Arguments of `generate` for those of a task, and the texts where an answer ends."""
    until = given.get("until") or []
    options = {name: given[name] for name in ("max_new_tokens", "num_beams") if given.get(name)}
    options.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    options["do_sample"] = bool(given.get("do_sample", False)) and bool(given.get("temperature"))
    if options["do_sample"]:
        options |= {name: given[name] for name in ("temperature", "top_p") if given.get(name)}
    return options, [until] if isinstance(until, str) else list(until)


def cut_at(text: str, ends: list[str]) -> str:
    """The text before the first of the `ends`."""
    return text[: min((text.find(end) for end in ends if end and end in text), default=len(text))]
