# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What methods ask of the tower and the projector besides the features, and that it costs no more than it has to."""

import sys
import threading
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import ANSWER_ID, aware, pixels, prompts, tiny_model
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModel, BitsAndBytesConfig

from llava_merge import (
    MERGING_METHODS,
    MergeExtras,
    MergeOutput,
    MergingMethod,
    Question,
    register_merging_method,
)
from llava_merge.model.relevance import projected_relevance, projected_word_relevance
from llava_merge.model.vision_encoding import find_layer, mean_attention


pytestmark = pytest.mark.core

M, N = 9, 36


@pytest.fixture
def asks_for_all():
    """A custom method that requires everything, and keeps what it got."""

    @register_merging_method("asks_for_all")
    class AsksForAll(MergingMethod):
        training_free = True
        requires = frozenset({"cls_attention", "keys", "layers"})
        options = ("feature_layers",)
        seen: list[MergeExtras] = []

        def forward(self, features, context):
            names = ("cls_attention", "keys", "num_heads", "layers", "relevance", "word_relevance")
            self.seen.append(MergeExtras(**{name: getattr(context, name) for name in names}))
            return MergeOutput(merged_features=context.geometry.windows.to(features.dtype) @ features)

    yield AsksForAll
    del MERGING_METHODS["asks_for_all"]


ALL_OF_IT = {"merger_type": "asks_for_all", "num_merged_tokens": M, "feature_layers": [1, -3]}


def fetched(asks_for_all, merger_config: dict = ALL_OF_IT, **kwargs) -> tuple[torch.nn.Module, MergeExtras]:
    model = tiny_model(merger_config, **kwargs)
    asks_for_all.seen.clear()
    with torch.no_grad():
        model.model.encode_images(pixels(2))
    return model, asks_for_all.seen[0]


def eager_tower(model):
    """The same tower with eager attention, and its output with all attention weights for two pictures."""
    tower = AutoModel.from_config(model.config.used_vision_config, attn_implementation="eager").eval()
    tower.load_state_dict(model.model.vision_tower.state_dict())
    with torch.no_grad():
        return tower, tower(pixels(2), output_attentions=True, output_hidden_states=True)


def test_a_method_that_says_no_source_is_named(asks_for_all):
    model = tiny_model(ALL_OF_IT)
    with pytest.raises(ValueError, match="merger_type='asks_for_all' does not say where its tokens come from"):
        model.merge_sources(**prompts([1], M), pixel_values=pixels(1))


@pytest.mark.parametrize("layer", [-2, -1, 1, [-3, -2]])
def test_extras_of_clip_equal_the_eager_path(asks_for_all, layer):
    model, extras = fetched(asks_for_all, vision_feature_layer=layer)
    tower, outputs = eager_tower(model)
    last = {-2: 1, -1: 2, 1: 0}.get(layer if isinstance(layer, int) else -2)  # the layer that makes the features
    expected = outputs.attentions[last].mean(dim=1)[:, 0, 1:]
    torch.testing.assert_close(extras.cls_attention, expected, atol=1e-5, rtol=0)
    assert extras.cls_attention.std() > 1e-3 and extras.num_heads == 4
    state = outputs.hidden_states[last]
    attended = find_layer(tower, last)
    keys = attended.self_attn.k_proj(attended.layer_norm1(state))[:, 1:]
    torch.testing.assert_close(extras.keys, keys, atol=1e-5, rtol=0)
    for layer, index in zip(extras.layers, (1, 1), strict=True):  # 1 and -3 of 4
        torch.testing.assert_close(layer, outputs.hidden_states[index][:, 1:], atol=1e-5, rtol=0)


def test_a_tower_without_cls_gives_the_mean_attention_received(asks_for_all):
    model, extras = fetched(asks_for_all, tower="siglip")
    _, outputs = eager_tower(model)
    expected = outputs.attentions[1].mean(dim=(1, 2))
    assert expected.shape == (2, N)
    torch.testing.assert_close(extras.cls_attention, expected, atol=1e-5, rtol=0)


def test_a_method_gets_only_what_it_requires(asks_for_all):
    asks_for_all.requires = frozenset({"keys"})
    _, extras = fetched(asks_for_all, {**ALL_OF_IT, "feature_layers": None})
    assert extras.kinds == {"keys"} and extras.cls_attention is None and extras.layers == ()


