# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What came out of a benchmark, as Markdown."""

MIB = 1 << 20
COLUMNS = {
    "first_token": "first token",
    "vision_tower": "tower",
    "merger": "merger",
    "multi_modal_projector": "projector",
    "prefill": "prefill",
    "prompt_graph": "graph of the prompt",
    "rest": "rest",
    "another_question": "another question",
    "decode": "a token",
    "token_graph": "graph of a token",
    "answer": "answer",
}


def make_tables(report: dict) -> str:
    """A table for each batch size, one of throughput if it was measured, and how all was measured."""
    protocol, parts = report["protocol"], []
    for size, rows in report["results"].items():
        parts += [f"## {size} at once", make_table(rows)]
    if report["throughput"] is not None:
        parts += [f"## Requests a second in {protocol['memory']} GiB", make_throughput_table(report["throughput"])]
    return "\n\n".join([f"# {protocol['model']}, {protocol['dtype']}", *parts, describe(protocol)]) + "\n"


def make_table(rows: dict[str, dict]) -> str:
    """Milliseconds as median and quartiles, with speed, ratios to the stock model, and what compiling took."""
    ratios = {"first_token_ratio": "first token ×", "answer_ratio": "answer ×"}
    numbers = {"tokens_per_second": "tokens/s", **ratios}
    if any(row["compiled"] for row in rows.values()):
        numbers |= {f"{name}_of_compiled": f"{shown} compiled" for name, shown in ratios.items()}
        numbers["compile_seconds"] = "compiling, s"
    columns = {
        name: shown for name, shown in COLUMNS.items() if any(name in row["milliseconds"] for row in rows.values())
    }
    head = ["merger", "tokens", *columns.values(), *numbers.values(), "KV MiB", "peak MiB"]
    lines = [head, ["---"] * len(head)]
    for row in rows.values():
        peak = row["peak_memory_bytes"]
        lines.append(
            [
                row["merger"] + (", compiled" if row["compiled"] else ""),
                row["budget"],
                *(as_text(row["milliseconds"].get(name)) for name in columns),
                *("" if row.get(name) is None else f"{row[name]:.2f}" for name in numbers),
                f"{row['kv_bytes_of_image'] / MIB:.1f}",
                "" if peak is None else f"{peak / MIB:.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(times: dict | None) -> str:
    """Median and quartiles; nothing of a part that was not measured, as inside a graph."""
    return "" if times is None else f"{times['median']:.2f} ({times['low']:.2f}–{times['high']:.2f})"


def make_throughput_table(rows: dict[str, dict]) -> str:
    """Largest batches and their requests a second."""
    lines = [["cell", "batch", "requests/s", "×"], ["---"] * 4]
    for key, row in rows.items():
        lines.append([key, str(row["batch_size"]), f"{row['requests_per_second']:.2f}", f"{row['ratio']:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(protocol: dict) -> str:
    """How it was measured, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in protocol["versions"].items())
    attention = protocol["attention"]
    return (
        f"{protocol['parameters'] / 1e6:.1f} million parameters, weights {protocol['weights']}; "
        f"{protocol['hardware']}, {protocol['threads']} threads; {versions}; attention {attention['vision_tower']} in "
        f"the tower, {attention['language_model']} in the language model. One picture and {protocol['text_tokens']} "
        f"other tokens a prompt, answers of {protocol['new_tokens']} tokens. Milliseconds of the whole batch: medians "
        f"(quartiles) of {protocol['rounds']} rounds, in which the rows took turns; × is how many times faster than "
        f"the first row, × compiled than the same row compiled. The rest is what the first token takes besides its "
        f"parts, or compiled, besides its graph: the host, mostly."
    )
