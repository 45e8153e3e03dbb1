# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The model as vLLM runs it. Overrides what is no public API: written for the release that pyproject.toml names."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import regex
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector as TransformersProjector
from vllm.config import CUDAGraphMode
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaMultiModalProcessor,
    LlavaMultiModalProjector,
    LlavaProcessingInfo,
    init_vision_tower_for_llava,
)
from vllm.model_executor.models.llava import LlavaForConditionalGeneration as VllmLlava
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, ImageSize
from vllm.multimodal.processing import PromptReplacement
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.torch_utils import async_tensor_h2d

from llava_merge import LlavaMergeProcessor
from llava_merge.compiled.graphs import Recorded
from llava_merge.model.checkpoint_files import refuse_missing_weights
from llava_merge.model.configuration_llava_merge import keeps_places
from llava_merge.model.merging_base import READ_FOR_QUESTION, find_merging_method, required_extras
from llava_merge.model.merging_image_resize import resize_pictures
from llava_merge.model.modeling_token_merger import TokenMerger
from llava_merge.model.questions import Question
from llava_merge.model.relevance import TextTower, read_for_question
from llava_merge.model.vision_encoding import (
    MergeExtras,
    attention_layer_of,
    features_of,
    index_on,
    merge_by_budget,
    read_tower,
)
from llava_merge.serving.requests import (
    BUDGET,
    RequestRules,
    check_named,
    check_servable,
    num_rope_rows,
    positions_of,
)


QUESTIONS = "question_input_ids"
PICTURES = "picture_ids"
KEPT_PICTURES = 64  # of which the tower's features are kept for other questions: 75 MB in LLaVA-1.5
RECORDED_IMAGES = (8, 4, 2, 1)  # of CUDA graphs of the tower; more images are encoded by several
IMAGES_AT_ONCE = 16  # without graphs; steps may hold hundreds, which no profile of memory has seen
NATIVE_TOWERS = ("clip_vision_model", "siglip_vision_model")
PLACE_DIGITS = 2  # columns behind the embeddings that say where a token sits, for bfloat16 holds no number over 256
PLACE_BASE = 128


class TowerGraphs:
    """A vision tower for a few images, as CUDA graphs, which the host starts at once instead of kernel by kernel.

    Args:
        run_tower: Features and extras of `pixel_values`.
        like: (I, 3, H, W), any images of the model.
    """

    def __init__(self, run_tower: Callable[[Tensor], tuple[Tensor, MergeExtras]], like: Tensor):
        pool = torch.cuda.graph_pool_handle()
        self.recorded = {
            number: Recorded(run_tower, {"pixel_values": like.new_zeros(number, *like.shape[1:])}, pool)
            for number in RECORDED_IMAGES
        }

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, MergeExtras]:
        """Features and extras of at most 8 images."""
        number = len(pixel_values)
        recorded = self.recorded[min(size for size in self.recorded if size >= number)]
        recorded.inputs["pixel_values"][:number] = pixel_values
        features, extras = recorded()
        return features[:number].clone(), extras.first(number)


class KeptFeatures:
    """The tower's features of the pictures that were last asked about, on the device."""

    def __init__(self):
        self.store: Tensor | None = None  # (KEPT_PICTURES, N, vision_dim)
        self.rows: dict[int, int] = {}  # where each picture is, the last used last

    def forget(self):
        """Keeps none, since the tower is another one."""
        self.rows.clear()

    def __call__(self, pictures: list[int], make: Callable[[list[int]], Tensor]) -> Tensor:
        """Features of the pictures (I, N, vision_dim), of which those that are not kept are made, by their indices."""
        index = {picture: number for number, picture in enumerate(pictures)}
        if len(index) > KEPT_PICTURES:
            return make([*range(len(pictures))])
        known = [picture for picture in index if picture in self.rows]
        for picture in known:
            self.rows[picture] = self.rows.pop(picture)
        new = [picture for picture in index if picture not in self.rows]
        if new:
            features = make([index[picture] for picture in new])
            if self.store is None:
                self.store = features.new_empty(KEPT_PICTURES, *features.shape[1:])
            for picture in new:
                full = len(self.rows) == KEPT_PICTURES
                self.rows[picture] = self.rows.pop(next(iter(self.rows))) if full else len(self.rows)
            self.store[index_on(self.store.device, [self.rows[picture] for picture in new])] = features
            if new == pictures:
                return features
        return self.store[index_on(self.store.device, [self.rows[picture] for picture in pictures])]