def hooks_of(model, run: bool = False) -> int:
    if run:
        model(**prompts([1, 1], N), pixel_values=pixels(2))
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    "merger_type, num_keys",
    [("average_pooling", 1), ("divprune", 1), ("none", 1), ("visionzip", 2), ("vispruner", 2), ("prumerge_plus", 2)],
)
def test_the_tower_runs_once_and_no_hook_is_left(merger_type, num_keys):
    """The keys of one layer are projected once more where a method asks for them, and nothing where none does."""
    budget = {} if merger_type == "none" else {"num_merged_tokens": M}
    model = tiny_model({"merger_type": merger_type, **budget})
    model(**prompts([1, 1], M if budget else N), pixel_values=pixels(2))  # transformers 5 leaves hooks of its own
    hooks = hooks_of(model)
    calls = {"tower": 0, "keys": 0, "projector": 0}
    layer = find_layer(model.model.vision_tower, 1)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    parts = {"tower": model.model.vision_tower, "keys": layer.self_attn.k_proj}
    parts["projector"] = model.model.multi_modal_projector
    handles = [part.register_forward_hook(count(name)) for name, part in parts.items()]
    model(**prompts([1, 1], M if budget else N), pixel_values=pixels(2))
    assert calls == {"tower": 1, "keys": num_keys, "projector": 1}
    with model.merger_bypassed():
        model(**prompts([1, 1], N), pixel_values=pixels(2))
    assert calls["keys"] == num_keys + 1  # the tower's own
    for handle in handles:
        handle.remove()
    assert hooks_of(model) == hooks == hooks_of(tiny_model({"merger_type": "none"}), run=True)


