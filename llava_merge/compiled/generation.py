# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`generate` from the graphs of a compiled model. It is given a dummy cache that only counts tokens."""

import functools
import gc
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import logging

from ..model.compat import CACHE_ARGUMENT, takes_arguments_of
from ..model.configuration_llava_merge import keeps_places
from ..model.placeholders import ALL_TOKENS, check_placeholders, is_whole_number, tokens_of_budget, warn_of_positions
from ..model.positions import find_cache
from ..model.vision_encoding import counted
from .graphs import GraphShapes, InferenceGraphs, PrefillShape, fingerprint_of


logger = logging.get_logger(f"transformers.{__name__}")

# Arguments of generate that a call from graphs may have, of those that go to forward.
INPUTS = {"input_ids", "attention_mask", "pixel_values", "num_merged_tokens", "use_cache"}
READ_BY_PREFILL = {"pixel_values", "num_merged_tokens"}
# Settings of generate that need another loop, or more of the model than its logits, where they are not one of these.
PLAIN = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    **dict.fromkeys(
        (
            "assistant_model",
            "assistant_early_exit",
            "prompt_lookup_num_tokens",
            "penalty_alpha",
            "dola_layers",
            "custom_generate",
            "output_attentions",
            "output_hidden_states",
            "return_dict_in_generate",
            "cache_implementation",
            "prefill_chunk_size",
            "token_healing",
            "use_mtp",
        ),
        (None, False),
    ),
}
TEXT_LENGTHS = (64, 192, 448)


class GraphCache(DynamicCache):
    """What `generate` takes for a cache, in a call that is answered from graphs.

    Args:
        graphs: Those of the model.
        shape: The prefill.
        first_logits: Of the prompt, whose prefill runs already while `generate` still prepares itself.
    """

    def __init__(self, graphs: InferenceGraphs, shape: PrefillShape, first_logits: Tensor):
        super().__init__()
        self.graphs, self.shape, self.logits, self.num_tokens = graphs, shape, first_logits, 0

    def get_seq_length(self, *args) -> int:
        """Tokens that were seen."""
        return self.num_tokens

    def answer(self, input_ids: Tensor) -> LlavaCausalLMOutputWithPast:
        """The next logits behind the new `input_ids` (B, L), the prompt's with the first call."""
        if self.num_tokens:
            self.logits = self.graphs.decode(self.shape, input_ids)
        else:
            self.graphs.wait_for_prefill()
        self.num_tokens += input_ids.shape[1]
        return LlavaCausalLMOutputWithPast(logits=self.logits, **{CACHE_ARGUMENT: self})


