# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

# Every sibling by name, also those used only by others: transformers 4.57 copies no deeper than the imports of this
# file when it loads a folder with trust_remote_code.
from .compat import hidden_states_to_keep, image_features_result, register_llava_key_mapping
from .configuration_llava_merge import LlavaMergeConfig, MergerConfig
from .generation_llava_merge import EncodesImagesBeforeForward
from .hub import MERGER_USAGE, MODEL_USAGE, push_card_if_missing, save_at_once
from .loading import (
    HUB_KWARGS,
    LLAVA_FIELDS,
    check_adapter_is_safetensors,
    for_other_repo,
    load_merger_config,
    naming_broken_files,
    plan_loading,
    refuse_missing_weights,
)
from .merging_average_pooling import AveragePooling  # noqa: F401
from .merging_base import MergeContext, MergeOutput, MergingMethod, OwnInitialization, check_grid, find_merging_method
from .merging_fixed_pooling import FixedPooling  # noqa: F401
from .merging_grid import window_weights  # noqa: F401
from .merging_none import Identity  # noqa: F401
from .question import check_placeholders, image_rows, question_mask_of_rows, scatter_image_features


register_llava_key_mapping("llava_merge", "LlavaMergeForConditionalGeneration", "LlavaMergeModel")


class TokenMerger(PreTrainedModel):
    """Merges the N visual tokens of each image into M: a merging method as a model that saves and loads by itself.

    Args:
        config: Which method, how many tokens, which widths. See [`MergerConfig`].

    Example:
        >>> merger = TokenMerger(MergerConfig(merger_type="fixed_pooling", num_merged_tokens=64))
        >>> merger(torch.randn(2, 576, 1024)).merged_features.shape
        torch.Size([2, 64, 1024])
    """

    config_class = MergerConfig
    base_model_prefix = ""
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenMerger"]
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = True
    _auto_class = "AutoModel"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        self.method = find_merging_method(config)(config)
        config.auto_map = {
            "AutoConfig": "configuration_llava_merge.MergerConfig",
            "AutoModel": "modeling_llava_merge.TokenMerger",
        }
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if isinstance(module, (MergingMethod, OwnInitialization)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self,
        features: Tensor,
        question_embeds: Tensor | None = None,
        question_mask: Tensor | None = None,
        num_tokens: int | None = None,
        grid: tuple[int, int] | None = None,
        return_source: bool = False,
    ) -> MergeOutput:
        """
        Args:
            features: (I, N, vision_dim), the tower's features without CLS.
            question_embeds: (I, T, text_dim), the language model's input embeddings of each image's question. Read by
                question-aware mergers only; without it they merge as if there were no question.
            question_mask: (I, T) bool, True where `question_embeds` is question; default everywhere.
            num_tokens: M, default the config's.
            grid: Rows and columns of the patches, default a square.
            return_source: Also return which patches made each token, (I, M, N).

        Raises:
            ValueError: Shapes that do not fit the config, or M out of range.
        """
        if features.ndim != 3 or features.shape[-1] != self.config.vision_dim:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; this merger takes (images, patches, vision_dim="
                f"{self.config.vision_dim}), the output of the vision tower before the projector."
            )
        if question_embeds is not None and not self.config.question_aware:
            question_embeds = question_mask = None
        if question_embeds is not None:
            question_embeds, question_mask = self._check_question(features, question_embeds, question_mask)
        num_patches = features.shape[1]
        if self.method.needs_grid:
            grid = check_grid(grid, num_patches)
        num_tokens = self._num_tokens(num_patches, num_tokens)
        context = MergeContext(grid, num_tokens, question_embeds, question_mask, return_source)
        return self.method(features, context)

    def _num_tokens(self, num_patches: int, num_tokens: int | None) -> int:
        if num_tokens is None or self.config.merger_type == "none":
            return self.config.num_tokens(num_patches)
        if not 1 <= num_tokens <= num_patches:
            raise ValueError(f"num_tokens={num_tokens}: has to be from 1 to the {num_patches} visual tokens.")
        return num_tokens

    def _check_question(self, features: Tensor, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        expected = f"(images={features.shape[0]}, tokens, text_dim={self.config.text_dim})"
        if embeds.ndim != 3 or embeds.shape[0] != features.shape[0] or embeds.shape[-1] != self.config.text_dim:
            raise ValueError(f"question_embeds have shape {tuple(embeds.shape)}, this merger takes {expected}.")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return embeds.to(features.device, features.dtype), mask.to(features.device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "TokenMerger":
        """Loads a merger checkpoint, a directory or Hub repo, from safetensors only.

        Raises:
            ValueError: A weight is missing, or a file is truncated or corrupted.
        """
        path = pretrained_model_name_or_path
        config = kwargs.pop("config", None)
        if config is None:
            config = load_merger_config(path, {name: kwargs[name] for name in HUB_KWARGS if name in kwargs})
        wants_info = kwargs.pop("output_loading_info", False)
        if find_merging_method(config).training_free:  # transformers cannot load a model without weights
            return (cls(config), {}) if wants_info else cls(config)
        kwargs = {**kwargs, "config": config, "use_safetensors": True, "output_loading_info": True}
        with naming_broken_files(path, kwargs.get("subfolder")):
            merger, info = super().from_pretrained(path, *args, **kwargs)
        refuse_missing_weights(path, info["missing_keys"])
        return (merger, info) if wants_info else merger

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; a training-free merger is its code and config.json alone."""
        if not self.method.training_free:
            return super().save_pretrained(save_directory, **kwargs)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        custom_object_save(self, save_directory, config=self.config)
        self.config.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """As in transformers; a repo without a model card gets one."""
        push_card_if_missing(self, repo_id, MERGER_USAGE, kwargs)
        return super().push_to_hub(repo_id, **kwargs)


class LlavaMergePreTrainedModel(LlavaPreTrainedModel):
    """What the headless model and the one with a language-modelling head share: loading and the merger's handling."""

    config_class = LlavaMergeConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config: PretrainedConfig | None = None,
        merger: str | None = None,
        merger_config: MergerConfig | dict | None = None,
        allow_missing_weights: bool = False,
        **kwargs,
    ):
        """Loads a llava_merge checkpoint, a stock LLaVA checkpoint, or a PEFT adapter of one of them.

        Args:
            pretrained_model_name_or_path: Directory or Hub repo. A stock LLaVA (`llava-hf/llava-1.5-7b-hf`) gives its
                weights and gets a merger that is fresh unless `merger` is given.
            merger: Directory or Hub repo of a merger checkpoint to lay over it.
            merger_config: Configuration of the merger instead of the checkpoint's, an object or a dict of its fields.
            allow_missing_weights: Load even where the checkpoint lacks weights; they stay random.

        The other arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: Weights are missing (those of a fresh merger may), a file is truncated or corrupted, or the
                merger does not fit the model.
        """
        if pretrained_model_name_or_path is None:  # a config and a state_dict
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        path = str(pretrained_model_name_or_path)
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if config is None:
            overrides = {name: kwargs.pop(name) for name in LLAVA_FIELDS if name in kwargs}
        else:
            overrides = {}
        plan = plan_loading(path, config, overrides, merger, merger_config, hub_kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        with naming_broken_files(path, kwargs.get("subfolder")):
            model, info = super().from_pretrained(path, *model_args, config=plan.config, **kwargs)
        if not allow_missing_weights:
            plan.check_loaded_keys(path, info)
        if merger is not None:
            model.load_merger(merger, **for_other_repo(hub_kwargs))
        return (model, info) if wants_info else model

    @property
    def core(self) -> "LlavaMergeModel":
        """The model that holds tower, merger, projector and language model."""
        raise NotImplementedError

    @contextmanager
    def merger_bypassed(self):
        """Inside, images keep all their tokens, as in the stock model: `with model.merger_bypassed(): ...`.

        The prompts need all placeholders then: a processor with `num_merged_tokens=None`.
        """
        was_enabled = self.core.merger_enabled
        self.core.merger_enabled = False
        try:
            yield self
        finally:
            self.core.merger_enabled = was_enabled

    def set_num_merged_tokens(self, num_merged_tokens: int, processor=None):
        """Changes M of the model, and of `processor` if given; the weights stay.

        Raises:
            ValueError: M is below 1 or above the number of visual tokens; nothing is changed then.
        """
        merger_config = self.config.merger_config
        if merger_config.merger_type == "none":
            raise ValueError(f"num_merged_tokens={num_merged_tokens}: merger_type='none' keeps all tokens.")
        changed = MergerConfig(
            **{**merger_config.to_dict(), "num_merged_tokens": num_merged_tokens, "merge_ratio": None}
        )
        changed.num_tokens(self.config.num_patches)
        for config in (merger_config, self.core.merger.config):  # one and the same, but for PEFT's copy
            config.num_merged_tokens, config.merge_ratio = num_merged_tokens, None
        self.config.image_seq_length = num_merged_tokens
        if processor is not None:
            processor.num_merged_tokens = num_merged_tokens

    def save_merger(self, save_directory: str):
        """Writes the merger alone, config.json and model.safetensors of a few MB, all at once or not at all."""
        save_at_once(self.core.merger.save_pretrained, save_directory)

    def load_merger(self, pretrained_model_name_or_path: str, **kwargs):
        """Puts the merger of a checkpoint (directory or Hub repo) in the place of the present one.

        Raises:
            ValueError: Its widths are not this model's, or a file is broken; the model is as before then.
        """
        merger = TokenMerger.from_pretrained(pretrained_model_name_or_path, **{"dtype": self.dtype, **kwargs})
        self.config.set_merger_config(merger.config)
        merger.config = merger.method.config = self.config.merger_config
        device = self.core.multi_modal_projector.linear_1.weight.device
        self.core.merger = merger.to("cpu" if device.type == "meta" else device)

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        """As in transformers, from safetensors only.

        Raises:
            ValueError: The adapter is a pickle.
        """
        if peft_model_id is not None:
            check_adapter_is_safetensors(peft_model_id)
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def push_merger_to_hub(self, repo_id: str, **kwargs):
        """Pushes the merger alone; `model.load_merger(repo_id)` gets it back. Arguments of `push_to_hub`."""
        return self.core.merger.push_to_hub(repo_id, **kwargs)


class LlavaMergeModel(LlavaMergePreTrainedModel, LlavaModel):
    """LLaVA without a language-modelling head: tower → merger → projector → language model.

    Each image's N visual tokens become M *before* the projector, which runs once, on M.
    """

    _checkpoint_conversion_mapping = {"language_model.model": "language_model", "^model.merger": "merger"}
    _auto_class = "AutoModel"

    def __init__(self, config: LlavaMergeConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.merger = TokenMerger(config.merger_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.merger_enabled = True
        self.post_init()

    @property
    def core(self) -> "LlavaMergeModel":
        return self

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
        return self._encode(pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs)[0]

    def _encode(self, pixel_values, layer=None, strategy=None, output_hidden_states=None, **kwargs):
        """Unprojected features (I, N, vision_dim) and the tower's output."""
        layer = self.config.vision_feature_layer if layer is None else layer
        strategy = self.config.vision_feature_select_strategy if strategy is None else strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy={strategy!r}: has to be 'default' (drops CLS) or 'full'.")
        self._check_image_size(pixel_values, kwargs)
        outputs = self.vision_tower(
            pixel_values,
            output_hidden_states=hidden_states_to_keep(layer, output_hidden_states),
            return_dict=True,
            **{name: value for name, value in kwargs.items() if value is not None},
        )
        states = [outputs.hidden_states[index] for index in ([layer] if isinstance(layer, int) else layer)]
        if strategy == "default":
            states = [state[:, 1:] for state in states]
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1), outputs

    def _check_image_size(self, pixel_values: Tensor, kwargs: dict):
        size = self.config.vision_config.image_size
        if kwargs.get("image_sizes") is not None:
            raise ValueError("image_sizes: towers with images of several sizes in a batch cannot be merged to one M.")
        resized = kwargs.get("interpolate_pos_encoding", False)
        if pixel_values.ndim != 4 or not resized and tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; the tower takes images as (images, channels, "
                f"{size}, {size}). Use the model's own processor."
            )

    def merge(
        self,
        features: Tensor,
        question_embeds: Tensor | None = None,
        question_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Merges unprojected features (I, N, vision_dim) to (I, M, vision_dim); none inside `merger_bypassed()`."""
        if not self.merger_enabled:
            return features
        weight = next(self.merger.parameters(), features)
        device = features.device if weight.is_meta else weight.device  # an offloaded merger comes to the features
        # the budget of this config: PEFT copies the merger with a config of its own
        num_tokens = self.config.merger_config.num_merged_tokens
        output = self.merger(features.to(device, weight.dtype), question_embeds, question_mask, num_tokens, grid)
        return output.merged_features.to(features.dtype)

    def encode_images(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question_embeds: Tensor | None = None,
        question_mask: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """The tower's output, with the merged and projected (M, hidden) features of each image as `pooler_output`."""
        features, outputs = self._encode(pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs)
        patch_size = self.config.vision_config.patch_size
        grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        merged = self.merge(features, question_embeds, question_mask, grid)  # (I, M, vision_dim)
        outputs.pooler_output = list(self.multi_modal_projector(merged))  # I × (M, hidden)
        return outputs

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        question_embeds: Tensor | None = None,
        question_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """Merged and projected features of each image, as stock LLaVA returns them.

        Args:
            pixel_values: (I, 3, H, W).
            question_embeds: (I, T, text_dim), for question-aware mergers; `forward` and `generate` fill it in.
            question_mask: (I, T) bool, True where `question_embeds` is question.

        Returns:
            A list of I tensors (M, hidden) on transformers 4.57; on 5.x the tower's output with that list as
            `pooler_output`, a tuple with `return_dict=False`.
        """
        outputs = self.encode_images(
            pixel_values,
            vision_feature_layer,
            vision_feature_select_strategy,
            question_embeds,
            question_mask,
            image_sizes=image_sizes,
            **kwargs,
        )
        return image_features_result(outputs, self.config.return_dict if return_dict is None else return_dict)

    def get_image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where the prompt has image placeholders: (B, L) bool."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(dim=-1)

    def get_question(
        self,
        inputs_embeds: Tensor,
        image_mask: Tensor,
        num_images: int,
        attention_mask: Tensor | None = None,
        question_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Each image's question, as arguments of `get_image_features`; empty where the merger does not read it.

        The question of an image is the text of its row: attended, no placeholder, inside `question_mask` if given.
        """
        if not (self.merger_enabled and self.config.merger_config.question_aware):
            return {}
        num_tokens = self.config.merger_config.num_merged_tokens
        check_placeholders(image_mask, num_images * num_tokens, num_images)
        readable = question_mask_of_rows(image_mask, attention_mask, question_mask)
        rows = image_rows(image_mask, num_images, num_tokens)
        question_embeds = inputs_embeds[rows.to(inputs_embeds.device)]
        return {"question_embeds": question_embeds, "question_mask": readable[rows]}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        question_mask: Tensor | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """
        Args:
            mm_encoder_outputs: `{"image": outputs}` with the images encoded before, instead of `pixel_values`.
            question_mask: (B, L) bool, text that a question-aware merger may read; default all attended text.

        The other arguments are those of [`~transformers.LlavaModel`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Pass images either as pixel_values or encoded as mm_encoder_outputs, not both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        image_features = None
        if pixel_values is not None or image_outputs is not None:
            image_mask = self.get_image_mask(input_ids, inputs_embeds)
        if pixel_values is not None:
            image_outputs = self.encode_images(
                pixel_values,
                vision_feature_layer,
                vision_feature_select_strategy,
                **self.get_question(inputs_embeds, image_mask, len(pixel_values), attention_mask, question_mask),
                image_sizes=image_sizes,
            )
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output))  # (I·M, hidden)
            inputs_embeds = scatter_image_features(inputs_embeds, image_mask, list(image_outputs.pooler_output))

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class LlavaMergeForConditionalGeneration(
    EncodesImagesBeforeForward, LlavaMergePreTrainedModel, LlavaForConditionalGeneration, GenerationMixin
):
    """LLaVA that merges each image's visual tokens before the projector: a drop-in for LlavaForConditionalGeneration.

    Example:
        >>> base = "llava-hf/llava-1.5-7b-hf"
        >>> model = LlavaMergeForConditionalGeneration.from_pretrained(base, merger_config={"num_merged_tokens": 64})
        >>> processor = LlavaMergeProcessor.from_pretrained(base, num_merged_tokens=64)
    """

    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: LlavaMergeConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaMergeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def core(self) -> LlavaMergeModel:
        return self.model

    def _refuse_unmarked_answers(self):
        if self.model.merger_enabled and self.config.merger_config.question_aware:
            raise ValueError(
                "A question-aware merger in training mode got neither labels nor question_mask, so that it cannot tell "
                "the question from the answer and would read both. Pass labels, or question_mask (batch, tokens) where "
                "the Trainer takes the labels away (label_smoothing_factor, compute_loss_func)."
            )

    def get_vision_features(self, pixel_values: Tensor, **kwargs) -> Tensor:
        """The tower's features of each image before merging and projecting: (I, N, vision_dim)."""
        return self.model.get_vision_features(pixel_values, **kwargs)

    def get_image_features(self, pixel_values: Tensor, *args, **kwargs):
        """Merged and projected features of each image; see [`LlavaMergeModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        question_mask: Tensor | None = None,
        **kwargs,
    ):
        """
        Args:
            labels: (B, L), -100 where no loss is taken. A question-aware merger reads only text whose label is -100: an
                answer never reaches it.
            question_mask: (B, L) bool, text that a question-aware merger may read; default all attended text.

        The other arguments, and the result, are those of [`~transformers.LlavaForConditionalGeneration`].
        """
        if self.training and labels is None and question_mask is None and pixel_values is not None:
            self._refuse_unmarked_answers()
        if labels is not None and pixel_values is not None:
            prompt = labels == -100
            question_mask = prompt if question_mask is None else prompt & question_mask.bool()
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            question_mask=question_mask,
            **kwargs,
        )

    def push_to_hub(self, repo_id: str, **kwargs):
        """As in transformers, with the code; a repo without a model card gets one."""
        push_card_if_missing(self, repo_id, MODEL_USAGE, kwargs)
        return super().push_to_hub(repo_id, **kwargs)


class LearnableTokenMergerV3(TokenMerger):
    """V3 under the name it was first described by: `LearnableTokenMergerV3(d_vision=1024)(vision_features)`.

    Args:
        config: A [`MergerConfig`]; the other arguments are for doing without.
        d_vision: Width of the visual features.
        d_text: Width of the question's embeddings.
        kwargs: Further fields of [`MergerConfig`], such as `num_merged_tokens` or `merge_ratio`.
    """

    def __init__(self, config: MergerConfig | None = None, *, d_vision: int = 1024, d_text: int = 4096, **kwargs):
        if config is None:
            config = MergerConfig(merger_type="fixed_pooling", vision_dim=d_vision, text_dim=d_text, **kwargs)
        super().__init__(config)