@pytest.mark.parametrize("merger_type", ["visionzip", "vispruner", "fastervlm", "prumerge_plus", "cdpruner", "mmtok"])
def test_image_features_compile_as_one_graph(merger_type):
    model = tiny_model({**aware(M), "merger_type": merger_type, "question_aware": merger_type in ("cdpruner", "mmtok")})
    question = torch.randn(2, 5, 64)

    def features(pixel_values):
        return torch.stack(model.model.encode_images(pixel_values, question=question).pooler_output)

    features(pixels(2))  # transformers 5 installs hooks at the first call, under a lock
    torch._dynamo.reset()
    compiled = torch.compile(features, fullgraph=True, backend="eager")
    for context in (torch.inference_mode, torch.enable_grad):
        with context():
            torch.testing.assert_close(compiled(pixels(2)), features(pixels(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merger_type", ["visionzip", "vispruner", "fastervlm", "prumerge_plus"])
def test_training_with_gradient_checkpointing_and_lora_on_the_tower(merger_type):
    model = tiny_model({"merger_type": merger_type, "num_merged_tokens": M})
    lora = LoraConfig(r=2, target_modules=r".*vision_tower.*(q_proj|k_proj|v_proj)", init_lora_weights=False)
    inject_adapter_in_model(lora, model)
    tower, outputs = model.model.vision_tower, {}
    batch = {**prompts([1, 1], M), "pixel_values": pixels(2)}
    for name, options in (("plain", None), ("checkpointed", {"use_reentrant": False})):
        model.zero_grad()
        if options:
            model.gradient_checkpointing_enable(options)
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        grads = [p.grad.clone() for n, p in tower.named_parameters() if "lora" in n and "v_proj" in n]
        outputs[name] = [loss.detach(), *grads]
    assert all(tensor.abs().sum() > 0 for tensor in outputs["plain"])
    torch.testing.assert_close(outputs["plain"], outputs["checkpointed"])


def test_adapters_of_the_tower_count_in_keys_and_attention(asks_for_all):
    model, before = fetched(asks_for_all)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*layers\.1.*k_proj", init_lora_weights=False), model)
    with torch.no_grad():
        model.model.encode_images(pixels(2))
    after = asks_for_all.seen[-1]
    assert (before.keys - after.keys).abs().max() > 1e-3
    assert (before.cls_attention - after.cls_attention).abs().max() > 1e-6


def test_threads_get_their_own(asks_for_all):
    model, _ = fetched(asks_for_all)
    pictures, results = [pixels(1, seed=seed) for seed in range(4)], [None] * 4
    with torch.no_grad():
        expected = [model.model.get_merge_extras(picture).cls_attention for picture in pictures]

    def work(index):
        with torch.no_grad():
            results[index] = [model.model.get_merge_extras(pictures[index]).cls_attention for _ in range(10)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    for wanted, got in zip(expected, results, strict=True):
        assert all(torch.allclose(wanted, one, atol=1e-6) for one in got)


def test_parts_on_the_disk(tmp_path):
    model = tiny_model({"merger_type": "visionzip", "num_merged_tokens": M})
    expected = model(**prompts([1, 1], M), pixel_values=pixels(2)).logits
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "off")
    torch.testing.assert_close(loaded(**prompts([1, 1], M), pixel_values=pixels(2)).logits, expected)


def test_budgets_of_one_batch_take_the_extras_of_their_images():
    model = tiny_model({"merger_type": "visionzip", "num_merged_tokens": M, "attention_mass": 1.0})
    together = model.model.encode_images(pixels(3), num_merged_tokens=[9, "all", 4])
    sizes = together.token_sizes.split([9, N, 4])
    assert sizes[1].unique().tolist() == [1.0] and sizes[0].sum() == sizes[2].sum() == N
    for image, budget in ((0, 9), (2, 4)):
        alone = model.model.encode_images(pixels(3)[image : image + 1], num_merged_tokens=budget)
        torch.testing.assert_close(together.pooler_output[image], alone.pooler_output[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(sizes[image], alone.token_sizes)


@pytest.mark.parametrize("merger_type", ["tome", "visionzip", "divprune"])
def test_attention_mass_counts_the_size_of_each_token(merger_type):
    """Against the language model alone, with the bias in a mask written out and positions by hand."""
    model = tiny_model({"merger_type": merger_type, "num_merged_tokens": M, "attention_mass": 0.7})
    batch, start = prompts([1], M), 1  # <s>, then the image
    with torch.no_grad():
        images = model.model.encode_images(pixels(1))
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[0, start : start + M] = images.pooler_output[0]
        length = embeds.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        mask[:, start : start + M] += 0.7 * images.token_sizes.log()
        positions = torch.arange(length)
        positions[start : start + M] = start + images.token_places
        positions[start + M :] += N - M
        arguments = {"attention_mask": mask.clamp(min=torch.finfo(torch.float32).min)[None, None]}
        states = model.model.language_model(inputs_embeds=embeds, position_ids=positions[None], **arguments)
        logits = model(**batch, pixel_values=pixels(1)).logits
    assert images.token_sizes.unique().numel() > 1
    torch.testing.assert_close(logits, model.lm_head(states.last_hidden_state), atol=1e-4, rtol=1e-4)


def test_attention_in_half_precision_is_summed_in_float32():
    queries, keys = torch.randn(2, 1, 32).half() * 20, torch.randn(2, 600, 32).half() * 20
    attention = mean_attention(queries, keys, 4)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, mean_attention(queries.double(), keys.double(), 4).float())
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_attention(queries, keys, 4), attention)


def full_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight of bitsandbytes' layers in float32."""
    if weight.dtype == torch.int8:
        return weight.data.float() * weight.SCB[:, None] / 127
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


class TestRelevance:
    def model(self):
        return tiny_model({**aware(M), "merger_type": "cdpruner"})

    def relevance(self, model, question) -> torch.Tensor:
        return model.model.get_merge_extras(pixels(2), question=question).relevance

    def test_it_is_the_cosine_with_the_gradient_of_the_projector(self):
        model, words = self.model(), torch.randn(2, 5, 64)
        with torch.no_grad():
            features = model.get_vision_features(pixels(2))
            relevance = self.relevance(model, words)
        for image in range(2):
            mean = features[image].mean(0).requires_grad_()
            wanted = (words[image] / words[image].norm(dim=-1, keepdim=True)).mean(0)
            (model.model.multi_modal_projector(mean[None])[0] @ wanted).backward()
            expected = torch.cosine_similarity(features[image] - mean.detach(), mean.grad[None])
            torch.testing.assert_close(relevance[image], expected, atol=1e-5, rtol=1e-4)

    def test_an_image_without_question_has_none_and_keeps_diverse_patches(self):
        model, words = self.model(), torch.randn(2, 5, 64)
        mask = torch.tensor([[True] * 5, [False] * 5])
        relevance = self.relevance(model, Question.of_each_image(words, mask))
        assert relevance[0].std() > 1e-3 and relevance[1].abs().max() == 0

    def test_images_of_a_batch_do_not_mix_their_questions(self):
        model, words = self.model(), torch.randn(2, 5, 64)
        with torch.no_grad():
            together = self.relevance(model, words)
            other = self.relevance(model, torch.cat((words[:1], torch.randn(1, 5, 64))))
        assert torch.equal(together[0], other[0]) and not torch.equal(together[1], other[1])

    @pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
    def test_a_quantised_projector(self, bits, tmp_path, plain_4bit_kernels):
        model, words = self.model(), torch.randn(2, 5, 64)
        model.save_pretrained(tmp_path)
        quantised = type(model).from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True}), device_map={"": "cpu"}
        )
        assert "bitsandbytes" in type(quantised.model.multi_modal_projector.linear_1).__module__
        pictures, question = pixels(2).to(quantised.dtype), words.to(quantised.dtype)
        projector = model.model.multi_modal_projector
        for name in ("linear_1", "linear_2"):
            weight = full_weight(getattr(quantised.model.multi_modal_projector, name).weight)
            getattr(projector, name).weight.data = weight
        with torch.inference_mode():
            relevance = quantised.model.get_merge_extras(pictures, question=question).relevance
            features = quantised.get_vision_features(pictures).float()
        expected = projected_relevance(features, Question.of_each_image(words), projector)
        assert torch.corrcoef(torch.stack((relevance.flatten(), expected.flatten())))[0, 1] > 0.99

    def test_forward_and_generate_take_the_question_from_the_prompt(self):
        model, seen = self.model(), []
        model.model.merger.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["extras"].relevance), with_kwargs=True
        )
        batch = {**prompts([1, 1], M), "pixel_values": pixels(2)}
        with torch.no_grad():
            model(**batch)
            model.generate(**batch, max_new_tokens=2)
            question = batch["input_ids"].masked_fill(batch["input_ids"] == ANSWER_ID, 0)
        assert len(seen) == 2 and torch.equal(*seen)
        words = question[0, -8:-1]  # of the longer row, the second, all of it
        embeds = model.get_input_embeddings()(question[1, -8:-1])
        assert len(words) == 7
        alone = self.relevance(model, Question.of_each_image(embeds.expand(2, -1, -1)))
        torch.testing.assert_close(seen[0][1], alone[1], atol=1e-5, rtol=1e-4)

    def test_no_question_is_refused(self):
        with pytest.raises(ValueError, match="merges each image for its question, and none is given"):
            self.model().get_image_features(pixels(2))
        with pytest.raises(ValueError, match=r"question_aware=False: merger_type='cdpruner' merges for a question"):
            tiny_model({"merger_type": "cdpruner", "num_merged_tokens": M, "question_aware": False})


