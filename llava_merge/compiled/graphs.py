# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Prefill and decoding in fixed shapes, compiled, and on a GPU recorded as CUDA graphs that the host only replays.

A prompt is padded on the left to the next length that was prepared. All that depends on its content stays on the
device: where the padding ends, where its images are, how far it has come.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from transformers import Cache, StaticLayer
from transformers.utils import logging

from ..model.compat import CACHE_ARGUMENT
from ..model.merging_base import MERGING_METHODS
from ..model.merging_grid import holding_what_is_made_once
from ..model.placeholders import ALL_TOKENS, tokens_of_budget
from ..model.positions import (
    EncodedImages,
    TokenLayout,
    biased_causal_mask,
    counted_positions,
    numbers_of_placeholders,
    sliding_window_of,
)
from ..model.questions import Prompt, Question


@dataclass(frozen=True)
class GraphShapes:
    """What is prepared; see `compile_for_inference`."""

    batch_sizes: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    images_per_prompt: tuple[int, ...]
    budgets: tuple[int | str, ...]
    max_new_tokens: int

    def length_of(self, num_tokens: int) -> int | None:
        """The length that a prompt is padded to, None where it is too long."""
        return min((length for length in self.prompt_lengths if length >= num_tokens), default=None)

    def prefills(self, num_patches: int) -> list["PrefillShape"]:
        """All shapes of prefills whose images fit, the largest first, so that the others find their memory."""
        images = {
            (number, budget if number else ALL_TOKENS) for number in self.images_per_prompt for budget in self.budgets
        }
        sizes = product(sorted(self.batch_sizes, reverse=True), sorted(self.prompt_lengths, reverse=True))
        return [
            PrefillShape(batch_size, length, batch_size * number, budget)
            for batch_size, length in sizes
            for number, budget in sorted(images, key=str)
            if number * tokens_of_budget(budget, num_patches) <= length
        ]


@dataclass(frozen=True)
class PrefillShape:
    """One prefill: B prompts of L tokens with I images in all, each of `budget` tokens."""

    batch_size: int
    length: int
    num_images: int
    budget: int | str

    def num_tokens(self, num_patches: int) -> list[int]:
        """Tokens of each image."""
        return [tokens_of_budget(self.budget, num_patches)] * self.num_images


