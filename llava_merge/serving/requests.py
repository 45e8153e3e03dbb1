# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What a request to a server asks for: budget, questions, and where its tokens sit. Pure functions, without vLLM."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from llava_merge import LlavaMergeConfig
from llava_merge.model.configuration_llava_merge import keeps_places
from llava_merge.model.merging_base import find_merging_method
from llava_merge.model.merging_image_resize import grid_of_budget, makes_picture
from llava_merge.model.placeholders import is_whole_number, warn_of_positions
from llava_merge.model.positions import place_on_slots
from llava_merge.model.questions import split_turns, turn_marks_of


BUDGET = "num_merged_tokens"
PLAIN_ROPE = ("default", "linear", "llama3")  # whose frequencies do not depend on the number of positions
PLAIN = -1  # text between ids that mean something
KEPT_PROMPTS = 64  # of which is known what they ask for; each may be as long as a request
ROPE_ROWS = 4  # positions prepared for each token that a request may have


def check_servable(config: LlavaMergeConfig):
    """Refuses what a serving engine could only do wrong.

    Raises:
        ValueError: It has `attention_mass`.
    """
    mass = config.merger_config.attention_mass
    if mass:
        raise ValueError(
            f"attention_mass={mass}: serving engines cannot add a bias to the attention on merged tokens. Train the "
            f"merger with attention_mass=0, or go on training it so: trained with it, it is bad without. A method that "
            f"starts fresh has none unless asked for."
        )


def check_named(mm_processor_kwargs: Mapping[str, object]):
    """Refuses what a request may not say of its images: their size, or ids that would be read as a question.

    Raises:
        ValueError: It says more than the budget.
    """
    others = sorted(set(mm_processor_kwargs) - {BUDGET})
    if others:
        raise ValueError(
            f"mm_processor_kwargs has {', '.join(others)}; a request to this model may say {BUDGET} alone. Whoever "
            f"serves it may say more, with --mm-processor-kwargs."
        )


def served_budgets(config: LlavaMergeConfig) -> range | list[int]:
    """Tokens per image that a request may ask for, rising: those that the merger was trained with, else any."""
    merger_config = config.merger_config
    if merger_config.merger_type == "none":
        return [config.num_patches]
    if merger_config.trained_num_tokens:
        return sorted({merger_config.num_merged_tokens, *merger_config.trained_num_tokens})
    budgets = range(1, config.num_patches + 1)
    return [*filter(makes_picture, budgets)] if find_merging_method(merger_config).resizes_pictures else budgets


def num_rope_rows(config: LlavaMergeConfig, max_model_len: int) -> int:
    """Positions that the language model's rotary embedding is prepared for, which engines do not check."""
    rope, rows = config.text_config.rope_parameters, config.text_config.max_position_embeddings
    return max(rows, ROPE_ROWS * max_model_len) if rope and rope["rope_type"] in PLAIN_ROPE else rows


@lru_cache(maxsize=KEPT_PROMPTS)  # chats of the same length have their images at the same place
def positions_of(num_tokens: int, images: tuple[tuple[int, int], ...], grid: tuple[int, int]) -> tuple[Tensor, int]:
    """Positions of a prompt whose merged tokens sit on slots, to be read alone: (3, num_tokens) int64.

    The first row holds them, the others where the image begins that a token is in.

    Args:
        images: Index of the first token and number of tokens of each, in their order.
        grid: Rows and columns of patches of an image.

    Returns:
        They, and how far text behind the prompt is from where it would be if each token counted as one.
    """
    image_mask = torch.zeros(1, num_tokens, dtype=torch.bool)
    for first, number in images:
        image_mask[:, first : first + number] = True
    positions, places, moved = place_on_slots(image_mask, [number for _, number in images], grid)
    starts = positions - places
    return torch.stack((positions, starts, starts)), int(moved)


