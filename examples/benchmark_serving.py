# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Load on vLLM's server: a stock LLaVA against merged ones, with several clients at once.

pip install '.[serve]'
python examples/benchmark_serving.py --model demo --merger served --merger average_pooling --output serving_demo.json
python examples/benchmark_serving.py --model 0.2b-narrow-tower --merger average_pooling --output serving_02b.json

All servers are up, and answer the same requests in turn, for several rounds; a ratio is that of two loads of one round.
What a server answers to many clients is compared with what it answered to one; the stock server is vLLM's own LLaVA.
On a GPU the servers share its memory: give each its part, --vllm-options "--gpu-memory-utilization 0.3".
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import torch
import vllm
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from llava_merge import LlavaMergeProcessor
from llava_merge.benchmark.models import SHAPES, config_of_shape
from llava_merge.demo import MODEL_DIR, find_merger
from llava_merge.evaluation.protocol import describe_machine
from llava_merge.files import write_whole
from llava_merge.serving.convert import convert


NEW_TOKENS = 16
WORDS = "what color shape is the star circle heart square red blue green there how many where digit shown".split()
# the tower takes as small a part of the prefill as in LLaVA-1.5-7B, a twentieth
NARROW = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
MODELS = {**SHAPES, "0.2b-narrow-tower": (NARROW, SHAPES["0.2b"][1])}


@dataclass
class Answer:
    """What a client got: the text or None where it was lost, seconds to the first token and to the last."""

    text: str | None
    first_token: float
    seconds: float
    prompt_tokens: int


class Server:
    """`vllm serve` on the loopback, as a context.

    Args:
        folder: Checkpoint.
        log: File for what it prints.
        options: Of `vllm serve`.
    """

    def __init__(self, folder: Path, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], *options]
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 600
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"The server did not start:\n{self.log.read_text()}")  # its cause may stand first
            time.sleep(1)
        return self

    def __exit__(self, *error):
        self.stop()

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def forget(self):
        """Empties its caches: of prefixes, pictures and what was encoded."""
        for cache in ("prefix", "mm", "encoder"):
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/reset_{cache}_cache", method="POST"), timeout=60)

    def stop(self):
        """Ends it and waits."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make_base(name: str, folder: Path) -> Path:
    """A stock checkpoint: the bundled model, a folder, or random weights in a shape of `MODELS`."""
    if name not in MODELS:
        return MODEL_DIR if name == "demo" else Path(name)
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    config = config_of_shape(*MODELS[name], processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    config.architectures = ["LlavaForConditionalGeneration"]
    torch.manual_seed(0)
    shutil.copytree(MODEL_DIR, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "*.md"))
    config.save_pretrained(folder)
    weights = LlavaForConditionalGeneration(config).state_dict()  # under the names of the Hub, which vLLM's LLaVA takes
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file({name: weight.contiguous() for name, weight in named.items()}, folder / "model.safetensors")
    return folder


def make_requests(kind: str, number: int) -> list[tuple[str, str]]:
    """Pairs of question and picture: each picture new, or four pictures with ever new questions."""
    rng, number_of_pictures = random.Random(0), number if kind == "new pictures" else 4
    pictures = [
        as_url(Image.frombytes("RGB", (336, 336), rng.randbytes(336 * 336 * 3))) for _ in range(number_of_pictures)
    ]
    questions = [" ".join(rng.choices(WORDS, k=24)) + "?" for _ in range(number)]
    return [(question, pictures[index % number_of_pictures]) for index, question in enumerate(questions)]


def as_url(image: Image.Image) -> str:
    """A picture as data URL, lossless."""
    image.save(file := io.BytesIO(), format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


async def ask(client: openai.AsyncOpenAI, question: str, picture: str) -> Answer:
    """One request, read token by token."""
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    start, first, text, prompt_tokens = time.perf_counter(), None, "", 0
    try:
        stream = await client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=NEW_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"min_tokens": NEW_TOKENS, "skip_special_tokens": False},
        )
        async for chunk in stream:
            if chunk.choices and first is None:
                first = time.perf_counter() - start
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            prompt_tokens = chunk.usage.prompt_tokens if chunk.usage else prompt_tokens
    except openai.APIError:
        text = None
    return Answer(text, first or 0.0, time.perf_counter() - start, prompt_tokens)


async def load(url: str, requests: list[tuple[str, str]], num_clients: int, limit: float) -> tuple[list[Answer], float]:
    """The answers to `requests` of clients that each ask one after the other, and the seconds for all of them."""
    waiting, answers = list(enumerate(requests)), {}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=limit) as client:

        async def one_client():
            while waiting:
                index, request = waiting.pop(0)
                answers[index] = await ask(client, *request)

        start = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(num_clients)))
    return [answers[index] for index in range(len(requests))], time.perf_counter() - start


def summarize(answers: list[Answer], seconds: float, alone: list[Answer]) -> dict:
    """Figures of a load; answers that are not those given to one client count as different."""
    got = [answer for answer in answers if answer.text is not None]
    return {
        "requests_per_second": len(got) / seconds,
        "first_token_ms": percentiles([1000 * answer.first_token for answer in got]),
        "answer_ms": percentiles([1000 * answer.seconds for answer in got]),
        "lost": len(answers) - len(got),
        "different": sum(one.text != other.text for one, other in zip(answers, alone, strict=True)),
        "prompt_tokens": round(sum(answer.prompt_tokens for answer in got) / max(1, len(got)), 1),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and tail."""
    ordered = sorted(values) or [0.0]
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 2) for share in (50, 90, 99)
    }


