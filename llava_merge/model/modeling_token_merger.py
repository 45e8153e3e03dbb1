# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A merger as a model of its own, with its checkpoints."""

from operator import index

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoint_files import OfCheckpoint, hub_arguments
from .compat import IS_PACKAGE
from .configuration_llava_merge import MergerConfig
from .merging_base import (
    MergeContext,
    MergeExtras,
    MergeOutput,
    MergingMethod,
    OwnInitialization,
    check_grid,
    find_merging_method,
    full_precision,
    required_extras,
    weights_of,
)
from .merging_grid import slot_geometry
from .questions import Question


if IS_PACKAGE:
    from . import checkpoint_saving as checkpoints  # saving and pushing stay at home

logger = logging.get_logger(f"transformers.{__name__}")


class TokenMerger(checkpoints.MergerCheckpoints if IS_PACKAGE else OfCheckpoint, PreTrainedModel):
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
            "AutoModel": "modeling_token_merger.TokenMerger",
        }
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if isinstance(module, (MergingMethod, OwnInitialization)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @property
    def device(self) -> torch.device:
        """Where its weights are; a method without merges where the features are, and says the CPU."""
        return next(weights_of(self), torch.empty(0, device="cpu")).device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights; a method without merges in that of the features, and says torch's default."""
        return next(weights_of(self), torch.empty(0, device="cpu")).dtype

    def forward(
        self,
        features: Tensor,
        question: Question | Tensor | None = None,
        num_tokens: int | None = None,
        grid: tuple[int, int] | None = None,
        return_source: bool = False,
        extras: MergeExtras | None = None,
    ) -> MergeOutput:
        """
        Args:
            features: (I, N, vision_dim), the tower's features without CLS; a method with weights merges in the dtype of
                these, whatever torch.autocast says.
            question: What each image is merged for: the language model's input embeddings of each image's question,
                (I, T, text_dim), or a [`Question`], which can mask some of them and be shared by images. Read by
                question-aware mergers only; without it they merge as if there were no question.
            num_tokens: M, default the config's.
            grid: Rows and columns of the patches, default a square.
            return_source: Also return which patches made each token, (I, M, N).
            extras: What the method `requires` besides, as `model.model.get_merge_extras(pixel_values)` gives it.

        Raises:
            ValueError: Shapes that do not fit the config, M out of range, or something that the method requires is
                missing.
        """
        if features.ndim != 3 or features.shape[-1] != self.config.vision_dim:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; this merger takes (images, patches, vision_dim="
                f"{self.config.vision_dim}), the output of the vision tower before the projector."
            )
        with full_precision(features.device):
            features = features.to(next(weights_of(self), features).dtype)
            return self._merge(features, question, num_tokens, grid, return_source, extras)

    def _merge(self, features, question, num_tokens, grid, return_source, extras) -> MergeOutput:
        if question is not None:
            question = self._check_question(features, question) if self.config.question_aware else None
        extras = self._check_required(features, extras)
        num_patches = index(features.shape[1])  # while it is traced, a tensor
        num_tokens = self._num_tokens(num_patches, num_tokens)
        geometry = None
        if self.method.needs_grid:
            grid = check_grid(grid, num_patches)
            geometry = slot_geometry(grid, num_tokens, features.device)
        context = MergeContext(
            grid,
            num_tokens,
            question,
            return_source,
            geometry,
            cls_attention=extras.cls_attention,
            keys=extras.keys,
            num_heads=extras.num_heads,
            layers=tuple(layer.to(features.dtype) for layer in extras.layers),
            relevance=extras.relevance,
            word_relevance=extras.word_relevance,
        )
        output = self.method(features, context)
        if output.positions is None:
            places = torch.arange(num_tokens, device=features.device) if geometry is None else geometry.places
            output.positions = places.expand(len(features), -1)
        if output.sizes is None:
            output.sizes = features.new_full((len(features), num_tokens), num_patches / num_tokens, dtype=torch.float32)
        return output

    def _check_required(self, features: Tensor, extras: MergeExtras | None) -> MergeExtras:
        """The extras, of which the method gets no more than it asked for."""
        requires = required_extras(self.config)
        extras = MergeExtras() if extras is None else extras.of_kinds(requires)
        missing = ", ".join(sorted(requires - extras.kinds))
        if missing:
            raise ValueError(
                f"merger_type={self.config.merger_type!r} needs {missing} besides the features. Call the model, which "
                f"fetches it, or pass extras=MergeExtras(...) as model.model.get_merge_extras(pixel_values) makes it."
            )
        extras.check_shapes(features)
        widths, wanted = [layer.shape[-1] for layer in extras.layers], self.config.feature_layers or []
        if widths != [self.config.tower_dim] * len(wanted):
            raise ValueError(
                f"layers have the widths {widths}; this merger takes those of feature_layers={wanted}, each tower_dim="
                f"{self.config.tower_dim} wide."
            )
        return extras.to(features.device)

    def _num_tokens(self, num_patches: int, num_tokens: int | None) -> int:
        if num_tokens is None or self.config.merger_type == "none":
            num_tokens = self.config.num_tokens(num_patches)
        if not 1 <= num_tokens <= num_patches:
            raise ValueError(f"num_tokens={num_tokens}: has to be from 1 to the {num_patches} visual tokens.")
        trained = self.config.trained_num_tokens
        if trained and num_tokens < min(trained) and not self.training and not torch.compiler.is_compiling():
            logger.warning_once(
                f"This merger was trained with {', '.join(map(str, sorted(trained)))} tokens per image; with fewer, "
                f"answers may be much worse."
            )
        return num_tokens

    def _check_question(self, features: Tensor, question: Question | Tensor) -> Question:
        if isinstance(question, Tensor):
            question = Question.of_each_image(question)
        embeds, num_images = question.embeds, len(question.image_turns)
        if embeds.ndim != 3 or embeds.shape[-1] != self.config.text_dim or num_images != len(features):
            raise ValueError(
                f"The question has embeds of shape {tuple(embeds.shape)} for {num_images} images; this merger takes "
                f"(rows, tokens, text_dim={self.config.text_dim}) for the {len(features)} images of the features."
            )
        return question.to(features.device, features.dtype)

    def set_progress(self, progress: float):
        """Says how much of the training is done, for methods that anneal something in its course. It is saved.

        Args:
            progress: From 0 to 1.

        Raises:
            ValueError: It is out of range.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress!r}: it is the share of the training that is done, from 0 to 1.")
        self.method.set_progress(progress)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "TokenMerger":
        """Loads a merger checkpoint, a directory or Hub repo, from safetensors only.

        Raises:
            ValueError: A weight is missing, or a file is truncated or corrupted.
        """
        path, config = pretrained_model_name_or_path, kwargs.pop("config", None)
        if config is None:
            fields, unused = MergerConfig.get_config_dict(path, **hub_arguments(kwargs))
            config = MergerConfig.of_merger(path, fields, **unused)
        if not find_merging_method(config).training_free:
            return super().from_pretrained(path, *args, config=config, **kwargs)
        merger = cls(config)  # transformers cannot load a model without weights
        return (merger, {}) if kwargs.get("output_loading_info") else merger


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
