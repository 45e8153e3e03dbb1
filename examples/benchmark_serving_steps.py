# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What the images of one step cost vLLM's engine: stock LLaVA against merged ones.

pip install '.[serve]'
python examples/benchmark_serving_steps.py --shape llava-1.5-7b --output serving_steps.json

Random weights, no server. For 1 and 32 new images: the copy to the device and `embed_multimodal`, putting what it made
between the text, and the positions of a prompt. "host" is until the call returns, "device" until the device is done;
"waits" counts how often the host waits for a GPU in between, as torch reports it.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace


os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
import vllm
from benchmark_serving import stock_config, write_report
from benchmark_serving_host import request
from tqdm import tqdm
from transformers import AutoTokenizer
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from llava_merge import LlavaMergeConfig, LlavaMergeProcessor
from llava_merge.benchmark.models import SHAPES
from llava_merge.demo import MODEL_DIR
from llava_merge.evaluation.candidates import parse_candidate
from llava_merge.serving.requests import positions_of


NUM_TOKENS = 64
# of decoding one request alone: with none at all the plugin records no tower either
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1]}
MERGERS = ("stock", "average_pooling", "tome", "divprune", "fixed_pooling", "fixed_pooling:question_aware=true")


def make_folder(folder: Path, shape: str, merger: str) -> Path:
    """Configuration and processor of a model, without weights."""
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    config = stock_config(shape, processor)
    if merger != "stock":
        name, fields = parse_candidate(merger)
        merger_config = {"merger_type": name, "num_merged_tokens": NUM_TOKENS, "attention_mass": 0.0, **fields}
        stock = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        config = LlavaMergeConfig(merger_config=merger_config, **stock)
        config.architectures = ["LlavaMergeForConditionalGeneration"]
        processor.num_merged_tokens = NUM_TOKENS
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def make_items(processor, tokenizer, number: int) -> tuple[list, list[list[int]], list]:
    """Of `number` requests with a new image each: what the engine gets, ids, and where the images are."""
    rng, items, ids, places = random.Random(number), [], [], []
    for _ in range(number):
        asked = request(processor, tokenizer, (336, 336), rng, {})
        made = processor.apply(asked, TimingContext(enabled=False))
        items += [("image", item) for item in made["mm_kwargs"]["image"]]
        ids.append(made["prompt_token_ids"])
        places += made["mm_placeholders"]["image"]
    return items, ids, places


def timed(call, rounds: int, before=lambda: None) -> dict[str, float]:
    """Milliseconds on host and device, medians, and waits."""
    on_gpu, host, device = torch.cuda.is_available(), [], []

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    for number in range(rounds + 3):
        before()
        wait()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        wait()
        if number >= 3:  # the first ones warm up
            host.append(1000 * (returned - start))
            device.append(1000 * (time.perf_counter() - start))
    found = {"host": round(statistics.median(host), 3), "device": round(statistics.median(device), 3)}
    if on_gpu:
        before()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        torch.cuda.set_sync_debug_mode("default")
        found["waits"] = sum("synchronizing CUDA operation" in str(each.message) for each in caught)
    return found


@torch.inference_mode()
def measure(model, processor, tokenizer, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of a model, by number of images and by what is done."""
    device, found = next(model.parameters()).device, {}
    for number in (1, 32):
        items, ids, places = make_items(processor, tokenizer, number)

        def embed(items=items):
            ((_, _, kwargs),) = group_and_batch_mm_kwargs(items, device=device, pin_memory=device.type == "cuda")
            return model.embed_multimodal(**kwargs)

        def forget():
            if hasattr(model, "kept_features"):
                model.kept_features.forget()

        made, tokens = embed(), torch.tensor([id for prompt in ids for id in prompt], device=device)
        mask, start = torch.zeros(len(tokens), dtype=torch.bool), 0
        for prompt, place in zip(ids, places, strict=True):
            mask[start + place.offset : start + place.offset + place.length] = True
            start += len(prompt)
        results = {
            "images": timed(embed, rounds, forget),
            "between the text": timed(
                lambda tokens=tokens, made=made, mask=mask: model.embed_input_ids(tokens, made, is_multimodal=mask),
                rounds,
            ),
        }
        if hasattr(model, "get_mrope_input_positions"):
            features = [[SimpleNamespace(mm_position=place)] for place in places]
            results["positions"] = timed(
                lambda ids=ids, features=features: [
                    model.get_mrope_input_positions(*each) for each in zip(ids, features, strict=True)
                ],
                rounds,
                positions_of.cache_clear,
            )
        found[f"{number} images"] = results
    return found


def main(arguments: argparse.Namespace):
    results, tokenizer = {}, AutoTokenizer.from_pretrained(MODEL_DIR)
    for merger in tqdm(MERGERS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_folder(Path(scratch, "model"), arguments.shape, merger)
            options = {} if arguments.dtype == "float32" else {"kv_cache_memory_bytes": 2**30}
            llm = vllm.LLM(
                str(folder),
                load_format="dummy",
                dtype=arguments.dtype,
                max_model_len=1024,
                compilation_config=GRAPHS,
                **options,
            )
            processor = llm.llm_engine.renderer.mm_processor
            results[merger] = llm.apply_model(
                lambda model, processor=processor: measure(model, processor, tokenizer, arguments.rounds)
            )[0]
            llm.llm_engine.engine_core.shutdown()
            del llm
            vllm.distributed.cleanup_dist_env_and_memory()
        protocol = {name: getattr(arguments, name) for name in ("shape", "dtype", "rounds")}
        protocol["num_merged_tokens"] = NUM_TOKENS
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_report(arguments.output, device, protocol, milliseconds=results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1.5-7b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("serving_steps.json"))
    main(parser.parse_args())
