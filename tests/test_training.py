# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Training that cannot go wrong quietly: batches without images, processes, resuming, adapters, quantisation."""

import pytest
import torch
from conftest import NUM_PATCHES, agnostic, answered, aware, pixels, prompts, tiny_model
from safetensors.torch import load_file
from test_pipelines import Rows
from transformers import Trainer, TrainingArguments

from llava_merge import (
    MERGING_METHODS,
    LlavaMergeForConditionalGeneration,
    LlavaMergeModel,
    TokenMerger,
    list_mergers,
)


TEXT_ONLY = answered(prompts([0, 0], 9))
WITH_IMAGES = {**answered(prompts([1, 2], 9)), "pixel_values": pixels(3)}


UNMERGED = {**answered(prompts([1, 2], NUM_PATCHES)), "pixel_values": pixels(3), "num_merged_tokens": "all"}


def merger_only(config: dict):
    """A model in training mode of which only the merger trains."""
    model = tiny_model(config, train_merger=True).train().requires_grad_(False)
    model.model.merger.requires_grad_(True)
    return model


@pytest.mark.core
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_batch_without_images_trains_the_merger_with_weight_zero(given):
    model = merger_only(aware())
    batch = dict(TEXT_ONLY)
    if given == "inputs_embeds":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    output = model(**batch)
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.merger.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, output.logits)


METHODS = {
    **{method.name: {"question_aware": method.question_aware} for method in list_mergers() if method.trained},
    "random": {"merger_type": "fixed_pooling", "init": "random"},
    "layers": {"feature_layers": [1, 2]},
    "soft": {"merger_type": "gumbel_topk_question", "estimator": "soft_topk", "question_aware": True},
}


@pytest.mark.core
@pytest.mark.parametrize("step", ["all tokens", "no question", "a question"])
@pytest.mark.parametrize("name", METHODS)
def test_each_weight_of_a_merger_is_in_each_step(name, step):
    """DistributedDataParallel fails on all ranks where a weight is in the step of one and not in that of another."""
    fields = METHODS[name]
    merger_type = fields.get("merger_type", name if name in MERGING_METHODS else "fixed_pooling")
    layers = {"feature_layers": [1, 2]} if "layers" in MERGING_METHODS[merger_type].requires else {}
    model = merger_only({**aware(), **layers, **fields, "merger_type": merger_type})
    if step == "all tokens":
        batch = UNMERGED
    else:
        batch = dict(WITH_IMAGES)
        if step == "no question":
            batch["question_mask"] = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    output = model(**batch)
    output.loss.backward()
    assert not [name for name, weight in model.model.merger.named_parameters() if weight.grad is None]
    if step == "all tokens":
        assert not any(weight.grad.any() for weight in model.model.merger.parameters())
        with torch.no_grad():
            assert torch.equal(model.eval()(**batch).logits, output.logits)


@pytest.mark.core
def test_a_text_only_model_stays_without_graph():
    model = tiny_model(aware()).train().requires_grad_(False)
    assert not model(**TEXT_ONLY).loss.requires_grad


def train_on_two_ranks(rank: int, file: str):
    """One rank has no images, or merges none; both have the mean of the gradients afterwards."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = merger_only(aware())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for batch in (WITH_IMAGES, TEXT_ONLY, WITH_IMAGES) if rank else (TEXT_ONLY, WITH_IMAGES, UNMERGED):
        model.zero_grad()
        parallel(**batch).loss.backward()
        alone = merger_only(aware())
        alone(**WITH_IMAGES).loss.backward()
        for ours, expected in zip(model.model.merger.parameters(), alone.model.merger.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad / 2, atol=1e-6, rtol=1e-4)
    torch.distributed.destroy_process_group()


def test_two_processes_one_without_images(tmp_path):
    torch.multiprocessing.spawn(train_on_two_ranks, args=(str(tmp_path / "store"),), nprocs=2)


def trained(directory, resume: bool, max_steps: int, **kwargs):
    arguments = TrainingArguments(
        directory,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        save_steps=2,
        save_total_limit=4,
        use_cpu=True,
        **kwargs,
    )
    torch.manual_seed(0)
    model = tiny_model(aware())
    Trainer(model=model, args=arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume or None)
    return model


@pytest.mark.core
def test_a_run_that_was_resumed_is_the_unbroken_one(tmp_path):
    """Trainer loads checkpoints by their own keys and says nothing where they do not fit."""
    unbroken = trained(tmp_path / "unbroken", False, 4).state_dict()
    trained(tmp_path / "broken", False, 2)
    resumed = trained(tmp_path / "broken", True, 4).state_dict()
    start = tiny_model(aware()).state_dict()
    moved = [key for key in start if not torch.equal(start[key], unbroken[key])]
    assert len(moved) > 0.9 * len(start) - 2  # the post_layernorm is not used
    assert [key for key in unbroken if not torch.equal(unbroken[key], resumed[key])] == []


@pytest.mark.core
def test_the_keys_of_a_checkpoint_can_be_loaded_into_a_model(tmp_path):
    for model, blank in (
        (tiny_model(aware(), train_merger=True), lambda config: LlavaMergeForConditionalGeneration(config)),
        (tiny_model(aware(), train_merger=True).model, lambda config: LlavaMergeModel(config)),
    ):
        model.save_pretrained(tmp_path)
        other = blank(model.config)
        result = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert not result.missing_keys and not result.unexpected_keys
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({})


class TestAdapter:
    @pytest.fixture
    def wrapped(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["merger"])
        return peft.get_peft_model(tiny_model(agnostic()), config)

    @pytest.fixture
    def merger_dir(self, tmp_path):
        tiny_model(agnostic(init="random"), train_merger=True).save_merger(tmp_path / "merger")
        return tmp_path / "merger"

    def test_load_merger_keeps_the_trained_copy(self, wrapped, merger_dir):
        trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad and "lora" in name}
        wrapped.load_merger(merger_dir)
        merger = TokenMerger.from_pretrained(merger_dir)
        now = {name for name, p in wrapped.named_parameters() if p.requires_grad}
        prefix = "base_model.model.model.merger.modules_to_save.default."
        assert now == trainable | {prefix + name for name, _ in merger.named_parameters()}
        copies = [module for module in wrapped.modules() if isinstance(module, TokenMerger)]
        assert len(copies) == 2 and len({id(next(copy.parameters())) for copy in copies}) == 2
        assert all(copy.config is wrapped.config.merger_config for copy in copies)

    def test_the_saved_adapter_holds_it(self, wrapped, merger_dir, tmp_path):
        import peft

        wrapped.load_merger(merger_dir)
        wrapped(**WITH_IMAGES).loss.backward()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
        expected = wrapped.eval()(**WITH_IMAGES).logits
        wrapped.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(tiny_model(agnostic(init="random")), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**WITH_IMAGES).logits, expected, atol=1e-5, rtol=1e-5)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped.model.model.merger(pixels_features()).merged_features.shape, (1, 9, 32))

    def test_a_plain_model_keeps_what_trains(self, merger_dir):
        model = tiny_model(agnostic()).to(torch.bfloat16).eval().requires_grad_(False)
        model.load_merger(merger_dir)
        assert not any(parameter.requires_grad for parameter in model.model.merger.parameters())
        assert model.model.merger.dtype == torch.bfloat16 and not model.model.merger.training


def pixels_features() -> torch.Tensor:
    return torch.zeros(1, 36, 32)


@pytest.mark.parametrize("bits", [4, 8])
class TestQuantisation:
    @pytest.fixture
    def quantised(self, tmp_path, bits, plain_4bit_kernels):
        from transformers import BitsAndBytesConfig

        tiny_model(aware()).save_pretrained(tmp_path / "full")
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        return LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "full", quantization_config=config)

    def test_the_merger_is_left_as_it_is(self, quantised, tmp_path):
        import bitsandbytes

        kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
        names = {name for name, module in quantised.named_modules() if isinstance(module, kinds)}
        assert any("language_model" in name for name in names) and not any("merger" in name for name in names)
        saved = load_file(tmp_path / "full" / "model.safetensors")
        for name, tensor in quantised.model.merger.state_dict().items():
            assert torch.equal(tensor, saved[f"model.merger.{name}"]), name
        assert not quantised.model.merger.method.output_proj.weight.any()

    def test_it_is_saved_and_loaded(self, quantised, tmp_path):
        batch = {name: tensor for name, tensor in WITH_IMAGES.items() if name != "labels"}
        batch["pixel_values"] = batch["pixel_values"].to(quantised.dtype)
        batch["question_mask"] = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        quantised.save_pretrained(tmp_path / "quantised")
        again = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path / "quantised")
        assert torch.equal(again(**batch).logits, quantised(**batch).logits)
        quantised.save_merger(tmp_path / "merger")
        merger = TokenMerger.from_pretrained(tmp_path / "merger").state_dict()
        assert all(
            torch.equal(merger[key].float(), t.float()) for key, t in quantised.model.merger.state_dict().items()
        )
