# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""LLaVA with a merger between vision tower and projector, without and with its head."""

import functools
import re
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector, LlavaPreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .checkpoint_files import OfCheckpoint, for_other_repo
from .compat import (
    IS_PACKAGE,
    MERGER_IN_MODULE_LISTS,
    NEEDS_PACKAGE,
    OUTPUT_OF_IMAGES,
    record_before_replicas,
    register_llava_key_mapping,
    takes_arguments_of,
)
from .configuration_llava_merge import LlavaMergeConfig, MergerConfig
from .generation import EncodesImagesBeforeForward, images_to_merge
from .merging_base import find_merging_method, weights_of
from .modeling_token_merger import TokenMerger
from .placeholders import ALL_TOKENS, check_num_features
from .positions import EncodedImages, ImagesOfPrompt, PlacesTokens, find_cache, keep_layout
from .questions import ReadsPrompt
from .vision_encoding import EncodesImages, RunningCalls, TowerFeatures, bypassing, counted
from .vllm_backend import check_backend, is_run_by_vllm


try:
    from . import question_marks
except ImportError:  # it travels with checkpoints that need it alone
    question_marks = None
if IS_PACKAGE:
    from . import checkpoint_loading  # what loads, changes, saves and pushes mergers stays at home

logger = logging.get_logger(f"transformers.{__name__}")

register_llava_key_mapping("llava_merge", "LlavaMergeForConditionalGeneration", "LlavaMergeModel")


def drop_unused_layers(tower: nn.Module, state_dict: dict, prefix: str, *args, pattern: str):
    """Lets `load_state_dict` of a tower take the weights of a whole one, whose last layers were not built."""
    for key in list(state_dict):
        if key.startswith(prefix) and re.search(pattern, key.removeprefix(prefix)):
            del state_dict[key]


def nothing_of(parts: list[nn.Module], like: Tensor) -> Tensor:
    """0 that has the trained parameters of `parts` in its graph, on the device and in the dtype of `like`.

    A backward pass needs something to train in it, and DistributedDataParallel every parameter on every rank.
    """
    trained = [weight for part in parts for weight in weights_of(part) if weight.requires_grad]
    return sum((weight.flatten()[:0].sum().to(like) for weight in trained), start=like.new_zeros(()))


def unused_layers_pattern(config: LlavaMergeConfig) -> str:
    """Pattern of the keys of tower layers that no feature is taken from, so that they are not built."""
    layers = range(config.num_used_tower_layers, config.vision_config.num_hidden_layers)
    return rf"\blayers\.({'|'.join(map(str, layers)) or 'none'})\."


