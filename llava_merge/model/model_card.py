# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Pushing with a model card."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from .compat import TRANSFORMERS_V5
from .configuration_llava_merge import LlavaMergeConfig, MergerConfig


SEVEN_B = "llava-hf/llava-1.5-7b-hf"  # in snippets
PUSH_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
TAG = "token-merging"  # "merge" means merged weights on the Hub

CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ kind[0] | upper }}{{ kind[1:] }}. It merges each image's visual tokens in CLIP space, before the multi-modal
projector, which then runs once, on the merged tokens.

| | |
|---|---|
| merger | `{{ merger.merger_type }}` |
| tokens per image | {{ merger.num_merged_tokens or "all" }} |
| trained with | {{ (merger.trained_num_tokens or ["not said"]) | join(", ") }} |
| question-aware | {{ "yes" if merger.question_aware else "no" }} |
| positions of merged tokens | {{ merger.position_ids }} |
| attention mass | {{ "1 where attention takes a bias" if merger.attention_mass is none else merger.attention_mass }} |
| width of the visual features | {{ merger.vision_dim }} |
| width of the language model | {{ merger.text_dim }} |

```python
{{ usage }}
```

{% if run %}## Training

| | |
|---|---|
{% for name, value in run.items() %}| {{ name }} | {{ value }} |
{% endfor %}
{% endif %}Made with `llava_merge`.
"""

MODEL_USAGE = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)"""

MERGER_USAGE = """from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor

base = "llava-hf/llava-1.5-7b-hf"  # or the LLaVA that the merger was made for
model = LlavaMergeForConditionalGeneration.from_pretrained(base, merger="{repo_id}")
processor = LlavaMergeProcessor.from_pretrained(base, num_merged_tokens=model.config.merger_config.num_merged_tokens)"""

ADAPTER_USAGE = """from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor

# with PEFT; on transformers 5.16 and 5.17 by PeftModel.from_pretrained(model of the base, "{repo_id}")
model = LlavaMergeForConditionalGeneration.from_pretrained("{repo_id}")
processor = LlavaMergeProcessor.from_pretrained("{repo_id}")"""

MERGER, MODEL, ADAPTER = "token merger for LLaVA", "LLaVA with a token merger", "adapter of a LLaVA with a token merger"
USAGE = {MERGER: MERGER_USAGE, MODEL: MODEL_USAGE, ADAPTER: ADAPTER_USAGE}


def push_arguments(kwargs: dict) -> dict:
    """Takes out of the `kwargs` of `save_pretrained` those that say what is pushed where."""
    return {name: kwargs.pop(name) for name in ("repo_id", *PUSH_OPTIONS) if name in kwargs}


def refuse_pickles(given: dict):
    """Refuses `safe_serialization=False` among the options of a save or push; transformers 5 writes nothing else.

    Raises:
        ValueError: It is there, on 4.57.
    """
    if not TRANSFORMERS_V5 and given.get("safe_serialization") is False:
        raise ValueError(
            "safe_serialization=False would write a pickle, which is never opened here. Leave it out; in "
            "TrainingArguments save_safetensors=False."
        )


def check_push_options(given: dict, known: tuple[str, ...] = PUSH_OPTIONS):
    """Refuses options of a push that it does not have, before anything is made on the Hub.

    Raises:
        ValueError: There is one, or a pickle is asked for.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}={given[unknown[0]]!r}: a push takes {', '.join(known)}. Leave it out.")
    refuse_pickles(given)


def prepare_repo(api: HfApi, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """Makes a repo, and its branch `revision`, where they do not exist; the full name of the repo."""
    repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def push_card_if_missing(config: MergerConfig | LlavaMergeConfig, repo_id: str, kind: str, push_kwargs: dict):
    """Creates the repo where needed and gives its branch a card where it has none; a user's card stays.

    Not for pull requests (`create_pr=True`), which may come from somebody who cannot write to the repo.
    """
    if push_kwargs.get("create_pr"):
        return
    api, revision = HfApi(token=push_kwargs.get("token")), push_kwargs.get("revision")
    repo_id = prepare_repo(api, repo_id, push_kwargs.get("private"), revision)
    if not api.file_exists(repo_id, "README.md", revision=revision):
        card = str(make_card(config, repo_id, kind)).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id, revision=revision)


def push_folder(
    folder: str | Path,
    repo_id: str,
    gone: list[str] | None = None,
    *,
    files: list[str] | None = None,
    kind: str = "token merger",
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **kwargs,
):
    """Uploads `files` of `folder`, default all, in one commit, which also deletes the files `gone` from the repo."""
    api = HfApi(token=token)
    if not create_pr:
        repo_id = prepare_repo(api, repo_id, private, revision)
    where = {"revision": revision, "create_pr": create_pr, "delete_patterns": gone or None, "allow_patterns": files}
    message = commit_message or f"Upload {kind}"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **where, **kwargs)


def make_card(
    config: MergerConfig | LlavaMergeConfig,
    repo_id: str,
    kind: str,
    base: str | None = None,
    run: dict[str, str] | None = None,
) -> ModelCard:
    """Model card of what is called `repo_id` on the Hub.

    Args:
        config: Of the merger, or of the LLaVA that has it.
        kind: MERGER, MODEL or ADAPTER.
        base: The LLaVA that it was made for, where that is known.
        run: What there is to say about its training, by name.
    """
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if kind == MODEL else None,
        tags=[TAG, "llava"],
        base_model=None if base is None or Path(base).exists() else base,
    )
    usage = USAGE[kind].format(repo_id=repo_id)
    return ModelCard.from_template(
        card_data,
        template_str=CARD_TEMPLATE,
        name=repo_id.split("/")[-1],
        kind=kind,
        merger=config if isinstance(config, MergerConfig) else config.merger_config,
        usage=usage if base is None else usage.replace(SEVEN_B, base),
        run=run,
    )
