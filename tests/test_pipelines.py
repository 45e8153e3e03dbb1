# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What existing code does with a LLaVA: processors, pipelines, Trainer, PEFT, torch.compile."""

import pytest
import torch
from conftest import (
    NUM_PATCHES,
    agnostic,
    answered,
    aware,
    image_features,
    make_processor,
    pixels,
    prompts,
    tiny_model,
    tiny_stock,
)
from transformers import AutoProcessor, LlavaProcessor, Trainer, TrainingArguments, pipeline

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.model.compat import TRANSFORMERS_V5


TEXT = "USER: <image> what color is the star ? ASSISTANT:"


@pytest.fixture
def processor():
    return make_processor(processor_class=LlavaMergeProcessor, num_merged_tokens=9)


class TestProcessor:
    def test_it_writes_m_placeholders_an_image(self, processor, picture):
        texts = [TEXT, "USER: <image> <image> how many ? ASSISTANT:", "USER: red ? ASSISTANT:"]
        inputs = processor(images=[picture] * 3, text=texts, padding=True, return_tensors="pt")
        counts = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
        assert counts.tolist() == [9, 18, 0] and inputs["pixel_values"].shape == (3, 3, 84, 84)
        assert image_features(tiny_model(aware())(**inputs)).shape == (27, 64)

    def test_none_is_the_stock_processor(self, processor, picture):
        processor.num_merged_tokens = None
        ours = processor(images=picture, text=TEXT, return_tensors="pt")
        stock = make_processor()(images=picture, text=TEXT, return_tensors="pt")
        assert ours.keys() == stock.keys() and all(torch.equal(ours[key], stock[key]) for key in stock)
        assert (ours["input_ids"] == processor.image_token_id).sum() == NUM_PATCHES

    def test_pixels_and_text_are_those_of_the_stock_processor(self, processor, picture):
        ours = processor(images=[picture], text=[TEXT], return_tensors="pt")
        stock = make_processor()(images=[picture], text=[TEXT], return_tensors="pt")
        assert ours.keys() == stock.keys()
        assert torch.equal(ours["pixel_values"], stock["pixel_values"])
        without = [ids[ids != processor.image_token_id].tolist() for ids in (ours["input_ids"], stock["input_ids"])]
        assert without[0] == without[1]

    def test_token_types_tell_the_placeholders(self, processor, picture):
        inputs = processor(images=picture, text=TEXT, return_tensors="pt", return_mm_token_type_ids=True)
        assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)

    def test_arguments_are_typed_as_those_of_the_stock_processor(self):
        ours, stock = (each.__call__.__annotations__["kwargs"] for each in (LlavaMergeProcessor, LlavaProcessor))
        assert ours == stock

    def test_text_alone(self, processor):
        assert processor(text="USER: red ?")["input_ids"] == make_processor()(text="USER: red ?")["input_ids"]

    def test_it_comes_back_with_its_budget(self, processor, tmp_path, picture):
        processor.save_pretrained(tmp_path)
        for path in tmp_path.glob("*.py"):
            path.unlink()
        tiny_model(aware()).config.save_pretrained(tmp_path)
        for again in (LlavaMergeProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
            assert type(again) is LlavaMergeProcessor and again.num_merged_tokens == 9
            assert again(images=picture, text=TEXT)["input_ids"] == processor(images=picture, text=TEXT)["input_ids"]

    @pytest.mark.parametrize("budget", [4, None])
    def test_budget_over_a_stock_folder(self, tmp_path, budget):
        make_processor().save_pretrained(tmp_path)
        processor = LlavaMergeProcessor.from_pretrained(tmp_path, num_merged_tokens=budget)
        assert type(processor) is LlavaMergeProcessor and processor.num_merged_tokens == budget
        assert (
            processor._get_num_multimodal_tokens(image_sizes=[(84, 84)] * 2)["num_image_tokens"] == [budget or 36] * 2
        )

    def test_model_and_processor_change_their_budget_together(self, processor, picture):
        model = tiny_model(aware())
        model.set_num_merged_tokens(4, processor)
        inputs = processor(images=picture, text=TEXT, return_tensors="pt")
        assert image_features(model(**inputs)).shape == (4, 64)

    @pytest.mark.parametrize("padding", [True, False])
    @pytest.mark.parametrize("budget", [None, 4, [4, "all", 9]])
    def test_source_positions_behind_the_model_max_length_are_warned_of(
        self, processor, picture, said_of_positions, budget, padding
    ):
        texts = ["USER: <image> red ? ASSISTANT:", "USER: <image> <image> ? ASSISTANT:"]
        longest = 3 + 2 * NUM_PATCHES  # of the second, whatever the budget
        tensors = {"return_tensors": "pt"} if padding else {}
        for limit, warns in ((10**30, 0), (longest, 0), (longest - 1, 1)):
            processor.tokenizer.model_max_length = limit
            processor(images=[picture] * 3, text=texts, padding=padding, num_merged_tokens=budget, **tensors)
            assert len(said_of_positions) == warns
        skipped = {None: 2 * 27, 4: 2 * 32}.get(budget if isinstance(budget, int | None) else 0, 27)
        assert (
            f"tokenizer.model_max_length={limit}" in said_of_positions[0] and f"skip {skipped} " in said_of_positions[0]
        )

    def test_a_stock_processor_s_prompts_are_not_warned_of(self, processor, picture, said_of_positions):
        processor.tokenizer.model_max_length, processor.num_merged_tokens = 8, None
        processor(images=picture, text=TEXT)
        assert not said_of_positions

    def test_no_placeholder_is_refused(self, processor, picture):
        processor.num_merged_tokens = 0
        with pytest.raises(ValueError, match="num_merged_tokens=0"):
            processor(images=picture, text=TEXT)


@pytest.fixture
def messages(picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what color is the star ?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("by", ["object", "directory"])
def test_image_text_to_text_pipeline(messages, processor, tmp_path, picture, by):
    model = tiny_model(aware(), train_merger=True)
    if by == "directory":
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        pipe = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
        assert type(pipe.model) is LlavaMergeForConditionalGeneration
    else:
        pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    result = pipe(text=messages, max_new_tokens=4, do_sample=False, return_full_text=False)
    inputs = processor(images=picture, text=TEXT, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert result[0]["generated_text"].strip() == processor.batch_decode(expected, skip_special_tokens=True)[0].strip()


HOW = {
    "call": {"num_merged_tokens": 4},
    "processor_kwargs": {"processor_kwargs": {"num_merged_tokens": 4}},
    "pipeline": {},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chats", [1, 2])
def test_a_pipeline_passes_on_the_budget_of_a_chat(messages, processor, picture, how, chats):
    model = tiny_model(aware(), train_merger=True)
    made_with = HOW["call"] if how == "pipeline" else {}
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu", **made_with)
    options = {"max_new_tokens": 4, "return_full_text": False, "generate_kwargs": {"do_sample": False}, **HOW[how]}
    results = pipe(text=[messages] * chats, **options)
    inputs = processor(images=picture, text=TEXT, return_tensors="pt", num_merged_tokens=4)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(expected, skip_special_tokens=True)[0].strip()
    assert [result[0]["generated_text"].strip() for result in results] == [expected] * chats
    plain = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    without = plain(text=messages, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    assert without[0]["generated_text"].strip() != expected  # of 9 tokens, and nothing is left behind


def test_a_pipeline_passes_on_the_budget_of_a_text(processor, picture):
    model = tiny_model(aware(), train_merger=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    options = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}, "return_tensors": True}
    few = pipe(images=picture, text=TEXT, num_merged_tokens=4, **options)[0]["generated_token_ids"]
    assert few.tolist().count(processor.image_token_id) == 4


def test_a_pipeline_that_gives_the_budget_to_generate_alone_is_refused(messages, processor):
    pipe = pipeline("image-text-to-text", model=tiny_model(aware()), processor=processor, device="cpu")
    with pytest.raises(ValueError, match=r"9 image placeholders.*processor\(..., num_merged_tokens=M\)"):
        pipe(text=messages, generate_kwargs={"num_merged_tokens": 4})


class Rows(torch.utils.data.Dataset):
    """Rows with one image, a question and an answer."""

    def __init__(self):
        self.rows = []
        for index, image in enumerate(pixels(4)):
            row = {name: tensor[0] for name, tensor in answered(prompts([1], 9, seed=index), seed=index).items()}
            self.rows.append({**row, "pixel_values": image})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer_trains_the_merger_alone(tmp_path, gradient_checkpointing):
    model = tiny_model(aware())
    model.requires_grad_(False)
    model.model.merger.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
        remove_unused_columns=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor.cpu(), before[name])}
    assert changed and all(".merger." in name for name in changed)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients, layer_calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(aware(), train_merger=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = []
        model.model.language_model.layers[0].input_layernorm.register_forward_hook(
            lambda *args, calls=calls: calls.append(1)
        )
        layer_calls.append(calls)
        model(**answered(prompts([1, 2], 9)), pixel_values=pixels(3)).loss.backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert [len(calls) for calls in layer_calls] == [1, 2]  # once more in the backward
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_lora_with_the_merger_saved_along(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(aware())
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["merger"])
    wrapped = peft.get_peft_model(model, config).train()
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert all("lora" in name or "merger" in name for name in trainable)
    batch = {**prompts([1, 2], 9), "pixel_values": pixels(3)}
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        wrapped(**answered(prompts([1, 2], 9)), pixel_values=pixels(3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()
    expected = wrapped(**batch).logits
    assert (expected - tiny_model(aware())(**batch).logits).abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(tiny_model(aware()), tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [agnostic(), aware()], ids=["agnostic", "aware"])
@pytest.mark.skipif(not TRANSFORMERS_V5, reason="transformers 4.57's own LLaVA breaks the graph")
def test_the_forward_compiles_as_one_graph(config):
    model = tiny_model(config, train_merger=True)
    batch = {**prompts([1, 1], 9), "pixel_values": pixels(2)}
    with torch.no_grad():
        expected = model(**batch).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_stock_processor_and_stock_model_are_untouched(picture):
    """Importing llava_merge changes nothing about transformers' own classes."""
    inputs = make_processor(processor_class=LlavaProcessor)(images=picture, text=TEXT, return_tensors="pt")
    assert image_features(tiny_stock()(**inputs)).shape == (NUM_PATCHES, 64)