class RequestRules:
    """What requests may ask of a model; worked out once, when its server starts.

    Args:
        config: Of the model.
        max_model_len: Tokens that a request may have, with its answer.
    """

    def __init__(self, config: LlavaMergeConfig, max_model_len: int):
        self.served = served_budgets(config)
        self.default_budget = config.merger_config.num_tokens(config.num_patches)
        self.resizes = find_merging_method(config.merger_config).resizes_pictures
        self.reads_question = config.merger_config.question_aware
        self.keeps_places = keeps_places(config.merger_config)
        self.num_patches, self.image_token_id = config.num_patches, config.image_token_id
        self.max_positions = config.text_config.max_position_embeddings
        self.max_model_len, self.config = max_model_len, config
        self.marks = turn_marks_of(config)
        self.meaningful = {*self.marks.eos, *self.marks.bos, self.image_token_id}
        self.sequences = defaultdict(list)  # by their first id
        for sequence in self.marks.question_start + self.marks.question_end:
            self.sequences[sequence[0]].append(sequence)
        self.runs_of_questions = lru_cache(maxsize=KEPT_PROMPTS)(self._find_runs_of_questions)

    @cached_property
    def rope_rows(self) -> int:
        """Positions that the rotary embedding is prepared for."""
        return num_rope_rows(self.config, self.max_model_len)

    def budget(self, asked: object = None) -> int:
        """Tokens per image of a request that asks for `asked`; the checkpoint's where that is None.

        Raises:
            ValueError: It is not among the [`served_budgets`]; where images are resized, the nearest are named.
        """
        if asked is None:
            return self.default_budget
        served = self.served
        if is_whole_number(asked) and asked <= self.num_patches and self.resizes:
            grid_of_budget(asked)
        if not is_whole_number(asked) or asked not in served:
            few = len(served) < 20
            listed = ", ".join(map(str, served)) if few else f"whole numbers from {served[0]} to {served[-1]}"
            raise ValueError(
                f"num_merged_tokens={asked!r}: this checkpoint is served with {listed}. Ask for one of them."
            )
        return asked

    def check_room(self, num_images: int, budget: int):
        """Refuses a request that could reach positions which are not prepared.

        Raises:
            ValueError: So it could.
        """
        highest = self.max_model_len + num_images * (self.num_patches - budget)
        if self.keeps_places and highest > self.rope_rows:
            raise ValueError(
                f"{num_images} images could reach position {highest}, since merged tokens keep the positions of their "
                f"patches, and {self.rope_rows} are prepared. Send fewer images, or serve with a lower --max-model-len."
            )

    def warn_of_long_prompt(self, ids: list[int], num_images: int, budget: int):
        """Warns where a prompt takes more positions than the language model was made for; engines count tokens alone.

        Args:
            ids: The prompt, with one placeholder for each image.
        """
        if self.keeps_places:
            num_text = len(ids) - num_images
            positions = num_text + num_images * self.num_patches
            warn_of_positions(positions, num_text + num_images * budget, self.max_positions)

    def questions(self, ids: list[int], num_images: int) -> list[list[int]]:
        """What each image is merged for, as ids: the text of its turn, as `model/questions.py` says it.

        Args:
            ids: The prompt, with one placeholder for each image.
            num_images: Images that came with it.

        Raises:
            ValueError: There are more or fewer placeholders.
        """
        found = ids.count(self.image_token_id)
        if found != num_images:
            raise ValueError(
                f"The prompt holds {found} image placeholders for {num_images} images. Write one for each."
            )
        means = [id in self.meaningful for id in ids]
        for index, id in enumerate(ids):
            for sequence in self.sequences.get(id, ()):
                if ids[index : index + len(sequence)] == sequence:
                    means[index : index + len(sequence)] = [True] * len(sequence)
        runs, skeleton = [], []  # each id that means something to the rule, and what stands between them
        for is_meaningful, group in groupby(zip(means, ids, strict=True), itemgetter(0)):
            run = [id for _, id in group]
            runs += [[id] for id in run] if is_meaningful else [run]
            skeleton += run if is_meaningful else [PLAIN]
        return [[id for run in chosen for id in runs[run]] for chosen in self.runs_of_questions(tuple(skeleton))]

    def _find_runs_of_questions(self, skeleton: tuple[int, ...]) -> list[list[int]]:
        """Which runs of a prompt are the question of each image; most chats have the same skeleton."""
        row = torch.tensor([skeleton])
        image_mask = row == self.image_token_id
        turns = split_turns(row, image_mask, self.marks)
        number, text = turns.number[0], turns.is_text[0]
        return [(text & (number == turn)).nonzero()[:, 0].tolist() for turn in number[image_mask[0]].tolist()]
