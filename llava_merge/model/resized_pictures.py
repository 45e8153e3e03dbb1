# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Encoding images where the budget is the tower's: it sees smaller pictures, of which it makes M tokens."""

from operator import index

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .merge_extras import HAS_CLS, merge_by_budget
from .merging_base import MERGING_METHODS
from .merging_grid import slot_geometry
from .merging_image_resize import resize_pictures
from .placeholders import ALL_TOKENS, tokens_of_budget
from .token_placing import EncodedImages


class ResizesPictures:
    """Mixin of a model with a merging method that may make pictures smaller, instead of merging what the tower made."""

    @property
    def resizes_pictures(self) -> bool:
        """Whether it does, except for images that keep all their tokens."""
        return MERGING_METHODS[self.config.merger_config.merger_type].resizes_pictures

    def _encode_resized(self, pixel_values: Tensor, budgets: list[int | str], options: dict) -> EncodedImages:
        """What `encode_images` returns: pictures of one budget go through the tower together.

        Args:
            options: Of the tower.

        Raises:
            ValueError: The tower takes pictures of one size only.
        """
        self._check_resizing(pixel_values, options)
        grid = self.config.patch_grid(pixel_values.shape[-2:])
        options = {**options, "tower_outputs": None, "interpolate_pos_encoding": True}

        def encode(pixels, question, grid, budget, extras) -> tuple[Tensor, Tensor, Tensor]:
            if budget != ALL_TOKENS:
                pixels = resize_pictures(pixels, budget, self.config.patch_shape)
            projected = self._project(self._run_tower(pixels, **options)[0])  # (I, M, hidden)
            num_images, num_tokens = len(projected), index(projected.shape[1])  # while it is traced, a tensor
            places = slot_geometry(grid, num_tokens, projected.device).places
            sizes = torch.full((num_images, num_tokens), grid[0] * grid[1] / num_tokens, device=projected.device)
            return projected, places.expand(num_images, -1), sizes

        tokens, places, sizes = merge_by_budget(encode, pixel_values, None, grid, budgets, None)
        outputs = BaseModelOutputWithPooling(pooler_output=tokens)
        if not self.places_tokens:
            return outputs
        return EncodedImages.of(outputs, torch.cat(places), torch.cat(sizes), grid[0] * grid[1])

    def _check_resizing(self, pixel_values: Tensor, options: dict):
        self._check_image_size(pixel_values, options)
        kind = self.vision_tower.config.model_type
        if kind not in HAS_CLS:
            raise ValueError(
                f"merger_type={self.config.merger_config.merger_type!r} needs a tower that takes smaller pictures, "
                f"which is known of {' and '.join(HAS_CLS)} only, not of {kind!r}. Choose another method."
            )

    def _sources_of_resized(self, pixel_values: Tensor, budgets: list[int | str]) -> list[Tensor]:
        """How much of each token came from each patch of the picture as it was: (M, N) for each image."""
        grid = self.config.patch_grid(pixel_values.shape[-2:])
        num_tokens = [tokens_of_budget(budget, grid[0] * grid[1]) for budget in budgets]
        return [slot_geometry(grid, number, pixel_values.device).windows for number in num_tokens]
