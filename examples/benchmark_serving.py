# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Load on vLLM's server: a stock LLaVA against merged ones, with several clients at once.

pip install '.[serve]'
python examples/benchmark_serving.py --model demo --merger served --merger average_pooling --output serving.json
python examples/benchmark_serving.py --model demo --merger tome --photographs ~/Pictures --load new,clients=8,tokens=128
python examples/benchmark_serving.py --merger tome --server one= 'four=OMP_NUM_THREADS=1 --api-server-count 4'

All servers are up, and answer the same requests in turn, for several rounds; a ratio is that of two loads of one round.
Each load, round and budget has pictures of its own, since processes keep caches that no request empties. What a server
answers when it is asked again is compared with what it answered before; the stock server is vLLM's own LLaVA. Requests
are sent with vLLM's own benchmark client, by processes of their own; the report says what these reach on a server that
computes nothing. On a GPU the servers share its memory: give each its part, such as
--vllm-options '--gpu-memory-utilization 0.15 --kv-cache-memory-bytes 4G'.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, takewhile
from pathlib import Path

import aiohttp
import torch
import vllm
from aiohttp import web
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlavaConfig, LlavaForConditionalGeneration
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_chat_completions

from llava_merge import LlavaMergeProcessor
from llava_merge.benchmark.models import SHAPES, config_of_shape
from llava_merge.demo import MODEL_DIR, find_merger
from llava_merge.evaluation.protocol import describe_machine
from llava_merge.model.checkpoint_saving import write_whole
from llava_merge.serving.convert import convert
from llava_merge.serving.requests import BUDGET


WORDS = "what color shape is the star circle heart square red blue green there how many where digit shown".split()
PICTURES = {"new": None, "repeated": 4, "large": None}  # how many there are; None for one a request
SMALL, LARGE = (0.3,), (0.3, 1, 3, 12)  # megapixels, in turn
MEASURED = ("first_token_ms", "answer_ms")


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        kind: "new" pictures, "repeated" ones with ever new questions, or new ones of which some are "large".
        clients: Which each ask one request after the other.
        requests: Of all clients together.
        tokens: Of an answer.
        words: Of a question.
    """

    kind: str
    clients: int = 8
    requests: int = 64
    tokens: int = 16
    words: int = 24

    @classmethod
    def parse(cls, text: str) -> "Load":
        """Of "new,clients=8,requests=64"."""
        kind, *fields = text.split(",")
        if kind not in PICTURES:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(PICTURES)}")
        try:
            return cls(kind, **{name: int(value) for name, value in (field.split("=") for field in fields)})
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: write new,clients=8,requests=64,tokens=16,words=24") from error

    def __str__(self) -> str:
        return ", ".join(
            [self.kind, *(f"{getattr(self, name)} {name}" for name in ("clients", "requests", "tokens", "words"))]
        )


LOADS = [Load(kind, clients) for kind in ("new", "repeated") for clients in (1, 8, 32)]


@dataclass
class Answer:
    """What a client got: the text or None where it was lost, seconds to the first token and to the last."""

    text: str | None
    first_token: float
    seconds: float
    prompt_tokens: int
    tokens: int


class Server:
    """`vllm serve` on the loopback, as a context.

    Args:
        folder: Checkpoint.
        log: File for what it prints.
        options: Of `vllm serve`.
        variables: Of its environment, besides those of this process.
    """

    def __init__(self, folder: Path, log: Path, *options: str, variables: dict[str, str] | None = None):
        self.url = free_url()
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], *options]
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1", **(variables or {})}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def __enter__(self) -> "Server":
        self.wait_until_up()
        return self

    def __exit__(self, *error):
        self.stop()

    def wait_until_up(self):
        """Waits until it answers.

        Raises:
            RuntimeError: It ends, or takes longer than ten minutes; with all that it printed.
        """
        deadline = time.monotonic() + 600
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"The server did not start:\n{self.log.read_text()}")  # its cause may stand first
            time.sleep(1)

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


def free_url() -> str:
    """An address on the loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def stock_config(shape: str, processor: LlavaMergeProcessor) -> LlavaConfig:
    """Of a stock LLaVA in a shape of `SHAPES`, whose tokens are those of the processor."""
    config = config_of_shape(*SHAPES[shape], processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], "bfloat16"
    return config


