# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Which budget M a training step has, and prompts that were made for all tokens cut down to it."""

import random
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_merge.model.placeholders import is_whole_number


IGNORED = -100  # label of a token that no loss is taken of
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}  # ids behind the mask are never read
UNSEEN = -1  # number of a sample that is none


class BudgetSchedule:
    """Draws the budget M of each step; the same on every rank, and again when a run is resumed.

    Args:
        budgets: A list of M, or {"min": 4, "max": 144} for every M between, small ones as often as large ones.
        curriculum: Share of the training, from 0 to 1, in which smaller budgets come in one after the other.
        seed: Of the draws.

    Raises:
        ValueError: There is no budget, or one that is no whole number of at least 1, or a range that is none.
    """

    def __init__(self, budgets: list[int] | Mapping[str, int], curriculum: float = 0.0, seed: int = 0):
        self.is_range = isinstance(budgets, Mapping)
        if self.is_range and set(budgets) != {"min", "max"}:
            raise ValueError(f"budgets.train={dict(budgets)!r}: a range has the keys min and max.")
        values = [budgets["min"], budgets["max"]] if self.is_range else budgets
        if not isinstance(values, list | tuple) or not values or not all(map(is_whole_number, values)):
            raise ValueError(
                f"budgets.train={budgets!r}: has to be a list of whole numbers of at least 1, or a range such as "
                f"{{min: 4, max: 144}}."
            )
        if self.is_range and values[0] > values[1]:
            raise ValueError(f"budgets.train={dict(budgets)!r}: min is more than max.")
        self.values = sorted(set(values), reverse=True)  # from mild to strong
        self.curriculum, self.seed = curriculum, seed

    @property
    def listed(self) -> list[int]:
        """Budgets that a merger says it was trained with: all, or the ends of a range."""
        return sorted(self.values)

    def at(self, step: int, num_steps: int) -> int:
        """M of a step, counted from 0, of `num_steps`."""
        rng = random.Random(f"{self.seed}-{step}")
        progress = 1.0 if not self.curriculum else min(1.0, step / max(1, num_steps) / self.curriculum)
        if not self.is_range:
            return rng.choice(self.values[: max(1, round(progress * len(self.values)))])
        high, low = self.values[0], self.values[-1]
        lowest = high * (low / high) ** progress
        return round(lowest * (high / lowest) ** rng.random())

    def name(self, budget: int) -> str:
        """What its loss is logged as: of a range, all budgets of an octave together."""
        if not self.is_range:
            return str(budget)
        octave = budget.bit_length() - 1
        return f"{max(2**octave, self.values[-1])}_to_{min(2 ** (octave + 1) - 1, self.values[0])}"


def with_budget(batch: dict[str, Tensor], image_token_id: int, num_patches: int, num_tokens: int) -> dict[str, Tensor]:
    """A batch made for N placeholders an image, with M of each.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` (B, L), padded on the right.
        num_patches: N.
        num_tokens: M, at most N.

    Returns:
        The three, (B, shorter); the order of what is left is the same.
    """
    ids = batch["input_ids"]
    is_image = ids == image_token_id
    place = (is_image.flatten().cumsum(0).view_as(ids) - 1) % num_patches  # within its image
    keep = (~is_image | (place < num_tokens)) & batch["attention_mask"].bool()
    length = int(keep.sum(dim=1).max())
    order = keep.long().sort(dim=1, descending=True, stable=True).indices[:, :length]
    inside = keep.gather(1, order)
    return {name: batch[name].gather(1, order).where(inside, value) for name, value in PADDING.items()}


def with_unseen_image(
    batch: dict[str, Tensor], image_token_id: int, num_patches: int, image_shape: tuple[int, int]
) -> dict[str, Tensor]:
    """A batch of text with a row more, an empty image that nothing is learnt from.

    Ranks that share the weights (FSDP) have to run the same modules, whether their batch has images or not.

    Args:
        image_shape: Height and width of the tower's images.
    """
    rows, length = batch["input_ids"].shape
    longer = max(0, num_patches - length)
    wider = {name: F.pad(batch[name], (0, longer, 0, 1), value=value) for name, value in PADDING.items()}
    wider["input_ids"][rows, :num_patches] = image_token_id
    wider["attention_mask"][rows, :num_patches] = 1
    wider["sample_ids"] = F.pad(batch["sample_ids"], (0, 1), value=UNSEEN)
    wider["num_skipped"] = F.pad(batch["num_skipped"], (0, 1))
    pixel_values = torch.zeros(1, 3, *image_shape, device=batch["input_ids"].device)
    return batch | wider | {"pixel_values": pixel_values}


def dropped_questions(sample_ids: Tensor, share: float, seed: str) -> Tensor:
    """(B,) bool: which samples of a step, by number, have their question dropped, whatever batch they are in."""
    ids = sample_ids.tolist()
    drawn = [sample == UNSEEN or random.Random(f"{seed}-{sample}").random() < share for sample in ids]
    return torch.tensor(drawn, device=sample_ids.device)