class PlacedLayer(StaticLayer):
    """Keys and values (B, heads, T, head_dim) of a layer: a prefill fills them from the front, a token goes to `past`.

    Args:
        keys: Empty, as are the `values`.
        past: (1,) int64, tokens that are there.
    """

    def __init__(self, keys: Tensor, values: Tensor, past: Tensor):
        super().__init__(keys.shape[2])
        self.keys, self.values, self.past = keys, values, past
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keeps the states, and returns all that queries may look at; of a prefill its own alone."""
        length = key_states.shape[2]
        if length > 1:
            self.keys[:, :, :length] = key_states
            self.values[:, :, :length] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.past, key_states)
        self.values.index_copy_(2, self.past, value_states)
        return self.keys, self.values

    def get_seq_length(self, *args) -> int:
        """0: what it is asked for, masks and positions, is given."""
        return 0


class Slot:
    """What B prompts that are answered side by side need on the device.

    Args:
        states: Of each layer, keys and values (B, heads, T, head_dim).

    Attributes:
        tokens: (B, 1) int64, the newest ones.
        past: (1,) int64, tokens that the cache holds, padding included.
        positions: (B, 1) int64, of the newest tokens.
        is_text: (B, T) bool, where the cache holds no padding.
        bias: (B, T + 1) float32, added to the attention logits of each key.
    """

    def __init__(self, states: list[tuple[Tensor, Tensor]]):
        batch_size, _, self.capacity, _ = states[0][0].shape
        like = states[0][0]
        self.tokens, self.positions = (like.new_zeros(batch_size, 1, dtype=torch.long) for _ in range(2))
        self.past = like.new_zeros(1, dtype=torch.long)
        self.is_text = like.new_zeros(batch_size, self.capacity, dtype=torch.bool)
        self.bias = like.new_zeros(batch_size, self.capacity + 1, dtype=torch.float32)
        self.cache = Cache(layers=[PlacedLayer(keys, values, self.past) for keys, values in states])

    @property
    def layout(self) -> TokenLayout:
        """How much each cached token weighs; their positions are used up."""
        nothing = torch.zeros_like(self.bias, dtype=torch.long)
        return TokenLayout(nothing, nothing, self.bias, False)

    def start(self, layout: TokenLayout, mask: Tensor, positions: Tensor):
        """Takes over from a prefill whose padding is at 0 in `mask` (B, L), and whose last token is at `positions`."""
        length = mask.shape[1]
        self.is_text[:, :length] = mask
        self.is_text[:, length:] = True
        self.bias[:, :length] = layout.bias[:, :length]
        self.bias[:, length:] = 0.0
        self.past.fill_(length)
        self.positions.copy_(positions)

    def clear(self):
        """Forgets keys and values, also those that are not finite: masked, they would make all attention NaN."""
        for layer in self.cache.layers:
            layer.keys.zero_()
            layer.values.zero_()

    def advance(self):
        """Counts a token."""
        self.past.add_(1)
        self.positions.add_(1)


class InferenceGraphs:
    """The graphs of one model.

    Args:
        model: A [`LlavaMergeForConditionalGeneration`], on one device.
        shapes: What to prepare.
        backend: Of `torch.compile`; None to record kernels as they are.
    """

    def __init__(self, model, shapes: GraphShapes, backend: str | Callable | None = "inductor"):
        self.model, self.shapes = model, shapes
        self.window = sliding_window_of(model.config.text_config)
        options = {"fullgraph": True, "dynamic": False, "backend": backend, "disable": backend is None}
        in_steps = MERGING_METHODS[model.config.merger_config.merger_type].chooses_in_steps
        self._read_question = torch.compile(self._question_of, **options)
        self._encode = torch.compile(self._tokens_of_images, **{**options, "disable": backend is None or in_steps})
        self._prefill = torch.compile(self._logits_of_prompt, **options)
        self._decode = torch.compile(self._logits_of_token, **options)
        self.slots: dict[tuple[int, int], Slot] = {}  # by batch size and length of the prompt
        self.prefills: dict[PrefillShape, Recorded] = {}
        self.decodes: dict[tuple[int, int], Recorded] = {}
        self.in_use = threading.Lock()
        self.was_finite: Tensor | bool = True  # the last answer's end; False where it was broken off
        device = model.lm_head.weight.device
        self.aside = stream_beside(device.index, "prefill") if device.type == "cuda" else None
        self.fingerprint = fingerprint_of(model)

    def warm_up(self):
        """Compiles and records everything, with a progress bar."""
        like, prefills = self.model.lm_head.weight, self.shapes.prefills(self.model.config.num_patches)
        pool = torch.cuda.graph_pool_handle() if like.is_cuda else None
        rooms = {(shape.batch_size, shape.length): shape.length + self.shapes.max_new_tokens for shape in prefills}
        limit = 8 + 4 * len(prefills)  # torch.compile gives up on the ninth shape
        with (
            for_graphs(),
            torch.cuda.device_of(like),
            # by the names of torch before 2.7, which later ones know too
            torch._dynamo.config.patch(cache_size_limit=limit, accumulated_cache_size_limit=8 * limit),
            logging.tqdm(total=len(prefills) + len(rooms), desc="compiling", disable=None) as bar,
        ):
            self.slots = make_slots(shapes_of_cache(self.model), rooms, like)
            prepare_tower(self.model)
            for key, slot in self.slots.items():
                self.decodes[key] = Recorded(self._decode, {"slot": slot}, pool)
                bar.update()
            for shape in prefills:
                self.prefills[shape] = Recorded(self._run_prefill, self._inputs_of(shape), pool)
                bar.update()

    def _inputs_of(self, shape: PrefillShape) -> dict:
        """Buffers that a prefill of this shape reads, with a prompt that has its images."""
        config, device = self.model.config, self.model.lm_head.weight.device
        number = sum(shape.num_tokens(config.num_patches)) // shape.batch_size
        ids = torch.full((shape.batch_size, shape.length), padding_id(config), device=device)
        ids[:, shape.length - number :] = config.image_token_id
        pixels = torch.zeros(shape.num_images, 3, *config.image_shape, dtype=self.model.dtype, device=device)
        return {
            "slot": self.slots[shape.batch_size, shape.length],
            "ids": ids,
            "mask": torch.ones_like(ids, dtype=torch.bool),
            "pixels": pixels,
            "shape": shape,
        }

    def prefill(self, shape: PrefillShape, input_ids: Tensor, mask: Tensor, pixels: Tensor | None) -> Tensor:
        """Logits of the next token, (B, 1, vocabulary), to be read after [`wait_for_prefill`] and before the next call.

        On a GPU it runs on a stream of its own, so that copies to the device which the caller makes meanwhile do not
        wait until all of it is done. The arguments have to live till then. Of a prompt whose placeholders are not those
        of its images, the logits mean nothing.

        Args:
            input_ids: (B, L or fewer).
            mask: (B, L or fewer), 0 where a token is padding.
            pixels: (I, 3, H, W).
        """
        logits, was_finite = self._start(shape, input_ids, mask, pixels), self.was_finite
        self.was_finite = False
        if not was_finite:  # asked while the prefill runs, since the answer waits for the device
            self.wait_for_prefill()
            for slot in self.slots.values():
                slot.clear()
            logits = self._start(shape, input_ids, mask, pixels)
        return logits

    def finish(self, logits: Tensor):
        """Takes the last `logits` of an answer, to clear the memory before the next one where they are not finite."""
        self.was_finite = logits.isfinite().all()

    def _start(self, shape: PrefillShape, input_ids: Tensor, mask: Tensor, pixels: Tensor | None) -> Tensor:
        recorded = self.prefills[shape]
        padding, buffers = shape.length - input_ids.shape[1], recorded.inputs
        if self.aside is not None:
            self.aside.wait_stream(torch.cuda.current_stream(self.aside.device))
        with torch.cuda.stream(self.aside):  # nothing where it is None
            buffers["ids"][:, :padding] = padding_id(self.model.config)
            buffers["ids"][:, padding:] = input_ids
            buffers["mask"][:, :padding] = False
            buffers["mask"][:, padding:] = mask  # not 0 is True
            if shape.num_images:
                buffers["pixels"].copy_(pixels)
            return recorded()

    def wait_for_prefill(self):
        """Lets the present stream wait for it, not the host."""
        if self.aside is not None:
            torch.cuda.current_stream(self.aside.device).wait_stream(self.aside)

    def decode(self, shape: PrefillShape, tokens: Tensor) -> Tensor:
        """Logits behind `tokens` (B, 1) of a prompt of `shape`: (B, 1, vocabulary), to be read before the next call."""
        recorded = self.decodes[shape.batch_size, shape.length]
        recorded.inputs["slot"].tokens.copy_(tokens)
        return recorded()

    def _run_prefill(self, slot: Slot, ids: Tensor, mask: Tensor, pixels: Tensor, shape: PrefillShape) -> Tensor:
        num_tokens = shape.num_tokens(self.model.config.num_patches)
        tokens = places = sizes = None
        if num_tokens:
            question = self._read_question(ids, mask, num_tokens)
            tokens, places, sizes = self._encode(pixels, question, [shape.budget] * shape.num_images)
        return self._prefill(slot, ids, mask, num_tokens, tokens, places, sizes)

    def _question_of(self, ids: Tensor, mask: Tensor, num_tokens: list[int]) -> Question | None:
        prompt = Prompt(ids, None, ids == self.model.config.image_token_id, attention_mask=mask, may_hold_answers=False)
        return self.model.model.get_question(prompt, num_tokens)

    def _tokens_of_images(self, pixels: Tensor, question: Question | None, budgets: list[int | str]):
        images = self.model.model.encode_images(pixels, question=question, num_merged_tokens=budgets)
        tokens = torch.cat(images.pooler_output)
        if not isinstance(images, EncodedImages):
            return tokens, None, None
        return tokens, images.token_places, images.token_sizes

    def _logits_of_prompt(self, slot, ids, mask, num_tokens: list[int], tokens, places, sizes) -> Tensor:
        headless = self.model.model
        image_mask = ids == self.model.config.image_token_id
        embeds, layout = headless.get_input_embeddings()(ids), TokenLayout.of_text(*ids.shape, ids.device)
        if num_tokens:
            of_images = tokens.to(embeds.dtype)[numbers_of_placeholders(image_mask, len(tokens))]
            embeds = of_images.where(image_mask[..., None], embeds)
        if places is not None:
            images = EncodedImages(
                pooler_output=tokens.split(num_tokens),
                token_places=places,
                token_sizes=sizes,
                num_patches=self.model.config.num_patches,
            )
            layout = headless.layout_of_prompt(image_mask, images, None)
        length = ids.shape[1]
        packed = counted_positions(mask, 0, length, ids.device)
        slot.start(layout, mask, packed[:, -1:] + 1 + layout.shift(length, 1))
        attention = biased_causal_mask(layout, 0, length, (length, 0), embeds.dtype, mask, self.window)
        return self._run_language_model(slot, embeds, packed + layout.shift(0, length), attention)

    def _logits_of_token(self, slot: Slot) -> Tensor:
        embeds = self.model.model.get_input_embeddings()(slot.tokens)
        keys = (slot.capacity, 0)
        attention = biased_causal_mask(slot.layout, slot.past, 1, keys, embeds.dtype, slot.is_text, self.window)
        logits = self._run_language_model(slot, embeds, slot.positions, attention)
        slot.advance()
        return logits

    def _run_language_model(self, slot: Slot, embeds: Tensor, positions: Tensor, attention: Tensor) -> Tensor:
        outputs = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=attention,
            use_cache=True,
            **{CACHE_ARGUMENT: slot.cache},
        )
        return self.model.lm_head(outputs.last_hidden_state[:, -1:])


class Recorded:
    """A call with fixed inputs: on a GPU a CUDA graph of it, elsewhere the call itself.

    Args:
        function: Compiled.
        inputs: Its arguments, whose tensors are read anew by each call.
        pool: Memory that the graphs of a model share, since only one of them runs at a time.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: dict, pool=None):
        self.function, self.inputs, self.graph = function, inputs, None
        with holding_what_is_made_once() as self.held:  # the graph reads it as long as it lives
            if pool is None:
                function(**inputs)
            else:
                self._record(pool)

    def _record(self, pool):
        present, aside = torch.cuda.current_stream(), stream_beside(torch.cuda.current_device(), "recording")
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles, and lets libraries choose their kernels
                self.function(**self.inputs)
        present.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        free_workspaces()  # so that the graph makes its own, in its pool
        with torch.cuda.graph(self.graph, pool=pool, stream=aside):
            self.result = self.function(**self.inputs)
        free_workspaces()

    def __call__(self) -> Tensor:
        """The result, which the next call overwrites."""
        if self.graph is None:
            with for_graphs():
                return self.function(**self.inputs)
        self.graph.replay()
        return self.result