def make_base(name: str, folder: Path, device: str) -> Path:
    """A stock checkpoint: the bundled model, a folder, or random weights in a shape of `SHAPES`."""
    if name not in SHAPES:
        return MODEL_DIR if name == "demo" else Path(name)
    config = stock_config(name, LlavaMergeProcessor.from_pretrained(MODEL_DIR))
    torch.manual_seed(0)
    shutil.copytree(MODEL_DIR, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "*.md"))
    config.save_pretrained(folder)
    with torch.device(device):
        weights = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).state_dict()
    # under the names of the Hub, which vLLM's LLaVA takes
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file({name: weight.contiguous().cpu() for name, weight in named.items()}, folder / "model.safetensors")
    del weights, named
    torch.cuda.empty_cache()  # for the servers
    return folder


def write_pictures(load: Load, folder: Path, photographs: list[Path]) -> Path:
    """JPEGs of the sizes that people send, each another cut of a photograph; of noise where there are none."""
    sizes, number = LARGE if load.kind == "large" else SMALL, num_pictures(load)
    folder.mkdir(parents=True)

    def write(index: int):
        rng = random.Random(f"{folder.name} {index}")
        width = round((sizes[index % len(sizes)] * 1e6 * 4 / 3) ** 0.5)
        size = width, round(width * 3 / 4)
        image = noise(size, rng) if not photographs else Image.open(photographs[index % len(photographs)])
        cut = rng.uniform(0, 0.1) * image.width, rng.uniform(0, 0.1) * image.height
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, (*cut, *image.size))
        image.save(folder / f"{index}.jpg", quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(number)))
    return folder


