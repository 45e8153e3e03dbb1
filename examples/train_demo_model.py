# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Trains the embedded demo model, a stock LlavaForConditionalGeneration, from scratch in nine minutes on one H200.

1. The tower alone, on what is drawn where: every patch has to tell what covers it.
2. The projector and the language model, on stored features of the tower, all 24 × 24 as in LLaVA-1.5: dense captions
   first, then questions, several to a conversation. With answers alone it learns next to nothing.
3. Everything together.

Nothing is ever pooled or merged. Half of the scenes are hard ones.

    python examples/train_demo_model.py --output llava_merge/demo/model

The time of each stage is an option. Pictures and features lie in GPU memory, 23 GB of them by default; the text is
written by all cores while the tower trains.
"""

import argparse
import json
import logging
import multiprocessing
import random
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_merge.demo.scenes import (
    COLORS,
    NEEDLE,
    SHAPES,
    Scene,
    SceneObject,
    ask_question,
    describe_scene,
    draw_scene,
    scene_of,
)


logger = logging.getLogger("train_demo_model")

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100
PATCH_SIZE = 14
TEXT_LENGTH = 128
CAPTION_PROMPTS = ("Describe the picture.", "Describe the image.", "What is in the picture?", "What do you see?")
NUM_CONVERSATIONS = 8  # with questions, about each scene
TYPE_WEIGHTS = {"color": 0.6, "shape": 0.4, "count": 2.5, "existence": 1.5, "position": 3.0, "digit": 0.4}
HARD_TYPE_WEIGHTS = {
    "color": 1.0,
    "shape": 0.8,
    "count": 2.5,
    "existence": 1.5,
    "position": 2.0,
    "number": 0.8,
    "relation": 2.5,
    "needle": 0.8,
}
# what a patch is covered by: a class for nothing first
KINDS = ("nothing", *SHAPES, NEEDLE, "digit")
PATCH_LABELS = {"kind": len(KINDS), "color": len(COLORS), "size": 3, "hundreds": 11, "tens": 11, "ones": 10}
EMPTY_WEIGHT = 0.1  # of the patches that show nothing, most of all
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else ('ASSISTANT: ' if message['role'] == 'assistant' else '') }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# --- data -------------------------------------------------------------------------------------------------------------


def train_scene(index: int) -> tuple[Scene, random.Random]:
    """Every second scene is a hard one."""
    return scene_of("train", index // 2, hard=index % 2 == 1)


def draw(indices: range, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, size, size, 3) and labels of their patches (n, N, 6), both bytes."""
    scenes = [train_scene(index)[0] for index in indices]
    return np.stack([np.asarray(draw_scene(scene, size)) for scene in scenes]), np.stack(
        [patch_labels(scene, size // PATCH_SIZE) for scene in scenes]
    )


def draw_all(pool: Executor, num_scenes: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures of the train scenes (num_scenes, size, size, 3) and labels of their patches (num_scenes, N, 6)."""
    chunks = [range(start, min(start + 100, num_scenes)) for start in range(0, num_scenes, 100)]
    drawn = pool.map(draw, chunks, [size] * len(chunks))
    pictures = torch.empty((num_scenes, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.empty((num_scenes, (size // PATCH_SIZE) ** 2, len(PATCH_LABELS)), dtype=torch.int8, device=device)
    for chunk, parts in tqdm(zip(chunks, drawn, strict=True), total=len(chunks), desc="drawing", mininterval=5):
        for whole, part in zip((pictures, labels), parts, strict=True):
            whole[chunk.start : chunk.stop] = torch.from_numpy(part)
    return pictures, labels


def normalize(pictures: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) to what CLIPImageProcessor gives, (B, 3, H, W)."""
    mean, std = (torch.tensor(values, device=pictures.device) * 255 for values in (IMAGE_MEAN, IMAGE_STD))
    return ((pictures.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def patch_labels(scene: Scene, side: int) -> np.ndarray:
    """What covers each patch of a grid of `side` × `side`, (side², 6) as in PATCH_LABELS; -100 where it has no such."""
    labels = np.full((side, side, len(PATCH_LABELS)), IGNORED, np.int8)
    labels[..., 0] = 0
    centers = (np.arange(side) + 0.5) / side
    for item in scene.objects:
        x = (item.column + item.span * (0.5 + item.offset[0])) / item.grid
        y = (item.row + 0.5 + item.offset[1]) / item.grid
        half = item.radius / item.grid + 0.5 / side
        wide = half if item.digit is None else half * (0.78 + 0.5 * (len(str(item.digit)) - 1))
        covered = np.ix_(abs(centers - y) < half, abs(centers - x) < wide)
        labels[covered] = item_labels(item)
    return labels.reshape(side * side, -1)


def item_labels(item: SceneObject) -> tuple[int, ...]:
    kind = KINDS.index(item.shape)
    if item.digit is None:
        sizes = ("small", "large", "tiny")
        return kind, list(COLORS).index(item.color), sizes.index(item.size), IGNORED, IGNORED, IGNORED
    tens, ones = divmod(item.digit, 10)
    hundreds, tens = divmod(tens, 10)
    written = len(str(item.digit))  # leading places are empty
    return kind, IGNORED, IGNORED, hundreds if written > 2 else 10, tens if written > 1 else 10, ones


def build_tokenizer(vocab_size: int = 800, num_scenes: int = 3000) -> Tokenizer:
    """Byte-level BPE over the captions and questions of the first train scenes; each digit is a token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((" ".join(map(str, corpus_of(index))) for index in range(num_scenes)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def corpus_of(index: int) -> list[str]:
    scene, rng = train_scene(index)
    turns = [*caption_turns(scene, rng), *question_turns(scene, rng)]
    return [f"USER: {question} ASSISTANT: {answer}" for question, answer in turns]


def caption_turns(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    return [(rng.choice(CAPTION_PROMPTS), describe_scene(scene))]


def question_turns(scene: Scene, rng: random.Random, count: int = 8) -> list[tuple[str, str]]:
    """Questions of all types in random order, without repeats."""
    weights = HARD_TYPE_WEIGHTS if scene.is_hard else TYPE_WEIGHTS
    names = rng.choices(list(weights), list(weights.values()), k=count + 3)
    asked = (ask_question(scene, name, rng) for name in names)
    return list(dict.fromkeys((question.text, question.answer) for question in asked if question))[:count]


class TextBuilder:
    """Conversations as token ids, equal to what the processor's chat template gives after the image."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.prefix = [BOS, *self.ids("USER: ")]

    def ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def encode(self, turns: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels of as many turns as fit; labels are set on answers and their end alone."""
        tokens, labels = np.full(TEXT_LENGTH, PAD, np.int64), np.full(TEXT_LENGTH, IGNORED, np.int64)
        position = 0
        for number, (question, answer) in enumerate(turns):
            asked = self.ids(f"{'USER: ' if number else chr(10)}{question} ASSISTANT:")
            phrases = answer.split(",")  # cached phrase by phrase; a comma always begins a new word
            answered = [*self.ids(f" {phrases[0]}"), *(i for part in phrases[1:] for i in self.ids(f",{part}")), EOS]
            middle, end = position + len(asked), position + len(asked) + len(answered)
            if end > TEXT_LENGTH:
                break
            tokens[position:middle], tokens[middle:end], labels[middle:end] = asked, answered, answered
            position = end
        return tokens, labels

    def conversations(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """About a scene: its caption, then NUM_CONVERSATIONS times questions; ids and labels, (1 + n, TEXT_LENGTH)."""
        scene, _ = train_scene(index)
        rng = random.Random(f"text-{index}")
        turns = [caption_turns(scene, rng), *(question_turns(scene, rng) for _ in range(NUM_CONVERSATIONS))]
        tokens, labels = zip(*map(self.encode, turns), strict=True)
        return np.stack(tokens).astype(np.int16), np.stack(labels).astype(np.int16)


@cache
def builder_of(tokenizer: str) -> TextBuilder:
    return TextBuilder(Tokenizer.from_str(tokenizer))


def write_conversations(tokenizer: str, indices: range) -> list[np.ndarray]:
    """Ids and labels of the conversations about some scenes, (n, 1 + NUM_CONVERSATIONS, TEXT_LENGTH)."""
    builder = builder_of(tokenizer)
    return [np.stack(part) for part in zip(*map(builder.conversations, indices), strict=True)]


class Conversations:
    """Conversations about the train scenes, written by other processes from the moment that this is made."""

    def __init__(self, pool: Executor, tokenizer: Tokenizer, num_scenes: int):
        chunks = [range(start, min(start + 250, num_scenes)) for start in range(0, num_scenes, 250)]
        text = tokenizer.to_str()
        self.waiting = [pool.submit(write_conversations, text, chunk) for chunk in chunks]

    def gather(self, device: str) -> tuple[Tensor, Tensor]:
        """Ids and labels (num_scenes, 1 + NUM_CONVERSATIONS, TEXT_LENGTH), int16; captions first."""
        parts = [future.result() for future in tqdm(self.waiting, desc="writing", mininterval=5)]
        tokens, labels = (torch.from_numpy(np.concatenate(each)).to(device) for each in zip(*parts, strict=True))
        return tokens, labels


# --- model ------------------------------------------------------------------------------------------------------------


def model_config(image_size: int, vision: tuple[int, int, int], text: tuple[int, int, int], vocab_size: int) -> dict:
    """config.json that transformers 4 and 5 both read: the rope base under both of its names."""
    (vision_dim, vision_layers, vision_heads), (text_dim, text_layers, text_heads) = vision, text
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE,
        "image_seq_length": (image_size // PATCH_SIZE) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "dtype": "float16",
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": text_dim,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "num_key_value_heads": text_heads,
            "head_dim": text_dim // text_heads,
            "intermediate_size": text_dim * 8 // 3 // 16 * 16,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "dtype": "float16",
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
            "hidden_size": vision_dim,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "intermediate_size": 4 * vision_dim,
            "projection_dim": vision_dim,
            "hidden_act": "quick_gelu",
            "dtype": "float16",
        },
    }


@torch.no_grad()
def initialize(model: LlavaForConditionalGeneration):
    """Positions that can be seen from the first step, and linear maps that keep variance, instead of 0.02 for all."""
    position = tower_of(model).embeddings.position_embedding.weight
    position[1:] = 0.5 * sine_positions(round((len(position) - 1) ** 0.5), position.shape[1])
    depth = len(model.model.language_model.layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            gain = depth**-0.5 if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5 * model.config.text_config.hidden_size**-0.5)


def sine_positions(side: int, dim: int) -> Tensor:
    """Two-dimensional sine positions, (side², dim)."""
    angles = torch.arange(side)[:, None] * torch.exp(-torch.arange(dim // 4) * 4 / dim * 4.0)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, dim / 2)
    return torch.cat((axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)), dim=-1).flatten(0, 1)


def tower_of(model: LlavaForConditionalGeneration) -> nn.Module:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def tower_features(model: LlavaForConditionalGeneration, pictures: Tensor) -> Tensor:
    """What the projector reads, (B, N, vision_dim); the layer after vision_feature_layer=-2 is not run."""
    tower = tower_of(model)
    states = tower.pre_layrnorm(tower.embeddings(normalize(pictures)))
    for layer in tower.encoder.layers[:-1]:
        states = layer(states, attention_mask=None)
        states = states[0] if isinstance(states, tuple) else states
    return states[:, 1:]


def text_loss(model, features: Tensor, prefix: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on the answers, from unprojected features (B, N, vision_dim)."""
    embed = model.get_input_embeddings()
    projected = model.model.multi_modal_projector(features)
    embeds = torch.cat((embed(prefix).expand(len(tokens), -1, -1), projected, embed(tokens)), dim=1)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, -tokens.shape[1] : -1])
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


# --- training ---------------------------------------------------------------------------------------------------------


def mixed_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compile_layers(model: LlavaForConditionalGeneration):
    """Compiles one layer of the tower and one of the language model; the other layers share them."""
    for layer in (*tower_of(model).encoder.layers, *model.model.language_model.layers):
        layer.compile(dynamic=False)


class Stage:
    """A stretch of training: the learning rate warms up, stays, and falls to zero as the time runs out."""

    def __init__(self, name: str, parameters: list[nn.Parameter], minutes: float, learning_rate: float, log: Path):
        self.name, self.minutes, self.learning_rate, self.log = name, minutes, learning_rate, log
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        self.start, self.step, self.losses = time.monotonic(), 0, {}
        self.bar = tqdm(total=100, desc=name, unit="%")

    @property
    def progress(self) -> float:
        return min(1.0, (time.monotonic() - self.start) / (60 * self.minutes))

    def update(self, loss: Tensor, kind: str = "loss"):
        warmup = min(1.0, (self.step + 1) / 200)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup * min(1.0, (1.0 - self.progress) / 0.5)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses.setdefault(kind, []).append(loss.detach())
        if self.step % 100 == 0:
            self.report()

    def report(self):
        means = {kind: round(torch.stack(values).mean().item(), 4) for kind, values in self.losses.items()}
        seconds = round(time.monotonic() - self.start, 1)
        with self.log.open("a") as file:
            file.write(json.dumps({"stage": self.name, "step": self.step, "seconds": seconds, **means}) + "\n")
        self.bar.update(round(100 * self.progress) - self.bar.n)
        self.bar.set_postfix(means)
        self.losses = {}


def train_tower(model, pictures: Tensor, labels: Tensor, args):
    """Stage 1: from each patch's feature, linear heads tell what covers it."""
    classes = list(PATCH_LABELS.values())
    heads = nn.Linear(model.config.vision_config.hidden_size, sum(classes)).to(pictures.device)
    parameters = [*tower_of(model).parameters(), *heads.parameters()]
    stage = Stage("tower", parameters, args.tower_minutes, args.tower_learning_rate, args.output / "log.jsonl")
    weights = [torch.ones(count, device=pictures.device) for count in classes]
    weights[0][0] = EMPTY_WEIGHT
    while stage.progress < 1:
        rows = torch.randint(len(pictures), (args.tower_batch_size,), device=pictures.device)
        targets = labels[rows].long()  # (B, N, 6)
        with mixed_precision(pictures.device):
            logits = heads(tower_features(model, pictures[rows])).split(classes, dim=-1)
        losses = [
            F.cross_entropy(part.float().flatten(0, 1), targets[..., i].flatten(), weights[i], ignore_index=IGNORED)
            for i, part in enumerate(logits)
        ]
        stage.update(sum(losses))


@torch.no_grad()
def all_features(model, pictures: Tensor) -> Tensor:
    batches = tqdm(pictures.split(256), desc="features")
    with mixed_precision(pictures.device):
        features = [tower_features(model, batch).half() for batch in batches]
    return torch.cat(features)


def train_text(model, stage: Stage, features_of, text: tuple[Tensor, Tensor], args, captions: float):
    """Stages 2 and 3: captions of, and questions about, the scenes.

    Args:
        features_of: Gives the features (B, N, vision_dim) of scenes by their indices (B,).
        text: Ids and labels of [`Conversations`].
        captions: The part of the time that goes to captions alone.
    """
    tokens, labels = text
    rng, device = random.Random(args.seed), tokens.device
    prefix = torch.tensor(args.prefix, device=device)
    while stage.progress < 1:
        rows = torch.randint(len(tokens), (args.batch_size,), device=device)
        is_caption = rng.random() < (1.0 if stage.progress < captions else 0.1)
        which = torch.randint(1, 1 + NUM_CONVERSATIONS, (args.batch_size,), device=device) * (not is_caption)
        with mixed_precision(device):
            loss = text_loss(model, features_of(rows), prefix, tokens[rows, which].long(), labels[rows, which].long())
        stage.update(loss, "captions" if is_caption else "answers")


# --- files ------------------------------------------------------------------------------------------------------------


def hub_name(name: str) -> str:
    """The key that llava-hf checkpoints use for a parameter of the model in memory."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def save(model: LlavaForConditionalGeneration, tokenizer: Tokenizer, config: dict, folder: Path):
    """Writes all that from_pretrained reads, in the form of transformers 4 and llava-hf, which 5 reads as well."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": config, **processor_files(config["vision_config"]["image_size"])}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {hub_name(name): p.detach().cpu().half().contiguous() for name, p in model.named_parameters()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")


def processor_files(size: int) -> dict[str, dict]:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "tokenizer_config.json": {
            **names,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "additional_special_tokens": ["<image>"],
            "added_tokens_decoder": {str(i): {"content": token, **added} for i, token in enumerate(SPECIAL_TOKENS)},
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 2048,
            "padding_side": "left",
        },
        "special_tokens_map.json": {**names, "additional_special_tokens": ["<image>"]},
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model, its log and stage checkpoints")
    parser.add_argument("--init", type=Path, help="saved folder to go on from; give stages that are done 0 minutes")
    parser.add_argument("--image-size", type=int, default=336, help="a multiple of 42: patches of 14 in thirds")
    parser.add_argument("--vision", type=int, nargs=3, default=(192, 6, 3), help="width, layers, heads")
    parser.add_argument("--text", type=int, nargs=3, default=(256, 6, 4), help="width, layers, heads")
    parser.add_argument("--num-scenes", type=int, default=40_000)
    parser.add_argument("--tower-minutes", type=float, default=1.5)
    parser.add_argument("--text-minutes", type=float, default=5.2)
    parser.add_argument("--joint-minutes", type=float, default=0.8)
    parser.add_argument("--caption-part", type=float, default=0.3, help="part of the text stage on captions alone")
    parser.add_argument("--tower-batch-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--tower-learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--joint-learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.image_size % (3 * PATCH_SIZE):
        parser.error(f"--image-size {args.image_size}: has to be a multiple of {3 * PATCH_SIZE}")
    return args


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        train(pool, args)


def train(pool: Executor, args: argparse.Namespace):
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pictures, labels = draw_all(pool, args.num_scenes, args.image_size, args.device)
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json")) if args.init else build_tokenizer()
    args.prefix = TextBuilder(tokenizer).prefix
    conversations = Conversations(pool, tokenizer, args.num_scenes)
    config = model_config(args.image_size, args.vision, args.text, tokenizer.get_vocab_size())
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict({**config, "dtype": "float32"})).float()
    initialize(model)
    if args.init:
        model = LlavaForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    model.to(args.device).train()
    if pictures.is_cuda:
        compile_layers(model)
    logger.info("%d parameters on %s", sum(p.numel() for p in model.parameters()), args.device)

    log = args.output / "log.jsonl"
    if args.tower_minutes:
        train_tower(model, pictures, labels, args)
        save(model, tokenizer, config, args.output)
    del labels
    text = conversations.gather(args.device)
    if args.text_minutes:
        reader = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
        features = all_features(model, pictures)
        stage = Stage("text", reader, args.text_minutes, args.learning_rate, log)
        train_text(model, stage, lambda rows: features[rows].float(), text, args, args.caption_part)
        save(model, tokenizer, config, args.output)
        del features
    if args.joint_minutes:
        stage = Stage("joint", list(model.parameters()), args.joint_minutes, args.joint_learning_rate, log)
        train_text(model, stage, lambda rows: tower_features(model, pictures[rows]), text, args, 0.0)
        save(model, tokenizer, config, args.output)


if __name__ == "__main__":
    main()
