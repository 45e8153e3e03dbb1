# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""`compile_for_inference`: the answers are those of the plain `generate`, from graphs made beforehand."""

import copy
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import Operators, agnostic, aware, make_processor, pixels, prompts, tiny_model
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer, pipeline

from llava_merge import CompiledModel, LlavaMergeForConditionalGeneration, LlavaMergeProcessor, compile_for_inference
from llava_merge.compiled import generation
from llava_merge.compiled.graphs import PrefillShape
from llava_merge.model.merging_grid import NUM_KEPT, slot_geometry


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


def counted(fast: CompiledModel, monkeypatch) -> list[PrefillShape]:
    """The shapes of the prefills from graphs, from now on."""
    seen, prefill = [], fast.graphs.prefill
    monkeypatch.setattr(fast.graphs, "prefill", lambda shape, *args: seen.append(shape) or prefill(shape, *args))
    return seen


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """Warnings of calls that run without graphs, each time they are given."""
    said = []
    monkeypatch.setattr(generation, "logger", SimpleNamespace(warning=said.append, warning_once=said.append))
    return said


@pytest.mark.parametrize("name", MERGERS)
def test_answers_are_those_of_the_plain_model(name, monkeypatch):
    model = merging(name)
    fast = compile_for_inference(model, **ALL, images_per_prompt=[1, 2], backend=None)
    seen = counted(fast, monkeypatch)
    calls = [([1], 3), ([1], 6), ([1], 13), ([2], 6), ([1, 1], 6), ([2, 2], 12), ([1, 1], 20), ([1], 6)]
    for counts, text in calls:
        batch = inputs(counts, text)
        assert torch.equal(fast.generate(**batch), model.generate(**batch)), (counts, text)
    assert len(seen) == len(calls) and len({*seen}) > 4


@pytest.mark.parametrize("name", ["agnostic", "aware, mass, source"])
def test_nothing_is_compiled_again_for_another_prompt(name, monkeypatch):
    model, counter = merging(name), CompileCounter()
    fast = compile_for_inference(
        model, prompt_lengths=[24, 48], images_per_prompt=[1, 2], max_new_tokens=8, backend=counter
    )
    num_graphs, seen = counter.frame_count, counted(fast, monkeypatch)
    assert num_graphs >= 8  # a token of two lengths; two lengths with one image and with two; one image and two
    for counts, text in (([1], 3), ([1], 13), ([1], 20), ([2], 6), ([2], 20)):
        batch = inputs(counts, text)
        assert torch.equal(fast.generate(**batch), model.generate(**batch)), (counts, text)
    assert len(seen) == 5 and counter.frame_count == num_graphs


@pytest.mark.core
def test_decoding_reads_no_more_than_a_prompt_of_its_length_needs(monkeypatch):
    """All of what a graph may read is read for each token, also what only longer prompts fill."""
    model, seen = merging("agnostic"), []
    fast = compile_for_inference(model, batch_sizes=[1, 2], prompt_lengths=[24, 48], max_new_tokens=12, backend=None)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, *args, **kwargs: seen.append(key.shape) or attend(query, key, *args, **kwargs),
    )
    for counts, text, length in (([1], 20, 48), ([1, 1], 20, 48), ([1, 1], 6, 24), ([1], 6, 24)):
        fast.generate(**inputs(counts, text))
        assert {(shape[0], shape[2]) for shape in seen[-6:]} == {(len(counts), length + 12)}
    memory = {slot.cache.layers[0].keys.untyped_storage().data_ptr() for slot in fast.graphs.slots.values()}
    assert len(memory) == 1


@pytest.mark.core
@pytest.mark.parametrize("broken", ["prompt", "sampled prompt", "answer"])
def test_an_answer_that_is_not_finite_leaves_nothing_behind(broken, monkeypatch):
    """A masked key that is NaN makes all of the attention NaN."""
    model = merging("agnostic")
    fast = compile_for_inference(model, **ALL, backend=None)
    seen, longer = counted(fast, monkeypatch), inputs([1], 20, new_tokens=12)
    embedding = model.get_input_embeddings()
    if broken == "sampled prompt":
        longer["pixel_values"][:] = torch.nan
        with pytest.raises(RuntimeError, match="nan"):
            fast.generate(**longer | {"do_sample": True})
    elif broken == "prompt":
        longer["pixel_values"][:] = torch.nan
        fast.generate(**longer)
    else:  # as a sum that overflows in float16
        hook = embedding.register_forward_hook(
            lambda _, args, embeds: embeds * (torch.nan if embeds.shape[1] == 1 else 1)
        )
        fast.generate(**longer)
        hook.remove()
    for batch in (inputs([1], 20 if broken == "answer" else 6), inputs([1], 20), inputs([1, 1], 20)):
        assert torch.equal(fast.generate(**batch), model.generate(**batch))
    assert len(seen) == 4


def test_picks_in_many_steps_are_not_compiled():
    counts = {}
    for name in ("tome", "divprune"):
        torch._dynamo.reset()
        model, counter = tiny_model({"merger_type": name, "num_merged_tokens": NUM_TOKENS}), CompileCounter()
        fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=8, backend=counter)
        counts[name] = counter.frame_count
        batch = inputs([1], 6)
        assert torch.equal(fast.generate(**batch), model.generate(**batch))
    assert counts["divprune"] == counts["tome"] - 1


@pytest.mark.core
def test_padding_of_the_prompt_is_not_seen(monkeypatch):
    """Rows of different lengths, and one sampled: the same numbers are drawn."""
    model = merging("aware, mass, source")
    fast = compile_for_inference(model, **ALL, backend=None)
    seen = counted(fast, monkeypatch)
    batch, shorter = inputs([1, 1], 10), inputs([1], 6)
    for name in ("input_ids", "attention_mask"):
        row = shorter[name][0]
        batch[name][0] = torch.nn.functional.pad(row, (batch[name].shape[1] - len(row), 0), value=0)
    assert torch.equal(fast.generate(**batch), model.generate(**batch))
    batch |= {"do_sample": True, "temperature": 2.0}
    torch.manual_seed(3)
    sampled = fast.generate(**batch)
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(**batch)) and len(seen) == 2
    with torch.inference_mode():
        batch["do_sample"] = False
        assert torch.equal(fast.generate(**batch), model.generate(**batch))


@pytest.mark.core
def test_without_merger_with_budgets_and_with_text_alone(monkeypatch):
    torch._dynamo.reset()
    stock = tiny_model({"merger_type": "none"})
    stock = compile_for_inference(stock, prompt_lengths=[60], images_per_prompt=[0, 1], max_new_tokens=8, backend=None)
    elastic = merging("tome, mass, source")
    elastic = compile_for_inference(
        elastic, prompt_lengths=[24, 60], num_merged_tokens=[4, 9, "all"], max_new_tokens=8, backend=None
    )
    calls = [(stock, inputs([1], 6, 36)), (stock, inputs([0], 6))]
    calls += [(elastic, inputs([1], 6, tokens, num_merged_tokens=given)) for tokens, given in ((4, 4), (36, "all"))]
    for fast, batch in [*calls, (elastic, inputs([1], 6))]:
        seen = counted(fast, monkeypatch)
        assert torch.equal(fast.generate(**batch), fast.uncompiled.generate(**batch)) and len(seen) == 1


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
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(fast, monkeypatch), {**inputs([1], 6), **fields}
    assert reason in fast._why_without_graphs(fast.graphs, batch)
    answer, expected = fast.generate(**batch), model.generate(**batch)
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

    if when == "before":
        monkeypatch.setattr(model.model, "get_image_features", own)
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    if when == "after":
        monkeypatch.setattr(model.model, "get_image_features", own)
    seen, batch = counted(fast, monkeypatch), inputs([1], 6)
    assert "get_image_features is overridden" in fast._why_without_graphs(fast.graphs, batch)
    assert torch.equal(fast.generate(**batch), model.generate(**batch)) and not seen


def test_what_the_model_s_own_settings_ask_for_counts_beside_those_of_a_call():
    """`generate` fills what a given configuration leaves open from the model's."""
    model = merging("agnostic")
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    model.generation_config.num_beams = 2
    batch = {name: tensor for name, tensor in inputs([1], 6).items() if isinstance(tensor, torch.Tensor)}
    batch["generation_config"] = GenerationConfig(max_new_tokens=8, do_sample=False)
    assert "num_beams" in fast._why_without_graphs(fast.graphs, batch)
    assert torch.equal(fast.generate(**batch), model.generate(**batch))
    assert fast._why_without_graphs(fast.graphs, {**batch, "num_beams": 1}) is None


@pytest.mark.core
@pytest.mark.parametrize("asked", [{"do_sample": False}, {"top_k": None}, {"temperature": 1.0}], ids=str)
def test_what_a_call_asks_for_wins_over_the_model_s_own_settings(asked, monkeypatch):
    """Also where it is what transformers has for its default, or None."""
    model = merging("agnostic")
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen = counted(fast, monkeypatch)
    model.generation_config.update(do_sample=True, temperature=1e-4 if "temperature" in asked else 3.0)
    model.generation_config.top_k = 1 if "top_k" in asked else 0
    batch = inputs([1], 6)
    del batch["do_sample"]
    answers = []
    for answer, fields in ((fast.generate, asked), (model.generate, asked), (fast.generate, {})):
        torch.manual_seed(0)
        answers.append(answer(**batch, **fields))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2]) and len(seen) == 2


def test_neither_autocast_nor_training_is_answered_from_graphs(monkeypatch):
    model = merging("agnostic")
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(fast, monkeypatch), inputs([1], 6)
    with torch.autocast("cpu", torch.bfloat16):
        fast.generate(**batch)
    model.train()
    fast.generate(**batch)
    assert not seen
    model.eval()
    fast.generate(**batch)
    assert len(seen) == 1


def test_other_shapes_run_without_graphs(monkeypatch):
    model = merging("agnostic")
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen = counted(fast, monkeypatch)
    embeds = inputs([1], 6)
    embeds["inputs_embeds"] = model.get_input_embeddings()(embeds["input_ids"])
    unmasked = inputs([1], 6)
    del unmasked["attention_mask"]  # of which generate makes one where it finds padding
    for batch in (inputs([1, 1], 6), inputs([2], 3), inputs([1], 20), inputs([0], 6), embeds, unmasked):
        assert torch.equal(fast.generate(**batch), model.generate(**batch))
    assert not seen


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("num_tokens", [7, 11])
def test_a_wrong_prompt_gets_the_same_error(name, num_tokens, monkeypatch):
    """Though its prefill has started by then."""
    model = merging(name)
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    batch, seen = inputs([1], 6, num_tokens=num_tokens), counted(fast, monkeypatch)
    for generate in (fast.generate, model.generate):
        with pytest.raises(ValueError, match=f"The prompts hold {num_tokens} image placeholders"):
            generate(**batch)
    good = inputs([1], 6)
    assert torch.equal(fast.generate(**good), model.generate(**good)) and len(seen) == 2


def test_nothing_is_waited_for_before_the_prefill(monkeypatch):
    model, waits = merging("aware, mass, source"), []
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    (prefill,) = fast.graphs.prefills.values()
    run = prefill.function
    fast.generate(**inputs([1], 6))
    with Operators() as operators:
        monkeypatch.setattr(
            prefill, "function", lambda **args: waits.append(operators.counts["_local_scalar_dense"]) or run(**args)
        )
        fast.generate(**inputs([1], 6))
    assert waits == [0] and operators.counts["_local_scalar_dense"] > 0


def test_another_merger_is_never_answered_from_old_graphs(monkeypatch):
    model = merging("agnostic")
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(fast, monkeypatch), inputs([1], 6)
    fast.generate(**batch)
    model.set_merger({"merger_type": "average_pooling"})
    answer = fast.generate(**batch)
    assert len(seen) == 1 and fast.graphs is None
    assert torch.equal(answer, model.generate(**batch))
    fast = compile_for_inference(model, prompt_lengths=[60], max_new_tokens=12, backend=None)
    with model.merger_bypassed():
        whole = inputs([1], 6, num_tokens=36)
        assert torch.equal(fast.generate(**whole), model.generate(**whole))


def clone_a_weight(model):
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.clone()


