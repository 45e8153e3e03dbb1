# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What a request costs the host of a vLLM server before the GPU sees it: stock LLaVA against merged ones.

pip install '.[serve]'
python examples/benchmark_serving_host.py --output serving_host.json

Milliseconds in vLLM's processor for images, of the bundled model, without its server: resizing, hashing, placeholders,
and here budget and question. Each request has a new image; the models take turns. Decoding of the image comes before,
and is the same for all. Runs on a CPU.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path


os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from benchmark_serving import make_question, noise, write_report
from tqdm import tqdm
from transformers import AutoTokenizer
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.plugins import load_general_plugins

from llava_merge.demo import MODEL_DIR, find_merger
from llava_merge.serving.convert import convert


MERGERS = {  # what is measured, and the merger of the checkpoint
    "untrained": "average_pooling",
    "places that depend on the image": "tome",
    "trained, reads the question": find_merger("served"),
}
IN_THE_REQUEST = "budget in the request"  # of the second
SIZES = ((336, 336), (640, 480), (1600, 1200))


def request(processor, tokenizer, size: tuple[int, int], rng: random.Random, options: dict) -> ProcessorInputs:
    """A question about a new image, as vLLM gives it to the processor."""
    ids = tokenizer(f"USER: <image>\n{make_question(rng)} ASSISTANT:")["input_ids"]
    items = processor.info.parse_mm_data({"image": [noise(size, rng)]})
    return ProcessorInputs(ids, items, hf_processor_mm_kwargs=options)


def measure(processors: dict, size: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each processor, in each round."""
    rng, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(MODEL_DIR)
    times = {name: [] for name in processors}
    for number in tqdm(range(rounds + 1), desc=f"{size[0]} × {size[1]}", disable=None):
        for name, (processor, options) in processors.items():
            asked = request(processor, tokenizer, size, rng, options)
            start = time.perf_counter()
            processor.apply(asked, TimingContext(enabled=False))
            if number:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def main(arguments: argparse.Namespace):
    load_general_plugins()
    torch.set_num_threads(1)  # for figures that do not depend on the number of cores
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"stock": MODEL_DIR}
        for name, merger in MERGERS.items():
            folders[name] = Path(scratch, f"merged-{len(folders)}")
            convert(str(MODEL_DIR), folders[name], merger, 64)
        folders[IN_THE_REQUEST] = folders["places that depend on the image"]
        processors = {}
        for name, folder in folders.items():
            config = ModelConfig(model=str(folder), dtype="float32", max_model_len=1024)
            options = {"num_merged_tokens": 16} if name == IN_THE_REQUEST else {}
            processors[name] = MULTIMODAL_REGISTRY.create_processor(config), options
        results = {}
        for size in SIZES:
            times = measure(processors, size, arguments.rounds)
            medians = {name: statistics.median(each) for name, each in times.items()}
            results[f"{size[0]} × {size[1]}"] = {
                name: {"milliseconds": round(median, 3), "ratio": round(median / medians["stock"], 3)}
                for name, median in medians.items()
            }
    write_report(arguments.output, "cpu", {"rounds": arguments.rounds}, results=results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("serving_host.json"))
    main(parser.parse_args())
