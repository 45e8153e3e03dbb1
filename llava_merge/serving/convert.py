# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A whole checkpoint, of a stock LLaVA and a merger, without loading the LLaVA."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import find_adapter_config_file, logging

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.evaluation.candidates import (
    UNMERGED,
    checkpoints_of,
    parse_candidate,
    put_merger,
    text_towers_of,
)
from llava_merge.model.checkpoint_files import check_safetensors_files, refuse_missing_weights
from llava_merge.model.checkpoint_saving import (
    CONFIG,
    refuse_link_outside,
    refuse_output_in_input,
    save_at_once,
    save_code,
)
from llava_merge.model.merging_base import MERGING_METHODS
from llava_merge.serving.requests import check_servable
from llava_merge.serving.shards import tensors_of, weight_files, write_shards


logger = logging.get_logger(f"transformers.{__name__}")

WITHOUT_MASS = (
    "is untrained and converted with attention_mass=0, since servers cannot add a bias to the attention: it answers "
    "worse than with from_pretrained, where merged tokens weigh as their patches. `llava-merge evaluate "
    "--attention-mass 0` says how much; a merger that was trained without the mass loses little."
)
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of what is downloaded: no pickles, no code
READ = (*PATTERNS, "*/*.jinja")  # of a base: files whose content may get into the output, besides shards below
GENERATION_CONFIG = "generation_config.json"


def convert(
    base: str, output: Path, merger: str, num_merged_tokens: int | None = None, revision: str | None = None
) -> LlavaMergeConfig:
    """Writes a folder that loads as `from_pretrained(base, merger=merger)` does, with code and processor.

    A method that starts fresh gets no `attention_mass`, which servers cannot add; a warning says so. Weight files of
    the base are hard links where they can be; one that holds a projector that another one replaces is copied without.
    All at once or not at all.

    Args:
        base: Directory or Hub repo of a stock LLaVA, in safetensors.
        merger: Directory or Hub repo of a merger, or a method; `NAME:FIELD=VALUE,FIELD=VALUE` sets fields.
        num_merged_tokens: Tokens per image; default the merger's.
        revision: Of the base on the Hub.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: The base is no stock LLaVA or lacks weights, the merger does not fit it or cannot be served, or
            `output` is or holds one of them, or holds other files.
    """
    refuse_output_in_input(output, base, *checkpoints_of([merger]))
    refuse_full_folder(output)
    directory = find_base(base, revision)
    model, processor = make_hollow_model(directory, merger, num_merged_tokens)
    refuse_output_in_input(output, directory, *text_towers_of(model))
    merger_config = model.config.merger_config
    if merger_config.attention_mass is None:
        merger_config.attention_mass = 0.0
        if merger_config.merger_type != UNMERGED:
            logger.warning(f"{merger} {WITHOUT_MASS}")
    check_servable(model.config)
    files = weight_files(directory)
    own = name_as_saved(model, files)
    check_complete(model, base, files, own)
    write_bos_in_chats(processor)

    def write(folder: Path):
        write_shards(files, own, folder)
        custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        save_code(merger_config, folder)
        if (directory / GENERATION_CONFIG).is_file():
            shutil.copy(directory / GENERATION_CONFIG, folder)

    save_at_once(write, output)
    return model.config


def refuse_full_folder(output: Path):
    """Refuses to write into a folder that holds something else than an earlier checkpoint of this kind.

    Raises:
        ValueError: So it does.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        model_type = json.loads((output / CONFIG).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        model_type = None
    if model_type != LlavaMergeConfig.model_type:
        raise ValueError(f"{output} is no checkpoint of llava_merge, which could be replaced. Give a new folder.")


def write_bos_in_chats(processor: LlavaMergeProcessor):
    """Lets chat templates write the token that begins a prompt, where the tokenizer adds it to any text.

    Servers tokenize a chat without special tokens; the processor adds no second one.
    """
    tokenizer, templates = processor.tokenizer, processor.chat_template
    if not templates or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return

    def begun(template: str) -> str:
        writes = "bos_token" in template or tokenizer.bos_token in template
        return template if writes else "{{- bos_token }}" + template

    several = isinstance(templates, dict)
    processor.chat_template = {name: begun(each) for name, each in templates.items()} if several else begun(templates)


def find_base(base: str, revision: str | None) -> Path:
    """The folder of a LLaVA, downloaded where it is on the Hub.

    Raises:
        ValueError: A file of it is broken, or a link that leads out of it, or it is an adapter.
    """
    directory = Path(base)
    if not directory.is_dir():
        directory = Path(snapshot_download(base, revision=revision, allow_patterns=list(PATTERNS)))
    for file in (file for pattern in READ for file in directory.glob(pattern)):
        if file.suffix != ".safetensors":  # which are nothing but weights, on another disk maybe
            refuse_link_outside(directory, file)
    if find_adapter_config_file(str(directory)) is not None:
        raise ValueError(
            f"{base} holds an adapter, which convert would leave out. Merge it into its LLaVA, with merge_and_unload() "
            f"of PEFT, save that, and convert it."
        )
    check_safetensors_files(directory)
    return directory


def make_hollow_model(
    directory: Path, merger: str, num_merged_tokens: int | None
) -> tuple[LlavaMergeForConditionalGeneration, LlavaMergeProcessor]:
    """The model with real weights in the merger, and in a projector that came with it, alone; and its processor.

    Raises:
        ValueError: It is no stock LLaVA, or the merger does not fit it.
    """
    config = LlavaMergeConfig.from_pretrained(directory)
    stock = LlavaMergeConfig.get_config_dict(directory)[0].get("merger_config") is None
    if not stock:
        raise ValueError(
            f"{directory} has a merger already. Give the stock LLaVA that it was made of; to change the merger of a "
            f"model, load it, call model.load_merger(...), and save it."
        )
    config = LlavaMergeConfig.from_pretrained(directory, merger_config={"merger_type": "none"})
    dtype = config.dtype
    with torch.device("meta"):
        model = LlavaMergeForConditionalGeneration(config)
    processor = LlavaMergeProcessor.from_pretrained(directory)
    name, fields = parse_candidate(merger)
    put_merger(model, processor, name, fields, places={})
    if name in MERGING_METHODS and "attention_mass" not in fields:
        model.config.merger_config.attention_mass = None  # nobody has chosen what it is now
    if num_merged_tokens is None:
        num_merged_tokens = model.config.merger_config.num_merged_tokens
    if num_merged_tokens is not None:  # as of merger_type="none"
        model.set_num_merged_tokens(num_merged_tokens, processor)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.config.merger_config.dtype = dtype
    return model, processor


def name_as_saved(model: LlavaMergeForConditionalGeneration, files: list[Path]) -> dict[str, Tensor]:
    """The weights that the model really has, by the names that the files have for them."""
    saved = {name_in_model(model, name): name for file in files for name in tensors_of(file)}
    return {saved.get(name, name): tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}


def check_complete(model: LlavaMergeForConditionalGeneration, base: str, files: list[Path], own: dict[str, Tensor]):
    """Refuses a base that lacks weights.

    Raises:
        ValueError: So it does.
    """
    found = {name_in_model(model, name) for name in [*own, *(name for file in files for name in tensors_of(file))]}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    refuse_missing_weights(base, {without_level(name) for name in model.state_dict()} - found - tied)


def name_in_model(model: LlavaMergeForConditionalGeneration, name: str) -> str:
    """What the model calls a weight of a file, but for a level of the tower that not every release has."""
    return without_level(model._name_in_model(name))


def without_level(name: str) -> str:
    """The name of a weight of the tower as on transformers 5; remove when 4.57 is no longer supported."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")