class LlavaMergeProcessingInfo(LlavaProcessingInfo):
    """What vLLM asks about images, with the budget in the place of the number of patches."""

    def get_hf_config(self) -> LlavaConfig:
        """The [`LlavaMergeConfig`], with trust_remote_code that of the checkpoint's own code."""
        return self.ctx.get_hf_config(LlavaConfig)

    def get_hf_processor(self, **kwargs: object) -> LlavaMergeProcessor:
        """The processor, of which only the part for images is used."""
        return self.ctx.get_hf_processor(LlavaMergeProcessor, **kwargs)

    @cached_property
    def rules(self) -> RequestRules:
        """What requests may ask for."""
        return RequestRules(self.get_hf_config(), self.ctx.model_config.max_model_len)

    def budget(self, mm_kwargs: Mapping[str, object]) -> int:
        """Tokens per image of a request with these `mm_processor_kwargs`.

        Raises:
            ValueError: It asks for a number that is not served.
        """
        return self.rules.budget(self.ctx.get_merged_mm_kwargs(mm_kwargs).get(BUDGET))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens of an image of any size: the default budget."""
        return self.budget({})

    def get_image_size_with_most_features(self) -> ImageSize:
        """The size that the tower takes."""
        height, width = self.get_hf_config().image_shape
        return ImageSize(width=width, height=height)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The largest budget that a request may ask for, so that memory is kept for it."""
        return {"image": self.rules.served[-1]}


