# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Which merger a report is about: what is particular to its configuration, and hashes of its weights."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from llava_merge import MergerConfig, TokenMerger
from llava_merge.configuration_llava_merge import BUDGET, QUESTION_MARKS, own_merger_fields
from llava_merge.evaluation.candidates import Candidate


MERGER_HASH = "merger_sha256"


def describe_merger(candidate: Candidate) -> dict:
    """What is particular to a merger, with hashes of its weights: alone, and with those of its projector."""
    merger, projector = [*candidate.merger.parameters()], [*candidate.projector.parameters()]
    hashes = {MERGER_HASH: hash_of(merger), "sha256": hash_of([*merger, *projector])}
    return {**particular_fields(candidate.config), **hashes}


def particular_fields(config: MergerConfig) -> dict:
    """Fields of a merger other than the default, without its budget."""
    widths = {name: getattr(config, name) for name in ("vision_dim", "text_dim", "tower_dim")}
    fields, default = config.to_dict(), MergerConfig(**widths).to_dict()
    described = own_merger_fields() - {*BUDGET, *QUESTION_MARKS, "query_grid"}
    particular = {name: fields[name] for name in fields if name in described and fields[name] != default[name]}
    return {"merger_type": config.merger_type, "position_ids": config.position_ids, **particular}


def hash_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values of tensors, as float32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_is_of_report(config: MergerConfig, weights: dict[str, Tensor], report: dict, name: str):
    """Compares a merger with the one that a report is about.

    Args:
        config: Of the merger.
        weights: By the names that they have in the merger.
        report: What is in a report.json of `llava-merge evaluate`.
        name: What the report calls its merger.

    Raises:
        ValueError: They differ, or the report does not say which weights it is about.
    """
    described = report.get("candidates", {}).get(name, {})
    if MERGER_HASH not in described:
        raise ValueError(f"The report does not say which weights its merger {name!r} had. Evaluate the folder again.")
    merger = TokenMerger(config)
    merger.load_state_dict(weights)
    merger = merger.to(getattr(torch, report["protocol"]["dtype"]))
    found = {**particular_fields(config), MERGER_HASH: hash_of(merger.parameters())}
    others = [key for key in {**found, **described} if key != "sha256" and found.get(key) != described.get(key)]
    if others:
        differences = "; ".join(f"{key}: {described.get(key)!r} there, {found.get(key)!r} here" for key in others)
        raise ValueError(
            f"The report's merger {name!r} is another than the folder's ({differences}). Evaluate the folder."
        )
