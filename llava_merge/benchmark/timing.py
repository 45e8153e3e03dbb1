# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Milliseconds of the parts of a model, from its own calls."""

import time
from contextlib import contextmanager

import torch
from torch import nn

from llava_merge.compiled import CompiledModel
from llava_merge.compiled.graphs import InferenceGraphs


PHASES = ("vision_tower", "merger", "multi_modal_projector", "language_model")


class Stopwatch:
    """Moments on a device: events in the stream of a GPU, which wait for nothing, or the clock of the CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def now(self):
        """This moment."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        """Milliseconds; the device has to have reached both moments."""
        return start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)

    def wait(self):
        """Until the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()


@contextmanager
def timed_calls(modules: dict[str, nn.Module], stopwatch: Stopwatch):
    """Times every call of the modules inside; hands over a dict that has their moments by name.

    On a GPU the time between two launches counts to the part that waits for the second one.
    """
    moments: dict[str, list] = {name: [] for name in modules}
    hooks = []
    for name, module in modules.items():
        seen = moments[name]
        hooks += [
            module.register_forward_pre_hook(lambda *arguments, seen=seen: seen.append([stopwatch.now()])),
            module.register_forward_hook(lambda *arguments, seen=seen: seen[-1].append(stopwatch.now())),
        ]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def time_generate(model, inputs: dict, new_tokens: int) -> dict[str, float]:
    """Milliseconds of a greedy answer of `new_tokens`, two or more, and of its parts.

    Returns:
        `first_token`; `decode`, of a token; `answer`, of all. Of the first token `vision_tower`, `merger`,
        `multi_modal_projector`, `prefill` of the language model, and `rest`, which is host, embeddings and head, and
        `another_question`, the first token where the images are encoded already. From graphs, [`time_graphs`] and
        `rest`, which is the first token without its graph.
    """
    stopwatch, graphs = Stopwatch(model.device), model.graphs if isinstance(model, CompiledModel) else None
    modules = {} if graphs else {name: getattr(model.model, name) for name in PHASES}
    with timed_calls(modules, stopwatch) as moments:
        first = wall_time(model, inputs, 1, stopwatch)
    answer = wall_time(model, inputs, new_tokens, stopwatch)
    times = {"first_token": first, "decode": (answer - first) / (new_tokens - 1), "answer": answer}
    if graphs:
        of_graphs = time_graphs(graphs, stopwatch)
        return {**times, **of_graphs, "rest": first - of_graphs["prompt_graph"]}
    phases = {name: sum(stopwatch.between(*each) for each in seen) for name, seen in moments.items()}
    phases["prefill"] = phases.pop("language_model")
    phases["rest"] = first - sum(phases.values())
    phases["another_question"] = wall_time(model, with_encoded_images(model, inputs), 1, stopwatch)
    return times | phases


def time_graphs(graphs: InferenceGraphs, stopwatch: Stopwatch) -> dict[str, float]:
    """Milliseconds of the graphs of one shape by themselves: `prompt_graph`, up to the first logits, `token_graph`."""
    times = {}
    (prompt,), (token,) = graphs.prefills.values(), graphs.decodes.values()
    for name, recorded in (("prompt_graph", prompt), ("token_graph", token)):
        stopwatch.wait()
        start = stopwatch.now()
        recorded()
        end = stopwatch.now()
        stopwatch.wait()
        times[name] = stopwatch.between(start, end)
    return times


def with_encoded_images(model, inputs: dict) -> dict:
    """Inputs of `generate` whose images the tower need not see any more."""
    encoded = model.encode_images(inputs["pixel_values"], num_merged_tokens=inputs.get("num_merged_tokens"))
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return {**others, "mm_encoder_outputs": {"image": encoded}}


def wall_time(model, inputs: dict, new_tokens: int, stopwatch: Stopwatch) -> float:
    """Milliseconds of a greedy answer of just so many tokens, with the device idle at both ends."""
    unknown = model.config.get_text_config().vocab_size  # ends no answer, and costs no more than another id that would
    stopwatch.wait()
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=unknown, do_sample=False, pad_token_id=0)
    stopwatch.wait()
    return 1000 * (time.perf_counter() - start)
