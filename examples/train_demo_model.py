# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Trains the embedded demo model, a stock LlavaForConditionalGeneration, from scratch in ten minutes on one H200.

1. The tower alone, on what is drawn where: every patch has to tell the content of its ninth of the picture.
2. The projector and the language model, on the features of the tower averaged over 2 × 2 patches, which is cheap: dense
   captions first, then questions, several to a conversation. With answers alone it learns next to nothing.
3. The same on all the features, 24 × 24 as in LLaVA-1.5.

    python examples/train_demo_model.py --output llava_merge/demo/model

The time of each stage is an option. The pictures lie in GPU memory, 22 GB of them by default.
"""

import argparse
import json
import logging
import os
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
    QUESTION_TYPES,
    SHAPES,
    Scene,
    ask_question,
    describe_scene,
    draw_scene,
    sample_scene,
    scene_rng,
)


logger = logging.getLogger("train_demo_model")

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100
PATCH_SIZE = 14
TEXT_LENGTH = 128
CAPTION_PROMPTS = ("Describe the picture.", "Describe the image.", "What is in the picture?", "What do you see?")
TYPE_WEIGHTS = {"color": 0.6, "shape": 0.4, "count": 2.5, "existence": 1.5, "position": 3.0, "digit": 0.4}
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
    rng = scene_rng("train", index)
    return sample_scene(rng), rng


def draw(indices: range, size: int) -> np.ndarray:
    return np.stack([np.asarray(draw_scene(train_scene(index)[0], size)) for index in indices])


def draw_all(pool: Executor, num_scenes: int, size: int, device: str) -> Tensor:
    """Pictures of the train scenes, (num_scenes, size, size, 3) bytes."""
    chunks = [range(start, min(start + 100, num_scenes)) for start in range(0, num_scenes, 100)]
    drawn = pool.map(draw, chunks, [size] * len(chunks))
    pictures = torch.empty((num_scenes, size, size, 3), dtype=torch.uint8, device=device)
    for chunk, part in tqdm(zip(chunks, drawn, strict=True), total=len(chunks), desc="drawing"):
        pictures[chunk.start : chunk.stop] = torch.from_numpy(part)
    return pictures


def normalize(pictures: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) to what CLIPImageProcessor gives, (B, 3, H, W)."""
    mean, std = (torch.tensor(values, device=pictures.device) * 255 for values in (IMAGE_MEAN, IMAGE_STD))
    return ((pictures.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def cell_labels(scene: Scene) -> np.ndarray:
    """Kind, colour and size of what each of the nine cells shows, (9, 3); 0 is nothing."""
    labels = np.zeros((9, 3), np.int64)
    for item in scene.objects:
        kind = 1 + SHAPES.index(item.shape) if item.digit is None else 1 + len(SHAPES) + item.digit
        color = 1 + list(COLORS).index(item.color) if item.digit is None else 0
        labels[item.cell] = kind, color, 1 + (item.size == "large")
    return labels


def build_tokenizer(vocab_size: int = 800, num_scenes: int = 3000) -> Tokenizer:
    """Byte-level BPE over the captions and questions of the first train scenes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
    names = rng.choices(QUESTION_TYPES, list(TYPE_WEIGHTS.values()), k=count + 3)
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

    def batch(self, num_scenes: int, size: int, caption_share: float, seed: str) -> dict:
        """One conversation about each of `size` scenes: their captions, or questions about them."""
        rng = random.Random(seed)
        captions = rng.random() < caption_share
        rows = [rng.randrange(num_scenes) for _ in range(size)]
        make_turns = caption_turns if captions else question_turns
        conversations = (self.encode(make_turns(train_scene(row)[0], rng)) for row in rows)
        text = tuple(np.stack(part) for part in zip(*conversations, strict=True))
        return {"kind": "captions" if captions else "answers", "rows": rows, "text": text}


class TextLoader:
    """Batches of text, written by other processes while the model trains."""

    def __init__(self, pool: Executor, builder: TextBuilder, num_scenes: int, size: int, seed: str):
        self.pool, self.builder, self.num_scenes, self.size, self.seed = pool, builder, num_scenes, size, seed
        self.waiting, self.count = [], 0

    def next(self, caption_share: float) -> dict:
        while len(self.waiting) < 2 * os.cpu_count():
            arguments = (self.num_scenes, self.size, caption_share, f"{self.seed}-{self.count}")
            self.waiting.append(self.pool.submit(write_batch, self.builder.tokenizer.to_str(), *arguments))
            self.count += 1
        return self.waiting.pop(0).result()


@cache
def builder_of(tokenizer: str) -> TextBuilder:
    return TextBuilder(Tokenizer.from_str(tokenizer))


def write_batch(tokenizer: str, *arguments) -> dict:
    return builder_of(tokenizer).batch(*arguments)


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


def train_tower(model, pictures: Tensor, args):
    """Stage 1: from each patch's feature, linear heads tell kind, colour and size of what its cell shows."""
    labels = torch.from_numpy(np.stack([cell_labels(train_scene(index)[0]) for index in range(len(pictures))]))
    labels = labels.to(pictures.device)
    side = args.image_size // PATCH_SIZE
    of_patch = torch.arange(side) * 3 // side
    cell_of_patch = (of_patch[:, None] * 3 + of_patch).flatten().to(pictures.device)  # (N,)
    heads = nn.Linear(model.config.vision_config.hidden_size, 17 + 9 + 3).to(pictures.device)
    parameters = [*tower_of(model).parameters(), *heads.parameters()]
    stage = Stage("tower", parameters, args.tower_minutes, args.tower_learning_rate, args.output / "log.jsonl")
    while stage.progress < 1:
        rows = torch.randint(len(pictures), (args.tower_batch_size,), device=pictures.device)
        targets = labels[rows][:, cell_of_patch]  # (B, N, 3)
        with mixed_precision(pictures.device):
            logits = heads(tower_features(model, pictures[rows])).split((17, 9, 3), dim=-1)
            losses = [F.cross_entropy(part.flatten(0, 1), targets[..., i].flatten()) for i, part in enumerate(logits)]
        stage.update(sum(losses))


@torch.no_grad()
def all_features(model, pictures: Tensor) -> Tensor:
    batches = tqdm(pictures.split(256), desc="features")
    with mixed_precision(pictures.device):
        features = [tower_features(model, batch).half() for batch in batches]
    return torch.cat(features)


def pool_windows(features: Tensor, side: int = 2) -> Tensor:
    """Means over windows of `side` × `side` patches, (B, N, dim) → (B, N / side², dim)."""
    grid = round(features.shape[1] ** 0.5)
    maps = features.transpose(1, 2).unflatten(2, (grid, grid))
    return F.avg_pool2d(maps, side).flatten(2).transpose(1, 2)


def train_text(model, stage: Stage, features: Tensor, loader: TextLoader, captions: float):
    """Stages 2 and 3: captions of, and questions about, the scenes whose `features` (scenes, N, vision_dim) are given.

    The part `captions` of the time goes to captions alone.
    """
    prefix = torch.tensor(loader.builder.prefix, device=features.device)
    while stage.progress < 1:
        batch = loader.next(1.0 if stage.progress < captions else 0.1)
        tokens, labels = (torch.from_numpy(part).to(features.device) for part in batch["text"])
        with mixed_precision(features.device):
            loss = text_loss(model, features[batch["rows"]].float(), prefix, tokens, labels)
        stage.update(loss, batch["kind"])


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
    parser.add_argument("--vision", type=int, nargs=3, default=(128, 6, 4), help="width, layers, heads")
    parser.add_argument("--text", type=int, nargs=3, default=(160, 6, 5), help="width, layers, heads")
    parser.add_argument("--num-scenes", type=int, default=64_000)
    parser.add_argument("--tower-minutes", type=float, default=1.75)
    parser.add_argument("--pooled-minutes", type=float, default=2.75)
    parser.add_argument("--text-minutes", type=float, default=3.5)
    parser.add_argument("--caption-part", type=float, default=0.3, help="part of the pooled stage on captions alone")
    parser.add_argument("--tower-batch-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--tower-learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.image_size % (3 * PATCH_SIZE):
        parser.error(f"--image-size {args.image_size}: has to be a multiple of {3 * PATCH_SIZE}")
    return args


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    with ProcessPoolExecutor() as pool:
        train(pool, args)


def train(pool: Executor, args: argparse.Namespace):
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pictures = draw_all(pool, args.num_scenes, args.image_size, args.device)
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json")) if args.init else build_tokenizer()
    builder = TextBuilder(tokenizer)
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
        train_tower(model, pictures, args)
        save(model, tokenizer, config, args.output)

    loader = TextLoader(pool, builder, args.num_scenes, args.batch_size, f"text-{args.seed}")
    reader = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    features = all_features(model, pictures)
    if args.pooled_minutes:
        stage = Stage("pooled", reader, args.pooled_minutes, args.learning_rate, log)
        train_text(model, stage, pool_windows(features), loader, args.caption_part)
        save(model, tokenizer, config, args.output)
    if args.text_minutes:
        stage = Stage("text", reader, args.text_minutes, args.learning_rate / 2, log)
        train_text(model, stage, features, loader, 0.0)
        save(model, tokenizer, config, args.output)


if __name__ == "__main__":
    main()
