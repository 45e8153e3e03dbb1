# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Pushing of a folder that was saved: a merger, a LLaVA with one, or an adapter."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import find_adapter_config_file

from llava_merge.evaluation.cards import add_evaluation, find_merger_of_report
from llava_merge.evaluation.fingerprints import check_is_of_report, is_norm_of_text
from llava_merge.model.checkpoint_files import check_safetensors_files
from llava_merge.model.checkpoint_loading import read_checkpoint
from llava_merge.model.checkpoint_saving import CONFIG, PROJECTOR, refuse_link_outside, replaced_weights
from llava_merge.model.configuration_llava_merge import LlavaMergeConfig, MergerConfig
from llava_merge.model.merging_base import find_merging_method
from llava_merge.model.model_card import ADAPTER, MERGER, MODEL, make_card, prepare_repo
from llava_merge.serving.shards import weight_files


ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
NOT_PUSHED = ("*.bin", "*.pt", "*.pth", "*.pkl", "trainer_state.json")  # pickles, as Trainer writes some too


@dataclass(frozen=True)
class SavedFolder:
    """A folder with a checkpoint.

    Attributes:
        kind: What it holds, as cards call it.
        config: Of the merger, or of the LLaVA.
        base: The LLaVA of an adapter.
    """

    path: Path
    kind: str
    config: MergerConfig | LlavaMergeConfig
    base: str | None = None

    @classmethod
    def read(cls, path: Path) -> "SavedFolder":
        """What is at a path.

        Raises:
            ValueError: Nothing that this package saves, or a file of it is broken.
        """
        if not path.is_dir():
            raise ValueError(f"{path}: there is no such folder. Save a model or merger first, with save_pretrained.")
        check_safetensors_files(path)
        is_adapter = find_adapter_config_file(str(path)) is not None
        if not is_adapter and not (path / CONFIG).is_file():
            raise ValueError(f"{path} has no {CONFIG}. Give the folder of a merger, a LLaVA with one, or an adapter.")
        if is_adapter:
            checkpoint = read_checkpoint(str(path), {})
            if checkpoint.adapter_merger is None:
                raise ValueError(f"{path} is an adapter without a merger; push it with PEFT.")
            return cls(path, ADAPTER, MergerConfig(**checkpoint.adapter_merger), checkpoint.adapter_base)
        model_type = PretrainedConfig.get_config_dict(path)[0].get("model_type")
        for kind, config in ((MERGER, MergerConfig), (MODEL, LlavaMergeConfig)):
            if model_type == config.model_type:
                return cls(path, kind, config.from_pretrained(path))
        what = f"holds a {model_type!r}" if model_type else f"has a {CONFIG} without a model_type"
        raise ValueError(f"{path} {what}, not a merger or a LLaVA with one. Give the folder of one.")

    def files(self) -> list[str]:
        """What is pushed, by its path in the folder: no pickles, hidden files or training states.

        Raises:
            ValueError: A file is a link that leads out of the folder.
        """
        files = {file.relative_to(self.path): file for file in sorted(self.path.rglob("*")) if file.is_file()}
        pushed = [
            name
            for name in files
            if not any(part.startswith((".", "checkpoint-", "__pycache__", "runs")) for part in name.parts)
            and not any(fnmatch(name.name, pattern) for pattern in NOT_PUSHED)
        ]
        for name in pushed:
            refuse_link_outside(self.path, files[name])
        return [name.as_posix() for name in pushed]

    @property
    def merger_config(self) -> MergerConfig:
        """Configuration of its merger."""
        return self.config.merger_config if self.kind == MODEL else self.config

    @property
    def holds_model(self) -> bool:
        """Whether it holds a whole LLaVA."""
        return self.kind == MODEL

    @property
    def has_projector(self) -> bool:
        """Whether it holds a projector that was trained with the merger."""
        return self.kind == MERGER and self.config.has_projector

    def merger_weights(self) -> dict[str, Tensor]:
        """Weights of its merger, by the names that they have in it."""
        if find_merging_method(self.merger_config).training_free:
            return {}
        if self.kind == MERGER:
            return self._weights(lambda name: True)
        own = self._weights(lambda name: "merger." in name)
        return {name.partition("merger.")[2]: weight for name, weight in own.items()}

    def projector_weights(self) -> dict[str, Tensor]:
        """Weights of the projector that was trained with the merger, by the names that they have in it."""
        return load_file(self.path / PROJECTOR)

    def text_norms(self) -> dict[str, Tensor]:
        """Weights of the norms of the language model."""
        return self._weights(is_norm_of_text)

    def _weights(self, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The weights of the names that are wanted."""
        weights = {}
        for file in [self.path / ADAPTER_WEIGHTS] if self.kind == ADAPTER else weight_files(self.path):
            with safe_open(file, framework="pt") as tensors:
                names = filter(is_wanted, tensors.keys())
                weights |= {name: tensors.get_tensor(name) for name in names}
        return weights


def push_directory(
    directory: Path,
    repo_id: str,
    report: dict | None = None,
    merger: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """Pushes a folder in one commit, with a card; weights that the folder does not have are removed from the repo.

    Args:
        directory: As `save_pretrained`, `save_merger` or `llava-merge train` wrote it.
        repo_id: Repo on the Hub, made where it does not exist.
        report: report.json of an evaluation, for the card.
        merger: Which of the report's mergers the folder is; default the only one.
        private: For a new repo.
        revision: Branch, made where it does not exist.
        create_pr: Open a pull request instead.
        token: Of the Hub; default the one that was logged in with.

    Raises:
        ValueError: The folder holds nothing that can be pushed, or a link out of it; or the report has no such merger,
            or is of another merger than the folder's.
    """
    saved, api = SavedFolder.read(Path(directory)), HfApi(token=token)
    files = saved.files()  # before anything is made on the Hub
    if report is not None:
        merger = find_merger_of_report(report, merger)
        check_is_of_report(saved, report, merger)
    if not create_pr:
        repo_id = prepare_repo(api, repo_id, private, revision)
    there = api.list_repo_files(repo_id, revision=None if create_pr else revision)
    card = find_card(saved, repo_id, CARD in there, api, None if create_pr else revision)
    if report is not None:
        add_evaluation(card, report, merger)
    stale = replaced_weights(files, there, (PROJECTOR,) if saved.kind == MERGER else ())
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, saved.path / name) for name in files if name != CARD),
            CommitOperationAdd(CARD, str(card).encode()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=f"Upload {saved.kind}",
        revision=revision,
        create_pr=create_pr,
    )


def find_card(saved: SavedFolder, repo_id: str, has_card: bool, api: HfApi, revision: str | None) -> ModelCard:
    """The card of the folder, else of the repo, else a new one."""
    if (saved.path / CARD).is_file():
        return ModelCard.load(saved.path / CARD)
    if has_card:
        return ModelCard.load(api.hf_hub_download(repo_id, CARD, revision=revision))
    return make_card(saved.config, repo_id, saved.kind, saved.base)
