# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What shows on a GPU alone: that the host does not wait for it, and that CUDA graphs say what the kernels do."""

import pytest
import torch
from conftest import agnostic, aware, pixels, prompts, tiny_model

from llava_merge import compile_for_inference
from llava_merge.model import placeholders, questions
from llava_merge.model.merging_grid import NUM_KEPT, slot_geometry
from llava_merge.model.questions import Prompt


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_TOKENS = 9
MERGERS = {
    "V3": agnostic(attention_mass=1.0),
    "V3, question-aware": aware(attention_mass=1.0),
    "V3, without mass": agnostic(),
    "V3, layers": agnostic(feature_layers=[0, 1]),
    **{
        name: {"merger_type": name, "num_merged_tokens": NUM_TOKENS, "attention_mass": 1.0}
        for name in (
            "average_pooling",
            "c_abstractor",
            "cdpruner",
            "divprune",
            "fastervlm",
            "image_resize",
            "mmtok",
            "mqt",
            "prumerge_plus",
            "quecc",
            "random",
            "resampler",
            "salient_pooling",
            "strided",
            "tokenpacker",
            "tome",
            "visionzip",
            "vispruner",
        )
    },
    "V1": {"merger_type": "gumbel_topk", "num_merged_tokens": NUM_TOKENS},
    "V2": {"merger_type": "gumbel_topk_question", "num_merged_tokens": NUM_TOKENS, "question_aware": True},
}


@pytest.fixture
def no_waits():
    """Makes every wait of the host for the GPU an error, where it is called with True."""

    def refuse(yes: bool):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if yes else "default")

    yield refuse
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(name: str, counts: list[int], text: int = 8) -> tuple:
    model = tiny_model(MERGERS[name]).cuda()
    return model, inputs(counts, text)


def inputs(counts: list[int], text: int) -> dict:
    batch = {key: tensor.cuda() for key, tensor in prompts(counts, NUM_TOKENS, text=text, seed=text).items()}
    return {**batch, "pixel_values": pixels(sum(counts), seed=text).cuda()}


@pytest.mark.parametrize("name", MERGERS)
@torch.no_grad()
def test_questions_merging_and_places_wait_for_nothing(name, no_waits):
    model, batch = on_gpu(name, [1, 2])
    headless, mask = model.model, batch["input_ids"] == model.config.image_token_id
    headless.get_vision_features(batch["pixel_values"])  # hooks of transformers
    for refused in (False, True):  # the first call sets up libraries
        no_waits(refused)
        prompt = Prompt(batch["input_ids"], None, mask, attention_mask=batch["attention_mask"], may_hold_answers=False)
        question = headless.get_question(prompt, [NUM_TOKENS] * 3)
        images = headless.encode_images(batch["pixel_values"], question=question)
        headless.layout_of_prompt(mask, images, None)


@pytest.mark.parametrize("name", [name for name in MERGERS if MERGERS[name].get("attention_mass")])
@torch.no_grad()
def test_a_forward_waits_for_its_checks_alone(name, no_waits, monkeypatch):
    model, batch = on_gpu(name, [1, 2])
    batch["question_mask"] = batch["attention_mask"].bool()
    checks = []
    for module in (placeholders, questions):
        monkeypatch.setattr(module, "check_on_device", lambda *check: checks.append(check[1]))
    for refused in (False, True):
        no_waits(refused)
        model(**batch, use_cache=False)
    assert checks


@pytest.mark.parametrize("name", MERGERS)
def test_cuda_graphs_answer_as_the_kernels_do(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of convolutions, which graphs do without
    model, _ = on_gpu(name, [1])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    calls = [{**inputs(counts, text), **settings} for counts in ([1], [1, 1]) for text in (3, 8, 20)]
    expected = [model.generate(**call) for call in calls]
    fast = compile_for_inference(model, batch_sizes=[1, 2], prompt_lengths=[24, 48], max_new_tokens=8, backend=None)
    seen, prefill = [], fast.graphs.prefill
    monkeypatch.setattr(fast.graphs, "prefill", lambda shape, *args: seen.append(shape) or prefill(shape, *args))
    for call, answer in zip(calls, expected, strict=True):
        assert torch.equal(fast.generate(**call), answer)
    assert len(seen) == len(calls) and len({*seen}) == 4
    for given in (NUM_TOKENS - 1, NUM_TOKENS + 1):  # of which the prefill runs before the check
        wrong = {key: tensor.cuda() for key, tensor in prompts([1], given, text=8).items()}
        with pytest.raises(ValueError, match=f"hold {given} image placeholders"):
            fast.generate(**{**calls[1], **wrong})
    assert torch.equal(fast.generate(**calls[1]), expected[1])


SETTINGS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def test_decompiling_leaves_no_memory_behind():
    model, batch = on_gpu("V3, question-aware", [1])
    allocated, free = [], []
    for _ in range(6):
        fast = compile_for_inference(model, prompt_lengths=[24, 48], max_new_tokens=8, backend=None)
        fast.generate(**batch, **SETTINGS)
        fast.decompile()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
        free.append(torch.cuda.mem_get_info()[0])
    assert allocated[-1] - allocated[1] < 2**20, allocated  # the first cycle sets up libraries
    assert free[1] - free[-1] < 2**24, free


@pytest.mark.parametrize("name", ["V3", "image_resize", "quecc", "salient_pooling"])
def test_answers_stay_the_same_when_caches_have_let_go_of_what_graphs_read(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, batch = on_gpu(name, [1])
    expected = model.generate(**batch, **SETTINGS)
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=8, backend=None)
    device, others = torch.device("cuda", torch.cuda.current_device()), []
    for number in range(NUM_KEPT + 16):
        geometry = slot_geometry((9, 9), 1 + number, device)
        others += [torch.full_like(tensor, torch.nan) for tensor in (geometry.windows, geometry.centres)]
        others += [torch.full((size,), torch.nan, device=device) for size in (9 * 36, 9 * 2, 9)]  # where it was
    for _ in range(2):
        assert torch.equal(fast.generate(**batch, **SETTINGS), expected)
    assert fast.graphs is not None


def test_graphs_of_two_models_share_no_memory(monkeypatch):
    """What cuBLAS computes in is freed with the graphs of one, and is the other's own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    models = [on_gpu(name, [1])[0] for name in ("V3", "V3, question-aware")]
    batch = inputs([1], 8)
    expected = [model.generate(**batch, **SETTINGS) for model in models]
    first, second = (
        compile_for_inference(model, prompt_lengths=[24], max_new_tokens=8, backend=None) for model in models
    )
    assert torch.equal(first.generate(**batch, **SETTINGS), expected[0])
    first.decompile()
    filled = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(16)]  # where the first one was
    assert torch.equal(second.generate(**batch, **SETTINGS), expected[1]) and len(filled) == 16