class LlavaMergePreTrainedModel(
    checkpoint_loading.ModelCheckpoints if IS_PACKAGE else OfCheckpoint, LlavaPreTrainedModel
):
    """What the headless model and the one with a language-modelling head share."""

    config_class = LlavaMergeConfig
    _saved_prefixes: dict[str, str] = {}  # of the keys in a checkpoint, and what they are called in the model
    _parts: tuple[str, ...] = ()

    def _prepare_loading(self, fresh_merger: bool, allow_missing_weights: bool):
        """What loading shall leave alone: called between the initialisation of transformers' class and the parts'."""
        if fresh_merger:
            self._may_be_missing = r"(^|\.)merger\."
            self._keys_to_ignore_on_load_missing = [self._may_be_missing]
        if allow_missing_weights:
            self._may_be_missing = ""
        if (
            "quantization_config" in vars(self.config)
            and not find_merging_method(self.config.merger_config).training_free
        ):
            self._keep_in_fp32_modules = [MERGER_IN_MODULE_LISTS]  # its branches that start at zero would become noise
        self._keys_to_ignore_on_load_unexpected = [rf"vision_tower\..*{unused_layers_pattern(self.config)}"]

    @property
    def merging_config(self) -> MergerConfig:
        """The configuration of its merger."""
        return self.config.merger_config

    @property
    def headless_model(self):
        """The model that holds tower, merger, projector and language model."""
        raise NotImplementedError

    def _prepare_questions(self, path: str, hub_kwargs: dict, fetches_text_tower: bool):
        """What a question-aware merger needs besides weights: marks between turns, and a text tower and tokenizer."""
        merger_config, headless = self.config.merger_config, self.headless_model
        tower_kwargs = for_other_repo(hub_kwargs) | ({} if fetches_text_tower else {"local_files_only": True})
        text_tower = headless.find_text_tower(merger_config, **tower_kwargs)
        wants_marks = merger_config.question_aware and merger_config.question_end_token_ids is None
        if not wants_marks and text_tower is None:
            return
        if question_marks is None:
            logger.warning(f"{path}: the question is not told from what stands around it. {NEEDS_PACKAGE}")
        else:
            headless.question_tokenizer = question_marks.read_questions_of_folder(merger_config, path, hub_kwargs)

    def load_state_dict(self, state_dict: dict, *args, **kwargs):
        """As in torch, also with the keys of a checkpoint, which `Trainer` passes to resume."""
        renamed = {self._name_in_model(key): tensor for key, tensor in state_dict.items()}
        return super().load_state_dict(renamed, *args, **kwargs)

    def _name_in_model(self, key: str) -> str:
        saved = next((prefix for prefix in self._saved_prefixes if key.startswith(prefix)), "")
        return self._saved_prefixes.get(saved, "") + key.removeprefix(saved)

    @contextmanager
    def merger_bypassed(self):
        """Inside, images keep all their tokens, as in the stock model: `with model.merger_bypassed(): ...`.

        That holds for the calls of this thread or asyncio task; others go on merging. The prompts need all placeholders
        then: a processor with `num_merged_tokens=None`.
        """
        with bypassing(self.headless_model):
            yield self

    def set_num_merged_tokens(self, num_merged_tokens: int, processor=None):
        """Changes M of the model, and of `processor` if given; the weights stay.

        Raises:
            ValueError: M is below 1 or above the number of visual tokens; nothing is changed then.
            RuntimeError: A call of this model is running.
        """
        merger_config = self.config.merger_config
        if merger_config.merger_type == "none":
            raise ValueError(f"num_merged_tokens={num_merged_tokens}: merger_type='none' keeps all tokens.")
        if num_merged_tokens is None:
            raise ValueError(
                "num_merged_tokens=None: give a number; to keep all tokens, call inside model.merger_bypassed(), or "
                "give num_merged_tokens='all' in the call."
            )
        changed = MergerConfig(
            **{**merger_config.to_dict(), "num_merged_tokens": num_merged_tokens, "merge_ratio": None}
        )
        changed.num_tokens(self.config.num_patches)
        with self._no_call_beside("set_num_merged_tokens"):
            for config in (merger_config, self.headless_model.merger.config):  # one and the same, but for PEFT's copy
                config.num_merged_tokens, config.merge_ratio = num_merged_tokens, None
            self.config.image_seq_length = num_merged_tokens
        if processor is not None:
            processor.num_merged_tokens = num_merged_tokens

    def _no_call_beside(self, change: str):
        return self.headless_model.running_calls.none_beside(change)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs):
        """As in transformers, which knows a part by its configuration: the tower's is a copy, with the layers built."""
        config, built = self.config, self.headless_model.vision_tower.config
        whole, config.vision_config = config.vision_config, built
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        finally:
            config.vision_config = whole
        whole._attn_implementation = built._attn_implementation


