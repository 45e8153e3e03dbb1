# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
import asyncio
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    IMAGE_ID,
    NUM_PATCHES,
    agnostic,
    answered,
    aware,
    image_features,
    pixels,
    prompts,
    tiny_config,
    tiny_model,
    tiny_stock,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, MergerConfig
from llava_merge.model import placeholders, questions
from llava_merge.model.compat import TRANSFORMERS_V5


pytestmark = pytest.mark.core

NONE = {"merger_type": "none", "num_heads": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_stock_logits_are_equal_bit_for_bit_when_merger_is_identity(dtype, pad):
    stock, model = tiny_stock().to(dtype), tiny_model(NONE).to(dtype)
    inputs = {**prompts([1, 2, 0], NUM_PATCHES, pad), "pixel_values": pixels(3).to(dtype)}
    expected, actual = stock(**inputs), model(**inputs)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(image_features(actual), image_features(expected))


def test_generated_ids_are_equal_to_stock_when_merger_is_identity():
    inputs = {**prompts([1, 2, 0], NUM_PATCHES), "pixel_values": pixels(3)}
    generated = [m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (tiny_stock(), tiny_model(NONE))]
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    "config", [agnostic(), aware(), {"merger_type": "average_pooling", "num_merged_tokens": 9, "num_heads": 4}]
)
def test_projector_runs_once_on_m_tokens(config):
    model = tiny_model(config)
    shapes = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda _, args, out: shapes.append((args[0].shape, out.shape))
    )
    model(**prompts([1, 2, 0], 9), pixel_values=pixels(3))
    model.generate(**prompts([1, 2, 0], 9), pixel_values=pixels(3), max_new_tokens=3)
    hook.remove()
    assert shapes == [((3, 9, 32), (3, 9, 64))] * 2


