# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What each merging method costs between tower and projector, beside the stock prefill of the same run.

python examples/benchmark_mergers.py --output merger_overhead.json
python examples/benchmark_mergers.py --model 0.2b --batch-sizes 1 --dtype float32 --repeats 3 --output cpu.json

All of a method counts, also what it asks of the tower (attention, keys) and how it reads the question. "eager" is as
`model.generate` calls it, "recorded" the same kernels as one CUDA graph, as in `compile_for_inference(model,
backend=None)`, and "compiled" a graph of what inductor made of them. Methods that pick in many steps
(`chooses_in_steps`) are not compiled, since that takes minutes for each M. Random weights and pictures: they change
no time.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llava_merge import MERGING_METHODS, LlavaMergeForConditionalGeneration, Question, list_mergers
from llava_merge.benchmark.models import make_inputs, make_model
from llava_merge.benchmark.timing import Stopwatch
from llava_merge.compiled.graphs import Recorded, for_graphs
from llava_merge.evaluation.protocol import describe_machine
from llava_merge.model.checkpoint_saving import write_whole


AWARE = "fixed_pooling:question_aware"
TEXT_TOKENS, QUESTION_TOKENS = 64, 32


def methods() -> list[str]:
    """All that merge what the tower made, and V3 once more with the question."""
    return [merger.name for merger in list_mergers() if merger.name not in ("none", "image_resize")] + [AWARE]


def merging_call(model: LlavaMergeForConditionalGeneration, pixels: Tensor, num_tokens: int) -> tuple[Callable, dict]:
    """A function that merges, and its arguments: what the tower gave for `pixels` (I, 3, H, W), and questions."""
    headless, config = model.model, model.config
    outputs = headless.vision_tower(pixels, output_hidden_states=True)
    words = torch.randn(len(pixels), QUESTION_TOKENS, config.text_config.hidden_size)
    question = Question.of_each_image(words.to(pixels))
    grid = config.patch_grid(config.image_shape)

    def merge(pixels, outputs, question) -> Tensor:
        features, _, extras = headless._run_tower(pixels, with_extras=True, tower_outputs=outputs)
        extras = headless._with_relevance(extras, features, question)
        return headless.merge_features(features, question, grid, num_tokens, extras).merged_features

    return merge, {"pixels": pixels, "outputs": outputs, "question": question}


def median_time(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of a call by the clock, with the device idle at both ends: median and extremes."""
    stopwatch, times = Stopwatch(device), []
    for _ in range(repeats + 3):
        stopwatch.wait()
        start = time.perf_counter()
        call()
        stopwatch.wait()
        times.append(1000 * (time.perf_counter() - start))
    times = times[3:]
    return {"median": round(statistics.median(times), 4), "min": round(min(times), 4), "max": round(max(times), 4)}


def ways_of(merge: Callable, inputs: dict, name: str, device: torch.device, compiles: bool) -> dict[str, Callable]:
    """The ways to call it, by name."""
    ways = {"eager": lambda: merge(**inputs)}
    if device.type == "cuda":
        ways["recorded"] = Recorded(merge, inputs, torch.cuda.graph_pool_handle())
        if compiles and not MERGING_METHODS[name.partition(":")[0]].chooses_in_steps:
            torch.compiler.reset()
            compiled = torch.compile(merge, fullgraph=True, dynamic=False)
            ways["compiled"] = Recorded(compiled, inputs, torch.cuda.graph_pool_handle())
    return ways


def measure(model, name: str, batch_size: int, num_tokens: int, arguments: argparse.Namespace) -> dict[str, dict]:
    """Times of a method, by way."""
    fields = {"merger_type": name.partition(":")[0], "num_merged_tokens": num_tokens}
    model.set_merger({**fields, "question_aware": True} if name == AWARE else fields)
    model.eval()
    pixels = make_inputs(model, batch_size, num_tokens, TEXT_TOKENS, 0)["pixel_values"]
    with for_graphs():
        merge, inputs = merging_call(model, pixels, num_tokens)
        ways = ways_of(merge, inputs, name, model.device, not arguments.no_compile)
        return {way: median_time(call, model.device, arguments.repeats) for way, call in ways.items()}


def stock_prefill(model, batch_size: int, repeats: int) -> dict[str, float]:
    """Milliseconds to the logits of the first token with nothing merged, tower included."""
    model.set_merger({"merger_type": "none"})
    inputs = make_inputs(model, batch_size, model.config.num_patches, TEXT_TOKENS, 0)
    with for_graphs():
        return median_time(lambda: model(**inputs, logits_to_keep=1, use_cache=True), model.device, min(repeats, 10))


def main(arguments: argparse.Namespace):
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    model = make_model(arguments.model, dtype, arguments.device)
    protocol = {**describe_machine(device), **vars(arguments), "output": None}
    results = {"stock_prefill": {}, "methods": {}}
    cells = [(size, budget) for size in arguments.batch_sizes for budget in arguments.num_merged_tokens]
    for size in arguments.batch_sizes:
        results["stock_prefill"][size] = stock_prefill(model, size, arguments.repeats)
    for name in tqdm(arguments.merger or methods(), desc="methods"):
        results["methods"][name] = {
            f"{size} x {budget}": measure(model, name, size, budget, arguments) for size, budget in cells
        }
        command = shlex.join(["python", "examples/benchmark_mergers.py", *sys.argv[1:]])
        written = {"command": command, "protocol": protocol, "results": results}
        write_whole(arguments.output, json.dumps(written, indent=2) + "\n")  # what is known so far


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-1.5-7b", help="a shape of llava-merge benchmark, or a checkpoint")
    parser.add_argument("--merger", action="append", help=f"default all, and {AWARE}; may be given several times")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--num-merged-tokens", type=int, nargs="+", default=[64, 288])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--output", type=Path, default=Path("merger_overhead.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