class LlavaMergeModel(EncodesImages, PlacesTokens, ReadsPrompt, LlavaMergePreTrainedModel, LlavaModel):
    """LLaVA without a language-modelling head: tower → merger → projector → language model.

    Each image's N visual tokens become M *before* the projector, which runs once, on M.

    Args:
        config: A [`LlavaMergeConfig`].
        fresh_merger: Whether a checkpoint that is loaded has no weights of the merger, so that nobody need be warned.
        allow_missing_weights: Whether a checkpoint that is loaded may lack any weights.
    """

    _checkpoint_conversion_mapping = {"language_model.model": "language_model", "^model.merger": "merger"}
    _saved_prefixes = {"language_model.model.": "language_model.", "model.merger.": "merger."}
    _parts = ("vision_tower", "merger", "multi_modal_projector", "language_model")
    _auto_class = "AutoModel"

    def __init__(self, config: LlavaMergeConfig, fresh_merger: bool = False, allow_missing_weights: bool = False):
        LlavaPreTrainedModel.__init__(self, config)
        self._prepare_loading(fresh_merger, allow_missing_weights)
        self.running_calls = RunningCalls()
        self.text_tower = None  # a TextTower and no module: it is neither trained nor saved
        self.question_tokenizer = None  # for the text tower, which reads questions as text
        self.vision_tower = AutoModel.from_config(config.used_vision_config)
        if config.used_vision_config is not config.vision_config:
            unused = unused_layers_pattern(config)
            self.vision_tower.register_load_state_dict_pre_hook(functools.partial(drop_unused_layers, pattern=unused))
        self.merger = TokenMerger(config.merger_config)
        if is_run_by_vllm(config):
            check_backend(config, {*self.merger.state_dict()})
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.settle_mass()
        self.post_init()

    def _replicate_for_data_parallel(self):
        record_before_replicas(self.vision_tower)
        return super()._replicate_for_data_parallel()

    @takes_arguments_of(LlavaModel.forward)
    @counted
    @can_return_tuple
    def forward(
        self,
        *,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        question_mask: Tensor | None = None,
        answer_mask: Tensor | None = None,
        num_merged_tokens: int | str | list | None = None,
        tokens_are_placed: bool = False,
        **kwargs,
    ):
        """
        Args:
            position_ids: (B or 1, L), counting each placeholder as one; those of merged tokens and of the text behind
                them follow from it (`MergerConfig.position_ids`).
            mm_encoder_outputs: `{"image": outputs}` with the images encoded before, instead of `pixel_values`: what
                [`encode_images`] or [`run_tower`] returned.
            question_mask: (B, L) bool, text that a question-aware merger may read of an image's turn; default all.
            answer_mask: (B, L) bool, tokens that are answer and which it never reads.
            num_merged_tokens: Tokens of an image, or one number for each image, "all" where it is not merged; default
                the config's. `processor(..., num_merged_tokens=...)` returns it.
            tokens_are_placed: Whether `position_ids` and `attention_mask` are those of merged tokens already, so that
                nothing is moved; also for `inputs_embeds` that hold neither text nor images, as soft prompts do.

        The other arguments, and the result, are those of [`~transformers.LlavaModel`].
        """
        to_merge = images_to_merge(pixel_values, mm_encoder_outputs)
        if to_merge is not None:
            masks = {"question_mask": question_mask, "answer_mask": answer_mask}
            mm_encoder_outputs = {"image": self._encode_images_of_call(to_merge, masks, num_merged_tokens, kwargs)}
        elif not mm_encoder_outputs:
            if kwargs.get("inputs_embeds") is not None and not tokens_are_placed:
                self.check_text_embeds(kwargs["inputs_embeds"], kwargs.get("attention_mask"))
            if self.training:
                self._join_image_parts(kwargs)
        images = (mm_encoder_outputs or {}).get("image")
        if images is not None and to_merge is None and not isinstance(images, ImagesOfPrompt):
            image_mask = self.get_image_mask(kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            check_num_features(image_mask, images.pooler_output)
        layout = None if tokens_are_placed else self.place_tokens(images, kwargs)
        outputs = self._forward_encoded_images(images, **kwargs)
        if layout is not None:
            keep_layout(find_cache(outputs), layout)
        return outputs

    def _encode_images_of_call(self, images: Tensor | TowerFeatures, masks: dict, num_merged_tokens, arguments: dict):
        """The images of a forward whose other `arguments` these are."""
        prompt, options = self._prompt_of_call(masks, arguments)
        encoded = self.encode_images_of_prompt(images, prompt, num_merged_tokens, **options)
        if self.training and set(self.budgets(len(images), num_merged_tokens)) == {ALL_TOKENS}:
            encoded.pooler_output = [tokens + nothing_of([self.merger], tokens) for tokens in encoded.pooler_output]
        return encoded

    def _join_image_parts(self, arguments: dict):
        """Puts a trained merger and projector into the graph of a batch without images, with weight 0."""
        parts = [self.merger, self.multi_modal_projector]
        is_trained = any(weight.requires_grad for part in parts for weight in weights_of(part))
        if not is_trained or arguments.get("input_ids") is None and arguments.get("inputs_embeds") is None:
            return
        if arguments.get("inputs_embeds") is None:
            arguments["inputs_embeds"] = self.get_input_embeddings()(arguments.pop("input_ids"))
        embeds = arguments["inputs_embeds"]
        arguments["inputs_embeds"] = embeds + nothing_of(parts, embeds)

    def _forward_encoded_images(self, image_outputs, input_ids=None, inputs_embeds=None, **kwargs):
        """Stock's forward, but for its check of the number of features, which waits until the tower is done.

        Raises:
            ValueError: The features are of another width than the embeddings.
        """
        if image_outputs is None:
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        if features.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(
                f"The image features are {features.shape[-1]} wide, the language model's embeddings "
                f"{inputs_embeds.shape[-1]}: they were encoded by another model. Encode the images with this one."
            )
        image_mask = self.get_image_mask(input_ids, inputs_embeds if input_ids is None else None)
        inputs_embeds = inputs_embeds.masked_scatter(image_mask[:, :, None].to(inputs_embeds.device), features)
        outputs = super().forward(inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        outputs[OUTPUT_OF_IMAGES] = features if OUTPUT_OF_IMAGES == "image_hidden_states" else image_outputs
        return outputs


class LlavaMergeForConditionalGeneration(
    EncodesImagesBeforeForward, LlavaMergePreTrainedModel, LlavaForConditionalGeneration, GenerationMixin
):
    """LLaVA that merges each image's visual tokens before the projector: a drop-in for LlavaForConditionalGeneration.

    Args:
        config: A [`LlavaMergeConfig`].
        fresh_merger: Whether a checkpoint that is loaded has no weights of the merger, so that nobody need be warned.
        allow_missing_weights: Whether a checkpoint that is loaded may lack any weights.

    Example:
        >>> base = "llava-hf/llava-1.5-7b-hf"
        >>> model = LlavaMergeForConditionalGeneration.from_pretrained(base, merger_config={"num_merged_tokens": 64})
        >>> processor = LlavaMergeProcessor.from_pretrained(base, num_merged_tokens=64)
    """

    _saved_prefixes = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    _parts = ("model", "lm_head")
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: LlavaMergeConfig, fresh_merger: bool = False, allow_missing_weights: bool = False):
        LlavaPreTrainedModel.__init__(self, config)
        self._prepare_loading(fresh_merger, allow_missing_weights)
        self.model = LlavaMergeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def headless_model(self) -> LlavaMergeModel:
        """The model without its head, which holds tower, merger, projector and language model."""
        return self.model

    def get_vision_features(self, pixel_values: Tensor, **kwargs) -> Tensor:
        """The tower's features of each image before merging and projecting: (I, N, vision_dim)."""
        return self.model.get_vision_features(pixel_values, **kwargs)

    def get_image_features(self, pixel_values: Tensor, *args, **kwargs):
        """Merged and projected features of each image; see [`LlavaMergeModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    def encode_images(
        self, pixel_values: Tensor, num_merged_tokens: int | str | list | None = None, **kwargs
    ) -> EncodedImages | TowerFeatures | Tensor:
        """Images (I, 3, H, W) for several questions, prompts or turns, so that the tower sees them once.

        Pass the result as `mm_encoder_outputs={"image": ...}` to `forward` or `generate`, instead of `pixel_values`,
        with the prompts that the processor makes of them; it has to have an image for each of theirs, in order. A
        question-aware merger merges what the tower kept anew for each question, and any budget; others merge here, to
        this budget. No more of the tower's output is kept than that needs; but where autograd records, its graph keeps
        all: call it inside `torch.no_grad()`.

        Args:
            num_merged_tokens: Of merged images; see `forward`.
            kwargs: `vision_feature_layer` and `vision_feature_select_strategy`.
        """
        if self.model.reads_question:
            if self.model.overrides_image_features:  # it takes pixels, and is to be asked with each question
                return pixel_values
            return self.model.run_tower(pixel_values, **kwargs)
        return self.model.encode_images(pixel_values, num_merged_tokens=num_merged_tokens, **kwargs)

    def merge_sources(self, labels: Tensor | None = None, **inputs) -> list[Tensor]:
        """Which patches each merged token came from, (M, N) of each image; see [`LlavaMergeModel.merge_sources`].

        Args:
            labels: As in `forward`: tokens with a label are answer, which the merger does not read.
        """
        if labels is not None:
            inputs["answer_mask"] = labels != -100
        return self.model.merge_sources(**inputs)

    @takes_arguments_of(LlavaForConditionalGeneration.forward)
    def forward(
        self,
        *,
        labels: Tensor | None = None,
        question_mask: Tensor | None = None,
        answer_mask: Tensor | None = None,
        num_merged_tokens: int | str | list | None = None,
        tokens_are_placed: bool = False,
        **kwargs,
    ):
        """
        Args:
            labels: (B, L), -100 where no loss is taken. Tokens with another label are answer, which a question-aware
                merger never reads.
            question_mask: (B, L) bool, text that a question-aware merger may read of an image's turn; default all.
            answer_mask: (B, L) bool, tokens that are answer, where there are no labels.
            num_merged_tokens: Tokens of an image, or one number for each image, "all" where it is not merged; default
                the config's. `processor(..., num_merged_tokens=...)` returns it.
            tokens_are_placed: See [`LlavaMergeModel.forward`].

        The other arguments, and the result, are those of [`~transformers.LlavaForConditionalGeneration`].
        """
        ours = {
            "question_mask": question_mask,
            "num_merged_tokens": num_merged_tokens,
            "tokens_are_placed": tokens_are_placed,
        }
        if labels is not None:
            answer_mask = labels != -100
        return super().forward(labels=labels, answer_mask=answer_mask, **ours, **kwargs)
