# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Reading and writing of checkpoints: what is refused, what is written at once, and the model card."""

import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open


TAG = "token-merging"  # "merge" means merged weights on the Hub

CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A {{ kind }}. It merges each image's visual tokens in CLIP space, before the multi-modal projector, which then runs
once, on the merged tokens.

| | |
|---|---|
| merger | `{{ merger.merger_type }}` |
| tokens per image | {{ merger.num_merged_tokens or "all" }} |
| question-aware | {{ "yes" if merger.question_aware else "no" }} |
| width of the visual features | {{ merger.vision_dim }} |
| width of the language model | {{ merger.text_dim }} |

```python
{{ usage }}
```

Made with `llava_merge`.
"""

MODEL_USAGE = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)"""

MERGER_USAGE = """from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor

base = "llava-hf/llava-1.5-7b-hf"  # or the LLaVA that the merger was made for
model = LlavaMergeForConditionalGeneration.from_pretrained(base, merger="{repo_id}")
processor = LlavaMergeProcessor.from_pretrained(base, num_merged_tokens=model.config.merger_config.num_merged_tokens)"""


def check_safetensors_files(directory: str | os.PathLike):
    """Opens the header of each safetensors file in `directory`; does nothing where that is no local directory.

    Raises:
        ValueError: A file is truncated or corrupted; it is named.
    """
    for path in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({error}). Download or save the checkpoint again."
            ) from error


def check_adapter_is_safetensors(directory: str | os.PathLike):
    """Refuses a local PEFT adapter that only has pickled weights.

    Raises:
        ValueError: There is an adapter_model.bin and no adapter_model.safetensors.
    """
    directory = Path(directory)
    if (directory / "adapter_model.bin").exists() and not (directory / "adapter_model.safetensors").exists():
        raise ValueError(
            f"{directory / 'adapter_model.bin'} is a pickle, which is never opened here. Save the adapter again with "
            f"safe_serialization=True to get adapter_model.safetensors."
        )


def refuse_missing_weights(path: str, missing_keys):
    """Raises where a checkpoint lacked weights.

    Raises:
        ValueError: `missing_keys` is not empty; those weights are random now.
    """
    missing = sorted(missing_keys)
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{path} lacks weights of this model, which would stay random: {some}. Use a complete checkpoint of the "
            f"same architecture, or pass allow_missing_weights=True."
        )


def save_at_once(save, directory: str | os.PathLike):
    """Calls `save(path)` with a temporary directory beside `directory`, then moves the files there.

    A save that fails or is killed leaves `directory` as it was.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        save(temporary)
        directory.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, directory / file.name)


def push_card_if_missing(model, repo_id: str, usage: str, token: str | bool | None = None, **create_repo_kwargs) -> str:
    """Creates the repo where needed and gives it a card where it has none; a user's card stays. Returns the full id."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, exist_ok=True, **create_repo_kwargs).repo_id
    if not api.file_exists(repo_id, "README.md"):
        card = make_card(model, repo_id, usage)
        api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id)
    return repo_id


def make_card(model, repo_id: str, usage: str) -> ModelCard:
    """Model card of a merger, or of a LLaVA with one, that is called `repo_id` on the Hub."""
    is_merger = model.config.model_type == "llava_merger"
    merger = model.config if is_merger else model.config.merger_config
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=None if is_merger else "image-text-to-text",
        tags=[TAG, "llava"],
    )
    return ModelCard.from_template(
        card_data,
        template_str=CARD_TEMPLATE,
        name=repo_id.split("/")[-1],
        kind="token merger for LLaVA" if is_merger else "LLaVA with a token merger",
        merger=merger,
        usage=usage.format(repo_id=repo_id),
    )