def test_get_vision_features_are_the_unprojected_hidden_states():
    model = tiny_model(agnostic())
    features = model.get_vision_features(pixels(2))
    hidden = tiny_stock().model.vision_tower(pixels(2), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert features.shape == (2, NUM_PATCHES, 32) and torch.equal(features, hidden)


def test_image_hidden_states_and_get_image_features_agree():
    model = tiny_model(agnostic())
    images = pixels(3)
    output = model(**prompts([1, 2], 9), pixel_values=images)
    result = model.get_image_features(images)
    features = result.pooler_output if TRANSFORMERS_V5 else result
    assert len(features) == 3 and features[0].shape == (9, 64)
    assert torch.equal(torch.cat(list(features)), image_features(output))
    if TRANSFORMERS_V5:
        assert isinstance(model.get_image_features(images, return_dict=False), tuple)
        assert len(model.get_image_features(images, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("config", [agnostic(), aware()])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_row_alone_and_in_a_batch_give_the_same_merged_features(config, pad):
    model = tiny_model(config, train_merger=True)
    counts, images = [1, 2, 0, 1], pixels(4)
    batch = prompts(counts, 9, pad)
    together = image_features(model(**batch, pixel_values=images)).reshape(4, 9, 64)
    first = 0
    for row, count in enumerate(counts):
        if count:
            keep = batch["attention_mask"][row].bool()
            alone = model(
                input_ids=batch["input_ids"][row][keep][None],
                attention_mask=batch["attention_mask"][row][keep][None],
                pixel_values=images[first : first + count],
            )
            torch.testing.assert_close(
                image_features(alone).reshape(count, 9, 64), together[first : first + count], atol=1e-5, rtol=1e-5
            )
        first += count


def test_a_question_token_changes_merged_features_only_of_its_row():
    model = tiny_model(aware(), train_merger=True)
    batch = prompts([1, 2], 9)
    before = image_features(model(**batch, pixel_values=pixels(3))).reshape(3, 9, 64)
    batch["input_ids"][1, -2] = 7 if batch["input_ids"][1, -2] != 7 else 8
    after = image_features(model(**batch, pixel_values=pixels(3))).reshape(3, 9, 64)
    assert torch.equal(before[0], after[0])
    assert (before[1:] - after[1:]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_an_agnostic_merger_gives_the_same_features_for_every_question():
    model = tiny_model(agnostic(), train_merger=True)
    features = [image_features(model(**prompts([1], 9, seed=seed), pixel_values=pixels(1))) for seed in (1, 2)]
    assert torch.equal(*features)


def test_question_mask_narrows_the_question():
    model = tiny_model(aware(), train_merger=True)
    batch = prompts([1], 9)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    absent = image_features(model(**batch, pixel_values=pixels(1), question_mask=mask))
    agnostic_path = model.model.merger(model.get_vision_features(pixels(1))).merged_features
    torch.testing.assert_close(absent, model.model.multi_modal_projector(agnostic_path)[0])
    mask[:, -2:] = True
    narrowed = image_features(model(**batch, pixel_values=pixels(1), question_mask=mask))
    generated = []
    model.model.multi_modal_projector.register_forward_hook(lambda *args: generated.append(args[-1]))
    model.generate(**batch, pixel_values=pixels(1), question_mask=mask, max_new_tokens=2)
    torch.testing.assert_close(generated[0][0], narrowed)
    assert (narrowed - absent).abs().max() > 1e-3


class TestFeaturesPutInByHand:
    """Embeddings that hold image features already: nobody could say where their tokens sit, so nobody guesses."""

    def embeds(self, model, batch, images):
        features = image_features(model(**batch, pixel_values=images))
        embeds = model.get_input_embeddings()(batch["input_ids"])
        return embeds.masked_scatter((batch["input_ids"] == IMAGE_ID)[..., None], features).detach()

    @pytest.mark.parametrize("merger", ["fixed_pooling", "tome"])
    def test_are_refused_where_tokens_are_placed(self, merger):
        model = tiny_model({"merger_type": merger, "num_merged_tokens": 9, "num_heads": 4}, train_merger=True)
        batch = prompts([1, 2], 9)
        embeds, mask = self.embeds(model, batch, pixels(3)), batch["attention_mask"]
        for call in (model, model.model, functools.partial(model.generate, max_new_tokens=2)):
            with pytest.raises(ValueError, match="inputs_embeds hold 27 vectors .* mm_encoder_outputs"):
                call(inputs_embeds=embeds, attention_mask=mask)
        with pytest.raises(ValueError, match="inputs_embeds hold 27 vectors"):  # ids beside them say no more
            model.generate(**batch, inputs_embeds=embeds, max_new_tokens=2)

    def test_what_the_message_says_works(self):
        model = tiny_model(agnostic(9), train_merger=True)
        batch = prompts([1, 2], 9)
        expected = model(**batch, pixel_values=pixels(3)).logits
        given = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
        given |= {"attention_mask": batch["attention_mask"]}
        encoded = {"image": model.encode_images(pixels(3))}
        torch.testing.assert_close(model(**given, mm_encoder_outputs=encoded).logits, expected)
        given["inputs_embeds"] = self.embeds(model, batch, pixels(3))
        model(**given, tokens_are_placed=True)
        model.generate(**given, tokens_are_placed=True, max_new_tokens=2)

    def test_packed_tokens_and_other_vectors_that_nobody_attends_to_are_fine(self):
        packed = tiny_model(agnostic(9, position_ids="packed", attention_mass=0), train_merger=True)
        batch = prompts([1], 9)
        embeds = self.embeds(packed, batch, pixels(1))
        by_hand = packed(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(by_hand, packed(**batch, pixel_values=pixels(1)).logits)
        model = tiny_model(agnostic(9), train_merger=True)
        with model.merger_bypassed():
            model(inputs_embeds=embeds)
        embeds = model.get_input_embeddings()(torch.full((1, 5), 7))
        embeds[:, 0] = torch.nan
        mask = torch.tensor([[0, 1, 1, 1, 1]])
        model(inputs_embeds=embeds, attention_mask=mask)
        causal = torch.ones(5, 5, dtype=torch.bool).tril() & mask.bool()
        for four in (causal[None, None], torch.zeros(1, 1, 5, 5).masked_fill(~causal, torch.finfo(torch.float32).min)):
            model.model.check_text_embeds(embeds, four)
            foreign = embeds.clone()
            foreign[:, 3] *= 2
            with pytest.raises(ValueError, match="inputs_embeds hold 1 vectors"):
                model.model.check_text_embeds(foreign, four)
        model(inputs_embeds=model.get_input_embeddings()(torch.full((1, 5), 7)).bfloat16().float())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_text_is_never_taken_for_features(self, dtype):
        model = tiny_model(agnostic(9), train_merger=True).to(dtype)
        vocabulary = torch.arange(model.config.text_config.vocab_size)
        vocabulary = vocabulary[vocabulary != IMAGE_ID]
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, args, output: 3 * output)  # as Gemma's, or LoRA on it
        model(inputs_embeds=embedding(vocabulary)[None])
        hook.remove()
        with pytest.raises(ValueError, match="inputs_embeds hold"):
            model(inputs_embeds=3 * embedding(vocabulary)[None])


class TestOverriddenImageFeatures:
    """`get_image_features` is what everybody overrides or patches; all that looks at images has to hear it."""

    def doubled(self, result):
        """A new result, as a stranger writes it, which knows nothing of where tokens sit."""
        if TRANSFORMERS_V5:
            return BaseModelOutputWithPooling(pooler_output=[2 * tokens for tokens in result.pooler_output])
        return [2 * tokens for tokens in result]

    @pytest.fixture(params=["class", "instance"])
    def models(self, request):
        """A model whose features are doubled by an override, and one whose projector does so."""
        model, expected = (tiny_model(aware(9, attention_mass=1.0), train_merger=True) for _ in range(2))
        expected.model.multi_modal_projector.register_forward_hook(lambda *args: 2 * args[-1])
        doubled, stock = self.doubled, type(model.model).get_image_features

        class Doubling(type(model.model)):
            def get_image_features(self, pixel_values, vision_feature_layer=None, **kwargs):
                return doubled(super().get_image_features(pixel_values, vision_feature_layer, **kwargs))

        if request.param == "class":
            model.model.__class__ = Doubling
        else:
            patched = functools.partial(stock, model.model)
            model.model.get_image_features = lambda *args, **kwargs: doubled(patched(*args, **kwargs))
        return model, expected

    def test_forward_generate_and_encoded_images_hear_it(self, models):
        model, expected = models
        batch = prompts([1, 2], 9)

        def answers(model):
            encoded = {"image": model.encode_images(pixels(3))}
            new = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
            with torch.no_grad():
                return (
                    model(**batch, pixel_values=pixels(3)).logits,
                    model(**batch, mm_encoder_outputs=encoded).logits,
                    torch.stack(model.generate(**batch, pixel_values=pixels(3), **new).logits),
                    torch.stack(model.generate(**batch, mm_encoder_outputs=encoded, **new).logits),
                    model(**answered(batch), pixel_values=pixels(3)).loss,
                )

        for found, wanted in zip(answers(model), answers(expected), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        plain = tiny_model(aware(9, attention_mass=1.0), train_merger=True)(**batch, pixel_values=pixels(3)).logits
        assert (answers(model)[0] - plain).abs().max() > 1e-3

    @pytest.mark.parametrize("fields", [agnostic(9), aware(9, attention_mass=1.0), {"merger_type": "none"}])
    def test_one_that_takes_stock_s_arguments_alone(self, fields):
        """As of a LLaVA that is no merger's: question, budgets and places are found again."""
        model, expected = (tiny_model(fields, train_merger=True) for _ in range(2))
        expected.model.multi_modal_projector.register_forward_hook(lambda *args: 2 * args[-1])
        number = expected.config.merger_config.num_tokens(36)
        doubled, stock = self.doubled, model.model.get_image_features

        def get_image_features(pixel_values, vision_feature_layer=None, vision_feature_select_strategy=None):
            return doubled(stock(pixel_values, vision_feature_layer, vision_feature_select_strategy))

        model.model.get_image_features = get_image_features
        batch = {**prompts([1, 2], number), "pixel_values": pixels(3)}
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits)
        assert torch.equal(model.generate(**batch, max_new_tokens=3), expected.generate(**batch, max_new_tokens=3))
        direct = model.model.get_image_features(pixels(1)) if "question_aware" not in fields else None
        assert direct is None or model.model.overrides_image_features

    @pytest.mark.parametrize("fields", [agnostic(9), aware(9)])
    def test_one_that_changes_pixels(self, fields):
        """Also of images that are encoded before their question is known."""
        model = tiny_model(fields, train_merger=True)
        batch = prompts([1, 1], 9)
        wanted = model(**batch, pixel_values=pixels(2).flip(-1)).logits
        stock = model.model.get_image_features
        model.model.get_image_features = lambda pixel_values, **kwargs: stock(pixel_values.flip(-1), **kwargs)
        encoded = {"image": model.encode_images(pixels(2))}
        for images in ({"pixel_values": pixels(2)}, {"mm_encoder_outputs": encoded}):
            torch.testing.assert_close(model(**batch, **images).logits, wanted)
            model.generate(**batch, **images, max_new_tokens=1)

    def test_encoded_by_an_agnostic_merger(self):
        model = tiny_model(agnostic(9), train_merger=True)
        before = model.encode_images(pixels(2)).pooler_output
        stock = model.model.get_image_features
        model.model.get_image_features = lambda *args, **kwargs: self.doubled(stock(*args, **kwargs))
        torch.testing.assert_close(model.encode_images(pixels(2)).pooler_output, [2 * tokens for tokens in before])

    def test_features_of_its_own(self):
        """Written as in stock LLaVA, never asking ours: the prompt has to have placeholders for them."""
        model = tiny_model(agnostic(9), train_merger=True)

        def every_second(pixel_values):
            return list(model.model.multi_modal_projector(model.get_vision_features(pixel_values)[:, ::2]))

        def get_image_features(pixel_values, **kwargs):
            projected = every_second(pixel_values)
            return BaseModelOutputWithPooling(pooler_output=projected) if TRANSFORMERS_V5 else projected

        number = len(every_second(pixels(1))[0])
        model.model.get_image_features = get_image_features
        batch = prompts([1], number)
        logits = model(**batch, pixel_values=pixels(1)).logits
        new = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        torch.testing.assert_close(model.generate(**batch, pixel_values=pixels(1), **new).logits[0], logits[:, -1])
        assert not torch.allclose(logits, model(**batch, pixel_values=pixels(2)[1:]).logits)
        with pytest.raises(ValueError, match="placeholders"):
            model(**prompts([1], number - 1), pixel_values=pixels(1))
        with pytest.raises(ValueError, match="placeholders"):
            model.generate(**prompts([1], number + 1), pixel_values=pixels(1), max_new_tokens=1)


class TestChangesBesideCalls:
    """A call sees one merger from its first token to its last, whatever other threads do."""

    changes = {
        "set_merger": lambda model: model.set_merger({"merger_type": "tome"}),
        "set_num_merged_tokens": lambda model: model.set_num_merged_tokens(4),
        "load_merger": lambda model: model.load_merger(model.saved),
    }
    calls = {
        "generate": lambda model, batch: model.generate(**batch, max_new_tokens=2),
        "forward": lambda model, batch: model(**batch),
        "encode_images": lambda model, batch: model.encode_images(batch["pixel_values"]),
        "get_image_features": lambda model, batch: model.get_image_features(batch["pixel_values"]),
        "merge_sources": lambda model, batch: model.merge_sources(**batch),
    }

    @pytest.fixture
    def model(self, tmp_path):
        model = tiny_model(agnostic(), train_merger=True)
        model.saved = tmp_path / "merger"
        model.save_merger(model.saved)
        return model

    @pytest.mark.parametrize("change", changes)
    @pytest.mark.parametrize("call", calls)
    def test_a_change_is_refused_while_a_call_runs(self, model, call, change):
        batch = {**prompts([1], 9), "pixel_values": pixels(1)}
        expected = model(**batch).logits
        refused = []

        def interrupt(*args):
            with pytest.raises(RuntimeError, match=f"^{change}: a call of this model is running"):
                run_in_a_thread(lambda: self.changes[change](model))
            refused.append(change)

        hook = model.model.vision_tower.register_forward_hook(interrupt)
        self.calls[call](model, batch)
        hook.remove()
        assert refused == [change] and torch.equal(model(**batch).logits, expected)
        self.changes[change](model)

    def test_while_a_checkpoint_is_written(self, model, tmp_path, monkeypatch):
        refused, write = [], torch.Tensor.contiguous

        def interrupted(*args, **kwargs):
            with pytest.raises(RuntimeError, match="set_merger"):
                run_in_a_thread(lambda: self.changes["set_merger"](model))
            refused.append(True)
            return write(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "contiguous", interrupted)
        model.save_pretrained(tmp_path / "whole")
        monkeypatch.undo()
        assert refused and LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "whole") is not None

    def test_a_call_that_begins_meanwhile_waits(self, model, monkeypatch):
        batch = {**prompts([1], 4), "pixel_values": pixels(1)}
        began, answers = threading.Event(), []

        def ask():
            began.set()
            answers.append(model(**batch).logits)

        def put(merger):
            thread.start()
            began.wait(10)
            thread.join(0.2)
            assert not answers  # it would be answered by half a change
            type(model)._put_merger(model, merger)

        thread = threading.Thread(target=ask)
        monkeypatch.setattr(model, "_put_merger", put)
        model.set_merger({"merger_type": "average_pooling", "num_merged_tokens": 4})
        thread.join(10)
        assert torch.equal(answers[0], model(**batch).logits)

    def test_a_copy_made_while_a_call_runs_can_be_changed(self, model):
        copies = []
        hook = model.model.vision_tower.register_forward_hook(lambda *args: copies.append(copy.deepcopy(model)))
        model(**prompts([1], 9), pixel_values=pixels(1))
        hook.remove()
        copies[0].set_merger({"merger_type": "tome"})
        assert model.config.merger_config.merger_type == "fixed_pooling"


def test_inputs_embeds_give_the_same_as_input_ids():
    model = tiny_model(aware(), train_merger=True)
    batch = prompts([1, 2], 9)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_ids = model(**batch, pixel_values=pixels(3))
    by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], pixel_values=pixels(3))
    assert torch.equal(by_ids.logits, by_embeds.logits)
    generated = model.generate(**batch, pixel_values=pixels(3), max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    from_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], pixel_values=pixels(3), max_new_tokens=5
    )
    assert torch.equal(generated, from_embeds[:, -generated.shape[1] :])