def over_rounds(loads: list[dict], stock: list[dict]) -> dict:
    """One load of all rounds: medians, sums of what went wrong, and requests a second as multiples of stock's."""
    percentile = {
        kind: {name: statistics.median(one[kind][name] for one in loads) for name in loads[0][kind]}
        for kind in ("first_token_ms", "answer_ms")
    }
    ratios = [
        one["requests_per_second"] / other["requests_per_second"] for one, other in zip(loads, stock, strict=True)
    ]
    return {
        "requests_per_second": statistics.median(one["requests_per_second"] for one in loads),
        **percentile,
        "lost": sum(one["lost"] for one in loads),
        "different": sum(one["different"] for one in loads),
        "prompt_tokens": loads[0]["prompt_tokens"],
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def measure(servers: dict[str, Server], arguments: argparse.Namespace) -> Iterator[dict[str, dict[str, dict]]]:
    """Yields the figures so far after each kind of load: by server, then by load."""
    found = {name: {} for name in servers}
    kinds = [(kind, clients) for kind in ("new pictures", "repeated pictures") for clients in arguments.clients]
    alone = {}
    for kind, num_clients in tqdm(kinds, desc="loads"):
        requests = make_requests(kind, arguments.requests)
        loads = {"cold": defaultdict(list), "warm": defaultdict(list)}
        for number in range(arguments.rounds):
            for name in list(servers)[:: 1 if number % 2 else -1]:
                servers[name].forget()
                for caches in loads:
                    answers, seconds = asyncio.run(load(servers[name].url, requests, num_clients, arguments.limit))
                    reference = alone.setdefault((name, kind), answers)
                    loads[caches][name].append(summarize(answers, seconds, reference))
        for name in servers:
            for caches, by_name in loads.items():
                key = f"{kind}, {caches}, {num_clients} clients"
                found[name][key] = over_rounds(by_name[name], by_name["stock"])
        yield found


def main(arguments: argparse.Namespace):
    options = ["--dtype", arguments.dtype, "--max-model-len", "1024", *shlex.split(arguments.vllm_options)]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        base = make_base(arguments.model, Path(scratch, "base"))
        servers = {}
        for name in tqdm(["stock", *arguments.merger], desc="servers"):
            folder = base
            if name != "stock":
                folder = Path(scratch, f"merged-{len(servers)}")
                convert(str(base), folder, find_merger(name), arguments.num_merged_tokens)
            servers[name] = running.enter_context(Server(folder, Path(scratch, f"log-{len(servers)}"), *options))
            asyncio.run(load(servers[name].url, make_requests("new pictures", 2), 1, arguments.limit))  # warm up
        for results in measure(servers, arguments):
            report(arguments, results)


def report(arguments: argparse.Namespace, results: dict):
    """Writes what is known so far."""
    protocol = {**describe_machine(torch.device(arguments.device)), "vllm": vllm.__version__, **vars(arguments)}
    command = shlex.join(["python", "examples/benchmark_serving.py", *sys.argv[1:]])
    protocol.pop("output")
    written = {"command": command, "protocol": protocol, "results": results}
    write_whole(arguments.output, json.dumps(written, indent=2) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"demo, a folder, or a shape: {', '.join(MODELS)}")
    parser.add_argument(
        "--merger", action="append", required=True, help="as of llava-merge convert; several may be given"
    )
    parser.add_argument("--num-merged-tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="of each load")
    parser.add_argument("--rounds", type=int, default=5, help="of each load, by all servers in turn")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a request may take")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that vLLM runs on")
    parser.add_argument("--vllm-options", default="", help="further options of vllm serve, as one text")
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
