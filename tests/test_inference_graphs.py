# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`compile_for_inference`: the answers are those of the plain `generate`, from graphs made beforehand."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from conftest import Operators, agnostic, aware, pixels, prompts, tiny_model
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer

from llava_merge import LlavaMergeForConditionalGeneration
from llava_merge.model.inference_graphs import PrefillShape
from llava_merge.model.joint_projections import PartOfJoint, joint_projections, lie_side_by_side
from llava_merge.model.patch_projection import ProjectedPatches, projected_patches


NUM_TOKENS = 9
ALL = {"batch_sizes": [1, 2], "prompt_lengths": [24, 48], "max_new_tokens": 12}
MERGERS = {
    "agnostic": agnostic(),
    "aware": aware(),
    "aware, mass, source": aware(position_ids="source", attention_mass=1.0),
    "tome, mass, source": {"merger_type": "tome", "position_ids": "source", "attention_mass": 1.0},
    "visionzip": {"merger_type": "visionzip", "position_ids": "packed"},
    "cdpruner": {"merger_type": "cdpruner", "position_ids": "source"},
}


def merging(name: str) -> LlavaMergeForConditionalGeneration:
    torch._dynamo.reset()
    return tiny_model({"num_merged_tokens": NUM_TOKENS, **MERGERS[name]})


def inputs(counts: list[int], text: int, num_tokens: int = NUM_TOKENS, new_tokens: int = 8, **fields) -> dict:
    batch = prompts(counts, num_tokens, text=text, seed=text)
    images = {"pixel_values": pixels(sum(counts), seed=text)} if sum(counts) else {}
    return {**batch, **images, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, **fields}


def plain(model, batch: dict) -> torch.Tensor:
    """What the model answers without its graphs."""
    graphs, model.inference_graphs = model.inference_graphs, None
    try:
        return model.generate(**batch)
    finally:
        model.inference_graphs = graphs


def counted(model, monkeypatch) -> list[PrefillShape]:
    """The shapes of the prefills from graphs, from now on."""
    graphs, seen = model.inference_graphs, []
    prefill = graphs.prefill
    monkeypatch.setattr(graphs, "prefill", lambda shape, *args: seen.append(shape) or prefill(shape, *args))
    return seen


@pytest.mark.parametrize("name", MERGERS)
def test_answers_are_those_of_the_plain_model(name, monkeypatch):
    model = merging(name)
    model.compile_for_inference(**ALL, images_per_prompt=[1, 2], backend=None)
    seen = counted(model, monkeypatch)
    calls = [([1], 3), ([1], 6), ([1], 13), ([2], 6), ([1, 1], 6), ([2, 2], 12), ([1, 1], 20), ([1], 6)]
    for counts, text in calls:
        batch = inputs(counts, text)
        assert torch.equal(model.generate(**batch), plain(model, batch)), (counts, text)
    assert len(seen) == len(calls) and len({*seen}) > 4


@pytest.mark.parametrize("name", ["agnostic", "aware, mass, source"])
def test_nothing_is_compiled_again_for_another_prompt(name, monkeypatch):
    model, counter = merging(name), CompileCounter()
    model.compile_for_inference(prompt_lengths=[24, 48], images_per_prompt=[1, 2], max_new_tokens=8, backend=counter)
    num_graphs, seen = counter.frame_count, counted(model, monkeypatch)
    assert num_graphs >= 8  # a token of two lengths; two lengths with one image and with two; one image and two
    for counts, text in (([1], 3), ([1], 13), ([1], 20), ([2], 6), ([2], 20)):
        batch = inputs(counts, text)
        assert torch.equal(model.generate(**batch), plain(model, batch)), (counts, text)
    assert len(seen) == 5 and counter.frame_count == num_graphs