class CompiledModel(GenerationMixin):
    """A model whose `generate` answers from graphs; all else is the model's. [`compile_for_inference`] makes it.

    The model stays as it is, and can be called meanwhile. A copy has no graphs.

    Args:
        uncompiled: The model.
        graphs: Those of the model; None where it has none.
    """

    def __init__(self, uncompiled, graphs: InferenceGraphs | None = None):
        vars(self).update(uncompiled=uncompiled, graphs=graphs)

    def __getattr__(self, name: str):
        return getattr(vars(self)["uncompiled"], name)

    def __setattr__(self, name: str, value):
        setattr(self.uncompiled, name, value)

    @property
    def __class__(self) -> type:
        """The model's, by which pipelines tell what it can do."""
        return type(self.uncompiled)

    def __reduce__(self):
        return CompiledModel, (self.uncompiled,)  # for copies too

    def eval(self) -> "CompiledModel":
        """As of the model."""
        self.uncompiled.eval()
        return self

    def to(self, *args, **kwargs) -> "CompiledModel":
        """As of the model; graphs stay behind, so that a model that moves has to be compiled again."""
        self.uncompiled.to(*args, **kwargs)
        return self

    def decompile(self):
        """Frees caches, buffers and graphs. Calls of this object run without them from then on.

        Code that torch.compile has made stays in the process, without the model, till `torch.compiler.reset()`.
        """
        vars(self)["graphs"] = None
        gc.collect()  # they hold themselves; freed later, maybe while others are recorded, they would spoil these
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @takes_arguments_of(GenerationMixin.generate)
    @counted
    def generate(self, **kwargs):
        """As in transformers; from graphs where they fit."""
        graphs = self.graphs  # another thread may take them away
        shape = self._shape_of_call(graphs, kwargs)
        if shape is None or not graphs.in_use.acquire(blocking=False):
            return self.uncompiled.generate(**kwargs)
        try:
            ids, mask, pixels = prompt_of_call(kwargs)
            cache = GraphCache(graphs, shape, graphs.prefill(shape, ids, mask, pixels))
            num_patches = self.config.num_patches  # checked while it runs already, since the check waits for the device
            check_placeholders(ids == self.config.image_token_id, shape.num_tokens(num_patches), num_patches)
            others = {name: kwargs[name] for name in kwargs if name not in READ_BY_PREFILL}
            answer = GenerationMixin.generate(self, **{**others, CACHE_ARGUMENT: cache, "disable_compile": True})
            graphs.finish(cache.logits)
            return answer
        finally:
            graphs.wait_for_prefill()  # which may still read what the caller gives up now, where there was an error
            graphs.in_use.release()

    def prepare_inputs_for_generation(self, input_ids: Tensor | None = None, **kwargs) -> dict:
        """As of the model; for graphs what they read."""
        cache = find_cache(kwargs)
        if not isinstance(cache, GraphCache):
            return self.uncompiled.prepare_inputs_for_generation(input_ids, **kwargs)
        return {"input_ids": input_ids[:, -1:] if cache.num_tokens else input_ids, CACHE_ARGUMENT: cache}

    def __call__(self, *args, **kwargs):
        """As of the model, or from graphs where `generate` says so."""
        cache = kwargs.get(CACHE_ARGUMENT)
        if isinstance(cache, GraphCache):
            return cache.answer(kwargs["input_ids"])
        return self.uncompiled(*args, **kwargs)

    def _shape_of_call(self, graphs: InferenceGraphs | None, arguments: dict) -> PrefillShape | None:
        """The prefill that a call of `generate` needs, None where there is none and it has to run without graphs."""
        if graphs is not None and fingerprint_of(self.uncompiled) != graphs.fingerprint:
            logger.warning(
                "The model has another merger, adapter, weight, place or precision than when it was compiled. Call "
                "compile_for_inference(model) again; till then it runs without graphs."
            )
            self.decompile()
            return None
        if graphs is None:
            logger.warning_once(
                "This model has no graphs, as after decompile() or in a copy. Call compile_for_inference(model) for "
                "new ones; till then it runs without."
            )
            return None
        shape, reason = None, self._why_without_graphs(graphs, arguments)
        if reason is None:
            shape, reason = self._find_shape(graphs, arguments)
        if reason is not None:
            logger.warning_once(f"This call of generate runs without the graphs of compile_for_inference(): {reason}.")
        return shape

    def _why_without_graphs(self, graphs: InferenceGraphs, arguments: dict) -> str | None:
        """Why a call cannot use the graphs, its shape aside."""
        configs = (arguments.get("generation_config"), self.generation_config)  # the second fills what the first leaves

        def asked(name: str) -> list:
            """What the call asks for, or all that its configurations say."""
            if name in arguments:
                return [arguments[name]]
            said = [getattr(config, name, None) for config in configs]  # releases have dropped some of the names
            return [value for value in said if value is not None]

        of_forward = arguments_of_forward(type(self.uncompiled)) | {"past_key_values"}
        given = {
            name for name, value in arguments.items() if value is not None and name not in INPUTS and name in of_forward
        }
        given |= {name for name, plain in PLAIN.items() if any(value not in plain for value in asked(name))}
        if given:
            return f"they do without {', '.join(sorted(given))}"
        if self.training:
            return "the model is in training mode"
        if self.model.overrides_image_features:
            return "get_image_features is overridden, whose code they would not run"
        if torch.is_autocast_enabled(self.device.type):
            return "they were made without torch.autocast"
        new_tokens, most = next(iter(asked("max_new_tokens")), None), graphs.shapes.max_new_tokens
        if new_tokens is None or new_tokens > most:
            return f"max_new_tokens={new_tokens}, and they were made for up to {most}"
        return None

    def _find_shape(self, graphs: InferenceGraphs, arguments: dict) -> tuple[PrefillShape | None, str | None]:
        """The prefill of a call, or why there is none."""
        ids, mask, pixels = prompt_of_call(arguments)
        if ids is None or ids.ndim != 2 or mask is None or mask.shape != ids.shape:
            return None, "they take input_ids and attention_mask as (batch, tokens)"
        num_images = 0 if pixels is None else len(pixels)
        budgets = self.model.budgets(num_images, arguments.get("num_merged_tokens"))
        if len({*budgets}) > 1 or (pixels is not None and pixels.shape[2:] != self.config.image_shape):
            return None, "they take images of one size, with one budget"
        length = graphs.shapes.length_of(ids.shape[1])
        shape = PrefillShape(len(ids), length, num_images, budgets[0] if budgets else ALL_TOKENS)
        if shape not in graphs.prefills:
            found = f"{len(ids)} prompts of {ids.shape[1]} tokens, with {num_images} images of {budgets[:1]} tokens"
            return None, f"they were made for other shapes than {found}"
        return shape, None