def test_gradients_reach_every_merger_parameter_and_nothing_else_changes_when_frozen():
    model = tiny_model(aware(), train_merger=False).train()
    model.requires_grad_(False)
    model.model.merger.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {**answered(prompts([1, 2], 9)), "pixel_values": pixels(3)}
    optimizer = torch.optim.Adam(model.model.merger.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = [
        name for name, p in model.model.merger.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not without
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.merger.{name}" for name, _ in model.model.merger.named_parameters()}


def test_merger_bypassed_is_the_stock_model():
    stock, model = tiny_stock(), tiny_model(aware(), train_merger=True)
    inputs = {**prompts([1, 2], NUM_PATCHES), "pixel_values": pixels(3)}
    with model.merger_bypassed():
        bypassed = model(**inputs).logits
        with pytest.raises(ValueError, match="placeholders"):
            model(**prompts([1, 2], 9), pixel_values=pixels(3))
    assert torch.equal(bypassed, stock(**inputs).logits)
    assert image_features(model(**prompts([1, 2], 9), pixel_values=pixels(3))).shape == (27, 64)


def test_threads_inside_merger_bypassed_do_not_reach_each_other():
    """First in, first out; and a third that never asked for it."""
    model = tiny_model(agnostic(), train_merger=True)
    merged, whole = ({**prompts([1], n), "pixel_values": pixels(1)} for n in (9, NUM_PATCHES))
    expected = model(**merged).logits
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    answers = {}

    def first():
        with model.merger_bypassed():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second():
        first_in.wait(10)
        with model.merger_bypassed(), model.merger_bypassed():
            second_in.set()
            first_out.wait(10)
            answers["second"] = model(**whole).logits
            answers["third"] = run_in_a_thread(lambda: model(**merged).logits)
            with model.merger_bypassed():
                pass
            answers["second again"] = model(**whole).logits

    run_in_a_thread(first, second)
    assert torch.equal(answers["third"], expected) and torch.equal(model(**merged).logits, expected)
    assert torch.equal(answers["second"], tiny_stock()(**whole).logits)
    assert torch.equal(answers["second again"], answers["second"])


def test_asyncio_tasks_inside_merger_bypassed_do_not_reach_each_other():
    model = tiny_model(agnostic())
    seen = []

    async def bypassing(inside: asyncio.Event, leave: asyncio.Event):
        with model.merger_bypassed():
            inside.set()
            await leave.wait()
            seen.append(model.model.merger_enabled)

    async def main():
        inside, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(bypassing(inside, leave))
        await inside.wait()
        seen.append(model.model.merger_enabled)
        leave.set()
        await task

    asyncio.run(main())
    assert seen == [True, False]


def test_one_model_bypassed_leaves_others_and_copies_alone():
    models = [tiny_model(agnostic()) for _ in range(2)]
    with models[0].merger_bypassed():
        assert not models[0].model.merger_enabled and models[1].model.merger_enabled
        copied = copy.deepcopy(models[0])
    assert copied.model.merger_enabled and models[0].model.merger_enabled


def run_in_a_thread(*calls):
    """Runs each call in a thread of its own, and gives the result of the first."""
    with ThreadPoolExecutor(len(calls)) as pool:
        results = [pool.submit(call) for call in calls]
        return [result.result() for result in results][0]


@pytest.mark.parametrize("num_tokens", [36, 12, 7, 4, 1])
def test_set_num_merged_tokens_serves_every_budget_with_one_checkpoint(num_tokens, tmp_path):
    model = tiny_model(aware(), train_merger=True)
    model.set_num_merged_tokens(num_tokens)
    batch = {**prompts([1, 2], num_tokens), "pixel_values": pixels(3)}
    output = model(**batch)
    assert image_features(output).shape == (3 * num_tokens, 64)
    assert model.config.image_seq_length == model.model.merger.config.num_merged_tokens == num_tokens
    model.save_pretrained(tmp_path)
    again = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, output.logits)


def test_images_can_be_encoded_once_for_several_questions():
    model = tiny_model(agnostic(), train_merger=True)
    encoded = {"image": model.model.encode_images(pixels(1))}
    for seed in (1, 2):
        batch = prompts([1], 9, seed=seed)
        plain = model(**batch, pixel_values=pixels(1)).logits
        assert torch.equal(model(**batch, mm_encoder_outputs=encoded).logits, plain)
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        ids = [
            model.generate(**batch, **images, **options)
            for images in ({"pixel_values": pixels(1)}, {"mm_encoder_outputs": encoded})
        ]
        assert torch.equal(*ids)


def test_models_do_not_share_the_merger_config_they_were_given():
    config = MergerConfig(num_merged_tokens=9, num_heads=4, vision_dim=32, text_dim=64)
    models = [tiny_model(config) for _ in range(2)]
    models[0].set_num_merged_tokens(4)
    assert models[1].config.merger_config.num_merged_tokens == 9 == config.num_merged_tokens


def test_text_only_prompts_work():
    stock, model = tiny_stock(), tiny_model(aware())
    batch = prompts([0, 0], 9)
    assert torch.equal(stock(**batch).logits, model(**batch).logits)
    assert torch.equal(*(m.generate(**batch, max_new_tokens=4, do_sample=False) for m in (stock, model)))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layer, built", [(-1, 3), (-2, 2), (1, 1), ([-2, -3], 2)], ids=str)
def test_tower_layers_that_no_feature_comes_from_are_not_built(tower, layer, built):
    """They would cost time, and adapters on them would get no gradient."""
    model = tiny_model(NONE, tower, vision_feature_layer=layer)
    assert model.model.vision_tower.config.num_hidden_layers == built
    assert model.config.vision_config.num_hidden_layers == 3
    inputs = {**prompts([1], NUM_PATCHES), "pixel_values": pixels(1)}
    assert torch.equal(model(**inputs).logits, tiny_stock(tower, vision_feature_layer=layer)(**inputs).logits)


def test_every_tower_parameter_that_can_gets_a_gradient():
    model = tiny_model(aware()).train()
    model(**answered(prompts([1, 2], 9)), pixel_values=pixels(3)).loss.backward()
    without = {name for name, p in model.model.vision_tower.named_parameters() if p.grad is None}
    assert all("post_layernorm" in name for name in without)  # of the pooled output, which LLaVA never reads


def test_siglip_towers_merge_all_their_tokens():
    model = tiny_model(aware(), tower="siglip", train_merger=True)
    assert model.get_vision_features(pixels(2)).shape == (2, NUM_PATCHES, 32)
    output = model(**prompts([1, 1], 9), pixel_values=pixels(2))
    assert image_features(output).shape == (18, 64)
    stock, identity = tiny_stock("siglip"), tiny_model(NONE, tower="siglip")
    inputs = {**prompts([1, 1], NUM_PATCHES), "pixel_values": pixels(2)}
    assert torch.equal(stock(**inputs).logits, identity(**inputs).logits)


@pytest.mark.parametrize("image_size, patch_size", [([84, 84], [14, 14]), ((56, 84), 14), (84, (14, 28))], ids=str)
def test_towers_may_give_their_sizes_as_pairs(image_size, patch_size):
    """InternVL's does."""
    config = tiny_model(agnostic(4)).config
    config.vision_config.__dict__ |= {"image_size": image_size, "patch_size": patch_size}
    rows, columns = (
        (size if isinstance(size, int) else size[axis]) // (patch if isinstance(patch, int) else patch[axis])
        for axis, size, patch in ((0, image_size, patch_size), (1, image_size, patch_size))
    )
    assert config.patch_grid(config.image_shape) == (rows, columns) and config.num_patches == rows * columns


def test_several_vision_feature_layers_are_merged_as_one_wider_feature():
    model = tiny_model(aware(), vision_feature_layer=[-2, -3], train_merger=True)
    assert model.config.merger_config.vision_dim == 64
    assert model.get_vision_features(pixels(1)).shape == (1, NUM_PATCHES, 64)
    assert image_features(model(**prompts([1], 9), pixel_values=pixels(1))).shape == (9, 64)
    stock, identity = (
        tiny_stock(vision_feature_layer=[-2, -3]),
        tiny_model(NONE, vision_feature_layer=[-2, -3]),
    )
    inputs = {**prompts([1], NUM_PATCHES), "pixel_values": pixels(1)}
    assert torch.equal(stock(**inputs).logits, identity(**inputs).logits)


def test_the_seeds_own_verification_at_llava_widths():
    """576 × 1024 → 288 × 1024 at ratio 0.5 → one projector call → 288 × 4096."""
    from transformers import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    from llava_merge import LearnableTokenMergerV3

    features = torch.randn(1, 576, 1024)
    merged = LearnableTokenMergerV3(d_vision=1024, merge_ratio=0.5)(features)["merged_features"]
    assert merged.shape == (1, 288, 1024)
    assert LlavaMultiModalProjector(LlavaConfig())(merged).shape == (1, 288, 4096)
    assert LlavaMergeConfig(merger_config={"merge_ratio": 0.5}).merger_config.num_merged_tokens == 288


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation, tmp_path):
    model = tiny_model(aware(), train_merger=True)
    model.save_pretrained(tmp_path)
    loaded = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.model.language_model.config._attn_implementation == implementation
    inputs = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
    attended = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        loaded(**inputs).logits[attended], model(**inputs).logits[attended], atol=1e-4, rtol=1e-4
    )


def test_resized_token_embeddings_keep_the_answers():
    model = tiny_model(aware(), train_merger=True)
    inputs = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
    vocabulary = model.config.text_config.vocab_size
    before = model(**inputs).logits
    model.resize_token_embeddings(vocabulary + 5)
    assert torch.equal(model(**inputs).logits[..., :vocabulary], before)


class TestBadInput:
    def test_wrong_placeholder_count_names_both_counts_and_the_fix(self):
        model = tiny_model(aware())
        with pytest.raises(ValueError, match=r"36 image placeholders .*9 tokens each, 9 in all.*num_merged_tokens"):
            model(**prompts([1], NUM_PATCHES), pixel_values=pixels(1))
        with pytest.raises(ValueError, match="placeholders"):
            model.generate(**prompts([1], NUM_PATCHES), pixel_values=pixels(1))

    @pytest.mark.parametrize(
        "counts, tokens, given, message",
        [
            ([1, 1], 9, 3, r"per row: \[9, 9\].*for 2 images \(per row: \[1, 1\]\), and 3 are given. Pass one image"),
            ([2, 1], 9, 1, r"per row: \[18, 9\].*for 3 images \(per row: \[2, 1\]\), and 1 are given. Pass one image"),
            ([0], 9, 1, r"per row: \[0\].*for 0 images \(per row: \[0\]\), and 1 are given. Pass one image"),
            ([1], NUM_PATCHES, 1, r"hold 36 .*9 tokens each.*another number of tokens per image.*num_merged_tokens=M"),
            ([1, 2], NUM_PATCHES, 3, "hold 108 .*another number of tokens per image"),
            (
                [1],
                18,
                1,
                "hold 18 .*for 2 images .*one image for each <image>.*Or, with 18 tokens per image, the prompts",
            ),
            ([1, 1], 4, 2, "hold 8 .*9 tokens each, 18 in all.*another number of tokens per image"),
            ([1, 1], 7, 2, "hold 14 .*9 tokens each, 18 in all.*Or a max_length cut the prompts off: raise it"),
        ],
    )
    def test_what_is_wrong_with_the_placeholders(self, counts, tokens, given, message):
        model, call = tiny_model(agnostic()), {**prompts(counts, tokens), "pixel_values": pixels(given)}
        for run in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                run(**call)

    def test_features_that_are_too_few(self):
        model = tiny_model(agnostic())
        encoded = {"image": model.model.encode_images(pixels(1))}
        with pytest.raises(ValueError, match=r"18 image placeholders \(per row: \[18\]\) for 9 image features"):
            model(**prompts([2], 9), mm_encoder_outputs=encoded)

    def test_unknown_merger_type(self):
        with pytest.raises(ValueError, match="'nonsense' does not exist; choose one of average_pooling, c_abstractor"):
            tiny_model({"merger_type": "nonsense", "num_heads": 4})

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"num_merged_tokens": 37}, "num_merged_tokens=37 is more than the 36"),
            ({"num_merged_tokens": 0}, "num_merged_tokens=0"),
            ({"num_merged_tokens": -3}, "num_merged_tokens=-3"),
            ({"num_merged_tokens": 9, "merge_ratio": 0.5}, "disagree: the ratio gives 18"),
            ({"merge_ratio": 1.5}, "merge_ratio=1.5"),
            ({"merge_ratio": 0.0}, "merge_ratio=0.0"),
            ({"init": "zeros"}, "init='zeros'"),
            ({"num_heads": 5}, "num_heads=5"),
            ({"vision_dim": 64}, "vision_dim=64, this model needs vision_dim=32"),
            ({"text_dim": 32, "question_aware": True}, "text_dim=32, this model needs text_dim=64"),
            ({"num_merge_tokens": 4}, "no field num_merge_tokens; its fields are merger_type, num_merged_tokens"),
            ({"num_merged_tokens": 4.5}, "num_merged_tokens=4.5: has to be a whole number"),
            ({"num_merged_tokens": "9"}, "num_merged_tokens='9'"),
            ({"query_grid": [0, 3]}, r"query_grid\[0\]=0"),
            ({"merger_type": "none", "num_merged_tokens": 9}, "'none' keeps all tokens"),
            ({"merger_type": "average_pooling", "question_aware": True}, "does not read the question"),
        ],
    )
    def test_merger_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            tiny_model({"num_heads": 4, **fields})

    def test_placeholders_of_one_row_do_not_take_the_image_of_another(self):
        """5 and 13 placeholders are 18 in all, as two images of 9 tokens are."""
        rows = [[IMAGE_ID] * 5 + [7] * 9, [IMAGE_ID] * 13 + [7]]
        with pytest.raises(ValueError, match=r"per row: \[5, 13\]"):
            tiny_model(agnostic())(torch.tensor(rows), pixels(2))

    def test_images_given_twice(self):
        model = tiny_model(agnostic())
        encoded = {"image": model.model.encode_images(pixels(1))}
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="either as pixel_values or encoded"):
                call(**prompts([1], 9), pixel_values=pixels(1), mm_encoder_outputs=encoded)

    def test_wrong_image_size(self):
        with pytest.raises(ValueError, match=r"\(1, 3, 70, 70\).*\(images, channels, 84, 84\)"):
            tiny_model(agnostic())(**prompts([1], 9), pixel_values=torch.zeros(1, 3, 70, 70))

    def test_a_layer_that_was_not_built(self):
        model = tiny_model(agnostic())
        with pytest.raises(ValueError, match=r"vision_feature_layer=-1: of the tower's 4 hidden .* only the first 3"):
            model(**prompts([1], 9), pixel_values=pixels(1), vision_feature_layer=-1)
        shallower = model(**prompts([1], 9), pixel_values=pixels(1), vision_feature_layer=-3)
        assert torch.equal(
            image_features(shallower),
            image_features(tiny_model(agnostic(), vision_feature_layer=-3)(**prompts([1], 9), pixel_values=pixels(1))),
        )

    @pytest.mark.parametrize(
        "tower, strategy, message",
        [
            ("clip", "full", "37 visual tokens .* 6 × 6 .*if it is CLS, .*='default' drops it"),
            ("siglip", "default", "35 visual tokens .* 6 × 6 .*without CLS such as SigLIP. Use .*='full'"),
        ],
    )
    def test_strategy_that_does_not_fit_the_tower(self, tower, strategy, message):
        model = tiny_model(agnostic(), tower, vision_feature_select_strategy=strategy)
        with pytest.raises(ValueError, match=message):
            model(**prompts([1], 9), pixel_values=pixels(1))

    @pytest.mark.parametrize(
        "num_patches, grid, message",
        [
            (40, (6, 6), "4 are no patches: towers with registers"),
            (24, None, r"5 × 5.*Patches in another shape need grid=\(rows, columns\)"),
            (12, (6, 6), r"12 visual tokens do not fill a grid of 6 × 6 patches. Patches in another shape need grid"),
        ],
    )
    def test_grid(self, num_patches, grid, message):
        with pytest.raises(ValueError, match=message):
            tiny_model(agnostic()).model.merger(torch.zeros(1, num_patches, 32), grid=grid)

    @pytest.mark.parametrize("size", [(84, 84, 84), "84", None, (84, 0), 84.0])
    def test_sizes_that_are_no_rows_and_columns(self, size):
        config = tiny_model(agnostic()).config
        config.vision_config.__dict__["image_size"] = size
        with pytest.raises(ValueError, match="image_size=.* of the vision tower: rows and columns"):
            config.set_merger_config({"num_merged_tokens": 4})

    def test_features_of_another_width(self):
        merger = tiny_model(aware()).model.merger
        with pytest.raises(ValueError, match=r"\(1, 36, 64\).*vision_dim=32"):
            merger(torch.zeros(1, 36, 64))
        with pytest.raises(ValueError, match=r"\(1, 5, 32\).*text_dim=64"):
            merger(torch.zeros(1, 36, 32), torch.zeros(1, 5, 32))
        with pytest.raises(ValueError, match="num_tokens=37"):
            merger(torch.zeros(1, 36, 32), num_tokens=37)

    def test_mask_that_hides_the_question(self):
        batch = prompts([1], 9)
        with pytest.raises(ValueError, match="attention_mask is"):
            tiny_model(aware())(batch["input_ids"], pixels(1), attention_mask=torch.zeros(1, 1, 16, 16))

    def test_set_num_merged_tokens_out_of_range_changes_nothing(self):
        model = tiny_model(aware())
        for wrong in (0, 37):
            with pytest.raises(ValueError, match=f"num_merged_tokens={wrong}"):
                model.set_num_merged_tokens(wrong)
        assert model.config.merger_config.num_merged_tokens == 9 == model.config.image_seq_length
        with pytest.raises(ValueError, match="'none' keeps all tokens"):
            tiny_model(NONE).set_num_merged_tokens(9)

    def test_merger_config_made_for_another_width(self):
        stock = tiny_config().to_dict()
        stock.pop("model_type")
        with pytest.raises(ValueError, match="vision_dim=1024, this model needs vision_dim=32"):
            LlavaMergeConfig(merger_config=MergerConfig(num_merged_tokens=4), **stock)


class TestSetMerger:
    def test_another_method_on_the_same_model(self):
        """The budget is the processor's too and stays; where tokens sit and what they weigh was the old merger's."""
        model = tiny_model(agnostic(4, attention_mass=0.5, position_ids="packed"), train_merger=True)
        batch = {**prompts([1, 1], 4), "pixel_values": pixels(2)}
        for merger_type in ("tome", "visionzip"):
            model.set_merger({"merger_type": merger_type})
            config = model.config.merger_config
            assert config is model.model.merger.config is model.model.merger.method.config
            assert (config.num_merged_tokens, model.model.attention_mass, config.position_ids) == (4, 1.0, "source")
            expected = tiny_model({"merger_type": merger_type, "num_merged_tokens": 4})
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits)

    def test_budget_dtype_and_mode_are_those_of_the_model(self):
        model = tiny_model(agnostic(9)).to(torch.bfloat16).train().requires_grad_(False)
        model.set_merger({"merger_type": "gumbel_topk", "num_merged_tokens": 4})
        merger = model.model.merger
        assert merger.training and model.config.image_seq_length == 4
        assert {(p.dtype, p.requires_grad) for p in merger.parameters()} == {(torch.bfloat16, False)}
        model.set_merger({"merger_type": "none"})
        assert model.config.merger_config.num_merged_tokens is None
        model.set_merger({"merger_type": "strided"})
        assert model.config.merger_config.num_merged_tokens == 9  # a quarter

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"merger_type": "nonsense"}, "'nonsense' does not exist"),
            ({"merger_type": "tome", "num_merged_tokens": 100}, "num_merged_tokens=100 is more than"),
            ({"merger_type": "tome", "faithful": True}, "faithful=True"),
            ({"merger_typ": "tome"}, "no field merger_typ"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, fields, message):
        model = tiny_model(agnostic(9))
        before, config = model.model.merger, model.config.to_dict()
        with pytest.raises(ValueError, match=message):
            model.set_merger(fields)
        assert model.model.merger is before and model.config.to_dict() == config


@pytest.mark.parametrize("merger", [agnostic(), aware(position_ids="source", attention_mass=1.0)], ids=["V3", "placed"])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_nothing_is_checked_once_the_tower_runs(merger, call, monkeypatch):
    """A check waits for the device, which has nothing else to do before the tower."""
    model, events = tiny_model(merger), []
    for module in (placeholders, questions):
        monkeypatch.setattr(module, "check_on_device", lambda *check: events.append("check"))
    model.model.vision_tower.register_forward_pre_hook(lambda *_: events.append("tower"))
    batch = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
    if call == "forward":
        model(**batch)
    else:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert events[0] == "check" and events.index("tower") == len(events) - 1


@pytest.mark.parametrize("fields", [{"position_ids": "packed"}, {"position_ids": "source"}], ids=str)
@pytest.mark.parametrize("given", [1, 3])
def test_encoded_images_of_another_prompt_are_refused(fields, given):
    model = tiny_model(agnostic(**fields))
    encoded = {"image": model.model.encode_images(pixels(given))}
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=f"hold 18 image placeholders .* for {9 * given} image features"):
            call(**prompts([1, 1], 9), mm_encoder_outputs=encoded)
