# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""LLaVA with a merger between vision tower and projector, without and with its head."""

import functools
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector, LlavaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .checkpoint_files import OfCheckpoint
from .compat import (
    IS_PACKAGE,
    MERGER_IN_MODULE_LISTS,
    OUTPUT_OF_IMAGES,
    asked_of,
    asking,
    hidden_states_to_keep,
    image_features_result,
    record_before_replicas,
    register_llava_key_mapping,
    taken_by,
    takes_arguments_of,
)
from .configuration_llava_merge import LlavaMergeConfig, MergerConfig
from .generation import EncodesImagesBeforeForward, images_to_merge
from .merging_base import READ_FOR_QUESTION, MergeExtras, MergeOutput, find_merging_method, required_extras, weights_of
from .modeling_token_merger import TokenMerger
from .placeholders import (
    ALL_TOKENS,
    budget_of_each_image,
    check_num_features,
    check_placeholders,
    tokens_of_budget,
)
from .positions import (
    EncodedImages,
    ImagesOfPrompt,
    PlacesTokens,
    find_cache,
    keep_layout,
)
from .questions import Prompt, Question, ReadsPrompt
from .vision_encoding import (
    Bypassable,
    ResizesPictures,
    RunningCalls,
    TowerFeatures,
    attention_layer_of,
    bypassing,
    counted,
    features_of,
    merge_by_budget,
    read_tower,
)
from .vllm_backend import check_backend, is_run_by_vllm


if IS_PACKAGE:
    from . import checkpoint_loading  # what loads, changes, saves and pushes mergers stays at home
try:
    from . import relevance
except ImportError:  # it travels with the methods that need it alone
    relevance = None

register_llava_key_mapping("llava_merge", "LlavaMergeForConditionalGeneration", "LlavaMergeModel")

# Arguments of forward that are the tower's too.
TOWER_ARGUMENTS = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_sizes",
    "output_hidden_states",
    "output_attentions",
    "interpolate_pos_encoding",
)


def device_of(module: nn.Module, features: Tensor) -> torch.device:
    """Where `features` meet a `module`; to an offloaded one they need not go, it comes to them."""
    weight = next(weights_of(module), features)
    return features.device if weight.is_meta else weight.device


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


def tower_options(vision_feature_layer, vision_feature_select_strategy) -> dict:
    """The tower's two options that stock LLaVA's functions take by position."""
    return {
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": vision_feature_select_strategy,
    }


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