def clone_a_buffer(model):
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


def exchange_an_activation(model):
    model.model.language_model.layers[0].mlp.act_fn = torch.nn.ReLU()


def pack_the_places(model):
    model.config.merger_config.position_ids = "packed"


def weigh_the_tokens(model):
    model.config.merger_config.attention_mass = 0.5


def cast_the_model(model):
    model.to(torch.float64)


CHANGES = [
    clone_a_weight,
    clone_a_buffer,
    exchange_an_activation,
    pack_the_places,
    weigh_the_tokens,
    cast_the_model,
]


@pytest.mark.core
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_moved_is_noticed(change, monkeypatch, warned):
    """A graph reads at addresses, which may be those of something else by then."""
    model = merging("agnostic")
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, batch = counted(fast, monkeypatch), inputs([1], 6)
    fast.generate(**batch)
    assert len(seen) == 1 and not warned
    change(model)
    assert torch.equal(fast.generate(**batch), model.generate(**batch))
    assert len(seen) == 1 and fast.graphs is None
    (warning,) = warned
    assert "another merger, adapter, weight" in warning and "compile_for_inference(model) again" in warning


@pytest.mark.core
def test_graphs_own_what_caches_let_go():
    device, fast = torch.device("cpu"), compile_for_inference(merging("agnostic"), prompt_lengths=[24], backend=None)
    geometry = weakref.ref(slot_geometry((6, 6), NUM_TOKENS, device))
    for number in range(NUM_KEPT + 1):
        slot_geometry((9, 9), 1 + number, device)
    assert slot_geometry((6, 6), NUM_TOKENS, device) is not geometry() is not None
    fast.decompile()
    assert geometry() is None


@pytest.mark.core
def test_all_else_is_the_model_s(monkeypatch):
    model = merging("agnostic")
    methods = {name for name in dir(model) if callable(getattr(type(model), name, None))}
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    assert methods == {name for name in dir(model) if callable(getattr(type(model), name, None))}
    assert isinstance(fast, LlavaMergeForConditionalGeneration) and isinstance(fast, CompiledModel)
    assert fast.config is model.config and fast.model is model.model and fast.device == model.device
    assert fast.eval() is fast and fast.to("cpu") is fast and not hasattr(fast, "no such attribute")
    fast.generation_config = GenerationConfig(max_new_tokens=5)
    assert model.generation_config.max_new_tokens == 5
    batch = {name: tensor for name, tensor in inputs([1], 6).items() if isinstance(tensor, torch.Tensor)}
    assert torch.equal(fast(**batch).logits, model(**batch).logits)
    features = [each.encode_images(batch["pixel_values"]).pooler_output[0] for each in (fast, model)]
    assert torch.equal(*features)
    seen = counted(fast, monkeypatch)
    assert torch.equal(fast.generate(**batch), model.generate(**batch)) and len(seen) == 1


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy])
def test_a_copy_has_no_graphs(again, caplog, monkeypatch):
    fast, batch = compile_for_inference(merging("agnostic"), **ALL, backend=None), inputs([1], 6)
    expected, copied = fast.generate(**batch), again(fast)
    assert type(copied) is CompiledModel and copied.graphs is None
    generation.logger.warning_once.cache_clear()
    for _ in range(2):
        assert torch.equal(copied.generate(**batch), expected)
    (warning,) = [record.message for record in caplog.records if "graphs" in record.message]
    assert "Call compile_for_inference(model)" in warning
    compiled = compile_for_inference(copied, **ALL, backend=None)
    for each in (compiled, fast):
        seen = counted(each, monkeypatch)
        assert torch.equal(each.generate(**batch), expected) and len(seen) == 1


def test_a_copy_of_the_model_is_a_plain_one():
    model, batch = merging("agnostic"), inputs([1], 6)
    fast = compile_for_inference(model, **ALL, backend=None)
    copied = copy.deepcopy(model)
    assert type(copied) is LlavaMergeForConditionalGeneration
    assert torch.equal(copied.generate(**batch), fast.generate(**batch))


def test_a_pipeline_answers_from_graphs(picture, caplog, monkeypatch):
    model = merging("agnostic")
    processor = make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=NUM_TOKENS)
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen, answers = counted(fast, monkeypatch), []
    for each in (fast, model):
        pipe = pipeline("image-text-to-text", model=each, processor=processor)
        call = {"images": picture, "text": "USER: <image> what color is the star ? ASSISTANT:"}
        answers.append(pipe(**call, generate_kwargs={"max_new_tokens": 8, "do_sample": False}))
    assert answers[0] == answers[1] and len(seen) == 1
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("put_in", [get_peft_model, lambda model, lora: inject_adapter_in_model(lora, model)])
def test_adapters_that_come_later_are_never_left_out(put_in):
    model, batch = merging("agnostic"), inputs([1], 6, new_tokens=12)
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    before = fast.generate(**batch)
    adapted = put_in(model, LoraConfig(target_modules=["v_proj"], layers_to_transform=[1], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    answer = fast.generate(**batch)
    assert fast.graphs is None and torch.equal(answer, adapted.generate(**batch))
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
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    seen = counted(fast, monkeypatch)
    answer = fast.generate(**batch, stopping_criteria=[AfterFour()], streamer=streamer)
    assert len(seen) == 1 and answer.shape[1] == batch["input_ids"].shape[1] + 4
    assert torch.equal(answer[0], torch.cat([ids.flatten() for ids in streamer.ids]))
    assert torch.equal(answer, model.generate(**batch)[:, : answer.shape[1]])


def test_a_second_thread_meanwhile_runs_without_graphs(monkeypatch):
    model = merging("agnostic")
    fast = compile_for_inference(model, prompt_lengths=[24], max_new_tokens=12, backend=None)
    batches = [inputs([1], text) for text in (4, 6)]
    expected, answers, seen = [model.generate(**batch) for batch in batches], {}, counted(fast, monkeypatch)

    class AskInBetween(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if 1 not in answers:
                answers[1] = None
                other = threading.Thread(target=lambda: answers.update({1: fast.generate(**batches[1])}))
                other.start()
                other.join()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    answers[0] = fast.generate(**batches[0], stopping_criteria=[AskInBetween()])
    assert len(seen) == 1 and all(torch.equal(answers[number], expected[number]) for number in (0, 1))
    assert torch.equal(fast.generate(**batches[1]), expected[1]) and len(seen) == 2


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
        compile_for_inference(merging("agnostic"), **options, backend=None)


@pytest.mark.core
def test_models_that_cannot_be_compiled_are_refused():
    with pytest.raises(ValueError, match="training mode"):
        compile_for_inference(merging("agnostic").train(), backend=None)
    model = merging("agnostic")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        compile_for_inference(model, backend=None)
    model = merging("agnostic")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        compile_for_inference(model, backend=None)
    model = merging("agnostic")
    model.model.merger.to("meta")
    with pytest.raises(ValueError, match="one device"):
        compile_for_inference(model, backend=None)


@pytest.mark.parametrize("position_ids", ["source", "packed"])
def test_compiling_warns_of_positions_that_its_prompts_can_reach(position_ids, said_of_positions):
    model = tiny_model(agnostic(9, position_ids=position_ids))
    for limit, warns in ((32 + 2 * 27 + 8, 0), (32 + 2 * 27 + 7, 1)):
        model.config.text_config.max_position_embeddings = limit
        compile_for_inference(model, prompt_lengths=(32,), images_per_prompt=(1, 2), max_new_tokens=8, backend=None)
        assert len(said_of_positions) == (warns if position_ids == "source" else 0)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_decompiling_frees_caches_buffers_and_the_model(backend):
    model = merging("aware")
    fast = compile_for_inference(model, prompt_lengths=(32,), max_new_tokens=8, backend=backend)
    fast.generate(**inputs([1], 6))
    graphs = fast.graphs
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
    fast.decompile()
    assert all(ref() is None for ref in refs)
    refs = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
    del model, fast
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_depend_on_the_length_are_refused(kind):
    model = merging("agnostic")
    model.model.language_model.rotary_emb.rope_type = kind
    with pytest.raises(ValueError, match=f"rope_type='{kind}' changes the rotary frequencies with the length"):
        compile_for_inference(model, backend=None)
