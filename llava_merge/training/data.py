# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Datasets of conversations: LLaVA-Instruct JSON, chat messages in files or on the Hub, whole or streamed."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm
from transformers.utils import logging

from llava_merge.training.samples import Sample, read_sample


logger = logging.get_logger(__name__)

LOADERS = {".jsonl": "json", ".parquet": "parquet"}


class ChatDataset(Dataset):
    """Samples by number, each with its pictures opened.

    Args:
        rows: Rows as [`read_sample`] takes them.
        source: File or dataset that they are from, for errors.
        image_folder: What image paths are relative to.
        on_broken_image: "skip" takes the next sample in the place of one with a missing or broken picture, and logs
            it; "error" raises.
        accepts: Whether a sample may be used, else the next is taken in its place.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        source: str,
        image_folder: Path = Path("."),
        on_broken_image: str = "skip",
        accepts: Callable[[Sample], bool] | None = None,
    ):
        self.rows, self.source, self.image_folder = rows, source, image_folder
        self.on_broken_image, self.accepts = on_broken_image, accepts

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        """Row `index`, checked."""
        row = self.rows[index]
        return read_sample(row, sample_name(self.source, row, index), self.image_folder)

    def __getitem__(self, index: int) -> dict:
        """`{"sample", "pictures", "index", "num_skipped"}` of a sample, or of the next that can be used.

        Raises:
            ValueError: A picture cannot be opened and `on_broken_image` is "error", or no sample can be used.
        """
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            found = usable(self.sample(at), at, self)
            if found is not None:
                return {**found, "num_skipped": offset}
        raise ValueError(f"{self.source}: of its {len(self)} samples none has pictures that can be opened.")

    def check(self, progress: bool = True):
        """Reads every sample without its pictures.

        Raises:
            ValueError: One cannot be trained on; it is named.
        """
        if not len(self):
            raise ValueError(f"{self.source} holds no samples.")
        for index in tqdm(range(len(self)), "checking samples", disable=not progress, mininterval=1):
            self.sample(index)

    def images(self) -> Iterator:
        """The pictures of all samples, not opened."""
        for index in range(len(self)):
            yield from self.sample(index).images

    def first(self, count: int) -> "ChatDataset":
        """The first `count` samples, or all where there are fewer."""
        rows = [self.rows[index] for index in range(min(count, len(self)))]
        return ChatDataset(rows, self.source, self.image_folder, self.on_broken_image, self.accepts)


class ChatStream(IterableDataset):
    """Samples one after the other, of a dataset that is read as it comes; the arguments are [`ChatDataset`]'s."""

    def __init__(self, rows, source: str, image_folder: Path, on_broken_image: str = "skip", accepts=None):
        self.rows, self.source, self.image_folder = rows, source, image_folder
        self.on_broken_image, self.accepts = on_broken_image, accepts

    def set_epoch(self, epoch: int):
        """Shuffles anew."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        num_skipped = 0
        for index, row in enumerate(self.rows):
            sample = read_sample(row, sample_name(self.source, row, index), self.image_folder)
            found = usable(sample, index, self)
            if found is None:
                num_skipped += 1
                continue
            yield {**found, "num_skipped": num_skipped}
            num_skipped = 0


def usable(sample: Sample, index: int, dataset: "ChatDataset | ChatStream") -> dict | None:
    """A sample with its pictures; None where it has to be skipped, which is logged."""
    if dataset.accepts is not None and not dataset.accepts(sample):
        logger.warning(f"Skipped {sample.name}: it is longer than data.max_length.")
        return None
    try:
        return {"sample": sample, "pictures": sample.open_images(), "index": index}
    except ValueError as error:
        if dataset.on_broken_image == "error":
            raise
        logger.warning(f"Skipped {error}")
        return None


def sample_name(source: str, row: dict, index: int) -> str:
    """What errors call a row: by its id, or its number counted from 1, which is the line of a JSONL file."""
    return f"{source}, sample {row['id']!r}" if row.get("id") is not None else f"{source}, sample {index + 1}"


def read_dataset(
    path: str,
    split: str = "train",
    image_folder: str | Path | None = None,
    streaming: bool = False,
    on_broken_image: str = "skip",
) -> ChatDataset | ChatStream:
    """The dataset at `path`: a JSON, JSONL or parquet file, a folder with such files, or a dataset on the Hub.

    Args:
        split: Of a dataset on the Hub or of a folder.
        image_folder: What image paths are relative to, default the folder of the file.
        streaming: Read it as it comes.
        on_broken_image: See [`ChatDataset`].

    Raises:
        ValueError: It cannot be read.
    """
    file = Path(path)
    folder = Path(image_folder) if image_folder is not None else (file if file.is_dir() else file.parent)
    if image_folder is not None and not folder.is_dir():
        raise ValueError(f"data.image_folder={str(image_folder)!r}: there is no such folder.")
    if file.suffix == ".json":
        if streaming:
            raise ValueError(f"data.streaming: {path} is one JSON list, which is read whole; use JSONL or parquet.")
        return ChatDataset(read_json(file), path, folder, on_broken_image)
    from datasets import load_dataset  # slow to import

    try:
        if file.suffix in LOADERS:
            if not file.is_file():
                raise FileNotFoundError("there is no such file")
            rows = load_dataset(LOADERS[file.suffix], data_files=str(file), split="train", streaming=streaming)
        else:
            rows = load_dataset(path, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"data: {path!r} cannot be read: {reason}. Give a .json, .jsonl or .parquet file, a folder of them, or a "
            f"dataset on the Hub with its split."
        ) from error
    kind = ChatStream if streaming else ChatDataset
    return kind(without_decoding(rows), path, folder, on_broken_image)


def files_of_dataset(path: str) -> list[str]:
    """The files that [`read_dataset`] reads: `path`, or those of a folder that the datasets library takes."""
    if not Path(path).is_dir():
        return [path]
    from datasets import load_dataset_builder  # slow to import

    return [file for files in (load_dataset_builder(path).config.data_files or {}).values() for file in files]


def read_json(file: Path) -> list[dict]:
    """The rows of a JSON list.

    Raises:
        ValueError: There is no such file, or it is no list of objects.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"data: {str(file)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"data: {str(file)!r} is no JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data: {str(file)!r} holds no list of samples; LLaVA-Instruct JSON is a list of objects.")
    return rows


def without_decoding(rows):
    """A table of the datasets library with its images as bytes or paths, so that a broken one does not end a loop."""
    from datasets import Image, List

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows
