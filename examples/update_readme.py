# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables of README.md, the guides and results/README.md: what mergers there are, and what was measured.

python examples/update_readme.py
"""

import inspect
import json
import os
import re
import statistics
from itertools import product
from pathlib import Path
from typing import NamedTuple

from llava_merge import MERGING_METHODS, MergerInfo, list_mergers
from llava_merge.evaluation.protocol import check_same_protocol
from llava_merge.model.checkpoint_saving import write_whole
from llava_merge.model.configuration_llava_merge import QUESTION_METHODS


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md")))
TRAINED = {  # mergers of the evaluation, and what they are called in the table
    "llava_merge/demo/mergers/question_aware": "`fixed_pooling` (V3), question-aware",
    "llava_merge/demo/mergers/agnostic": "`fixed_pooling` (V3)",
    "demo_mergers/salient": "`salient_pooling` (V3 on what stands out)",
    "demo_mergers/gumbel_topk": '`gumbel_topk` (V1), `estimator="soft_topk"`',
    "demo_mergers/gumbel_topk_question": '`gumbel_topk_question` (V2), `estimator="soft_topk"`',
}
PLACES = {  # fields of a merger's name, and what they mean
    "": "source, mass 1",
    "position_ids=packed": "packed, mass 1",
    "attention_mass=0": "source, mass 0",
    "position_ids=packed,attention_mass=0": "packed, mass 0",
}
RIVALS = {  # mergers of demo_rivals.yaml, and what they are called in the table
    "fixed_pooling": "`fixed_pooling` (V3)",
    "fixed_pooling_layers": "`fixed_pooling` (V3), `feature_layers=[1, 2, 3, 4]`",
    "c_abstractor": "`c_abstractor`",
    "tokenpacker": "`tokenpacker`",
    "mqt": "`mqt`",
    "resampler": "`resampler`",
    "fixed_pooling_question": "`fixed_pooling` (V3), question-aware",
    "quecc": "`quecc`, question-aware",
}
BUDGETS = ("64", "16", "4")
LORA_MERGERS = {  # in names of files, and the merger of the same kind without LoRA
    "question_aware": "llava_merge/demo/mergers/question_aware",
    "agnostic": "llava_merge/demo/mergers/agnostic",
    "salient": "demo_mergers/salient",
}
LORA_SCENES = {"simple": "demo", "hard": "demo_hard"}  # as the tables say it, and in names of files

LOAD = r"(\w+), (\d+) clients, (\d+) requests, (\d+) tokens, \d+ words, (\w+)"  # of benchmark_serving.py
CACHED = "fixed_pooling:attention_mass=1"  # of compiling, whose graphs are those of the row before


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, *rows)).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def mergers_table() -> str:
    """Of [`llava_merge.list_mergers`]: the default first, then by name."""
    head = ["`merger_type`", "trained", "reads the question", "needs", "what it does", "source"]
    return table(head, merger_rows())


def methods_table() -> str:
    """The same in short."""
    rows = [[name, trained, summary] for name, trained, _, _, summary, _ in merger_rows()]
    return table(["`merger_type`", "trained", "what it does"], rows)


def merger_rows() -> list[list[str]]:
    mergers = sorted(list_mergers(), key=lambda merger: (merger.name != "fixed_pooling", merger.name))
    return [merger_row(merger) for merger in mergers]


def merger_row(merger: MergerInfo) -> list[str]:
    question = "no"
    if merger.question_aware:
        question = "yes" if merger.name in QUESTION_METHODS else "with `question_aware=True`"
    file = Path(inspect.getfile(MERGING_METHODS[merger.name])).name
    source = ", ".join([f"[{file}](llava_merge/model/{file})", *([merger.paper] if merger.paper else [])])
    name = f"`{merger.name}`" + (" (default)" if merger.name == "fixed_pooling" else "")
    return [name, "yes" if merger.trained else "no", question, ", ".join(merger.requires), merger.summary, source]


def evaluation_tables(simple: dict, hard: dict) -> tuple[str, str]:
    """Scores in % by tokens an image, of all mergers and of the ways of placing their tokens; best first."""
    names = [row["merger"] for row in simple["results"].values() if row["budget"] == BUDGETS[1]]
    names.sort(
        key=lambda name: (
            -sum(report["results"][f"{name}@{BUDGETS[1]}"]["scores"]["all"]["score"] for report in (simple, hard))
        )
    )
    head = [f"{kind}, {budget}" for kind in ("simple", "hard") for budget in BUDGETS]
    unmerged = [report["results"]["none@all"] for report in (simple, hard)]
    rows = [
        [
            "all tokens (stock LLaVA)",
            "",
            *(cell for row in unmerged for cell in (percent(row), "", "")),
            f"{unmerged[0]['milliseconds']:.2f}",
        ]
    ]
    placed = []
    for name in names:
        method, _, fields = name.partition(":")
        cells = [percent(report["results"][f"{name}@{budget}"]) for report in (simple, hard) for budget in BUDGETS]
        if not fields:
            row = simple["results"][f"{name}@{BUDGETS[1]}"]
            time = f"{row['milliseconds']:.2f}" + " (1)" * row.get("is_of_another_host", False)
            rows.append([TRAINED.get(name, f"`{name}`"), "yes" if name in TRAINED else "no", *cells, time])
        if any(f"{method}:" in other for other in names):
            placed.append([f"`{method}`", PLACES[fields], *cells])
    placed.sort(key=lambda row: (row[0], list(PLACES.values()).index(row[1])))
    return table(["", "trained", *head, "ms, 16"], rows), table(["", "positions, mass", *head], placed)


def percent(row: dict) -> str:
    return f"{100 * row['scores']['all']['score']:.1f}"


def types_table(hard: dict) -> str:
    """Scores in % by type of question, of the mergers that are told apart by it, at 16 tokens."""
    shown = {"none@all": "all tokens"} | {f"{name}@16": text for name, text in TRAINED.items()}
    shown |= {f"{name}@16": f"`{name}`" for name in ("divprune", "tome", "random")}
    types = [name for name in hard["results"]["none@all"]["scores"] if name != "all"]
    rows = [
        [text, *(f"{100 * hard['results'][key]['scores'][name]['score']:.1f}" for name in types)]
        for key, text in shown.items()
    ]
    return table(["16 tokens, hard scenes", *types], rows)


def lora_table(reports: dict[tuple[str, str], dict]) -> str:
    """Scores in % where the language model was trained along; `reports` by merger and kind of scenes."""
    head = ["", *(f"{kind}, {budget}" for kind in LORA_SCENES for budget in ("576", *BUDGETS))]
    rows = []
    for merger, alone in LORA_MERGERS.items():
        results = [reports[merger, scenes]["results"] for scenes in LORA_SCENES.values()]
        keys = ("none@all", *(f"own@{budget}" for budget in BUDGETS))
        rows.append([f"{TRAINED[alone]}, LoRA", *(percent(found[key]) for found in results for key in keys)])
    return table(head, rows)


def served_table(simple: dict, hard: dict) -> str:
    """What the mass that a server cannot add was worth, and a merger that was trained without."""
    head = ["", *(f"{scenes}, {budget}" for scenes in ("simple", "hard") for budget in BUDGETS)]
    names = {
        "served": "trained without mass: can be served",
        "question_aware": "trained with mass 1: transformers alone",
        "question_aware:attention_mass=0": "the same with its mass set to 0",
    }
    rows = [
        [shown, *(percent(report["results"][f"{name}@{budget}"]) for report in (simple, hard) for budget in BUDGETS)]
        for name, shown in names.items()
    ]
    return table(head, rows)


class LoadName(NamedTuple):
    """What was asked, as the name of a load says it."""

    kind: str
    clients: str
    caches: str
    tokens: str
    requests: str


def load_of(name: str) -> LoadName:
    """Of "new, 8 clients, 48 requests, 16 tokens, 24 words, cold"."""
    kind, clients, requests, tokens, caches = re.fullmatch(LOAD, name).groups()
    return LoadName(kind, clients, caches, tokens, requests)


def serving_tables(report: dict, invariant: dict) -> str:
    """Requests a second of merged servers beside the stock one's, seconds to the first token, and other loads.

    `invariant` is the report of servers whose kernels round alike in every batch.
    """
    protocol, results = report["protocol"], report["results"]
    loads = {key: load_of(key) for key in results["stock"]}
    short = [load for load in loads.values() if load.kind != "large" and load.tokens == "16"]
    clients = sorted({load.clients for load in short}, key=int)
    rows, first = [], []
    for name, found in results.items():
        cells = {load: found[key] for key, load in loads.items()}
        for kind, caches in product(("new", "repeated"), ("cold", "warm")):
            chosen = [cells[load] for number in clients for load in short if load[:3] == (kind, number, caches)]
            rows.append([shown_server(name), f"{kind} images, {caches}", *map(per_second, chosen)])
        chosen = [cells[load] for number in clients for load in short if load[:3] == ("new", number, "cold")]
        first.append([shown_server(name), *map(times_of, chosen)])
    head = [f"{number} clients" for number in clients]
    others = [(key, load) for key, load in loads.items() if load not in short]
    titles = [
        ("0.3 to 12 megapixels" if load.kind == "large" else f"answers of {load.tokens} tokens")
        + f", {load.clients} clients, {load.caches}"
        for _, load in others
    ]
    beside = [[shown_server(name), *(per_second(found[key]) for key, _ in others)] for name, found in results.items()]
    of_stock, merged = share_of_others(results, stock=True), share_of_others(results, stock=False)
    lost = sum(one["lost"] for found in results.values() for one in found.values())
    number = sum(int(load.requests) for load in loads.values()) * protocol["rounds"] * len(results)
    versions = f"vLLM {protocol['vllm']}, torch {protocol['versions']['torch']}, {protocol['dtype']}"
    rounds = rounds_of(protocol)
    alone = f"{report['clients_alone']['requests_per_second']:.0f} requests a second"
    parts = (
        table(["requests a second", "load", *head], rows),
        "Milliseconds to the first token, median / 99 %, and to the last, median; new images, cold:",
        table(["", *head], first),
        "Other loads, requests a second:",
        table(["", *titles], beside),
        f"{protocol['hardware']}, {protocol['cores']} cores, {versions}, random weights in the shape of "
        f"{protocol['model']}; JPEGs of {protocol['pictures']}, enlarged to 0.3 megapixels but where more is said, "
        f"questions of 24 words, answers of 16 tokens, {rounds}; × is beside stock. The clients alone reach {alone} "
        f"where nothing is computed. Of {number} answers {lost} were lost. Asked again, {of_stock} of stock's answers "
        f"and {merged} of the merged ones were others than before: with random weights two words are often nearly as "
        f"likely, and kernels round by the size of a batch. With kernels that do not (`VLLM_BATCH_INVARIANT=1`), "
        f"{share_of_others(invariant['results'], stock=True)} of stock's and "
        f"{share_of_others(invariant['results'], stock=False)} of the merged ones were others "
        f"([serving_7b.json](examples/results/serving_7b.json), "
        f"[serving_invariant.json](examples/results/serving_invariant.json)).",
    )
    return "\n\n".join(parts)


def rounds_of(protocol: dict) -> str:
    return f"{protocol['rounds']} round" + ("s" if protocol["rounds"] > 1 else "")


def share_of_others(results: dict, stock: bool) -> str:
    """Of the answers of stock or merged servers that were asked again: how many were others."""
    rows = [found for name, found in results.items() if name.endswith("stock") == stock]
    again = [load for found in rows for key, load in found.items() if key.endswith(", warm")]
    different, compared = (sum(one[field] for one in again) for field in ("different", "compared"))
    return f"{different} of {compared} ({different / compared:.1%})"


def settings_table(report: dict) -> str:
    """Requests a second of one load, of servers with other numbers of processes and threads."""
    results, protocol = report["results"], report["protocol"]
    columns, rows = ("stock", "fixed_pooling@64", "fixed_pooling@16"), []
    for setting, _, _ in protocol["server"]:
        cells = [[*results[f"{setting}, {column}"].values()] for column in columns]  # cold and warm
        rows.append([setting, *(per_second(cell[caches]) for caches in (0, 1) for cell in cells)])
    head = [f"{shown_server(column)}, {caches}" for caches in ("cold", "warm") for column in columns]
    load = load_of(next(iter(results[f"{setting}, stock"])))
    cache = re.search(r"--kv-cache-memory-bytes (\d+)G", protocol["vllm_options"])[1]
    return (
        f"{table(['API servers', *head], rows)}\n\nAs above, {load.kind} images, {load.clients} clients, but "
        f"{rounds_of(protocol)}, {cache} GB of KV cache each, and {protocol['cores']} cores on which other tests ran, "
        f"too ([serving_settings.json](examples/results/serving_settings.json))."
    )


def steps_table(report: dict) -> str:
    """Milliseconds of an engine's step, on host and device."""
    found, protocol = report["milliseconds"], report["protocol"]
    waits = sum(part["waits"] for row in found.values() for cell in row.values() for part in cell.values())
    rows = []
    for name, row in found.items():
        images = [f"{row[size]['images']['host']:.1f}, {row[size]['images']['device']:.1f}" for size in row]
        between = [f"{row[size]['between the text']['device']:.1f}" for size in row]
        positions = [f"{row[size]['positions']['host']:.1f}" if "positions" in row[size] else "" for size in row]
        rows.append(
            [
                shown_server(name if name == "stock" else f"{name}@{protocol['num_merged_tokens']}"),
                *images,
                *between,
                *positions,
            ]
        )
    sizes = [re.sub("^1 images", "1 image", size) for size in found["stock"]]
    parts = ("tower to projector: host, device", "between the text", "positions: host")
    return (
        f"{table(['ms', *(f'{part}, {size}' for part in parts for size in sizes)], rows)}\n\n"
        f"{protocol['hardware']}, vLLM {protocol['vllm']}, {protocol['dtype']}, the shape of {protocol['shape']}, "
        f'medians of {protocol["rounds"]}; "host" is until the call returns, "device" until the device is done. '
        f"The host waited {waits} times for the device ([serving_steps.json](examples/results/serving_steps.json))."
    )


def shown_server(name: str) -> str:
    """A row of the serving tables: its merger and its tokens."""
    merger, _, budget = name.partition("@")
    aware = ", question-aware" if "question_aware=true" in merger else ""
    return f"`{merger.partition(':')[0]}`{aware}, {budget}" if budget else f"{merger}, 576"


def times_of(load: dict) -> str:
    """Milliseconds to the first token and to the last."""
    first, last = load["first_token_ms"], load["answer_ms"]
    return f"{first['p50']:.0f} / {first['p99']:.0f}, {last['p50']:.0f}"


def per_second(load: dict) -> str:
    """Requests a second, and as a multiple of stock's."""
    return f"{load['requests_per_second']:.0f} ({load['ratio']:.2f} ×)"


def host_table(report: dict) -> str:
    """What a request costs the host of a server, by the size of its image."""
    results, protocol = report["results"], report["protocol"]
    rows = [
        [name, *(f"{cell[name]['milliseconds']:.1f} ms ({cell[name]['ratio']:.2f} ×)" for cell in results.values())]
        for name in next(iter(results.values()))
    ]
    return (
        f"What a request costs the server's host before the GPU sees it, by the size of its image, decoded:\n\n"
        f"{table(['', *results], rows)}\n\n{protocol['hardware']}, {protocol['threads']} thread, vLLM "
        f"{protocol['vllm']}, medians of {protocol['rounds']} rounds; × is the time beside stock's of the same run, "
        f"in chats of a shape that the server has seen before "
        f"([serving_host.json](examples/results/serving_host.json))."
    )


