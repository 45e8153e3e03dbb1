# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""How long loading and importing take: a merged checkpoint beside the stock one of the same weights, and `import`.

python examples/benchmark_loading.py --output loading.json
python examples/benchmark_loading.py --text-layers 8 --rounds 7 --output loading.json

Random weights in a shape of `llava-merge benchmark`, in a temporary folder of as many bytes (14 GB for all layers of
llava-1.5-7b). The merged checkpoint is what `llava-merge convert` makes: the same files and a merger's. They are loaded
in turn; the files are in the system's cache by then. Each import is a new process.
"""

import argparse
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.benchmark.models import SHAPES, config_of_shape
from llava_merge.demo import MODEL_DIR
from llava_merge.evaluation.protocol import describe_machine
from llava_merge.model.checkpoint_saving import write_whole
from llava_merge.serving.convert import convert


IMPORT = """
import time, torch, transformers
from transformers import LlavaForConditionalGeneration
start = time.process_time()
import llava_merge
print(time.process_time() - start)
"""


def make_checkpoints(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[type, Path]]:
    """The stock and the merged checkpoint, with the classes that load them."""
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    vision, text = SHAPES[arguments.model]
    text = {**text, "num_hidden_layers": arguments.text_layers or text["num_hidden_layers"]}
    config = config_of_shape(vision, text, processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    torch.manual_seed(0)
    with torch.device(arguments.device):  # a CPU takes minutes for the random numbers of all layers
        model = LlavaForConditionalGeneration._from_config(config, dtype=getattr(torch, arguments.dtype))
    model.save_pretrained(folder / "stock", max_shard_size="2GB")
    processor.save_pretrained(folder / "stock")
    del model
    convert(str(folder / "stock"), folder / "merged", arguments.merger, arguments.num_merged_tokens)
    return {
        "stock": (LlavaForConditionalGeneration, folder / "stock"),
        "merged": (LlavaMergeForConditionalGeneration, folder / "merged"),
    }


def time_load(model_class: type, folder: Path, arguments: argparse.Namespace) -> float:
    """Seconds of `from_pretrained`."""
    gc.collect()
    torch.cuda.empty_cache()  # as a new process would find it; nothing where there is no GPU
    start = time.perf_counter()
    model = model_class.from_pretrained(
        folder, dtype=getattr(torch, arguments.dtype), device_map={"": arguments.device}
    )
    seconds = time.perf_counter() - start
    del model
    return seconds


def time_import() -> float:
    """Seconds of CPU time that `import llava_merge` adds to transformers and its LLaVA, in a new process."""
    output = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return float(output.stdout.split()[-1])


def in_turn(measures: dict, rounds: int) -> dict[str, list[float]]:
    """What each of `measures` returns, round by round; the first round, which fills caches, does not count."""
    found = {name: [] for name in measures}
    for number in tqdm(range(rounds + 1), desc="loads"):
        for name, measure in [*measures.items()][:: 1 if number % 2 else -1]:
            found[name].append(measure())
    return {name: values[1:] for name, values in found.items()}


def main(arguments: argparse.Namespace):
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        checkpoints = make_checkpoints(arguments, Path(scratch))
        loads = in_turn(
            {name: lambda found=found: time_load(*found, arguments) for name, found in checkpoints.items()},
            arguments.rounds,
        )
    imports = [time_import() for _ in tqdm(range(arguments.rounds), desc="imports")]
    ratios = [merged / stock for merged, stock in zip(loads["merged"], loads["stock"], strict=True)]
    results = {
        "load_seconds": loads,
        "load_ratio": statistics.median(ratios),
        "import_cpu_seconds": imports,
        "import_median": statistics.median(imports),
    }
    protocol = {**describe_machine(torch.device(arguments.device)), **vars(arguments), "output": None, "scratch": None}
    command = shlex.join(["python", "examples/benchmark_loading.py", *sys.argv[1:]])
    write_whole(
        arguments.output, json.dumps({"command": command, "protocol": protocol, "results": results}, indent=2) + "\n"
    )
    print(f"Loading takes {results['load_ratio']:.3f} × stock's time; import adds {results['import_median']:.2f} s")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-1.5-7b", choices=SHAPES)
    parser.add_argument("--text-layers", type=int, help="of the language model; default all")
    parser.add_argument("--merger", default="fixed_pooling")
    parser.add_argument("--num-merged-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scratch", help="where the checkpoints are written; default the system's")
    parser.add_argument("--output", type=Path, default=Path("loading.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