class TestWordRelevance:
    def model(self):
        return tiny_model({**aware(M), "merger_type": "mmtok"})

    def relevance(self, model, question) -> torch.Tensor:
        return model.model.get_merge_extras(pixels(2), question=question).word_relevance

    def test_it_is_the_cosine_with_the_gradient_of_each_word(self):
        model, words = self.model(), torch.randn(2, 5, 64)
        with torch.no_grad():
            features = model.get_vision_features(pixels(2))
            relevance = self.relevance(model, words)
        assert relevance.shape == (2, features.shape[1], 5) and relevance.dtype == torch.float32
        for image, word in product(range(2), range(5)):
            mean = features[image].mean(0).requires_grad_()
            (model.model.multi_modal_projector(mean[None])[0] @ words[image, word]).backward()
            expected = torch.cosine_similarity(features[image] - mean.detach(), mean.grad[None])
            torch.testing.assert_close(relevance[image, :, word], expected, atol=1e-5, rtol=1e-4)

    def test_words_of_others_and_of_no_question_are_none(self):
        """Two images of one row and turn, one of another row, whose question is shorter, one without."""
        model, words = self.model(), torch.randn(3, 5, 64)
        turns = torch.tensor([[0, 0, 0, 4, 4], [4, 2, 2, 4, 4], [4, 4, 4, 4, 4]])
        question = Question(words, turns, torch.tensor([0, 0, 2, 3]))
        features = torch.randn(4, 36, model.config.merged_vision_dim)
        relevance = projected_word_relevance(features, question, model.model.multi_modal_projector)
        is_word = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
        assert torch.equal(relevance.isfinite(), is_word[:, None].expand(-1, 36, -1))
        alone = Question.of_each_image(words[1:2, 1:3])
        expected = projected_word_relevance(features[2:3], alone, model.model.multi_modal_projector)
        torch.testing.assert_close(relevance[2:3, :, 1:3], expected)

    def test_forward_takes_the_question_from_the_prompt(self):
        model, seen = self.model(), []
        model.model.merger.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["extras"].word_relevance), with_kwargs=True
        )
        batch = {**prompts([1, 1], M), "pixel_values": pixels(2)}
        with torch.no_grad():
            model(**batch)
        embeds = model.get_input_embeddings()(batch["input_ids"][1, -8:-1])
        alone = self.relevance(model, Question.of_each_image(embeds.expand(2, -1, -1)))
        assert seen[0].isfinite().all(dim=1)[1].sum() == 7
        torch.testing.assert_close(seen[0][1, :, -8:-1], alone[1], atol=1e-5, rtol=1e-4)