def flips_sentence(report: dict) -> str:
    """How many answers change with the size of the batch."""
    protocol, flips = report["protocol"], report["flips"]
    sizes = ", ".join(map(str, flips["batch_sizes"][:-1])) + f" or {flips['batch_sizes'][-1]}"
    stock = flips["cells"]["none@all"]
    merged = max(cell["score"] for key, cell in flips["cells"].items() if key != "none@all")
    found = f"{stock['score']:.1%} of the unmerged model's answers, and at most {merged:.1%} of a merged one's"
    if stock["score"] == merged == 0:
        found = "no answer of the unmerged model, and none of a merged one"
    return (
        f"The size of the batch changes {found}: {stock['n']} questions about hard scenes, asked in batches of "
        f"{sizes}, with all, 64 or 16 tokens, in {protocol['dtype']} on one {protocol['hardware']} (95 % interval up "
        f"to {100 * stock['ci95'][1]:.1f} %; [evaluation_flips.json](examples/results/evaluation_flips.json))."
    )


def first_numbers(hard: dict, speed: dict) -> str:
    """The first table of README, and what it is worth at 7B's size."""
    names = [name for name in TRAINED if "gumbel" not in name and "agnostic" not in name]
    names += ["divprune", "average_pooling", "random"]
    rows = [["all 576 tokens", "", percent(hard["results"]["none@all"]), "", ""]]
    for name in names:
        cells = [percent(hard["results"][f"{name}@{budget}"]) for budget in BUDGETS]
        rows.append([TRAINED.get(name, f"`{name}`"), "trained" if name in TRAINED else "untrained", *cells])
    protocol, merged = speed["protocol"], speed["results"]["32"]["divprune@64"]
    return (
        f"{table(['', '', *(f'{budget} tokens' for budget in BUDGETS)], rows)}\n\nRight answers in % to "
        f"{hard['protocol']['questions']} questions about hard drawn scenes, of the bundled model, whose language "
        f"model was trained with all 576 tokens alone ([all methods, losses included]"
        f"(examples/guides/evaluation.md#measured)). At the size of "
        f"LLaVA-1.5-7B, with 64 tokens of `divprune` on one {protocol['hardware']}, the first token comes "
        f"{merged['first_token_ratio']:.1f} × as fast in batches of 32, and a whole answer of "
        f"{protocol['new_tokens']} tokens {merged['answer_ratio']:.1f} ×; one prompt alone gains nothing, not compiled "
        f"([Speed](examples/guides/speed.md))."
    )