class LlavaMergeModel(ResizesPictures, PlacesTokens, ReadsPrompt, Bypassable, LlavaMergePreTrainedModel, LlavaModel):
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

    @property
    def headless_model(self) -> "LlavaMergeModel":
        """This model itself."""
        return self

    def _replicate_for_data_parallel(self):
        record_before_replicas(self.vision_tower)
        return super()._replicate_for_data_parallel()

    @property
    def required_extras(self) -> frozenset[str]:
        """What the merger requires besides the features: names of fields of [`MergeExtras`]."""
        return required_extras(self.config.merger_config)

    @counted
    def get_vision_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> Tensor:
        """The tower's features of each image before merging and projecting: (I, N, vision_dim).

        Args:
            pixel_values: (I, 3, H, W).
            vision_feature_layer: Hidden state to take, or several to concatenate; default the config's.
            vision_feature_select_strategy: "default" drops the CLS token, "full" keeps all; default the config's.
        """
        kwargs |= tower_options(vision_feature_layer, vision_feature_select_strategy)
        return self._run_tower(pixel_values, **kwargs)[0]

    @counted
    def get_merge_extras(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question: Question | Tensor | None = None,
        **kwargs,
    ) -> MergeExtras:
        """What the merging method requires besides the features; the other arguments are of [`get_vision_features`].

        `model.model.merger(features, extras=extras)` takes it; `forward` and `generate` fetch it in the same pass of
        the tower as the features.

        Args:
            question: See [`get_image_features`].
        """
        if not self.required_extras:
            return MergeExtras()
        if isinstance(question, Tensor):
            question = Question.of_each_image(question)
        kwargs |= tower_options(vision_feature_layer, vision_feature_select_strategy)
        features, _, extras = self._run_tower(pixel_values, with_extras=True, **kwargs)
        return self._with_relevance(extras, features, question)

    def _with_relevance(
        self, extras: MergeExtras | None, features: Tensor, question: Question | None
    ) -> MergeExtras | None:
        """The extras with the relevance of each patch, where the method asks for it.

        Raises:
            ValueError: There is no question.
        """
        requires = self.required_extras
        if extras is None or not requires & READ_FOR_QUESTION:
            return extras
        if question is None:
            raise ValueError(
                f"merger_type={self.config.merger_config.merger_type!r} merges each image for its question, and none "
                f"is given. Pass question=..., or call forward or generate, which read it from the prompt."
            )
        tower = self.find_text_tower(self.config.merger_config)
        if tower is None:
            device = device_of(self.multi_modal_projector, features)
            features, question = features.to(device), question.to(device)
        read = relevance.read_for_question(
            requires, features, question, self.multi_modal_projector, tower, self.question_tokenizer
        )
        return replace(extras, **read)

    def find_text_tower(self, merger_config: MergerConfig, **hub_kwargs):
        """The `TextTower` that `merger_config` asks for, if it does; loaded once.

        Raises:
            ValueError: It cannot be loaded, or is of another vision tower.
        """
        name = merger_config.text_tower
        if name is not None and (self.text_tower is None or self.text_tower.name != name):
            self.text_tower = relevance.TextTower(name, merger_config.vision_dim, hub_kwargs)
        return self.text_tower if name is not None else None

    def _run_tower(
        self,
        pixel_values,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        output_hidden_states=None,
        with_extras=False,
        tower_outputs=None,
        **kwargs,
    ):
        """Unprojected features (I, N, vision_dim), the tower's output, and the extras of the method or None.

        With `tower_outputs`, of these very `pixel_values`, the tower does not run again.
        """
        strategy = vision_feature_select_strategy
        strategy = self.config.vision_feature_select_strategy if strategy is None else strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy={strategy!r}: has to be 'default' (drops CLS) or 'full'.")
        self._check_image_size(pixel_values, kwargs)
        layers = self._tower_layers(vision_feature_layer)
        requires, extra_layers = self.required_extras, []
        if with_extras and requires:
            extra_layers = [*self.config.merger_layers(), attention_layer_of(layers)]
        if tower_outputs is not None and tower_outputs[0] is pixel_values:  # else an override has changed them
            outputs = tower_outputs[1]
        else:
            outputs = self.vision_tower(
                pixel_values,
                output_hidden_states=hidden_states_to_keep([*layers, *extra_layers], output_hidden_states),
                return_dict=True,
                **{name: value for name, value in kwargs.items() if value is not None},
            )
        first_patch = 1 if strategy == "default" else 0
        features = features_of(outputs.hidden_states, layers, first_patch)
        if not extra_layers:
            return features, outputs, None
        *extra_layers, attention_layer = extra_layers
        extras = read_tower(
            self.vision_tower, outputs.hidden_states, requires, extra_layers, attention_layer, first_patch
        )
        return features, outputs, extras

    def _tower_layers(self, layer: int | list[int] | None) -> list[int]:
        """Indices of hidden states, counted from the front."""
        layer = self.config.vision_feature_layer if layer is None else layer
        self.config.check_layers("vision_feature_layer", layer)
        layers = self.config.feature_layers(layer)
        self.check_built(layers, f"vision_feature_layer={layer}")
        return layers

    def check_built(self, layers: list[int], setting: str):
        """Refuses hidden states of tower layers that this model was built without, counted from the front.

        Args:
            setting: The argument of `from_pretrained` that asks for them.

        Raises:
            ValueError: There are some.
        """
        built = self.vision_tower.config.num_hidden_layers
        if not all(0 <= index <= built for index in layers):
            num_states = self.config.vision_config.num_hidden_layers + 1
            raise ValueError(
                f"{setting}: of the tower's {num_states} hidden states this model has only the first {built + 1}, "
                f"since it was built without the layers that it did not need. Load the model with from_pretrained(..., "
                f"{setting})."
            )

    def _check_image_size(self, pixel_values: Tensor, kwargs: dict):
        rows, columns = self.config.image_shape
        if kwargs.get("image_sizes") is not None:
            raise ValueError("image_sizes: towers with images of several sizes in a batch cannot be merged to one M.")
        resized = kwargs.get("interpolate_pos_encoding", False)
        if pixel_values.ndim != 4 or not resized and tuple(pixel_values.shape[-2:]) != (rows, columns):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; the tower takes images as (images, channels, "
                f"{rows}, {columns}). Use the model's own processor."
            )

    @property
    def merger_enabled(self) -> bool:
        """Whether calls of this thread merge; False inside `merger_bypassed()`."""
        return not self.is_bypassed

    def budgets(self, num_images: int, num_merged_tokens: int | str | list | None = None) -> list[int | str]:
        """Tokens of each image, "all" where it is not merged: those of the call, else the config's.

        Raises:
            ValueError: `num_merged_tokens` is not for this number of images, or there is no merger that could do it.
        """
        merger_config = self.config.merger_config
        keeps_all = not self.merger_enabled or merger_config.merger_type == "none"
        if num_merged_tokens is None or not self.merger_enabled:
            return [ALL_TOKENS if keeps_all else merger_config.num_merged_tokens] * num_images
        budgets = budget_of_each_image(num_merged_tokens, num_images)
        if keeps_all and set(budgets) - {ALL_TOKENS}:
            raise ValueError(
                f"num_merged_tokens={num_merged_tokens!r}: this model has merger_type='none', which keeps all tokens. "
                f"Load it with merger=... or merger_config=..., or leave num_merged_tokens out."
            )
        return budgets

    @counted
    def merge_features(
        self,
        features: Tensor,
        question: Question | Tensor | None = None,
        grid: tuple[int, int] | None = None,
        num_merged_tokens: int | str | None = None,
        extras: MergeExtras | None = None,
        return_source: bool = False,
    ) -> MergeOutput:
        """Merges unprojected features (I, N, vision_dim) to (I, M, vision_dim); none inside `merger_bypassed()`.

        Args:
            question: See [`get_image_features`].
            grid: Rows and columns of the patches, default a square.
            num_merged_tokens: M, or "all" to merge nothing; default the config's.
            extras: What the method requires besides; see [`get_merge_extras`].
            return_source: Also return how much of each token came from each patch, (I, M, N).
        """
        num_images, num_patches = features.shape[:2]
        budget = self.budgets(num_images, num_merged_tokens)[0]
        if budget == ALL_TOKENS:
            places = torch.arange(num_patches, device=features.device).expand(num_images, -1)
            sizes = torch.ones(num_images, num_patches, device=features.device)
            source = None
            if return_source:
                source = torch.eye(num_patches, device=features.device).expand(num_images, -1, -1)
            return MergeOutput(merged_features=features, source=source, positions=places, sizes=sizes)
        # the budget of this config: PEFT copies the merger with a config of its own
        features_there = features.to(device_of(self.merger, features))
        output = self.merger(features_there, question, budget, grid, return_source=return_source, extras=extras)
        output.merged_features = output.merged_features.to(features.dtype)
        return output

    @counted
    def encode_images(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question: Question | Tensor | None = None,
        num_merged_tokens: int | str | list | None = None,
        **kwargs,
    ) -> EncodedImages | BaseModelOutputWithPooling:
        """[`get_image_features`], with the same result on every transformers release, to be kept.

        Its `pooler_output` is the list of I tensors (M, hidden). Pass it to `forward` or `generate` as
        `mm_encoder_outputs={"image": ...}` to ask an image several questions. Of the tower's own output it keeps
        nothing but what `output_hidden_states` and `output_attentions` ask for.
        """
        kwargs |= tower_options(vision_feature_layer, vision_feature_select_strategy)
        outputs = self._call_image_features(pixel_values, question, num_merged_tokens, kwargs)
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            return outputs
        return replace(outputs, last_hidden_state=None, hidden_states=None, attentions=None)

    @property
    def overrides_image_features(self) -> bool:
        """Whether [`get_image_features`] is that of a subclass, or was replaced on this model."""
        own = type(self).get_image_features is LlavaMergeModel.get_image_features
        return not own or "get_image_features" in vars(self)

    def _call_image_features(
        self,
        images: Tensor | TowerFeatures,
        question: Question | Tensor | Prompt | None,
        num_merged_tokens: int | str | list | None,
        options: dict,
    ) -> EncodedImages | BaseModelOutputWithPooling:
        """What [`get_image_features`], which may be overridden, makes of images, with where its tokens sit.

        Raises:
            ValueError: An override returns another number of features than the prompt has placeholders.
        """
        merged = []
        ours = {"question": question, "num_merged_tokens": num_merged_tokens, "merged": merged}
        given = {"pixel_values": images, **options, **ours, "return_dict": True}
        taken = taken_by(self.get_image_features, given) if self.overrides_image_features else given
        with nullcontext() if ours.keys() <= taken.keys() else asking(self, *ours.values()):
            result = self.get_image_features(**taken)
        features = list(getattr(result, "pooler_output", result))  # 4.57 returns it alone
        if merged and [*map(len, features)] == merged[1]:
            merged[0].pooler_output = features
            return merged[0]
        if isinstance(question, Prompt):
            check_num_features(question.new_image_mask, features)
        return BaseModelOutputWithPooling(pooler_output=features)

    def _project(self, merged_features: Tensor) -> Tensor:
        """Projected features (I, M, hidden) of merged ones (I, M, vision_dim)."""
        device = device_of(self.multi_modal_projector, merged_features)
        return self.multi_modal_projector(merged_features.to(device))

    def _merge_and_project(self, features, outputs, image_shape, question, budgets, extras) -> EncodedImages:
        """What [`encode_images`] returns; images of the same budget are merged together."""
        grid, num_patches = self.config.patch_grid(image_shape), features.shape[1]
        if isinstance(question, Tensor):
            question = Question.of_each_image(question)
        extras = self._with_relevance(extras, features, question)
        if len(set(budgets)) == 1:
            projected, places, sizes = self._merge_alike(features, question, grid, budgets[0], extras)
            outputs.pooler_output = list(projected)  # I × (M, hidden)
        else:
            tokens = merge_by_budget(self._merge_alike, features, question, grid, budgets, extras)
            outputs.pooler_output, places, sizes = (tokens[0], *map(torch.cat, tokens[1:]))
        if not self.places_tokens:
            return outputs
        return EncodedImages.of(outputs, places.flatten(), sizes.flatten(), num_patches)

    def _merge_alike(self, features, question, grid, budget: int | str, extras) -> tuple[Tensor, Tensor, Tensor]:
        """Projected features (I, M, hidden), places and sizes (I, M) of images with the same budget."""
        merged = self.merge_features(features, question, grid, budget, extras)
        return self._project(merged.merged_features), merged.positions, merged.sizes

    @counted
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        question: Question | Tensor | Prompt | None = None,
        num_merged_tokens: int | str | list | None = None,
        return_dict: bool | None = None,
        merged: list | None = None,
        **kwargs,
    ):
        """Merged and projected features of each image, as stock LLaVA returns them.

        All that looks at images calls it: `forward`, `generate`, `encode_images`, training and evaluation. An override
        is given their arguments, and may leave out those that stock LLaVA does not have, which are found here again.

        Args:
            pixel_values: (I, 3, H, W), or what [`run_tower`] made of them.
            question: For question-aware mergers, the language model's input embeddings (I, T, text_dim) of each image's
                question, or a [`Question`]; `forward` and `generate` give the prompt, to read it from.
            num_merged_tokens: M, or one for each image, "all" for those that are not merged; default the config's.
            merged: A list that gets the result with where its tokens sit, and the number of tokens of each image.

        Returns:
            A list of I tensors (M, hidden) on transformers 4.57; on 5.x the tower's output with that list as
            `pooler_output`, a tuple with `return_dict=False`.

        Raises:
            ValueError: The placeholders of the prompt are not those of the images, or a question cannot be told from
                its answer.
        """
        if merged is None and self.overrides_image_features:  # maybe by a method that takes stock's arguments alone
            question, num_merged_tokens, merged = asked_of(self, question, num_merged_tokens, merged)
        options = kwargs | tower_options(vision_feature_layer, vision_feature_select_strategy)
        options["image_sizes"] = image_sizes
        outputs = self._encode_images(pixel_values, question, num_merged_tokens, options)
        if merged is not None:
            merged += outputs, [*map(len, outputs.pooler_output)]
        return image_features_result(outputs, self.config.return_dict if return_dict is None else return_dict)

    def _encode_images(self, images: Tensor | TowerFeatures, question, num_merged_tokens, options: dict):
        """[`get_image_features`] with where tokens sit."""
        if self.resizes_pictures and isinstance(images, Tensor):
            budgets = self.budgets(len(images), num_merged_tokens)
            if isinstance(question, Prompt):
                self._read_question(question, budgets, self.config.num_patches)
            return self._encode_resized(images, budgets, options)
        features, outputs, question, budgets, extras = self._read_images(images, question, num_merged_tokens, options)
        image_shape = images.image_shape if isinstance(images, TowerFeatures) else images.shape[-2:]
        return self._merge_and_project(features, outputs, image_shape, question, budgets, extras)

    @counted
    def run_tower(self, pixel_values: Tensor, **kwargs) -> TowerFeatures:
        """Images (I, 3, H, W) behind the tower, with what the merging method requires.

        The other arguments are those of [`get_vision_features`].
        """
        features, _, extras = self._run_tower(pixel_values, with_extras=True, **kwargs)
        return TowerFeatures(features, extras, tuple(pixel_values.shape[-2:]))

    @counted
    def encode_images_of_prompt(
        self,
        images: Tensor | TowerFeatures,
        prompt: Prompt,
        num_merged_tokens: int | str | list | None = None,
        **kwargs,
    ) -> EncodedImages:
        """[`encode_images`] with the question of each image that is new in the `prompt`.

        Args:
            images: Pixels (I, 3, H, W), or what [`run_tower`] made of them.
            kwargs: `vision_feature_layer` and `vision_feature_select_strategy` for pixels; `tower_outputs`, the
                pixels and the output of `vision_tower` with all hidden states, spares its pass: several mergers or
                questions may share it.

        Raises:
            ValueError: The placeholders are not those of the images, or a question cannot be told from its answer.
        """
        return self._call_image_features(images, prompt, num_merged_tokens, kwargs)

    def _read_images(self, images: Tensor | TowerFeatures, question, num_merged_tokens, options: dict) -> tuple:
        """Features, output of the tower, question, budgets and extras of images; `question` may be a prompt still."""
        budgets = self.budgets(len(images), num_merged_tokens)
        prompt = question if isinstance(question, Prompt) else None
        if prompt is not None and ALL_TOKENS not in budgets:  # an error comes before the tower runs
            question = self._read_question(prompt, budgets, self.config.num_patches)
        if isinstance(images, TowerFeatures):
            features, outputs, extras = images.features, BaseModelOutputWithPooling(), images.extras
        else:
            with_extras = set(budgets) != {ALL_TOKENS}
            features, outputs, extras = self._run_tower(images, with_extras=with_extras, **options)
        if prompt is not None and ALL_TOKENS in budgets:
            question = self._read_question(prompt, budgets, features.shape[1])
        return features, outputs, question, budgets, extras

    def _read_question(self, prompt: Prompt, budgets: list[int | str], num_patches: int) -> Question | None:
        """The question of each new image of a prompt that was checked to have the placeholders for them."""
        num_tokens = [tokens_of_budget(budget, num_patches) for budget in budgets]
        check_placeholders(prompt.new_image_mask, num_tokens, num_patches)
        return self.get_question(prompt, num_tokens)

    @counted
    @torch.no_grad()
    def merge_sources(self, pixel_values: Tensor, num_merged_tokens=None, **inputs) -> list[Tensor]:
        """Which patches each merged token of a prompt came from, to be looked at: see `llava_merge.visualization`.

        Args:
            pixel_values: (I, 3, H, W).
            num_merged_tokens: See `forward`.
            inputs: What else the processor returned, `input_ids` and `attention_mask`, and the masks of `forward`.

        Returns:
            For each image (M, N) float32: the share of each patch in each token; rows sum to 1. Where two attentions
            make a token, as in V3, the share is by weight times length of what is added (arXiv 2004.10102).

        Raises:
            ValueError: As `forward`; or a method of one's own does not say it.
        """
        masks = {name: inputs.pop(name, None) for name in ("question_mask", "answer_mask")}
        prompt, options = self._prompt_of_call(masks, inputs)
        grid = self.config.patch_grid(pixel_values.shape[-2:])
        if self.resizes_pictures:
            budgets = self.budgets(len(pixel_values), num_merged_tokens)
            self._read_question(prompt, budgets, self.config.num_patches)
            return self._sources_of_resized(pixel_values, budgets)
        features, _, question, budgets, extras = self._read_images(pixel_values, prompt, num_merged_tokens, options)
        extras = self._with_relevance(extras, features, question)

        def source_of(*merged_alike) -> tuple[Tensor]:
            source = self.merge_features(*merged_alike, return_source=True).source
            if source is None:
                raise ValueError(
                    f"merger_type={self.config.merger_config.merger_type!r} does not say where its tokens come from: "
                    f"its method has to give MergeOutput(source=...) where `return_source` is asked for."
                )
            return (source.float(),)

        return merge_by_budget(source_of, features, question, grid, budgets, extras)[0]

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

    def _prompt_of_call(self, masks: dict, arguments: dict) -> tuple[Prompt, dict]:
        """The prompt of a forward with these `arguments`, and those of them that are for the tower."""
        input_ids, inputs_embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        masks |= {name: arguments.get(name) for name in ("attention_mask", "position_ids")}
        options = {name: arguments[name] for name in TOWER_ARGUMENTS if name in arguments}
        return self.read_prompt(input_ids, inputs_embeds, **masks), options

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
