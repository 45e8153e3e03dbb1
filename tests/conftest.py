# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Tiny random LLaVAs, built offline. Weights are scaled up so that every picture and question changes the output."""

import importlib.util
import json
import os
import shutil
import signal
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny

import pytest
import torch
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.utils import logging

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration
from llava_merge.model.compat import TRANSFORMERS_VERSION


logging.enable_propagation()  # to caplog
WORDS = (
    "<pad> <s> </s> <unk> <image> USER: ASSISTANT: what color is the star ? red blue how many circles are there".split()
)
IMAGE_ID, PAD_ID, BOS_ID, EOS_ID = WORDS.index("<image>"), 0, 1, 2
USER_ID, ANSWER_ID = WORDS.index("USER:"), WORDS.index("ASSISTANT:")
FIRST_WORD_ID = WORDS.index("what")
NUM_PATCHES = 36  # 6 × 6
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
    "{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--fuzz-cases", type=int, default=2000, help="random cases of tests/test_fuzz.py, default 2000")


def load_example(name: str):
    """A script of examples/, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(tower: str = "clip", text_hidden_size: int = 64, **kwargs) -> LlavaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 84, "patch_size": 14}
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](**sizes, num_hidden_layers=3)
    text = LlamaConfig(
        hidden_size=text_hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS) + 8,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=2,
        max_position_embeddings=1024,
    )
    kwargs.setdefault("vision_feature_select_strategy", "default" if tower == "clip" else "full")
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=NUM_PATCHES, **kwargs
    )


def scale_up(model: torch.nn.Module, merger: bool = False) -> torch.nn.Module:
    """Random weights large enough that differences survive; the merger's only if `merger`, for it starts special."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "merger" in name and not merger:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max([1, *parameter.shape[-1:]]) ** 0.5)
    return model.eval()


def tiny_stock(tower: str = "clip", **kwargs) -> LlavaForConditionalGeneration:
    return scale_up(LlavaForConditionalGeneration(tiny_config(tower, **kwargs)))


def used_weights(stock: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a stock LLaVA that its features depend on: not those of the tower's last layer."""
    return {key: tensor for key, tensor in stock.state_dict().items() if "encoder.layers.2." not in key}


def tiny_model(merger_config: dict, tower: str = "clip", train_merger: bool = False, **kwargs):
    """A llava_merge model with the weights of `tiny_stock`; `train_merger` gives the merger random weights."""
    stock_config = tiny_config(tower, **kwargs).to_dict()
    stock_config.pop("model_type")
    model = LlavaMergeForConditionalGeneration(LlavaMergeConfig(merger_config=merger_config, **stock_config)).eval()
    missing, unexpected = model.load_state_dict(tiny_stock(tower, **kwargs).state_dict(), strict=False)
    assert not unexpected and all("merger" in key for key in missing)
    if train_merger:
        scale_up(model.model.merger, merger=True)
    return model


class Operators(TorchDispatchMode):
    """How often each operator of torch is called inside."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def aware(num_merged_tokens: int = 9, **fields) -> dict:
    """Merger config of a question-aware V3."""
    marks = {"question_start_token_ids": [[USER_ID]], "question_end_token_ids": [[ANSWER_ID]]}
    return {"num_merged_tokens": num_merged_tokens, "num_heads": 4, "question_aware": True, **marks, **fields}


def agnostic(num_merged_tokens: int = 9, **fields) -> dict:
    """Merger config of a V3 that does not read the question."""
    return {"num_merged_tokens": num_merged_tokens, "num_heads": 4, **fields}


def prompts(image_counts: list[int], tokens_per_image: int, pad: str = "left", seed: int = 0, text: int = 6):
    """input_ids and attention_mask (B, L) of rows with the given number of images and random words, padded.

    Each ends where its answer begins.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, count in enumerate(image_counts):
        words = torch.randint(FIRST_WORD_ID, len(WORDS), (text + index,), generator=generator).tolist()
        rows.append([1, *[IMAGE_ID] * (tokens_per_image * count), *words, ANSWER_ID])
    length = max(map(len, rows))
    padded = [
        [PAD_ID] * (length - len(row)) + row if pad == "left" else row + [PAD_ID] * (length - len(row)) for row in rows
    ]
    input_ids = torch.tensor(padded)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD_ID).long()}


def listen_to_ctrl_c():
    """`preexec_fn` of a child that is sent SIGINT: a shell that starts pytest in the background may ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def answered(batch: dict, num_words: int = 2, seed: int = 0) -> dict:
    """The left-padded `prompts` with an answer of random words and </s> behind each, and labels on the answers."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(batch["input_ids"]), num_words)
    words = torch.randint(FIRST_WORD_ID, len(WORDS), size, generator=generator)
    answers = torch.nn.functional.pad(words, (0, 1), value=EOS_ID)
    return {
        "input_ids": torch.cat((batch["input_ids"], answers), dim=1),
        "attention_mask": torch.cat((batch["attention_mask"], torch.ones_like(answers)), dim=1),
        "labels": torch.cat((torch.full_like(batch["input_ids"], -100), answers), dim=1),
    }


@pytest.fixture
def plain_4bit_kernels(monkeypatch):
    """bitsandbytes without its kernels for CPUs with AVX512-BF16, which take no width below 64."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_images, 3, 84, 84, generator=torch.Generator().manual_seed(seed))


def image_features(output) -> torch.Tensor:
    """Projected features (I·M, hidden) that a forward put into the prompt, as its output names them."""
    if TRANSFORMERS_VERSION >= Version("5.24"):
        return torch.cat(output.image_outputs.pooler_output)
    return output.image_hidden_states


def make_processor(adds_bos: bool = False, **kwargs) -> LlavaProcessor:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:  # as LLaVA's does
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    processor_class = kwargs.pop("processor_class", LlavaProcessor)
    return processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        **kwargs,
    )


@pytest.fixture
def picture() -> Image.Image:
    pixels = torch.randint(0, 255, (100, 120, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def said_of_positions(monkeypatch) -> list[str]:
    """Warnings of positions that a language model was not made for, each time they are given."""
    said = []
    monkeypatch.setattr("llava_merge.model.placeholders.logger", SimpleNamespace(warning_once=said.append))
    return said


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def stock_dir(tmp_path):
    """A checkpoint of a tiny stock LLaVA."""
    tiny_stock().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


LONGEST = 10  # tokens of a segment of CLIP's, with start and end
START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP with the vision width of `tiny_model`, in the files of those on the Hub."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, "?", ":"]
    vocab = {token: index for index, token in enumerate([*letters, *(f"{x}</w>" for x in letters), START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **names}))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    ids = {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(vocab), "max_position_embeddings": LONGEST, **ids},
        vision_config={**sizes, "image_size": 84, "patch_size": 14},
        projection_dim=24,
    )
    scale_up(CLIPModel(config)).save_pretrained(folder)
    return str(folder)


def as_snapshot(folder: Path, repo: Path) -> Path:
    """A copy of a folder as the Hub's cache keeps it: a snapshot of links to the files, which are in `blobs`."""
    shutil.copytree(folder, repo / "blobs")
    for blob in [path for path in (repo / "blobs").rglob("*") if path.is_file()]:
        link = repo / "snapshots" / "0123abc" / blob.relative_to(repo / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repo / "snapshots" / "0123abc"
