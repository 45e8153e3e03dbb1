# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a run: the merger and the projector that is trained with it, a few MB each."""

import copy
import json
import re
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava_merge import LlavaMergeForConditionalGeneration, TokenMerger
from llava_merge.model.checkpoint_files import refusing_broken_file
from llava_merge.model.checkpoint_saving import PROJECTOR as PROJECTOR_FILE
from llava_merge.model.checkpoint_saving import remove_leftovers


WRITE_FAILED = re.compile(r"inline_container|PytorchStreamWriter|iostream|os error", re.IGNORECASE)  # no OSErrors
MERGER_FILE, STATE_FILE = "model.safetensors", "trainer_state.json"


@contextmanager
def naming_failed_writes(directory: str):
    """Makes an OSError of what torch and safetensors raise where a file cannot be written.

    Raises:
        OSError: One cannot.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not WRITE_FAILED.search(str(error)):
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{directory} cannot be written, maybe since the disk is full; what was saved before is whole. ({reason})"
        ) from error


def save_parts(
    model: LlavaMergeForConditionalGeneration,
    directory: str,
    with_projector: bool,
    state_dict: dict[str, Tensor] | None = None,
):
    """Writes the merger, and the projector if asked, as `model.save_merger` does.

    Args:
        state_dict: Weights of the whole model, where it holds only shards of them.
    """
    if state_dict is None:
        model.save_merger(directory, projector=with_projector)
        return
    merger = TokenMerger(copy.deepcopy(model.config.merger_config))
    merger.load_state_dict(weights_below(state_dict, "merger."))
    projector = None
    if with_projector:
        projector = type(model.model.multi_modal_projector)(model.config)
        projector.load_state_dict(weights_below(state_dict, "multi_modal_projector."))
    merger.save_pretrained(directory, projector=projector)


def weights_below(state_dict: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Those of a part of the model, as the part calls them."""
    return {key.partition(part)[2]: tensor for key, tensor in state_dict.items() if f".{part}" in f".{key}"}


def load_parts(model: LlavaMergeForConditionalGeneration, directory: str):
    """Puts the weights of [`save_parts`] into the model.

    Raises:
        ValueError: There are none, or a file is broken.
    """
    folder = Path(directory)
    parts: dict[str, nn.Module] = {MERGER_FILE: model.model.merger, PROJECTOR_FILE: model.model.multi_modal_projector}
    found = [name for name in parts if (folder / name).is_file()]
    if not found and not model.model.merger.method.training_free:
        raise ValueError(f"{directory} holds no {MERGER_FILE}, so that training cannot go on from it.")
    for name in found:
        with refusing_broken_file(folder / name):
            parts[name].load_state_dict(load_file(folder / name))


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint of a run that was written to its end; None where there is none.

    Trainer writes its state last, so one without it was broken off: the process was killed, or the disk full.
    """
    folders = sorted(
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit()
    )
    for _, folder in reversed(folders):
        if is_whole(folder):
            return str(folder)
    return None


def remove_broken_off(output_dir: str):
    """Removes what saves that were broken off have left in the folder of a run that goes on, and in its checkpoints."""
    root = Path(output_dir)
    for folder in (root, *root.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        remove_leftovers(folder)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True
