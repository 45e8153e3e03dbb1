# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Datasets of conversations: LLaVA-Instruct JSON, chat messages in files or on the Hub, whole or streamed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm
from transformers.utils import logging

from llava_merge.training.json_rows import read_json, stream_json
from llava_merge.training.samples import Sample, read_sample


logger = logging.get_logger(f"transformers.{__name__}")

SKIP, ERROR = "skip", "error"  # what is done about a row or picture that cannot be used


class ChatDataset(Dataset):
    """Samples by number, each with its pictures opened.

    Args:
        rows: Rows as [`read_sample`] takes them.
        source: File or dataset that they are from, for errors.
        image_folder: What image paths are relative to.
        on_broken_image: "skip" takes the next sample in the place of one with a missing or broken picture, and logs
            it; "error" raises.
        on_broken_row: The same, of a row that cannot be trained on.
        accepts: Whether a sample may be used, else the next is taken in its place.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        source: str,
        image_folder: str | Path = ".",
        on_broken_image: str = SKIP,
        accepts: Callable[[Sample], bool] | None = None,
        on_broken_row: str = ERROR,
    ):
        self.rows, self.source, self.image_folder = rows, source, Path(image_folder)
        self.on_broken_image, self.on_broken_row, self.accepts = on_broken_image, on_broken_row, accepts

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        """Row `index`, checked."""
        row = self.rows[index]
        return read_sample(row, sample_name(self.source, row, index), self.image_folder)

    def __getitem__(self, index: int) -> dict:
        """`{"sample", "pictures", "index", "num_skipped"}` of a sample, or of the next that can be used.

        Raises:
            ValueError: A picture cannot be opened and that is an error, or no sample can be used.
        """
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            row = self.rows[at]  # once: of a table, it is read from its file with the pictures' bytes
            found = usable(row, sample_name(self.source, row, at), self)
            if found is not None:
                return {**found, "index": at, "num_skipped": offset}
        raise ValueError(
            f"{self.source}: none of its {len(self)} samples can be used; why each was skipped is logged above. Look "
            f"at data.image_folder ({self.image_folder}) and data.max_length."
        )

    def check(self, progress: bool = True) -> "ChatDataset":
        """Reads every sample without its pictures; returns the dataset without the rows that are skipped.

        Raises:
            ValueError: One cannot be trained on, and that is an error; it is named. Or there is none that can.
        """
        good, num_left_out = [], 0
        for index in tqdm(range(len(self)), "checking samples", disable=not progress, mininterval=1):
            try:
                num_left_out += self.sample(index).num_left_out
                good.append(index)
            except ValueError as error:
                if self.on_broken_row == ERROR:
                    raise
                logger.warning(f"Skipped {error}")
        if num_left_out:
            logger.warning(
                f"{self.source}: {num_left_out} turns are left out, answers before the first question of their row or "
                f"questions after its last answer."
            )
        if not good:
            raise ValueError(f"{self.source} holds no samples{' that can be used' if len(self) else ''}.")
        if len(good) == len(self):
            return self
        logger.warning(f"{self.source}: {len(self) - len(good)} of {len(self)} rows are broken and left out.")
        return self.some(good)

    def images(self) -> Iterator:
        """The pictures of all samples, not opened."""
        for index in range(len(self)):
            yield from self.sample(index).images

    def first(self, count: int) -> "ChatDataset":
        """The first `count` samples, or all where there are fewer."""
        return self.some(range(min(count, len(self))))

    def some(self, indices: Iterable[int]) -> "ChatDataset":
        """The samples of these numbers."""
        selects = hasattr(self.rows, "select")  # a table that is not in memory
        rows = self.rows.select(indices) if selects else [self.rows[index] for index in indices]
        given = self.image_folder, self.on_broken_image, self.accepts, self.on_broken_row
        return ChatDataset(rows, self.source, *given)


class ChatStream(IterableDataset):
    """Samples one after the other, of a dataset that is read as it comes; the arguments are [`ChatDataset`]'s."""

    def __init__(self, rows, source: str, image_folder=".", on_broken_image=SKIP, accepts=None, on_broken_row=ERROR):
        self.rows, self.source, self.image_folder = rows, source, Path(image_folder)
        self.on_broken_image, self.on_broken_row, self.accepts = on_broken_image, on_broken_row, accepts

    def set_epoch(self, epoch: int):
        """Shuffles anew."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        num_skipped = 0
        for index, row in enumerate(self.rows):
            found = usable(row, sample_name(self.source, row, index), self)
            if found is None:
                num_skipped += 1
                continue
            yield {**found, "index": index, "num_skipped": num_skipped}
            num_skipped = 0


def usable(row: dict, name: str, dataset: "ChatDataset | ChatStream") -> dict | None:
    """A sample with its pictures; None where it has to be skipped, which is logged.

    Raises:
        ValueError: The row or a picture cannot be used, and that is an error.
    """
    rule = dataset.on_broken_row
    try:
        sample = read_sample(row, name, dataset.image_folder)
        if dataset.accepts is not None and not dataset.accepts(sample):
            logger.warning(f"Skipped {name}: it is longer than data.max_length.")
            return None
        rule = dataset.on_broken_image
        return {"sample": sample, "pictures": sample.open_images()}
    except ValueError as error:
        if rule == ERROR:
            raise
        logger.warning(f"Skipped {error}")
        return None


def sample_name(source: str, row: dict, index: int) -> str:
    """What errors call a row: by its id, or its number counted from 1."""
    return f"{source}, sample {row['id']!r}" if row.get("id") is not None else f"{source}, sample {index + 1}"


def read_dataset(
    path: str,
    split: str = "train",
    image_folder: str | Path | None = None,
    streaming: bool = False,
    on_broken_image: str = SKIP,
    on_broken_row: str = ERROR,
) -> ChatDataset | ChatStream:
    """The dataset at `path`: a JSON, JSONL or parquet file, a folder with such files, or a dataset on the Hub.

    Args:
        split: Of a dataset on the Hub or of a folder.
        image_folder: What image paths are relative to, default the folder of the file.
        streaming: Read it as it comes.
        on_broken_image: See [`ChatDataset`].
        on_broken_row: See [`ChatDataset`].

    Raises:
        ValueError: It cannot be read.
    """
    rules = {"on_broken_image": on_broken_image, "on_broken_row": on_broken_row}
    file = Path(path)
    folder = Path(image_folder) if image_folder is not None else (file if file.is_dir() else file.parent)
    if image_folder is not None and not folder.is_dir():
        raise ValueError(f"data.image_folder={str(image_folder)!r}: there is no such folder.")
    with naming_what_cannot_be_read(path):
        files = [file] if file.suffix in (".json", ".jsonl") else json_files_in(path, split)
    if files and not streaming:
        return ChatDataset([row for each in files for row in read_json(each)], path, folder, **rules)
    if any(each.suffix == ".json" for each in files):
        raise ValueError(f"data.streaming: {path} is one JSON list, which is read whole; use JSONL or parquet.")
    with naming_what_cannot_be_read(path):
        rows = without_decoding(load_table(path, split, streaming, [*map(str, files)]))
    return (ChatStream if streaming else ChatDataset)(rows, path, folder, **rules)


def json_files_in(path: str, split: str) -> list[Path]:
    """The files of a split of a folder where all of them are JSON; none of another folder, or of something else."""
    files = [Path(each) for each in data_files_of(path).get(split, ())] if Path(path).is_dir() else []
    return files if all(each.suffix in (".json", ".jsonl") for each in files) else []


def load_table(path: str, split: str, streaming: bool, files: list[str]):
    """A dataset of the datasets library, or a stream of `files` of lines."""
    from datasets import IterableDataset as Stream  # slow to import
    from datasets import load_dataset
    from pyarrow.parquet import read_metadata

    file = Path(path)
    if file.suffix in (".jsonl", ".parquet") and not file.is_file():
        raise FileNotFoundError("there is no such file")
    if files:
        return Stream.from_generator(stream_json, gen_kwargs={"files": files})
    if file.suffix == ".parquet":
        if not read_metadata(file).num_rows:
            raise ValueError("it holds no samples")
        return load_dataset("parquet", data_files=path, split="train", streaming=streaming)
    if file.is_file():
        raise ValueError(f"{file.suffix or 'a file without an extension'} is not read")
    return load_dataset(path, split=split, streaming=streaming)


@contextmanager
def naming_what_cannot_be_read(path: str):
    """Names the dataset in what the library of its format, or the Hub, raises inside.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        yield
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"data: {path!r} cannot be read: {reason}. Give a .json, .jsonl or .parquet file, a folder of them, or a "
            f"dataset on the Hub with its split."
        ) from error


def data_files_of(folder: str) -> dict[str, list[str]]:
    """The files of each split of a folder, as the datasets library finds them."""
    from datasets import load_dataset_builder  # slow to import

    return load_dataset_builder(folder).config.data_files or {}


def files_of_dataset(path: str) -> list[str]:
    """The files that [`read_dataset`] reads: `path`, or those of a folder that the datasets library takes."""
    if not Path(path).is_dir():
        return [path]
    return [file for files in data_files_of(path).values() for file in files]


def without_decoding(rows):
    """A table of the datasets library with its images as bytes or paths, so that a broken one does not end a loop."""
    from datasets import Image, List

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows
