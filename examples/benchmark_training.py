# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What a training step costs at the size of LLaVA-1.5-7B, and whether many GPUs make the steps of one.

    python examples/benchmark_training.py --output examples/results/training_benchmark.json

The first part trains V3 in a model of LLaVA-1.5-7B's shapes with random weights on one GPU: samples a second and peak
memory, with the teacher in each step, with its answers cached, and without it. The second trains the demo model with
the same global batch on one GPU, on two under DistributedDataParallel, and on two under FSDP2, and compares the losses.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, LlavaMergeProcessor, TokenMerger
from llava_merge.benchmark.models import make_model
from llava_merge.demo import MODEL_DIR
from llava_merge.demo.scenes import ask_question, draw_scene, sample_scene, scene_rng
from llava_merge.model.checkpoint_saving import write_whole
from llava_merge.training.budgets import IGNORED, BudgetSchedule
from llava_merge.training.collator import MergerCollator
from llava_merge.training.data import ChatDataset
from llava_merge.training.settings import LossSettings, Settings, TrainedSettings, training_arguments
from llava_merge.training.trainer import MergerTrainer


WRAPPED = ["LlamaDecoderLayer", "CLIPEncoderLayer", "TokenMerger", "LlavaMultiModalProjector"]
PARALLEL = {"one": 1, "ddp": 2, "fsdp": 2}  # GPUs
STEPS, GLOBAL_BATCH = 8, 16


class RandomSamples(Dataset):
    """Batches as a [`MergerCollator`] makes them: a picture, a question and an answer, all random."""

    def __init__(self, config: LlavaMergeConfig, num_question: int, num_answer: int, length: int):
        self.config, self.num_question, self.num_answer, self.length = config, num_question, num_answer, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(100, 30000, (self.num_question + self.num_answer,), generator=generator)
        image = torch.full((self.config.num_patches,), self.config.image_token_id)
        ids = torch.cat((torch.tensor([1]), image, text))
        labels = ids.clone()
        labels[: -self.num_answer] = IGNORED
        pixel_values = torch.randn(3, 336, 336, generator=generator)
        return {"input_ids": ids, "labels": labels, "pixel_values": pixel_values, "sample_ids": torch.tensor(index)}


class Stack:
    """A collator of samples of one length."""

    def __call__(self, items: list[dict]) -> dict:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch | {"num_skipped": torch.zeros(len(items), dtype=torch.long)}


def model_of_7b() -> LlavaMergeForConditionalGeneration:
    """LLaVA-1.5-7B's shapes, random, in bfloat16."""
    model = make_model("llava-1.5-7b", torch.bfloat16, "cuda")
    model.set_merger({"num_merged_tokens": 144, "attention_mass": 0.0})
    return model


class Clock(TrainerCallback):
    """Seconds of each step, with the device idle at both ends."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def measure_7b(args) -> list[dict]:
    """Rows on the cost of a step, each with another use of the teacher."""
    model, rows = model_of_7b(), []
    for teacher in ("each step", "cached", "none"):
        for budget in args.budgets:
            rows.append({"teacher": teacher, "num_merged_tokens": budget, **measure_step(model, teacher, budget, args)})
            print(rows[-1], flush=True)
    return rows


def measure_step(model, teacher: str, budget: int, args) -> dict:
    clock, size = Clock(), args.batch_size
    steps = 4 if teacher == "cached" else 6
    samples = RandomSamples(model.config, 48, 16, size if teacher == "cached" else steps * size)
    fields = {"max_steps": steps, "per_device_train_batch_size": size, "bf16": True, "gradient_checkpointing": True}
    fields |= {"output_dir": "/tmp/benchmark", "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = MergerTrainer(
        model,
        training_arguments(Settings(training={**fields, "warmup_steps": 0, "num_train_epochs": 99})),
        budgets=BudgetSchedule([budget]),
        loss_settings=LossSettings(distillation=float(teacher != "none"), cache_teacher=teacher == "cached"),
        trained=TrainedSettings(parts="merger"),
        data_collator=Stack(),
        train_dataset=samples,
        callbacks=[clock],
    )
    trainer.train()
    seconds = sorted(clock.seconds[2:])[len(clock.seconds[2:]) // 2]
    memory = torch.cuda.max_memory_allocated() / 2**30
    return {
        "seconds_per_step": round(seconds, 4),
        "samples_per_second": round(size / seconds, 2),
        "peak_memory_gib": round(memory, 2),
    }


def demo_rows(num_scenes: int) -> list[dict]:
    """Scenes with a conversation of four questions; every eighth has no picture."""
    rows = []
    for index in range(num_scenes):
        rng = scene_rng("train", index)
        scene = sample_scene(rng)
        asked = [ask_question(scene, name, rng) for name in ("count", "existence", "count", "existence")]
        image = "" if index % 8 == 7 else "<image>\n"
        turns = []
        for number, item in enumerate(filter(None, asked)):
            turns.append({"from": "human", "value": f"{image if number == 0 else ''}{item.text}"})
            turns.append({"from": "gpt", "value": item.answer})
        rows.append({"id": index, "images": [draw_scene(scene)] if image else [], "conversations": turns})
    return rows


def train_demo(kind: str, output: str):
    """A short run on the demo model, on as many processes as run this; the first writes its losses to `output`."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    set_seed(0)  # ranks that share the weights have to start with the same merger
    model = LlavaMergeForConditionalGeneration.from_pretrained(
        MODEL_DIR, merger_config={"num_merged_tokens": 64, "attention_mass": 1.0}, dtype=torch.float32
    )
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    fields = {"max_steps": STEPS, "per_device_train_batch_size": GLOBAL_BATCH // ranks, "optim": "sgd"}
    fields |= {"output_dir": f"{output}.{kind}", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    fields |= {
        "save_strategy": "no",
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
        "use_cpu": not torch.cuda.is_available(),
    }
    if kind == "fsdp":
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": WRAPPED}
        fields |= {"fsdp": True, "fsdp_config": wrapped}
    trainer = MergerTrainer(
        model,
        training_arguments(Settings(training=fields)),
        budgets=BudgetSchedule([64, 16, 4]),
        data_collator=MergerCollator(processor, model.config.num_patches),
        train_dataset=ChatDataset(demo_rows(STEPS * GLOBAL_BATCH), "scenes"),
    )
    trainer.train()
    trainer.save_model()
    if trainer.args.should_save:
        parameters = list(trainer.model.parameters())
        sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
        assert (sharded == len(parameters)) == (kind == "fsdp"), f"{sharded} of {len(parameters)} are sharded"
        losses = [entry for entry in trainer.state.log_history if "distillation" in entry]
        kept = ("loss", "cross_entropy", "distillation", "grad_norm")
        Path(output).write_text(json.dumps([{name: round(entry[name], 5) for name in kept} for entry in losses]))


def compare_parallel(folder: Path) -> dict:
    """Losses of each kind of run, and the largest relative difference from one GPU's."""
    losses = {}
    for kind, ranks in PARALLEL.items():
        output = folder / f"losses_{kind}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environment = dict(os.environ) if ranks > 1 else {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        command = [sys.executable, *launcher, __file__, "--output", str(output), "--worker", kind]
        subprocess.run(command, check=True, env=environment)
        losses[kind] = json.loads(output.read_text())
    differences = {}
    for kind in ("ddp", "fsdp"):
        pairs = [
            abs(ours[name] - alone[name]) / alone[name]
            for ours, alone in zip(losses[kind], losses["one"], strict=True)
            for name in ("loss", "distillation")
        ]
        differences[kind] = {
            "losses, relative": float(f"{max(pairs):.2e}"),
            "saved merger, absolute": weight_difference(folder, kind),
        }
    return {"global_batch": GLOBAL_BATCH, "largest_difference_from_one_gpu": differences, "losses": losses}


def weight_difference(folder: Path, kind: str) -> float:
    """Largest difference between the mergers that a kind of run and that on one GPU saved."""
    ours, alone = (
        TokenMerger.from_pretrained(folder / f"losses_{name}.json.{name}").state_dict() for name in (kind, "one")
    )
    return float(f"{max((ours[name] - alone[name]).abs().max().item() for name in alone):.2e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--batch-size", type=int, default=32, help="of the 7B-shape step")
    parser.add_argument("--budgets", type=int, nargs="+", default=[144, 64])
    parser.add_argument("--parts", nargs="+", default=["step", "parallel"], choices=["step", "parallel"])
    parser.add_argument("--worker", choices=PARALLEL, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train_demo(args.worker, str(args.output))
        return
    report = json.loads(args.output.read_text()) if args.output.exists() else {}
    report |= {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
        if torch.cuda.is_available()
        else "CPU",
    }
    if "step" in args.parts:
        report["step"] = {
            "model": "LLaVA-1.5-7B's shapes, random weights, bfloat16; only V3 trains; gradient checkpointing",
            "batch_size": args.batch_size,
            "text_tokens": 65,
            "answer_tokens": 16,
            "rows": measure_7b(args),
        }
    if "parallel" in args.parts:
        report["parallel"] = compare_parallel(args.output.parent)
    write_whole(args.output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