class TestBadInput:
    def test_what_is_missing_is_named(self):
        model = tiny_model({"merger_type": "visionzip", "num_merged_tokens": M})
        features = model.get_vision_features(pixels(2))
        with pytest.raises(ValueError, match="merger_type='visionzip' needs cls_attention, keys besides the features"):
            model.model.merger(features)
        extras = model.model.get_merge_extras(pixels(2))
        with pytest.raises(ValueError, match="needs keys besides"):
            model.model.merger(features, extras=replace(extras, keys=None))
        with pytest.raises(ValueError, match=r"keys has shape \(1, 36, 32\)"):
            model.model.merger(features, extras=replace(extras, keys=extras.keys[:1]))

    @pytest.mark.parametrize(
        "fields, message",
        [
            (
                {"merger_type": "tome", "faithful": True},
                "faithful=True: merger_type='tome' does not read it, only prumerge_plus, visionzip",
            ),
            ({"merger_type": "random", "init": "random"}, "init='random': merger_type='random' does not read it"),
            ({"merger_type": "strided", "seed": 1}, "seed=1: merger_type='strided' does not read it, only random"),
            ({"merger_type": "divprune", "important_ratio": 0.5}, "only prumerge_plus, visionzip, vispruner"),
            ({"merger_type": "vispruner", "important_ratio": 1.5}, "important_ratio=1.5: it is the share"),
            ({"merger_type": "vispruner", "important_ratio": True}, "important_ratio=True"),
            ({"merger_type": "random", "seed": "x"}, "seed='x': has to be a int"),
            ({"merger_type": "visionzip", "faithful": 1}, "faithful=1: has to be a bool"),
            ({"merger_type": "tome", "question_aware": True}, "does not read the question"),
            ({"merger_type": "tome", "num_merged_tokens": 37}, "num_merged_tokens=37 is more than"),
            ({"merger_type": "gumbel_topk", "estimator": "sampling"}, "estimator='sampling': has to be 'gumbel' or"),
            ({"merger_type": "gumbel_topk", "final_temperature": 2.0}, "initial_temperature=1.0, final_temperature=2"),
            ({"merger_type": "gumbel_topk", "final_temperature": 0}, "have to be numbers above 0"),
        ],
    )
    def test_options(self, fields, message):
        with pytest.raises(ValueError, match=message):
            tiny_model({"num_merged_tokens": M, **fields})

    def test_a_tower_of_another_kind(self, asks_for_all):
        model = tiny_model(ALL_OF_IT)
        model.model.vision_tower.config.model_type = "vit"
        with pytest.raises(ValueError, match="known of clip_vision_model and siglip_vision_model only, not of 'vit'"):
            model.model.encode_images(pixels(1))

    def test_layers_have_to_be_named(self, asks_for_all):
        with pytest.raises(ValueError, match="feature_layers=None: merger_type='asks_for_all' reads layers"):
            tiny_model({**ALL_OF_IT, "feature_layers": None})