def training_table(report: dict) -> str:
    """Validation of a run before and after it."""
    head = ["", *(f"step {entry['step']}" for entry in report["evaluations"])]
    names = {"eval_16_accuracy": "16 tokens", "eval_all_accuracy": "all 576 tokens"}
    rows = [
        [shown, *(f"{100 * entry[name]:.1f} %" for entry in report["evaluations"])] for name, shown in names.items()
    ]
    measured = (
        f"{report['hardware']}, transformers {report['versions']['transformers']}, n = {report['num_validation']}"
    )
    seconds = f"{report['metrics']['train_runtime']:.0f} s with both validations"
    return f"{table(head, rows)}\n\n{measured}, {seconds} ([demo_training.json](examples/results/demo_training.json))."


def training_cost_table(report: dict) -> str:
    """Seconds and memory of a step at 7B's size, and many GPUs against one."""
    head = ["teacher", "tokens an image", "samples / s", "peak GiB", "share of the step that is the teacher's"]
    rows, seconds = (
        [],
        {(row["teacher"], row["num_merged_tokens"]): row["seconds_per_step"] for row in report["step"]["rows"]},
    )
    for row in report["step"]["rows"]:
        alone = seconds["none", row["num_merged_tokens"]]
        share = f"{1 - alone / row['seconds_per_step']:.0%}"
        budget, rate, memory = row["num_merged_tokens"], row["samples_per_second"], row["peak_memory_gib"]
        rows.append([row["teacher"], str(budget), f"{rate:.1f}", f"{memory:.1f}", share])
    differences = report["parallel"]["largest_difference_from_one_gpu"].values()
    worst = max(value["losses, relative"] for value in differences)
    return (
        f"{table(head, rows)}\n\nOne of {report['hardware']}, torch {report['versions']['torch']}, transformers "
        f"{report['versions']['transformers']}. On an earlier demo model, of 3.3 million parameters, eight steps of "
        f"{report['parallel']['global_batch']} samples under DDP and FSDP2 on two GPUs have the losses of one GPU "
        f"(largest relative difference, of five decimals: {worst:g}) "
        f"([training_benchmark.json](examples/results/training_benchmark.json))."
    )


