# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Pushing with a model card."""

from huggingface_hub import HfApi, ModelCard, ModelCardData


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
| trained with | {{ (merger.trained_num_tokens or ["not said"]) | join(", ") }} |
| question-aware | {{ "yes" if merger.question_aware else "no" }} |
| positions of merged tokens | {{ merger.position_ids }} |
| attention mass | {{ merger.attention_mass }} |
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


def push_card_if_missing(model, repo_id: str, usage: str, push_kwargs: dict):
    """Creates the repo where needed and gives it a card where it has none; a user's card stays.

    Not for pull requests (`create_pr=True`), which may come from somebody who cannot write to the repo.
    """
    if push_kwargs.get("create_pr"):
        return
    api = HfApi(token=push_kwargs.get("token"))
    repo_id = api.create_repo(repo_id, exist_ok=True, private=push_kwargs.get("private")).repo_id
    if not api.file_exists(repo_id, "README.md"):
        card = make_card(model, repo_id, usage)
        api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id)


def push_folder(
    folder: str,
    repo_id: str,
    gone: list[str],
    *,
    commit_message: str = "Upload token merger",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **kwargs,
):
    """Uploads the files of `folder` in one commit, which also deletes the files `gone` from the repo."""
    api = HfApi(token=token)
    if not create_pr:
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    where = {"revision": revision, "create_pr": create_pr, "delete_patterns": gone or None}
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, **where, **kwargs)


def make_card(model, repo_id: str, usage: str, run: dict[str, str] | None = None) -> ModelCard:
    """Model card of a merger, or of a LLaVA with one, that is called `repo_id` on the Hub.

    Args:
        run: What there is to say about its training, by name.
    """
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
        run=run,
    )