def noise(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Smooth colours and noise, as photographs have both."""
    coarse = Image.frombytes("RGB", (8, 6), rng.randbytes(8 * 6 * 3)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(coarse, Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)), 0.1)


def num_pictures(load: Load) -> int:
    """Pictures that a load needs."""
    return PICTURES[load.kind] or load.requests


def make_requests(load: Load, folder: Path) -> list[tuple[str, Path]]:
    """Pairs of question and picture."""
    rng = random.Random(load.words)
    return [
        (make_question(rng, load.words), folder / f"{index % num_pictures(load)}.jpg") for index in range(load.requests)
    ]


def make_question(rng: random.Random, num_words: int = 24) -> str:
    """Words that the bundled model's tokenizer knows."""
    return " ".join(rng.choices(WORDS, k=num_words)) + "?"


def as_url(image: Image.Image) -> str:
    """A picture as data URL, lossless."""
    image.save(file := io.BytesIO(), format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def as_message(question: str, picture: Path) -> dict:
    """A user's turn."""
    url = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"role": "user", "content": content}


async def ask(session: aiohttp.ClientSession, url: str, message: dict, tokens: int, options: dict) -> Answer:
    """One request, read token by token."""
    got = await async_request_openai_chat_completions(
        RequestFuncInput(
            prompt=[message],
            api_url=f"{url}/v1/chat/completions",
            prompt_len=0,
            output_len=tokens,
            model="model",
            ignore_eos=True,
            extra_body={"temperature": 0, "skip_special_tokens": False, **options},
        ),
        session,
    )
    text = got.generated_text if got.success else None
    return Answer(text, got.ttft, got.latency, got.prompt_len, got.output_tokens)


def run_clients(
    url: str, requests: dict[int, tuple[str, Path]], num_clients: int, tokens: int, options: dict, limit: float
) -> tuple[dict[int, Answer], float, float]:
    """The answers to `requests` of clients that each ask one after the other, and when they began and were done."""
    waiting = [(index, as_message(*request)) for index, request in requests.items()][::-1]
    answers, timeout = {}, aiohttp.ClientTimeout(total=limit)

    async def one_client(session: aiohttp.ClientSession):
        while waiting:
            index, message = waiting.pop()
            answers[index] = await ask(session, url, message, tokens, options)

    async def all_clients() -> tuple[float, float]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            start = time.perf_counter()
            await asyncio.gather(*(one_client(session) for _ in range(num_clients)))
            return start, time.perf_counter()

    return answers, *asyncio.run(all_clients())


def run_load(
    pool: Executor, processes: int, url: str, load: Load, folder: Path, options: dict, limit: float
) -> tuple[list[Answer], float]:
    """The answers to a load, whose clients are shared among processes, and the seconds for all of them."""
    requests, processes = make_requests(load, folder), min(processes, load.clients)
    parts = [
        pool.submit(
            run_clients,
            url,
            dict(list(enumerate(requests))[number::processes]),
            load.clients // processes + (number < load.clients % processes),
            load.tokens,
            options,
            limit,
        )
        for number in range(processes)
    ]
    found, starts, ends = zip(*(part.result() for part in parts), strict=True)
    answers = {index: answer for part in found for index, answer in part.items()}
    return [answers[index] for index in range(len(requests))], max(ends) - min(starts)


async def answer_at_once(request: web.Request) -> web.StreamResponse:
    """What a server would say that computes nothing."""
    asked = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(asked["max_completion_tokens"]):
        await response.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
    await response.write(b"data: [DONE]\n\n")
    return response


def requests_without_a_server(run, load: Load, folder: Path) -> float:
    """Requests a second that the clients reach where nothing is computed."""
    app, url = web.Application(client_max_size=2**28), free_url()
    app.router.add_post("/v1/chat/completions", answer_at_once)
    options = {"host": "127.0.0.1", "port": int(url.rpartition(":")[2]), "print": None, "handle_signals": False}
    threading.Thread(
        target=web.run_app, args=(app,), kwargs={**options, "loop": asyncio.new_event_loop()}, daemon=True
    ).start()
    answers, seconds = [], 1.0
    while not (answers and all(answer.text for answer in answers)):  # until it listens
        answers, seconds = run(url, load, folder, {})
    return len(answers) / seconds


def summarize(answers: list[Answer], seconds: float, before: list[Answer]) -> dict:
    """Figures of a load; answers that are not those that were given `before`, if any were, count as different."""
    got = [answer for answer in answers if answer.text is not None]
    pairs = [(one.text, other.text) for one, other in zip(answers, before, strict=False)]
    pairs = [pair for pair in pairs if None not in pair]
    return {
        "requests_per_second": len(got) / seconds,
        "tokens_per_second": sum(answer.tokens for answer in got) / seconds,
        "first_token_ms": percentiles([1000 * answer.first_token for answer in got]),
        "answer_ms": percentiles([1000 * answer.seconds for answer in got]),
        "lost": len(answers) - len(got),
        "different": sum(one != other for one, other in pairs),
        "compared": len(pairs),
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
    median = {name: statistics.median(one[name] for one in loads) for name in loads[0] if name.endswith("_per_second")}
    percentile = {
        kind: {name: statistics.median(one[kind][name] for one in loads) for name in loads[0][kind]}
        for kind in MEASURED
    }
    ratios = [
        one["requests_per_second"] / other["requests_per_second"] for one, other in zip(loads, stock, strict=True)
    ]
    return {
        **{name: round(value, 2) for name, value in median.items()},
        **percentile,
        **{name: sum(one[name] for one in loads) for name in ("lost", "different", "compared")},
        "prompt_tokens": loads[0]["prompt_tokens"],
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


@dataclass
class Row:
    """A server and what its requests ask for; its figures are compared with those of the row `beside`.

    Rows of one server have another number each, and ask about other pictures.
    """

    name: str
    server: Server
    options: dict
    beside: str
    number: int


def measure(rows: list[Row], loads: list[Load], rounds: int, run, folder_of) -> Iterator[dict[str, dict[str, dict]]]:
    """Yields the figures so far after each load: by row, then by load."""
    found = {row.name: {} for row in rows}
    for load in tqdm(loads, desc="loads"):
        times = {"cold": defaultdict(list), "warm": defaultdict(list)}
        for turn in range(rounds):
            folders = {number: folder_of(load) for number in {row.number for row in rows}}
            for row in rows[:: 1 if turn % 2 else -1]:
                row.server.forget()
                before = []
                for caches in times:
                    answers, seconds = run(row.server.url, load, folders[row.number], row.options)
                    times[caches][row.name].append(summarize(answers, seconds, before))
                    before = answers
        for row in rows:
            for caches, by_name in times.items():
                found[row.name][f"{load}, {caches}"] = over_rounds(by_name[row.name], by_name[row.beside])
        yield found


def start_servers(arguments: argparse.Namespace, scratch: Path, running: contextlib.ExitStack) -> list[Row]:
    """All servers, which start at the same time, and the rows that are measured on them."""
    base = make_base(arguments.model, scratch / "base", arguments.device)
    folders, budgets, rows = {"stock": base}, arguments.num_merged_tokens, []
    for merger in arguments.merger:
        folders[merger] = scratch / f"merged-{len(folders)}"
        convert(str(base), folders[merger], find_merger(merger), budgets[0])
    always, servers = ["--dtype", arguments.dtype, "--max-model-len", "1024", *shlex.split(arguments.vllm_options)], []
    for setting, variables, more in arguments.server:
        prefix = f"{setting}, " if setting else ""
        for merger, folder in folders.items():
            own = shlex.split(arguments.stock_options) if merger == "stock" else ["--trust-request-mm-kwargs"]
            server = Server(folder, scratch / f"log-{len(servers)}", *always, *more, *own, variables=variables)
            running.callback(server.stop)
            servers.append(server)
            if merger == "stock":
                rows.append(Row(f"{prefix}stock", server, {}, f"{prefix}stock", 0))
                continue
            for index, budget in enumerate(budgets):
                asked = {"mm_processor_kwargs": {BUDGET: budget}} if index else {}
                rows.append(Row(f"{prefix}{merger}@{budget}", server, asked, f"{prefix}stock", index))
    for server in tqdm(servers, desc="servers"):
        server.wait_until_up()
    return rows


def main(arguments: argparse.Namespace):
    files = sorted(arguments.photographs.iterdir()) if arguments.photographs else []
    photographs = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if arguments.photographs and not photographs:
        raise ValueError(f"--photographs {arguments.photographs}: it holds no .jpg, .jpeg or .png.")
    processes, spawn = arguments.processes, multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        numbers = count()

        def folder_of(load: Load) -> Path:
            """New pictures, in a folder of their own."""
            return write_pictures(load, Path(scratch, f"pictures-{next(numbers)}"), photographs)

        pool = running.enter_context(ProcessPoolExecutor(processes, spawn))
        for _ in range(processes):
            pool.submit(time.sleep, 1)  # they import what they need while the servers start
        run = partial(run_load, pool, processes, limit=arguments.limit)
        rows = start_servers(arguments, Path(scratch), running)
        few = replace(arguments.load[0], clients=2, requests=4)  # to warm up
        for row in rows:
            run(row.server.url, few, folder_of(few), row.options)
        most = max(arguments.load, key=lambda load: load.clients)
        reached = requests_without_a_server(run, most, folder_of(most))
        for results in measure(rows, arguments.load, arguments.rounds, run, folder_of):
            report(arguments, results, {"load": str(most), "requests_per_second": round(reached, 1)})


def report(arguments: argparse.Namespace, results: dict, without_a_server: dict):
    """Writes what is known so far."""
    left_out = ("load", "merger", "photographs", "output", "limit")  # results and command say them
    protocol = {name: value for name, value in vars(arguments).items() if name not in left_out}
    protocol |= {"cores": os.cpu_count(), "pictures": "photographs" if arguments.photographs else "noise"}
    protocol["megapixels"] = {"new and repeated": SMALL, "large": LARGE}
    figures = {"clients_alone": without_a_server, "results": results}  # alone: on a server that computes nothing
    write_report(arguments.output, arguments.device, protocol, **figures)


def write_report(output: Path, device: str, protocol: dict, **figures: dict):
    """Writes figures with the command that made them, and on what."""
    command = shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    protocol = {**describe_machine(torch.device(device)), "vllm": vllm.__version__, **protocol}
    write_whole(output, json.dumps({"command": command, "protocol": protocol, **figures}, indent=1) + "\n")


def parse_server(text: str) -> tuple[str, dict[str, str], list[str]]:
    """A setting of the server: its name, variables of the environment, and options."""
    name, equals, rest = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=OPTIONS, or NAME=VARIABLE=VALUE OPTIONS")
    words = shlex.split(rest)
    variables = dict(word.split("=", 1) for word in takewhile(lambda word: re.match(r"\w+=", word), words))
    return name, variables, words[len(variables) :]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"demo, a folder, or a shape: {', '.join(SHAPES)}")
    parser.add_argument(
        "--merger", action="append", required=True, help="as of llava-merge convert; several may be given"
    )
    parser.add_argument(
        "--num-merged-tokens", type=int, nargs="+", default=[64], help="the checkpoint's, then those of requests"
    )
    parser.add_argument(
        "--load", type=Load.parse, nargs="+", default=LOADS, help="such as large,clients=8,requests=64,tokens=128"
    )
    parser.add_argument("--photographs", type=Path, help="folder of pictures to be asked about; default noise")
    parser.add_argument("--rounds", type=int, default=3, help="of each load, by all servers in turn")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="of the clients")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a request may take")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that vLLM runs on")
    parser.add_argument(
        "--vllm-options", default="", help="of vllm serve, as one text: --vllm-options='--enforce-eager'"
    )
    parser.add_argument("--stock-options", default="", help="more for stock, such as a larger --kv-cache-memory-bytes")
    parser.add_argument(
        "--server",
        type=parse_server,
        nargs="+",
        default=[("", {}, [])],
        help="NAME=VARIABLES OPTIONS, servers that run beside",
    )
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
