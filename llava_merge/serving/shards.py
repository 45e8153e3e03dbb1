# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Weight files of a checkpoint, linked or copied as they are, without loading them."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as WEIGHTS

from llava_merge.model.checkpoint_files import read_index


CHUNK = 1 << 24  # bytes copied at once


def read_header(path: Path) -> tuple[dict, int]:
    """What a safetensors file says of its tensors, by name, and where their bytes begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a checkpoint, in order: those that `from_pretrained` takes, model.safetensors before an index.

    Raises:
        ValueError: There is none, or one that the index names is not there, or not in this folder.
    """
    index, names = directory / INDEX, [WEIGHTS]
    if index.is_file() and not (directory / WEIGHTS).is_file():
        names = sorted({*read_index(index).values()})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {', '.join(missing[:3])}: a checkpoint with safetensors is needed.")
    return [directory / name for name in names]


def write_shards(files: list[Path], own: dict[str, Tensor], directory: Path):
    """Puts weight files and weights of one's own into a folder, with an index.

    Files that hold a weight of `own` are written anew without it; the others are hard links where they can be.
    """
    count, weight_map, num_bytes = len(files) + bool(own), {}, 0
    kept = {file: [name for name in tensors_of(file) if name not in own] for file in files}
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, disable=None) as bar:
        for number, (file, names) in enumerate(kept.items(), 1):
            target = directory / f"model-{number:05}-of-{count:05}.safetensors"
            if len(names) == len(tensors_of(file)):
                link_or_copy(file.resolve(), target, bar.update)
            else:
                copy_without(file, target, names, bar.update)
            weight_map |= dict.fromkeys(names, target.name)
            num_bytes += target.stat().st_size
    if own:
        target = directory / f"model-{count:05}-of-{count:05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, target, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, target.name)
        num_bytes += target.stat().st_size
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_of(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file."""
    return [name for name in read_header(file)[0] if name != "__metadata__"]


def link_or_copy(source: Path, target: Path, progress: Callable[[int], object]):
    """A hard link, or a copy where there can be none, as between two disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    progress(source.stat().st_size)


def copy_without(source: Path, target: Path, names: list[str], progress: Callable[[int], object]):
    """A safetensors file with some of the tensors of another, copied byte by byte, in the order of their bytes."""
    header, start = read_header(source)
    names = sorted(names, key=lambda name: header[name]["data_offsets"])
    described, end = {"__metadata__": header.get("__metadata__", {"format": "pt"})}, 0
    for name in names:
        first, last = header[name]["data_offsets"]
        described[name] = {**header[name], "data_offsets": [end, end + last - first]}
        end += last - first
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            first, last = header[name]["data_offsets"]
            reader.seek(start + first)
            copy_bytes(reader, writer, last - first)
            progress(last - first)


def copy_bytes(reader, writer, number: int):
    """Copies a number of bytes between open files."""
    while number:
        chunk = reader.read(min(CHUNK, number))
        if not chunk:
            raise ValueError(f"{reader.name} is truncated. Download or save the checkpoint again.")
        writer.write(chunk)
        number -= len(chunk)