@pytest.mark.core
def test_decoding_reads_no_more_than_a_prompt_of_its_length_needs(monkeypatch):
    """All of what a graph may read is read for each token, also what only longer prompts fill."""
    model, seen = merging("agnostic"), []
    model.compile_for_inference(batch_sizes=[1, 2], prompt_lengths=[24, 48], max_new_tokens=12, backend=None)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, *args, **kwargs: seen.append(key.shape) or attend(query, key, *args, **kwargs),
    )
    for counts, text, length in (([1], 20, 48), ([1, 1], 20, 48), ([1, 1], 6, 24), ([1], 6, 24)):
        model.generate(**inputs(counts, text))
        assert {(shape[0], shape[2]) for shape in seen[-6:]} == {(len(counts), length + 12)}
    memory = {slot.cache.layers[0].keys.untyped_storage().data_ptr() for slot in model.inference_graphs.slots.values()}
    assert len(memory) == 1


@pytest.mark.core
@pytest.mark.parametrize("broken", ["prompt", "sampled prompt", "answer"])
def test_an_answer_that_is_not_finite_leaves_nothing_behind(broken, monkeypatch):
    """A masked key that is NaN makes all of the attention NaN."""
    model = merging("agnostic")
    model.compile_for_inference(**ALL, backend=None)
    seen, longer = counted(model, monkeypatch), inputs([1], 20, new_tokens=12)
    embedding = model.get_input_embeddings()
    if broken == "sampled prompt":
        longer["pixel_values"][:] = torch.nan
        with pytest.raises(RuntimeError, match="nan"):
            model.generate(**longer | {"do_sample": True})
    elif broken == "prompt":
        longer["pixel_values"][:] = torch.nan
        model.generate(**longer)
    else:  # as a sum that overflows in float16
        hook = embedding.register_forward_hook(
            lambda _, args, embeds: embeds * (torch.nan if embeds.shape[1] == 1 else 1)
        )
        model.generate(**longer)
        hook.remove()
    for batch in (inputs([1], 20 if broken == "answer" else 6), inputs([1], 20), inputs([1, 1], 20)):
        assert torch.equal(model.generate(**batch), plain(model, batch))
    assert len(seen) == 4


def test_picks_in_many_steps_are_not_compiled():
    counts = {}
    for name in ("tome", "divprune"):
        torch._dynamo.reset()
        model, counter = tiny_model({"merger_type": name, "num_merged_tokens": NUM_TOKENS}), CompileCounter()
        model.compile_for_inference(prompt_lengths=[24], max_new_tokens=8, backend=counter)
        counts[name] = counter.frame_count
        batch = inputs([1], 6)
        assert torch.equal(model.generate(**batch), plain(model, batch))
    assert counts["divprune"] == counts["tome"] - 1


@pytest.mark.core
def test_padding_of_the_prompt_is_not_seen(monkeypatch):
    """Rows of different lengths, and one sampled: the same numbers are drawn."""
    model = merging("aware, mass, source")
    model.compile_for_inference(**ALL, backend=None)
    seen = counted(model, monkeypatch)
    batch, shorter = inputs([1, 1], 10), inputs([1], 6)
    for name in ("input_ids", "attention_mask"):
        row = shorter[name][0]
        batch[name][0] = torch.nn.functional.pad(row, (batch[name].shape[1] - len(row), 0), value=0)
    assert torch.equal(model.generate(**batch), plain(model, batch))
    batch |= {"do_sample": True, "temperature": 2.0}
    torch.manual_seed(3)
    sampled = model.generate(**batch)
    torch.manual_seed(3)
    assert torch.equal(sampled, plain(model, batch)) and len(seen) == 2
    with torch.inference_mode():
        batch["do_sample"] = False
        assert torch.equal(model.generate(**batch), plain(model, batch))


@pytest.mark.core
def test_without_merger_with_budgets_and_with_text_alone(monkeypatch):
    torch._dynamo.reset()
    stock = tiny_model({"merger_type": "none"})
    stock.compile_for_inference(prompt_lengths=[60], images_per_prompt=[0, 1], max_new_tokens=8, backend=None)
    elastic = merging("tome, mass, source")
    elastic.compile_for_inference(
        prompt_lengths=[24, 60], num_merged_tokens=[4, 9, "all"], max_new_tokens=8, backend=None
    )
    calls = [(stock, inputs([1], 6, 36)), (stock, inputs([0], 6))]
    calls += [(elastic, inputs([1], 6, tokens, num_merged_tokens=given)) for tokens, given in ((4, 4), (36, "all"))]
    for model, batch in [*calls, (elastic, inputs([1], 6))]:
        seen = counted(model, monkeypatch)
        assert torch.equal(model.generate(**batch), plain(model, batch)) and len(seen) == 1


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"num_beams": 2}, "num_beams"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache"),
        ({"max_new_tokens": 13}, "max_new_tokens=13, and they were made for up to 12"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    ],
)
def test_other_calls_run_without_graphs(fields, reason, monkeypatch):
    model = merging("agnostic")
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(model, monkeypatch), {**inputs([1], 6), **fields}
    assert reason in model._why_without_graphs(model.inference_graphs, batch)
    answer, expected = model.generate(**batch), plain(model, batch)
    if fields.get("return_dict_in_generate"):
        answer, expected = answer.sequences, expected.sequences
    assert torch.equal(answer, expected) and not seen


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_override_of_image_features_runs_without_graphs(when, monkeypatch):
    """They would take its features for packed ones, and on a GPU not run its code at all."""
    model = merging("agnostic")
    features = list(torch.randn(1, 9, model.config.text_config.hidden_size))

    def own(pixel_values, **kwargs):
        return features * len(pixel_values)

    for is_patched in (when == "before", when == "after"):
        if is_patched:
            monkeypatch.setattr(model.model, "get_image_features", own)
        if model.inference_graphs is None:
            model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(model, monkeypatch), inputs([1], 6)
    assert "get_image_features is overridden" in model._why_without_graphs(model.inference_graphs, batch)
    assert torch.equal(model.generate(**batch), plain(model, batch)) and not seen


def test_what_the_model_s_own_settings_ask_for_counts_beside_those_of_a_call():
    """`generate` fills what a given configuration leaves open from the model's."""
    model = merging("agnostic")
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    model.generation_config.num_beams = 2
    batch = {name: tensor for name, tensor in inputs([1], 6).items() if isinstance(tensor, torch.Tensor)}
    batch["generation_config"] = GenerationConfig(max_new_tokens=8, do_sample=False)
    assert "num_beams" in model._why_without_graphs(model.inference_graphs, batch)
    assert torch.equal(model.generate(**batch), plain(model, batch))
    assert model._why_without_graphs(model.inference_graphs, {**batch, "num_beams": 1}) is None


@pytest.mark.core
@pytest.mark.parametrize("asked", [{"do_sample": False}, {"top_k": None}, {"temperature": 1.0}], ids=str)
def test_what_a_call_asks_for_wins_over_the_model_s_own_settings(asked, monkeypatch):
    """Also where it is what transformers has for its default, or None."""
    model = merging("agnostic")
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen = counted(model, monkeypatch)
    model.generation_config.update(do_sample=True, temperature=1e-4 if "temperature" in asked else 3.0)
    model.generation_config.top_k = 1 if "top_k" in asked else 0
    batch = inputs([1], 6)
    del batch["do_sample"]
    answers = []
    for answer, fields in ((model.generate, asked), (lambda **batch: plain(model, batch), asked), (model.generate, {})):
        torch.manual_seed(0)
        answers.append(answer(**batch, **fields))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2]) and len(seen) == 2


def test_neither_autocast_nor_training_is_answered_from_graphs(monkeypatch):
    model = merging("agnostic")
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(model, monkeypatch), inputs([1], 6)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**batch)
    model.train().generate(**batch)
    assert not seen
    model.eval().generate(**batch)
    assert len(seen) == 1


def test_other_shapes_run_without_graphs(monkeypatch):
    model = merging("agnostic")
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen = counted(model, monkeypatch)
    embeds = inputs([1], 6)
    embeds["inputs_embeds"] = model.get_input_embeddings()(embeds["input_ids"])
    unmasked = inputs([1], 6)
    del unmasked["attention_mask"]  # of which generate makes one where it finds padding
    for batch in (inputs([1, 1], 6), inputs([2], 3), inputs([1], 20), inputs([0], 6), embeds, unmasked):
        assert torch.equal(model.generate(**batch), plain(model, batch))
    assert not seen


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("num_tokens", [7, 11])
def test_a_wrong_prompt_gets_the_same_error(name, num_tokens, monkeypatch):
    """Though its prefill has started by then."""
    model = merging(name)
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    batch, seen = inputs([1], 6, num_tokens=num_tokens), counted(model, monkeypatch)
    for generate in (lambda: model.generate(**batch), lambda: plain(model, batch)):
        with pytest.raises(ValueError, match=f"The prompts hold {num_tokens} image placeholders"):
            generate()
    good = inputs([1], 6)
    assert torch.equal(model.generate(**good), plain(model, good)) and len(seen) == 2


