# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Which model and merger a report is about: what is particular to their configurations, and hashes of weights."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llava_merge import LlavaMergeForConditionalGeneration, MergerConfig, TokenMerger
from llava_merge.evaluation.candidates import Candidate
from llava_merge.model.checkpoint_saving import merger_of_projector
from llava_merge.model.configuration_llava_merge import BUDGET, QUESTION_MARKS, own_merger_fields


WIDTHS = ("vision_dim", "text_dim", "tower_dim")
MERGER_HASH, PROJECTOR_HASH, TEXT_HASH = "merger_sha256", "projector_sha256", "language_model_sha256"


def describe_merger(candidate: Candidate, model: LlavaMergeForConditionalGeneration) -> dict:
    """What is particular to a merger in a model, with hashes of weights.

    Of those of the merger, of a projector that came with it, and of both together with the model's own projector.
    """
    merger, projector = [*candidate.merger.parameters()], [*candidate.projector.parameters()]
    mass = {} if candidate.config.merger_type == "none" else {"attention_mass": candidate.attention_mass(model)}
    came_with = merger_of_projector(candidate.projector) is not None
    return {
        **particular_fields(candidate.config),
        **mass,
        MERGER_HASH: hash_of(merger),
        PROJECTOR_HASH: hash_by_name(candidate.projector.state_dict()) if came_with else None,
        "sha256": hash_of([*merger, *projector]),
    }


def particular_fields(config: MergerConfig) -> dict:
    """Fields of a merger other than the default, without its budget; its width always."""
    fields, default = config.to_dict(), MergerConfig(**{name: getattr(config, name) for name in WIDTHS}).to_dict()
    described = own_merger_fields() - {*BUDGET, *QUESTION_MARKS, "query_grid"}
    particular = {name: fields[name] for name in fields if name in described and fields[name] != default[name]}
    always = {name: fields[name] for name in ("merger_type", "position_ids", "vision_dim")}
    return {**always, **particular}


def hash_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values of tensors, as float32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def hash_by_name(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights in the order of their names."""
    return hash_of(weights[name] for name in sorted(weights))


def hash_of_text_model(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the norms of the language model among the `weights` of a LLaVA, whatever a release calls them."""
    norms = (hash_of([weight]) for name, weight in weights.items() if is_norm_of_text(name))
    return hashlib.sha256("".join(sorted(norms)).encode()).hexdigest()


def is_norm_of_text(name: str) -> bool:
    """Whether a weight of a LLaVA is of a norm of its language model."""
    return "language_model" in name and "norm" in name


def check_is_of_report(saved, report: dict, name: str):
    """Compares a folder with the merger that a report is about.

    Args:
        saved: A [`SavedFolder`].
        report: What is in a report.json of `llava-merge evaluate`.
        name: What the report calls its merger.

    Raises:
        ValueError: They differ, or the report does not say which weights it is about.
    """
    described = report.get("candidates", {}).get(name, {})
    dtype, config = getattr(torch, str(report["protocol"].get("dtype")), None), saved.merger_config
    if MERGER_HASH not in described or TEXT_HASH not in report or not isinstance(dtype, torch.dtype):
        raise ValueError(f"The report does not say which weights its merger {name!r} had. Evaluate the folder again.")
    merger = TokenMerger(config)
    merger.load_state_dict(saved.merger_weights())
    found = {
        **particular_fields(config),
        MERGER_HASH: hash_of(merger.to(dtype).parameters()),
        PROJECTOR_HASH: hash_by_name(as_dtype(saved.projector_weights(), dtype)) if saved.has_projector else None,
    }
    mass = {"attention_mass": described.get("attention_mass")} if config.attention_mass is None else {}
    found, described = {**found, **mass}, {key: value for key, value in described.items() if key != "sha256"}
    if saved.holds_model:
        described[TEXT_HASH] = report[TEXT_HASH]
        found[TEXT_HASH] = hash_of_text_model(as_dtype(saved.text_norms(), dtype))
    others = [key for key in {**found, **described} if found.get(key) != described.get(key)]
    if others:
        differences = "; ".join(f"{key}: {described.get(key)!r} there, {found.get(key)!r} here" for key in others)
        raise ValueError(
            f"The report's merger {name!r} is another than the folder's ({differences}). Evaluate the folder itself."
        )


def as_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as a model of that dtype has them."""
    return {name: weight.to(dtype) for name, weight in weights.items()}