def compile_for_inference(
    model,
    batch_sizes: Sequence[int] = (1,),
    prompt_lengths: Sequence[int] | None = None,
    images_per_prompt: Sequence[int] = (1,),
    num_merged_tokens: Sequence[int | str] | None = None,
    max_new_tokens: int = 256,
    backend: str | Callable | None = "inductor",
) -> CompiledModel:
    """Compiles tower, merger, projector and language model for these shapes, so that `generate` answers from them.

    At small batches a GPU waits for the host, which launches thousands of kernels one by one; a graph is one launch. It
    takes a minute or two for each length and batch size. `generate` of the result is called as that of the model,
    greedily or sampling; what was not prepared (another batch size, longer prompts, beams, drafts, returned caches, a
    second thread meanwhile) runs as if it were not compiled, with one warning. `decompile()` of the result frees its
    memory.

    Args:
        model: A [`LlavaMergeForConditionalGeneration`], which stays as it is.
        batch_sizes: Prompts of a call.
        prompt_lengths: Tokens, those of images included; a prompt is padded to the next of them, and each token of its
            answer attends to so many and `max_new_tokens`. Default: the images, and 64, 192 or 448 tokens of text.
        images_per_prompt: Images of a call by its prompts; 0 for text alone.
        num_merged_tokens: Budgets, default the config's.
        max_new_tokens: Of the longest answer.
        backend: Of `torch.compile`; None records the kernels as they are, in seconds, and gains a little less. So are
            tower and merger in any case where the method picks patches in many steps (`chooses_in_steps`).

    Raises:
        ValueError: A shape is no number, or the model cannot be compiled: it is on several devices or in training mode,
            has adapters, FlashAttention, a text model with layers of several kinds or with rotary frequencies that
            depend on the length (dynamic NTK, longrope), or a `text_tower`.
    """
    if isinstance(model, CompiledModel):
        model = model.uncompiled
    check_can_be_compiled(model)
    budgets = budgets_to_compile(model, num_merged_tokens)
    if prompt_lengths is None:
        largest = max(tokens_of_budget(budget, model.config.num_patches) for budget in budgets)
        prompt_lengths = [max(images_per_prompt, default=0) * largest + text for text in TEXT_LENGTHS]
    shapes = GraphShapes(*map(tuple, (batch_sizes, prompt_lengths, images_per_prompt, budgets)), max_new_tokens)
    check_shapes(shapes, model.config.num_patches)
    warn_of_shapes(shapes, model.config)
    graphs = InferenceGraphs(model, shapes, backend)
    graphs.warm_up()
    return CompiledModel(model, graphs)