@functools.cache
def stream_beside(device: int, purpose: str) -> torch.cuda.Stream:
    """The one stream of the process for this purpose on a device: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


def free_workspaces():
    """Gives back what cuBLAS keeps for each stream, where torch can; the next matmul makes it anew."""
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()


@contextmanager
def for_graphs():
    """One mode for all calls: torch.compile would compile for inference mode once more."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def prepare_tower(model):
    """Runs the tower once: transformers 5 puts hooks into it in the first call, which torch.compile cannot follow."""
    pixels = torch.zeros(1, 3, *model.config.image_shape, dtype=model.dtype, device=model.lm_head.weight.device)
    model.get_vision_features(pixels)


def padding_id(config) -> int:
    """An id that is no image's."""
    return 0 if config.image_token_id != 0 else 1


def shapes_of_cache(model) -> list[torch.Size]:
    """Shapes (1, heads, 1, head_dim) of one token's keys and values, layer by layer."""
    token = torch.full((1, 1), padding_id(model.config), device=model.lm_head.weight.device)
    cache = model.model.language_model(input_ids=token, use_cache=True)[CACHE_ARGUMENT]
    return [states.shape for layer in cache.layers for states in (layer.keys, layer.values)]


def make_slots(
    shapes: list[torch.Size], rooms: dict[tuple[int, int], int], like: Tensor
) -> dict[tuple[int, int], Slot]:
    """A slot for each batch size and length of prompts, with room for so many tokens, all of which decoding reads.

    One is in use at a time: each is the front of the same memory.

    Args:
        shapes: [`shapes_of_cache`].
    """
    most = max(batch_size * room for (batch_size, _), room in rooms.items())
    memory = [like.new_zeros(most, heads * width) for _, heads, _, width in shapes]
    slots = {}
    for (batch_size, length), room in rooms.items():
        states = [
            part[: batch_size * room].view(batch_size, heads, room, width)
            for part, (_, heads, _, width) in zip(memory, shapes, strict=True)
        ]
        slots[batch_size, length] = Slot([*zip(states[::2], states[1::2], strict=True)])
    return slots


def fingerprint_of(model) -> tuple:
    """All that the graphs of a model were made for, besides the values of its weights.

    It has every module, and the address of every parameter and buffer, since a graph reads at addresses.
    """
    modules, addresses = [model], []
    for module in modules:  # which grows meanwhile
        modules += [child for child in module._modules.values() if child is not None]
        for tensors in (module._parameters, module._buffers):
            addresses += [tensor.data_ptr() for tensor in tensors.values() if tensor is not None]
    merger_config = model.config.merger_config
    marks = merger_config.question_start_token_ids, merger_config.question_end_token_ids
    return modules, addresses, merger_config.position_ids, model.model.attention_mass, repr(marks)