class LlavaMergeMultiModalProcessor(LlavaMultiModalProcessor):
    """Puts budget and question of each image into its cache keys and beside its pixels."""

    def apply(self, inputs, timing_ctx):
        """As in vLLM.

        Raises:
            ValueError: The budget is not served, an image comes as embeddings, there are too many images, or the
                request says more than its budget.
        """
        num_images = inputs.mm_data_items.get_all_counts().get("image", 0)
        if isinstance(inputs.mm_data_items.get("image"), ImageEmbeddingItems):
            raise ValueError("image_embeds: this model merges images itself. Send pictures.")
        rules, kwargs = self.info.rules, dict(inputs.hf_processor_mm_kwargs)
        check_named(kwargs)
        budget = self.info.budget(kwargs)
        rules.check_room(num_images, budget)
        if isinstance(inputs.prompt, list):
            rules.warn_of_long_prompt(inputs.prompt, num_images, budget)
        kwargs.pop(BUDGET, None)
        pictures = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs)).get("image", [])
        kwargs |= {BUDGET: budget, PICTURES: pictures}
        if rules.reads_question:
            kwargs[QUESTIONS] = rules.questions(inputs.prompt, num_images)
        return super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)

    def _get_mm_hashes(self, inputs) -> dict[str, list[str]]:
        kwargs = inputs.hf_processor_mm_kwargs
        pictures = kwargs[PICTURES]
        # of each image its own question, so that a later turn changes none of an earlier one
        questions = kwargs.get(QUESTIONS, [None] * len(pictures))
        pairs = zip(pictures, questions, strict=True)
        hashes = [hash_of_text(f"{picture} {kwargs[BUDGET]} {ids}") for picture, ids in pairs]
        return {"image": hashes} if hashes else {}

    def _get_cache_missing_processor_kwargs(self, inputs, mm_is_cached) -> Mapping[str, object]:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        for name in {PICTURES, QUESTIONS} & kwargs.keys():
            kwargs[name] = [each for each, known in zip(kwargs[name], mm_is_cached["image"], strict=True) if not known]
        return kwargs

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        kwargs = dict(hf_kwargs)
        budget, pictures, questions = kwargs.pop(BUDGET), kwargs.pop(PICTURES), kwargs.pop(QUESTIONS, None)
        inputs = super()._apply_hf_processor_main(mm_items, kwargs)
        if pictures:
            inputs[BUDGET] = torch.full((len(pictures),), budget)
            inputs[PICTURES] = torch.tensor([int(hash_of_text(picture)[:15], 16) for picture in pictures])
            if questions is not None:
                inputs[QUESTIONS] = [torch.tensor(ids, dtype=torch.long) for ids in questions]
        return inputs

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            BUDGET: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            PICTURES: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            QUESTIONS: MultiModalFieldConfig.batched("image"),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> list[PromptReplacement]:
        placeholder = self.info.get_hf_config().image_token_id
        tokens = [placeholder] * hf_processor_mm_kwargs[BUDGET]
        return [PromptReplacement(modality="image", target=[placeholder], replacement=tokens)]


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMergeMultiModalProcessor, info=LlavaMergeProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaMergeForConditionalGeneration(VllmLlava, SupportsMRoPE):
    """LLaVA with a merger on vLLM: its tower, projector and language model, and the merger of transformers.

    Tower and projector are those of transformers where the merger asks for what vLLM's do not tell: attention or keys
    of the tower, several of its layers, smaller pictures, the relevance of patches; and for towers that vLLM does not
    have. They and the merger are on every rank of a tensor-parallel group.

    Merged tokens keep the positions of their patches by the hooks that vLLM has for M-RoPE, of which the language model
    gets the first row. Where positions depend on the picture, they come with the embeddings, as columns behind them.
    """

    hf_to_vllm_mapper = VllmLlava.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"model.merger.": "merger."},
        orig_to_new_regex={regex.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)"): r"\1vision_model."},
    )

    def __init__(self, *, vllm_config, prefix: str = ""):
        nn.Module.__init__(self)
        model_config = vllm_config.model_config
        self.config = config = model_config.hf_config
        self.multimodal_config = model_config.multimodal_config
        self.requires, self.patch_grid = required_extras(config.merger_config), config.patch_grid(config.image_shape)
        method = find_merging_method(config.merger_config)
        self.resizes_pictures = method.resizes_pictures
        self.tells_places = keeps_places(config.merger_config) and not method.sits_on_slots
        check_servable(config)
        check_positions(config, model_config)
        if self.tells_places:
            check_told_places(vllm_config)
        self.places: tuple[Tensor, Tensor] | None = None  # of the images of a step: which tokens, and where they sit
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self._make_encoder(vllm_config.quant_config, prefix)
            self.merger = TokenMerger(config.merger_config).eval()
        with self._mark_language_model(vllm_config), more_positions(config, model_config.max_model_len):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        # an agnostic merger's tokens are kept by vLLM itself; other extras than relevance are the tower's
        self.keeps_features = config.merger_config.question_aware and self.requires <= READ_FOR_QUESTION
        self.kept_features = KeptFeatures()
        in_parts = vllm_config.parallel_config.tensor_parallel_size > 1 and self.is_native
        cannot_be_replayed = in_parts or self.resizes_pictures or vllm_config.lora_config or vllm_config.quant_config
        is_profiled = not self.multimodal_config.skip_mm_profiling  # else they would be recorded by the first request
        as_graphs = vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
        self.records_tower = as_graphs and is_profiled and not cannot_be_replayed
        self.tower_graphs: TowerGraphs | None = None
        self.has_run_tower = False
        self.text_tower = self.question_tokenizer = None
        if config.merger_config.text_tower is not None:
            self.text_tower = TextTower(config.merger_config.text_tower, config.merged_vision_dim, {})
            self.question_tokenizer = cached_tokenizer_from_config(model_config)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def _make_encoder(self, quant_config, prefix: str):
        """Tower and projector, vLLM's where they do."""
        config = self.config
        layers, kind = config.vision_feature_layer, config.vision_config.model_type
        own = self.requires or self.resizes_pictures
        self.is_native = kind in NATIVE_TOWERS and isinstance(layers, int) and not own
        if not self.is_native:
            dtype = torch.get_default_dtype()
            self.vision_tower = AutoModel.from_config(
                config.used_vision_config, dtype=dtype, attn_implementation="sdpa"
            ).eval()
            self.multi_modal_projector = TransformersProjector(config).to(dtype).eval()
            return
        self.vision_tower = init_vision_tower_for_llava(
            config, quant_config=quant_config, require_post_norm=False, prefix=maybe_prefix(prefix, "vision_tower")
        )
        self.multi_modal_projector = LlavaMultiModalProjector(
            vision_hidden_size=config.vision_config.hidden_size,
            text_hidden_size=config.text_config.hidden_size,
            projector_hidden_act=config.projector_hidden_act,
            multimodal_projector_bias=config.multimodal_projector_bias,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "multi_modal_projector"),
        )

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Merged and projected tokens of each image, (M, hidden); where they tell their places, a few columns more."""
        budgets, pictures, questions = (kwargs.pop(name, None) for name in (BUDGET, PICTURES, QUESTIONS))
        images = self._parse_and_validate_image_input(**kwargs)
        if images is None:
            return []
        grid = self.patch_grid
        if self.resizes_pictures:
            pixels = images["pixel_values"]
            return merge_by_budget(self._resize_alike, pixels, None, grid, budgets.flatten().tolist(), None)[0]
        question = None if questions is None else self._embed_questions(questions)
        if self.keeps_features:
            features, extras = self._recall_features(images["pixel_values"], pictures.flatten().tolist()), MergeExtras()
        else:
            features, extras = self._run_tower(images["pixel_values"])
        requires, projector = self.requires, self.multi_modal_projector
        if requires & READ_FOR_QUESTION:
            read = read_for_question(requires, features, question, projector, self.text_tower, self.question_tokenizer)
            extras = replace(extras, **read)
        tokens, places = merge_by_budget(
            self._merge_alike, features, question, grid, budgets.flatten().tolist(), extras
        )
        if not self.tells_places:
            return tokens
        return [
            torch.cat((image, digits_of(where, image.dtype)), dim=1)
            for image, where in zip(tokens, places, strict=True)
        ]

    def _run_tower(self, pixel_values: Tensor) -> tuple[Tensor, MergeExtras]:
        """Features (I, N, vision_dim) and what the method requires of the tower."""
        if not self.has_run_tower:
            self._prepare_tower(pixel_values)
        run = self.tower_graphs or self._compute_tower
        at_once = IMAGES_AT_ONCE if self.tower_graphs is None else RECORDED_IMAGES[0]
        if len(pixel_values) <= at_once:
            return run(pixel_values)
        parts = [run(part) for part in pixel_values.split(at_once)]
        return torch.cat([features for features, _ in parts]), MergeExtras.joined([extras for _, extras in parts])

    def _prepare_tower(self, pixel_values: Tensor):
        """Lets the profile see the memory of all images that the tower is given at once; its own may be one of them."""
        self.has_run_tower = True
        if self.records_tower and pixel_values.is_cuda:
            self.tower_graphs = TowerGraphs(self._compute_tower, pixel_values)
        elif pixel_values.is_cuda:
            self._compute_tower(pixel_values[:1].expand(IMAGES_AT_ONCE, -1, -1, -1))

    def _compute_tower(self, pixel_values: Tensor) -> tuple[Tensor, MergeExtras]:
        config, strategy = self.config, self.config.vision_feature_select_strategy
        if self.is_native:
            return self.vision_tower(pixel_values, feature_select_strategy=strategy), MergeExtras()
        layers, first = config.feature_layers(), 1 if strategy == "default" else 0
        options = {"interpolate_pos_encoding": True} if self.resizes_pictures else {}
        states = self.vision_tower(pixel_values, output_hidden_states=True, **options).hidden_states
        extras = read_tower(
            self.vision_tower, states, self.requires, config.merger_layers(), attention_layer_of(layers), first
        )
        return features_of(states, layers, first), extras

    def _recall_features(self, pixel_values: Tensor, pictures: list[int]) -> Tensor:
        """Features of the images, which the tower makes only of pictures that are not kept: (I, N, vision_dim)."""

        def make(images: list[int]) -> Tensor:
            some = len(images) < len(pictures)
            return self._run_tower(pixel_values[index_on(pixel_values.device, images)] if some else pixel_values)[0]

        return self.kept_features(pictures, make)

    def _embed_questions(self, questions: Tensor | list[Tensor]) -> Question:
        """The question of each image, of its ids (T,)."""
        ids = nn.utils.rnn.pad_sequence([*questions], batch_first=True, padding_value=-1)
        ids = nn.functional.pad(ids, (0, 1), value=-1)  # there may be none
        return Question.of_each_image(self.language_model.embed_input_ids(ids.clamp(min=0)), ids >= 0, ids)

    def _merge_alike(self, features, question, grid, budget: int, extras) -> tuple[Tensor, Tensor]:
        """Projected tokens (I, M, hidden) and places (I, M) of images with the same budget."""
        merged = self.merger(features, question, budget, grid, extras=extras)
        return self.multi_modal_projector(merged.merged_features.contiguous()), merged.positions

    def _resize_alike(self, pixel_values, question, grid, budget: int, extras) -> tuple[Tensor]:
        """Projected tokens (I, M, hidden) of images with the same budget, which are resized to it."""
        features, _ = self._run_tower(resize_pictures(pixel_values, budget, self.config.patch_shape))
        return (self.multi_modal_projector(features.contiguous()),)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Positions (3, L), and how far text behind the prompt is from where it would be if each token counted as one.

        As [`positions_of`] has them.
        """
        images = sorted((feature.mm_position.offset, feature.mm_position.length) for feature in mm_features)
        return positions_of(len(input_tokens), tuple(images), self.patch_grid)

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings=None, *, is_multimodal=None) -> Tensor:
        """As in vLLM; keeps the places that images of this step tell for its `forward`."""
        self.places = None
        if self.tells_places and multimodal_embeddings is not None and len(multimodal_embeddings):
            embeddings, digits = torch.cat([*multimodal_embeddings]).tensor_split([-PLACE_DIGITS], dim=1)
            tokens = async_tensor_h2d(is_multimodal.nonzero()[:, 0], digits.device)  # of a mask on the host
            self.places, multimodal_embeddings = (tokens, number_of(digits)), [embeddings]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self, input_ids, positions: Tensor, intermediate_tensors=None, inputs_embeds=None, **kwargs: object
    ) -> Tensor:
        """As in vLLM; of positions (3, L) the first row counts."""
        if self.places is not None:  # written in place, for CUDA graphs read from where they were captured
            tokens, places = self.places
            positions[0, tokens] = positions[1, tokens] + places
            self.places = None
        positions = positions[0] if positions.ndim == 2 else positions
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As in vLLM.

        Raises:
            ValueError: A part that is transformers' lacks a weight.
        """
        parts = ["merger"] if self.is_native else ["merger", "vision_tower", "multi_modal_projector"]
        states = {part: {} for part in parts}

        def others():
            for name, tensor in self.hf_to_vllm_mapper.apply(weights):
                part, _, rest = name.partition(".")
                if part in states:
                    states[part][rest.removeprefix("vision_model.")] = tensor
                else:
                    yield name, tensor

        loaded = set(AutoWeightsLoader(self).load_weights(others()))
        for part, state in states.items():
            targets = getattr(self, part).state_dict(keep_vars=True)
            refuse_missing_weights(self.config._name_or_path, targets.keys() - state.keys())
            for name, target in targets.items():  # whose loader vLLM replaces where it loads weights anew
                getattr(target, "weight_loader", default_weight_loader)(target, state[name])
            loaded |= {f"{part}.{name}" for name in targets}
        self.kept_features.forget()
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        """Prefixes of the parts."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector=["merger", "multi_modal_projector"],
            tower_model="vision_tower",
        )