def budgets_to_compile(model, num_merged_tokens: Sequence[int | str] | None) -> list[int | str]:
    """The budgets, or the configuration's."""
    if num_merged_tokens is None:
        return model.model.budgets(1)
    return [model.model.budgets(1, budget)[0] for budget in num_merged_tokens]


def warn_of_shapes(shapes: GraphShapes, config):
    """Warns where the longest prompt takes more positions than the language model, which no call then checks."""
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is None or not keeps_places(config.merger_config):
        return
    num_tokens = max(shapes.prompt_lengths) + shapes.max_new_tokens
    fewest = min(tokens_of_budget(budget, config.num_patches) for budget in shapes.budgets)
    skipped = max(shapes.images_per_prompt) * (config.num_patches - fewest)
    warn_of_positions(num_tokens + skipped, num_tokens, limit)


def prompt_of_call(arguments: dict) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Ids, mask and pixels of a call of `generate`."""
    ids = arguments.get("inputs") if arguments.get("input_ids") is None else arguments["input_ids"]
    return ids, arguments.get("attention_mask"), arguments.get("pixel_values")


@functools.cache
def arguments_of_forward(model_class: type) -> frozenset[str]:
    """Names of what `forward` takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def check_can_be_compiled(model):
    """Compares a model with what [`compile_for_inference`] can do.

    Raises:
        ValueError: It cannot.
    """
    merger_config, devices = model.config.merger_config, {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"compile_for_inference: the model is on {', '.join(sorted(map(str, devices)))}, and a graph is of one "
            f"device. Load it with device_map={{'': 0}}, or do without."
        )
    if model.training:
        raise ValueError("compile_for_inference: the model is in training mode. Call model.eval() before.")
    adapted = [name for name, _ in model.named_modules() if name.endswith((".base_layer", ".original_module"))]
    if adapted:
        raise ValueError(
            f"compile_for_inference: {adapted[0]} and others belong to adapters, and graphs would not see that one is "
            f"switched or turned off. Merge them into the weights before: model.merge_and_unload()."
        )
    attention = model.model.language_model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"compile_for_inference: attn_implementation={attention!r} takes no mask, as padded prompts need. Load the "
            f"model with attn_implementation='sdpa'."
        )
    rope_types = {str(getattr(module, "rope_type", None)) for module in model.model.language_model.modules()}
    growing = sorted(kind for kind in rope_types if "dynamic" in kind or "longrope" in kind)
    if growing:
        raise ValueError(
            f"compile_for_inference: rope_type={growing[0]!r} changes the rotary frequencies with the length of a "
            f"prompt, which no graph can. Do without, or use torch.compile(model), which breaks its graph there."
        )
    if merger_config.text_tower is not None:
        raise ValueError(
            f"compile_for_inference: text_tower={merger_config.text_tower!r} reads questions as text, which no graph "
            f"can. Use text_tower=None, or do without."
        )


def check_shapes(shapes: GraphShapes, num_patches: int):
    """Refuses shapes that are none, and images for which no prompt is long enough.

    Raises:
        ValueError: One is.
    """
    named = {"batch_sizes": shapes.batch_sizes, "prompt_lengths": shapes.prompt_lengths}
    named |= {"max_new_tokens": [shapes.max_new_tokens], "images_per_prompt": [1 + n for n in shapes.images_per_prompt]}
    for name, values in named.items():
        if not values or not all(map(is_whole_number, values)):
            given = getattr(shapes, name)
            least = 0 if name == "images_per_prompt" else 1
            raise ValueError(f"{name}={given!r}: has to be whole numbers of {least} or more, at least one of them.")
    if min(shapes.prompt_lengths) < 2:
        raise ValueError(f"prompt_lengths={shapes.prompt_lengths}: a prompt has two tokens or more.")
    tokens = max(shapes.images_per_prompt) * max(tokens_of_budget(budget, num_patches) for budget in shapes.budgets)
    if tokens > max(shapes.prompt_lengths):
        raise ValueError(
            f"prompt_lengths={shapes.prompt_lengths}: the images of a prompt alone are {tokens} tokens. Give a length "
            f"that has room for them and the text."
        )