def speed_in_short(report: dict, served: dict) -> str:
    """Times at 7B's shape, and requests a second of servers, of few mergers."""
    results, protocol = report["results"], report["protocol"]
    shown = ("none@all", "divprune@64", "fixed_pooling@64", "fixed_pooling@16")
    largest = [*results][-1]
    rows = [
        [
            timed_merger(results[largest][key]),
            results[largest][key]["budget"],
            *(timed(of_size[key], "first_token") for of_size in results.values()),
            timed(results[largest][key], "answer"),
        ]
        for key in shown
    ]
    loads = {load_of(key): key for key in served["results"]["stock"]}
    asked = ("new", "cold", "16")
    new = {load.clients: key for load, key in loads.items() if (load.kind, load.caches, load.tokens) == asked}
    most = max(new, key=int)
    rate = {name: found[new[most]] for name, found in served["results"].items()}
    head = ["", "tokens", *(f"first token, batch {size}" for size in results), f"answer, batch {largest}"]
    return (
        f"{table(head, rows)}\n\n{protocol['parameters'] / 1e9:.1f} billion parameters in the shape of LLaVA-1.5-7B, "
        f"random weights, {protocol['dtype']}, one {protocol['hardware']}, answers of {protocol['new_tokens']} tokens; "
        f"× is how many times faster than stock ([Speed](examples/guides/speed.md)). On vLLM, where {most} clients ask "
        f"about new images, {rate['fixed_pooling@64']['ratio']:.1f} × the requests per second of stock with 64 tokens "
        f"and {rate['fixed_pooling@16']['ratio']:.1f} × with 16 ([Serving](examples/guides/serving.md))."
    )


def results_table() -> str:
    """Of each file of results: the hardware and the command."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        report = read_result(path.stem)
        hardware = report.get("protocol", report).get("hardware")
        command = report.get("command", "llava-merge train examples/configs/demo.yaml")
        rows.append([f"[{path.name}](examples/results/{path.name})", hardware, f"`{command}`".replace("|", "\\|")])
    return table(["file", "hardware", "command"], rows)


def speed_table(report: dict, later: dict) -> str:
    """Times at 7B's shape, and of a `later` run throughput, each beside the stock model of the same run."""
    results, throughput, protocol = report["results"], later["throughput"], report["protocol"]
    check_same_protocol(
        {**protocol, "rounds": None, "memory": None}, {**later["protocol"], "rounds": None, "memory": None}, "later"
    )
    largest = [*results][-1]
    head = [
        "",
        "tokens",
        *(f"first token, batch {size}" for size in results),
        f"answer, batch {largest}",
        "requests/s",
    ]
    rows = []
    for key, row in results[largest].items():
        times = [timed(rows_of_size[key], "first_token") for rows_of_size in results.values()]
        rate, requests = throughput.get(key), ""
        if rate is not None:
            requests = f"{rate['requests_per_second']:.0f} ({rate['ratio']:.2f} ×), batch {rate['batch_size']}"
        rows.append([timed_merger(row), row["budget"], *times, timed(row, "answer"), requests])
    phases = [row["milliseconds"] for row in results[largest].values()]
    share = max(each["merger"]["median"] for each in phases) / phases[0]["first_token"]["median"]
    versions = protocol["versions"]
    return (
        f"{table(head, rows)}\n\n{protocol['parameters'] / 1e9:.1f} billion parameters, random weights, "
        f"{protocol['dtype']}, one {protocol['hardware']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; prompts of an image and {protocol['text_tokens']} other tokens, answers of "
        f"{protocol['new_tokens']}, medians of {protocol['rounds']} rounds; × is how many times faster than stock; "
        f"merged tokens have no attention mass unless a row says so. The slowest merger of these takes "
        f"{100 * share:.1f} % of the stock time to the first token in batches of {largest}. Requests a second are "
        f"measured in {protocol['memory']:.0f} GiB, each row at the largest batch that fits "
        f"([benchmark_7b.json](examples/results/benchmark_7b.json), requests a second of a later run: "
        f"[benchmark_7b_throughput.json](examples/results/benchmark_7b_throughput.json))."
    )


def compiled_table(names: dict[str, str]) -> str:
    """Stock and merged, as they are and compiled.

    Args:
        names: Results on one GPU, by batch size.
    """
    reports = {size: read_result(name) for size, name in names.items()}
    head = ["", "tokens"]
    for size in reports:
        head += [f"first token, batch {size}", f"answer, batch {size}"]
    rows = []
    for key, row in next(iter(reports.values()))["results"]["1"].items():
        if row["merger"] == CACHED:  # the same once more
            continue
        cells = [report["results"][size].get(key) for size, report in reports.items()]
        times = ["" if cell is None else timed(cell, part) for cell in cells for part in ("first_token", "answer")]
        rows.append([timed_merger(row) + ", compiled" * row["compiled"], row["budget"], *times])
    protocol = reports["1"]["protocol"]
    links = ", ".join(f"[batch {size}](examples/results/{name}.json)" for size, name in names.items())
    ours = {size: report["results"][size]["fixed_pooling@64, compiled"] for size, report in reports.items()}
    beside = [
        f"{row['first_token_ratio_of_compiled']:.2f} and {row['answer_ratio_of_compiled']:.2f} × in batches of {size}"
        for size, row in ours.items()
    ]
    return (
        f"{table(head, rows)}\n\n{protocol['hardware']}, otherwise as above, answers of "
        f"{protocol['new_tokens']} tokens; × is how many times faster than stock that is not compiled, of the same run "
        f"({links}). Beside stock compiled the same way, first token and answer of `fixed_pooling` are "
        f"{', '.join(beside)}."
    )


def compiling_sentence(names: list[str]) -> str:
    """Seconds of compiling one length and batch size."""
    rows = [row for name in names for rows in read_result(name)["results"].values() for row in rows.values()]
    seconds = [row["compile_seconds"] for row in rows if row["compiled"] and row["merger"] != CACHED]
    (again,) = (row["compile_seconds"] for row in rows if row["compiled"] and row["merger"] == CACHED)
    return (
        f"Compiling one length of one batch size took {min(seconds):.0f} to {max(seconds):.0f} s there, and "
        f"{again:.0f} s where torch's cache on the disk had most of it."
    )


def loading_sentence(on_cpu: dict, on_gpu: dict) -> str:
    """What loading and importing take."""
    return (
        f"Loading a merged checkpoint of LLaVA-1.5-7B's shape, mapped to memory, takes {loads_of(on_cpu)}; to a GPU "
        f"{loads_of(on_gpu)}. `import llava_merge` adds {on_cpu['results']['import_median']:.2f} s to transformers "
        f"([loading.json](examples/results/loading.json), [loading_gpu.json](examples/results/loading_gpu.json))."
    )


def loads_of(report: dict) -> str:
    """Seconds of merged and stock checkpoints in turn, and how far their ratios lie apart."""
    loads, protocol = report["results"]["load_seconds"], report["protocol"]
    stock, merged = (statistics.median(loads[name]) for name in ("stock", "merged"))
    ratios = [ours / theirs for ours, theirs in zip(loads["merged"], loads["stock"], strict=True)]
    return (
        f"{merged:.2f} s, stock {stock:.2f} s (medians of {protocol['rounds']} loads in turn; ratios "
        f"{min(ratios):.2f}–{max(ratios):.2f}, median {report['results']['load_ratio']:.2f}; {protocol['hardware']}, "
        f"{protocol['threads']} threads, transformers {protocol['versions']['transformers']})"
    )


def cpu_table(reports: dict[str, dict]) -> str:
    """One prompt a batch on a CPU, in milliseconds, beside the stock model of the same run."""
    head = ["", "tokens", "first token", "another question about it", "answer"]
    rows = []
    for model, report in reports.items():
        for row in report["results"]["1"].values():
            shown = "stock" if row["merger"] == "none" else f"`{row['merger'].rpartition('/')[2]}`"
            again = f"{row['milliseconds']['another_question']['median']:.0f} ms"
            times = [timed(row, "first_token"), again, timed(row, "answer")]
            rows.append([f"{model}, {shown}", row["budget"], *times])
    protocol = next(iter(reports.values()))["protocol"]
    return (
        f"{table(head, rows)}\n\n{protocol['hardware']}, {protocol['threads']} threads, {protocol['dtype']}, "
        f"transformers {protocol['versions']['transformers']}, answers of {protocol['new_tokens']} tokens "
        f"([demo](examples/results/benchmark_cpu_demo.json), [0.2b](examples/results/benchmark_cpu_02b.json))."
    )


def timed_merger(row: dict) -> str:
    """The merger of a row; reports name the mass of its tokens themselves only since it has another default than 0."""
    if row["merger"] == "none":
        return "stock"
    name, _, fields = row["merger"].partition(":")
    mass = row.get("attention_mass", float("attention_mass=1" in fields))
    question = ", question-aware" if "question_aware=true" in fields else ""
    return f"`{name}`{question}" + (f", mass {mass:g}" if mass else "")


def timed(row: dict, name: str) -> str:
    return f"{row['milliseconds'][name]['median']:.0f} ms ({row[f'{name}_ratio']:.2f} ×)"


def overhead_table(report: dict, later: dict) -> str:
    """What methods cost between tower and projector, cheapest first; `vispruner`, which was changed, from `later`."""
    rows, protocol = [], report["protocol"]
    stock, later_stock = (run["results"]["stock_prefill"]["32"]["median"] for run in (report, later))
    for name in report["results"]["methods"]:
        run, of_stock = (later, later_stock) if name == "vispruner" else (report, stock)
        cells = run["results"]["methods"][name].values()
        times = [{way: time["median"] for way, time in cell.items()} for cell in cells]
        shares = [cell[way] / of_stock for cell in times[2:] for way in ("eager", "recorded")]
        shown = [" / ".join(f"{time:.2f}" for time in cell.values()) for cell in times]
        shown += [" / ".join(f"{100 * share:.1f} %" for share in pair) for pair in (shares[:2], shares[2:])]
        rows.append((shares[0], [f"`{name.partition(':')[0]}`" + ", question-aware" * (":" in name), *shown]))
    head = ["", "1 × 64", "1 × 288", "32 × 64", "32 × 288", "of stock's 32 × 64", "32 × 288"]
    return (
        f"{table(head, [row for _, row in sorted(rows)])}\n\nMilliseconds, medians of {protocol['repeats']} calls, "
        f"{protocol['dtype']}, {protocol['hardware']}, transformers {protocol['versions']['transformers']}; the stock "
        f"prefill of 32 took {stock:.0f} ms in the same run ([merger_overhead.json]"
        f"(examples/results/merger_overhead.json)), and {later_stock:.0f} ms in that of `vispruner` "
        f"([merger_overhead_vispruner.json](examples/results/merger_overhead_vispruner.json))."
    )


def read_result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def read_evaluation(name: str) -> dict:
    """An evaluation, with the methods that were evaluated later, by the same protocol."""
    report, later, salient = (read_result(f"{name}{part}") for part in ("", "_later", "_salient"))
    resized = read_rivals(name.removeprefix("evaluation_demo"))
    salient["protocol"]["threads"] = report["protocol"]["threads"]  # of the host, whose times are told apart
    for part, other in (("later", later), ("salient", salient), ("rivals_3", resized)):
        check_same_protocol(report["protocol"], other["protocol"], part)
    resized = {key: row for key, row in resized["results"].items() if row["merger"] == "image_resize"}
    others = {key: {**row, "is_of_another_host": True} for key, row in salient["results"].items()}
    return {**report, "results": {**others, **resized, **later["results"], **report["results"]}}


def other_host_sentence(salient: dict) -> str:
    """What the times with a (1) are to be compared with."""
    stock, ours = (
        salient["results"][key]["milliseconds"] for key in ("none@all", "llava_merge/demo/mergers/agnostic@16")
    )
    return (
        f"(1) On another host, where all tokens took {stock:.2f} ms and `fixed_pooling` {ours:.2f} "
        f"([simple](examples/results/evaluation_demo_salient.json), "
        f"[hard](examples/results/evaluation_demo_hard_salient.json))."
    )


def read_rivals(suffix: str) -> dict:
    """The evaluations of what was trained by demo_rivals.yaml, as one; `suffix` "_hard" for hard scenes."""
    reports = [read_result(f"rivals_{part}{suffix}") for part in (1, 2, 3)]
    for report in reports[1:]:
        check_same_protocol(reports[0]["protocol"], report["protocol"], f"rivals{suffix}")
    return {**reports[0], "results": {key: row for report in reports for key, row in report["results"].items()}}


def rivals_table(simple: dict, hard: dict) -> str:
    """Scores in % after the same training."""
    rows = [
        [
            shown,
            *(percent(report["results"][f"rivals/{name}@{budget}"]) for report in (simple, hard) for budget in BUDGETS),
        ]
        for name, shown in RIVALS.items()
    ]
    return table(["", *(f"{kind}, {budget}" for kind in ("simple", "hard") for budget in BUDGETS)], rows)


def updated(documents: dict[Path, str]) -> dict[Path, str]:
    """Texts of README and guides with the tables of today between their marks, each in one of them."""
    simple, hard = map(read_evaluation, ("evaluation_demo", "evaluation_demo_hard"))
    training, cost, flips = map(read_result, ("demo_training", "training_benchmark", "evaluation_flips"))
    lora = {
        (merger, scenes): read_result(f"evaluation_lora_{merger}_{scenes}")
        for merger in LORA_MERGERS
        for scenes in LORA_SCENES.values()
    }
    accuracy, placed = evaluation_tables(simple, hard)
    compiled = {size: f"benchmark_7b_compiled_{size}" for size in ("1", "8", "32")}
    tables = {
        "mergers": mergers_table(),
        "methods": methods_table(),
        "results": results_table(),
        "speed in short": speed_in_short(read_result("benchmark_7b"), read_result("serving_7b")),
        "first numbers": first_numbers(hard, read_result("benchmark_7b")),
        "accuracy of mergers": f"{accuracy}\n\n{other_host_sentence(read_result('evaluation_demo_salient'))}",
        "rivals": rivals_table(*map(read_rivals, ("", "_hard"))),
        "accuracy with LoRA": lora_table(lora),
        "flips": flips_sentence(flips),
        "accuracy by positions": placed,
        "accuracy by type": types_table(hard),
        "training": training_table(training),
        "cost of training": training_cost_table(cost),
        "speed": speed_table(read_result("benchmark_7b"), read_result("benchmark_7b_throughput")),
        "compiled": "\n\n".join(
            (
                compiled_table(compiled),
                compiling_sentence([*compiled.values()]),
            )
        ),
        "overhead": overhead_table(read_result("merger_overhead"), read_result("merger_overhead_vispruner")),
        "cpu": cpu_table({name: read_result(f"benchmark_cpu_{name}") for name in ("demo", "02b")}),
        "loading": loading_sentence(read_result("loading"), read_result("loading_gpu")),
        "served": served_table(read_result("evaluation_served"), read_result("evaluation_served_hard")),
        "host": host_table(read_result("serving_host")),
        "serving": serving_tables(read_result("serving_7b"), read_result("serving_invariant")),
        "settings": settings_table(read_result("serving_settings")),
        "steps": steps_table(read_result("serving_steps")),
    }
    documents = dict(documents)
    for name, lines in tables.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        places = [(path, place) for path, text in documents.items() for place in pattern.findall(text)]
        if len(places) != 1:
            raise ValueError(f"{len(places)} places are between {marks[0]} and {marks[1]}; there has to be one.")
        ((path, place),) = places
        filled = f"{marks[0]}\n{relinked(lines, path.parent)}\n{marks[1]}"
        documents[path] = documents[path].replace(place, filled)
    return documents


def relinked(lines: str, folder: Path) -> str:
    """Lines whose links, which are from the root, are from the `folder`."""
    return re.sub(r"\]\((?!http)([^)#]+)", lambda link: f"]({os.path.relpath(ROOT / link[1], folder)}", lines)


def read_documents() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}


def main():
    for path, text in updated(read_documents()).items():
        write_whole(path, text)


if __name__ == "__main__":
    main()