def hash_of_text(text: str) -> str:
    """A hash that other texts do not have, as hexadecimal digits; SHA-256, whatever vLLM takes for images."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_positions(config: LlavaConfig, model_config):
    """Refuses to serve where merged tokens would silently be packed.

    Raises:
        ValueError: So they would.
    """
    if keeps_places(config.merger_config) and not model_config.uses_mrope:
        raise ValueError(
            "position_ids='source', but vLLM would count positions, since the checkpoint's own code is too old. Serve "
            "without --trust-remote-code, or write the checkpoint anew."
        )


def check_told_places(vllm_config):
    """Refuses to run where positions that depend on the picture could not be put in.

    Raises:
        ValueError: The model is split into stages, whole steps with new images run as CUDA graphs, or prompts may come
            as embeddings, which say nothing of positions.
    """
    fix = "Use a merger whose tokens sit on slots, such as fixed_pooling, position_ids='packed', or "
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(f"Where this merger's tokens sit is known to the first pipeline stage only. {fix}one stage.")
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(
            f"--enable-prompt-embeds: such prompts do not say where their tokens sit. {fix}no such prompts."
        )
    if vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
        raise ValueError(f"cudagraph_mode=FULL leaves no room to say where tokens sit. {fix}FULL_AND_PIECEWISE.")


@contextmanager
def more_positions(config: LlavaConfig, max_model_len: int):
    """Inside, the language model is built with a rotary embedding for the positions that merged tokens can reach."""
    text_config = config.text_config
    rows = text_config.max_position_embeddings
    if keeps_places(config.merger_config):
        text_config.max_position_embeddings = num_rope_rows(config, max_model_len)
    try:
        yield
    finally:
        text_config.max_position_embeddings = rows


def digits_of(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Places (M,) as columns of numbers that every floating dtype holds exactly: (M, PLACE_DIGITS)."""
    powers = PLACE_BASE ** torch.arange(PLACE_DIGITS, device=places.device)
    return (places[:, None] // powers % PLACE_BASE).to(dtype)


def number_of(digits: Tensor) -> Tensor:
    """What [`digits_of`] made columns of: (M,) int64."""
    powers = PLACE_BASE ** torch.arange(PLACE_DIGITS, device=digits.device)
    return (digits.long() * powers).sum(dim=1)