def test_nothing_is_waited_for_before_the_prefill(monkeypatch):
    model, waits = merging("aware, mass, source"), []
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    (prefill,) = model.inference_graphs.prefills.values()
    run = prefill.function
    model.generate(**inputs([1], 6))
    with Operators() as operators:
        monkeypatch.setattr(
            prefill, "function", lambda **args: waits.append(operators.counts["_local_scalar_dense"]) or run(**args)
        )
        model.generate(**inputs([1], 6))
    assert waits == [0] and operators.counts["_local_scalar_dense"] > 0


def test_another_merger_is_never_answered_from_old_graphs(monkeypatch):
    model = merging("agnostic")
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(model, monkeypatch), inputs([1], 6)
    model.generate(**batch)
    model.set_merger({"merger_type": "average_pooling"})
    answer = model.generate(**batch)
    assert len(seen) == 1 and model.inference_graphs is None
    assert torch.equal(answer, plain(model, batch))
    model.compile_for_inference(prompt_lengths=[60], max_new_tokens=12, backend=None)
    with model.merger_bypassed():
        whole = inputs([1], 6, num_tokens=36)
        assert torch.equal(model.generate(**whole), plain(model, whole))


@pytest.mark.parametrize("put_in", [get_peft_model, lambda model, lora: inject_adapter_in_model(lora, model)])
def test_adapters_that_come_later_are_never_left_out(put_in):
    model, batch = merging("agnostic"), inputs([1], 6, new_tokens=12)
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    before = model.generate(**batch)
    adapted = put_in(model, LoraConfig(target_modules=["v_proj"], layers_to_transform=[1], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    answer = adapted.generate(**batch)
    assert model.inference_graphs is None and torch.equal(answer, plain(model, batch))
    assert not torch.equal(answer, before)


def test_streams_and_stopping_criteria_see_the_prompt_as_it_was(monkeypatch):
    """The padding is between graph and cache; nothing of it shows."""

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            lengths.append(input_ids.shape[1])
            return torch.full((len(input_ids),), input_ids.shape[1] >= batch["input_ids"].shape[1] + 4)

    class Put(TextIteratorStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids.append(value)

        def end(self):
            pass

    model, lengths, batch, streamer = merging("agnostic"), [], inputs([1], 6, min_new_tokens=1), Put()
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen = counted(model, monkeypatch)
    answer = model.generate(**batch, stopping_criteria=[AfterFour()], streamer=streamer)
    assert len(seen) == 1 and answer.shape[1] == batch["input_ids"].shape[1] + 4
    assert torch.equal(answer[0], torch.cat([ids.flatten() for ids in streamer.ids]))
    assert torch.equal(answer, plain(model, batch)[:, : answer.shape[1]])


def test_a_second_thread_meanwhile_runs_without_graphs(monkeypatch):
    model = merging("agnostic")
    model.compile_for_inference(prompt_lengths=[24], max_new_tokens=12, backend=None)
    batches = [inputs([1], text) for text in (4, 6)]
    expected, answers, seen = [plain(model, batch) for batch in batches], {}, counted(model, monkeypatch)

    class AskInBetween(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if 1 not in answers:
                answers[1] = None
                other = threading.Thread(target=lambda: answers.update({1: model.generate(**batches[1])}))
                other.start()
                other.join()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    answers[0] = model.generate(**batches[0], stopping_criteria=[AskInBetween()])
    assert len(seen) == 1 and all(torch.equal(answers[number], expected[number]) for number in (0, 1))
    assert torch.equal(model.generate(**batches[1]), expected[1]) and len(seen) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_sizes": []}, "batch_sizes="),
        ({"batch_sizes": [0]}, "batch_sizes="),
        ({"images_per_prompt": [-1]}, "images_per_prompt="),
        ({"prompt_lengths": [1]}, "two tokens or more"),
        ({"prompt_lengths": [17], "images_per_prompt": [2]}, "images of a prompt alone are 18 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens="),
        ({"num_merged_tokens": [0]}, "num_merged_tokens"),
    ],
)
@pytest.mark.core
def test_bad_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        merging("agnostic").compile_for_inference(**options, backend=None)


@pytest.mark.core
def test_models_that_cannot_be_compiled_are_refused():
    with pytest.raises(ValueError, match="training mode"):
        merging("agnostic").train().compile_for_inference(backend=None)
    model = merging("agnostic")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        model.compile_for_inference(backend=None)
    model = merging("agnostic")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.compile_for_inference(backend=None)
    model = merging("agnostic")
    model.model.merger.to("meta")
    with pytest.raises(ValueError, match="one device"):
        model.compile_for_inference(backend=None)


@pytest.mark.parametrize("position_ids", ["source", "packed"])
def test_compiling_warns_of_positions_that_its_prompts_can_reach(position_ids, said_of_positions):
    model = tiny_model(agnostic(9, position_ids=position_ids))
    for limit, warns in ((32 + 2 * 27 + 8, 0), (32 + 2 * 27 + 7, 1)):
        model.config.text_config.max_position_embeddings = limit
        model.compile_for_inference(prompt_lengths=(32,), images_per_prompt=(1, 2), max_new_tokens=8, backend=None)
        assert len(said_of_positions) == (warns if position_ids == "source" else 0)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_decompiling_frees_caches_buffers_and_the_model(backend):
    model = merging("aware")
    model.compile_for_inference(prompt_lengths=(32,), max_new_tokens=8, backend=backend)
    model.generate(**inputs([1], 6))
    graphs = model.inference_graphs
    held = [graphs, *graphs.slots.values(), *graphs.prefills.values(), *graphs.decodes.values()]
    for slot in graphs.slots.values():
        held += [
            slot.cache,
            slot.past,
            *(states for layer in slot.cache.layers for states in (layer.keys, layer.values)),
        ]
    held += [prefill.inputs[name] for prefill in graphs.prefills.values() for name in ("ids", "mask", "pixels")]
    refs = [weakref.ref(each) for each in held]
    del graphs, held, slot
    model.decompile()
    assert all(ref() is None for ref in refs)
    refs = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_depend_on_the_length_are_refused(kind):
    model = merging("agnostic")
    model.model.language_model.rotary_emb.rope_type = kind
    with pytest.raises(ValueError, match=f"rope_type='{kind}' changes the rotary frequencies with the length"):
        model.compile_for_inference(backend=None)


class TestProjectedPatches:
    """The patch embedding as a matmul, as graphs of a GPU have it."""

    @pytest.mark.parametrize("size", [(14, 21), (17, 23)], ids=["whole patches", "a rest that is cut off"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_it_is_the_convolution(self, bias, size):
        tower = torch.nn.Sequential(torch.nn.Conv2d(3, 8, (7, 3), stride=(7, 3), bias=bias, dtype=torch.float64))
        pixel_values = torch.randn(2, 3, *size, dtype=torch.float64)
        (convolution,), expected = tower, tower(pixel_values)
        with projected_patches(tower):
            assert isinstance(tower[0], ProjectedPatches)
            torch.testing.assert_close(tower(pixel_values), expected)
        assert tower[0] is convolution

    def test_others_are_left_alone(self):
        others = [torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3, stride=3, padding=1)]
        others += [torch.nn.Conv2d(4, 4, 3, stride=3, groups=2), torch.nn.Conv2d(4, 4, 3, stride=3, dilation=2)]
        others += [torch.nn.Conv2d(4, 4, 3, stride=3)]
        others[-1].register_forward_hook(lambda *_: None)
        others += [type("Quantised", (torch.nn.Conv2d,), {})(4, 4, 3, stride=3)]
        tower = torch.nn.Sequential(*others)
        with projected_patches(tower):
            assert [*tower] == others


class TestJointProjections:
    """Queries, keys and values from one matmul, and gate and up, as graphs of a GPU have them."""

    @pytest.mark.parametrize("name", ["aware, mass, source", "visionzip"])
    def test_the_logits_stay_and_the_layers_come_back(self, name):
        model, batch = merging(name), inputs([1, 2], 6)
        del batch["max_new_tokens"], batch["min_new_tokens"], batch["do_sample"]
        layers = dict(model.named_modules())
        expected = model(**batch).logits
        model.compile_for_inference(prompt_lengths=[24], max_new_tokens=4, backend=None)
        for _ in range(2):  # the second time, the weights lie side by side already
            with model.inference_graphs.faster_layers():
                joint = [module.joint for module in model.modules() if isinstance(module, PartOfJoint)]
                assert any(isinstance(module, ProjectedPatches) for module in model.modules())
                torch.testing.assert_close(model(**batch).logits, expected)
            assert len({*joint}) == (5 if name == "visionzip" else 6) and not any(part.parts for part in joint)
        assert layers == dict(model.named_modules())
        assert torch.equal(model(**batch).logits, expected)

    def test_other_threads_answer_and_save_as_ever(self, tmp_path):
        """While one compiles, for minutes at 7B; shared parts of a joint layer would mix what they ask."""
        model = tiny_model(agnostic())
        batches = [{"input_ids": torch.randint(5, 20, (1, 3 + row))} for row in range(3)]
        expected, names = [model(**batch).logits for batch in batches], set(model.state_dict())
        wrong = []

        def ask(number: int):
            attention = model.model.language_model.layers[0].self_attn
            attention.q_proj(torch.ones(1, 1, 64))
            wrong.extend(["parts were kept"] if attention.q_proj.joint.parts else [])
            for _ in range(100):
                with torch.no_grad():
                    logits = model(**batches[number]).logits
                wrong.extend([number] if (logits - expected[number]).abs().max() > 1e-4 else [])

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with joint_projections(model):
                threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert set(model.state_dict()) == names
        finally:
            sys.setswitchinterval(interval)
        assert not wrong

    def test_one_matmul_for_several_and_one_graph(self):
        """Nor does torch.compile break the graph or come back for another call."""
        model, counter = tiny_model(agnostic()).model.language_model, CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        call = {"inputs_embeds": torch.randn(1, 5, model.config.hidden_size), "use_cache": False}
        with torch.no_grad():
            with Operators() as apart:
                expected = model(**call).last_hidden_state
            with joint_projections(model):
                with Operators() as joint:
                    torch.testing.assert_close(model(**call).last_hidden_state, expected)
                for _ in range(3):
                    torch.testing.assert_close(compiled(**call).last_hidden_state, expected)
        assert joint.counts["mm"] == apart.counts["mm"] - 2 * (2 + 1) and counter.frame_count == 1

    def test_weights_are_saved_as_before(self, tmp_path):
        model = tiny_model(agnostic())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with joint_projections(model.model.language_model):
            pass
        attention = model.model.language_model.layers[0].self_attn
        assert lie_side_by_side([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        mlp = model.model.language_model.layers[1].mlp
        assert lie_side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight])
        model.save_pretrained(tmp_path)
        after = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        attention.k_proj.weight.data.fill_(1.0)  # and is its own part alone
        assert not (attention.q_proj.weight == 1).any() and not (attention.v_proj.weight == 1).any()

    def test_layers_of_another_kind_are_left_alone(self):
        model = tiny_model(agnostic())
        attentions = [layer.self_attn for layer in model.model.language_model.layers]
        handle = attentions[0].k_proj.register_forward_hook(lambda *_: None)
        attentions[1].v_proj = torch.nn.Sequential(attentions[1].v_proj)
        for layer in model.model.language_model.layers:
            layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)
        for layer in model.model.vision_tower.modules():
            if type(layer) is torch.nn.Linear:
                layer.__class__ = type("Quantised", (torch.nn.Linear,), {})
        with joint_projections(model.model.vision_tower):
            assert not any(isinstance(module, PartOfJoint) for module in model.modules())
        with joint_projections(model.model.language_model):
            assert not any(isinstance(module, PartOfJoint) for module in model.modules())
        handle.remove()
        with joint_projections(model.model.language_model, apart=[attentions[0]]):
            assert not any(isinstance(module, PartOfJoint) for module in model.modules())
