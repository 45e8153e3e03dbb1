# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Mergers that are evaluated on one model, one after the other, without loading it again."""

import copy
import json
import re
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from llava_merge import LlavaMergeForConditionalGeneration, MergerConfig, TokenMerger, list_mergers
from llava_merge.demo import find_merger
from llava_merge.model.placeholders import ALL_TOKENS


UNMERGED, OWN = "none", "own"
BASELINES = (UNMERGED, "random", "average_pooling")  # of every evaluation
PLACES = ("position_ids", "attention_mass")


@dataclass(frozen=True)
class Candidate:
    """A merger, and the projector that goes with it.

    Attributes:
        name: As the user wrote it.
        config: Its configuration.
    """

    name: str
    merger: TokenMerger
    projector: nn.Module
    config: MergerConfig

    @classmethod
    def of(cls, name: str, model: LlavaMergeForConditionalGeneration) -> "Candidate":
        """The merger that is in the model now, without PEFT's wrapper, in which another would be put in its place."""
        merger, projector = (unwrapped(part) for part in (model.model.merger, model.model.multi_modal_projector))
        return cls(name, merger, projector, model.config.merger_config)

    @contextmanager
    def answering(self, model: LlavaMergeForConditionalGeneration):
        """Puts the merger into the model inside, and the present one back behind."""
        parts, config = model.model, model.config
        before = parts.merger, parts.multi_modal_projector, config.merger_config
        parts.merger, parts.multi_modal_projector, config.merger_config = self.merger, self.projector, self.config
        try:
            yield
        finally:
            parts.merger, parts.multi_modal_projector, config.merger_config = before

    def attention_mass(self, model: LlavaMergeForConditionalGeneration) -> float:
        """What its tokens weigh in the model."""
        with self.answering(model):
            return model.model.attention_mass


def unwrapped(part: nn.Module) -> nn.Module:
    """The module that answers where PEFT keeps two, the one of the base and a trained one; else the module itself."""
    if not isinstance(getattr(part, "modules_to_save", None), nn.ModuleDict):
        return part
    return part.original_module if part.disable_adapters else part.modules_to_save[part.active_adapters[0]]


def make_candidates(
    model: LlavaMergeForConditionalGeneration, processor, mergers: list[str], places: dict, seed: int = 0
) -> list[Candidate]:
    """The candidates that `mergers` name, and the baselines, unmerged first.

    Args:
        mergers: Each `NAME` or `NAME:FIELD=VALUE,FIELD=VALUE`, where NAME is a method, a bundled merger, a directory or
            Hub repo of one, or "own" for the model's; fields are those of [`MergerConfig`].
        places: `position_ids` and `attention_mass` of methods that do not say their own.
        seed: Of `random`.

    Raises:
        ValueError: One cannot be used.
    """
    own, candidates = Candidate.of(OWN, model), []
    for text in dict.fromkeys([*BASELINES, *mergers]):
        with own.answering(model):  # which puts it back behind
            put_merger(model, processor, *parse_candidate(text), places, seed)
            candidates.append(Candidate.of(text, model))
    return candidates


def parse_candidate(text: str) -> tuple[str, dict]:
    """`"tome:attention_mass=1"` as name and fields.

    Raises:
        ValueError: A field has no value.
    """
    name, colon, rest = text.partition(":")
    if not colon or Path(text).exists():
        return text, {}
    fields = {}
    for pair in re.split(r",(?![^\[]*\])", rest):  # not inside a list
        field, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"merger {text!r}: {pair!r} has no value; write NAME:FIELD=VALUE,FIELD=VALUE.")
        fields[field.strip()] = read_value(value.strip())
    return name, fields


def shown_name(text: str) -> str:
    """A merger as it was named, and that it is untrained where it is a method that training is made for."""
    is_untrained = any(method.trained and method.name == parse_candidate(text)[0] for method in list_mergers())
    return f"{text} (untrained)" if is_untrained else text


def checkpoints_of(mergers: Iterable[str] | None) -> list[str]:
    """The folders and Hub repos among the `mergers`, without the methods and "own"."""
    names = [find_merger(parse_candidate(text)[0]) for text in mergers or ()]
    return [name for name in names if name not in {OWN, *(method.name for method in list_mergers())}]


def text_towers_of(model: LlavaMergeForConditionalGeneration, candidates: Iterable[Candidate] = ()) -> list[str | None]:
    """The folder or Hub repo of the text tower of the model's merger, and of each candidate; None where it has none."""
    return [config.text_tower for config in (model.config.merger_config, *(each.config for each in candidates))]


def read_value(text: str):
    """A number, true, false or null as JSON has them; else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def put_merger(model, processor, name: str, fields: dict, places: dict, seed: int = 0):
    """Puts the merger of a name into the model, to answer with.

    Args:
        processor: Of the model; None leaves unknown what stands between question and answer.
        fields: To be set, of a saved merger `position_ids` and `attention_mass` alone.
        places: Those two, of a method whose `fields` do not say them.
        seed: Of `random`.

    Raises:
        ValueError: There is none, or it has no such fields.
    """
    methods, name = [method.name for method in list_mergers()], find_merger(name)
    if name in methods:
        given = {**places, **({"seed": seed} if name == "random" else {}), **fields}
        model.set_merger({"merger_type": name, **({} if name == UNMERGED else given)})
    elif name == OWN or "/" in name or Path(name).is_dir():
        if name != OWN:
            model.load_merger(name)
        unknown = set(fields) - set(PLACES)
        if unknown:
            raise ValueError(
                f"merger {name!r}: of a saved merger {', '.join(PLACES)} may be set, not {unknown.pop()!r}."
            )
        MergerConfig(**{**model.config.merger_config.to_dict(), **fields})  # refuses values that cannot be
        model.config.merger_config = copy.deepcopy(model.config.merger_config)
        model.config.merger_config.update(fields)
        model.model.settle_mass()
    else:
        raise ValueError(
            f"merger {name!r} is neither a method ({', '.join(methods)}), nor a folder or Hub repo of a merger, nor "
            f"{OWN!r}."
        )
    if model.config.merger_config.question_aware and processor is not None:
        model.set_question_marks(processor)
    model.model.merger.eval()


def budgets_of(candidate: Candidate, budgets: list[int]) -> list[int | str]:
    """The budgets that a candidate is asked with: all tokens where it merges nothing."""
    return [ALL_TOKENS] if candidate.name == UNMERGED else list(budgets)
