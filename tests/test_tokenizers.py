# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The tokens of a Llama tokenizer as files on the Hub have it, wherever a processor is read from, and on each release.

`data/processor_saved_by_4.57.6` and `..._5.24.0` are of these releases, by `data/save_processor.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from llava_merge import LlavaMergeConfig, LlavaMergeProcessor


pytestmark = pytest.mark.core

DATA = Path(__file__).parent / "data"
SAVED = [DATA / f"processor_saved_by_{release}" for release in ("4.57.6", "5.24.0")]
PROMPT = "USER: <image>\nwhat  is it"
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
# The space between "<image>" and the line break is the one that a tokenizer which is built anew loses.
TOKENS = ["<s>", *"▁USER:", "▁", "<image>", "▁", "<0x0A>", *"what", "▁", "▁", *"is", "▁", *"it"]


def hub_files(folder: Path) -> Path:
    """A stock LLaVA without weights, with the tokenizer files of llava-hf in small."""
    folder.mkdir()
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({*"▁USER:whatisit"})]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    names |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "padding_side": "left"}
    names |= {"additional_special_tokens": ["<image>"], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    sizes = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(sizes | {"processor_class": "LlavaProcessor"}))
    CLIPImageProcessor().save_pretrained(folder)
    tiny_config().save_pretrained(folder)
    return folder


def save_here(stock: Path, folder: Path):
    """A merged model's folder, but for its weights."""
    LlavaMergeConfig.from_pretrained(stock).save_pretrained(folder)
    LlavaMergeProcessor.from_pretrained(stock, num_merged_tokens=4).save_pretrained(folder)


def tokens(reader: type, folder: Path, **kwargs) -> list[str]:
    read = reader.from_pretrained(folder, **kwargs)
    tokenizer = read if reader is AutoTokenizer else read.tokenizer
    return tokenizer.convert_ids_to_tokens(tokenizer(PROMPT)["input_ids"])


@pytest.fixture
def stock(tmp_path) -> Path:
    return hub_files(tmp_path / "stock")


@pytest.mark.parametrize("reader", [LlavaProcessor, LlavaMergeProcessor])
def test_of_a_stock_folder(stock, reader):
    assert tokens(reader, stock) == TOKENS


@pytest.mark.parametrize("reader", [LlavaMergeProcessor, LlavaProcessor, AutoProcessor, AutoTokenizer])
def test_of_a_folder_that_was_saved(stock, tmp_path, reader):
    save_here(stock, tmp_path / "merged")
    assert tokens(reader, tmp_path / "merged", trust_remote_code=reader is AutoProcessor) == TOKENS


def test_of_files_that_were_copied_beside_a_merged_model(stock, tmp_path):
    shutil.copytree(stock, tmp_path / "copied")
    LlavaMergeConfig.from_pretrained(stock).save_pretrained(tmp_path / "copied")
    assert tokens(LlavaMergeProcessor, tmp_path / "copied") == TOKENS


@pytest.mark.parametrize("reader", [LlavaMergeProcessor, AutoTokenizer])
@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name.rpartition("_")[2])
def test_of_a_folder_that_another_release_saved(folder, reader):
    assert tokens(reader, folder) == TOKENS


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name.rpartition("_")[2])
def test_what_the_class_of_a_tokenizer_knew_is_in_its_files(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left" and tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert "<image>" in tokenizer.all_special_tokens


def test_a_processor_alone_writes_no_tokenizer(stock, tmp_path):
    LlavaMergeProcessor.from_pretrained(stock).to_json_file(tmp_path / "processor_config.json")
    assert not (tmp_path / "tokenizer_config.json").exists()
