# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""What an image is merged for with chat templates of common language models: what the user wrote, and nothing else.

Offline with small tokenizers that split text as those of the models do, and with the real ones where
LLAVA_MERGE_TOKENIZERS names a folder that `.ci/get_tokenizers` made.
"""

import functools
import json
import os
import string
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import aware, tiny_config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from llava_merge import LlavaMergeConfig, LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.model.question_marks import find_question_marks
from llava_merge.model.questions import TurnMarks, question_of_images, split_turns
from llava_merge.serving.requests import RequestRules
from llava_merge.training.collator import MergerCollator
from llava_merge.training.samples import Sample


pytestmark = pytest.mark.core

REAL = os.environ.get("LLAVA_MERGE_TOKENIZERS")
WITH_TEMPLATE = ("qwen2_5", "qwen3", "llama3", "gemma3", "mistral_nemo", "command_r_plus", "deepseek_v3")
SYSTEM_IN_TURN = ("gemma3", "mistral_nemo")  # without a mark between system prompt and question
NUM_TOKENS = 4  # of an image
BODY = "{% if m.content is string %}{{ m.content }}{% endif %}{% for c in m.content if c.type == 'image' %}<image>\
{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{{ '' }}"  # keeps a newline behind it
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + BODY + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (  # 2 and 2.5: always a system prompt, and tools speak as users
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n" + BODY + "\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n" + BODY + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n" + BODY + "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n" + BODY + "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles have to alternate') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    ALTERNATING + "{% for m in messages %}{% if m.role == 'system' %}<s>[INST] <<SYS>>\n" + BODY + "\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}{% if loop.first or loop.previtem.role != 'system' %}<s>[INST] {% endif %}" + BODY + " "
    "[/INST]{% else %} " + BODY + " </s>{% endif %}{% endfor %}"
)
MISTRAL_V1 = (
    "<s>" + ALTERNATING + "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}[INST] " + BODY + " [/INST]{% else %}" + BODY + "</s>{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]" + BODY + "[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]" + BODY + "[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]" + BODY + ""
    "[/TOOL_RESULTS]{% else %}" + BODY + "</s>{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}" + BODY + " {% elif m.role == 'user' %}USER: " + BODY + " "
    "{% else %}ASSISTANT: " + BODY + "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n" + BODY + "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n" + BODY + "</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>" + BODY + ""
    "{% elif m.role == 'assistant' %}<｜Assistant｜>" + BODY + "<｜end▁of▁sentence｜>{% else %}" + BODY + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    + BODY
    + "\n\n{% elif m.role == 'user' %}### Instruction:\n"
    + BODY
    + "\n\n{% else %}### Response:\n"
    + BODY
    + "</s>\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
PHI = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<|endoftext|>")
INST = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


@dataclass
class Family:
    """A chat template and a tokenizer: `pieces`, "bytes" or "words", is how it splits, `real` which package has it."""

    template: str
    eos: str
    bos: str | None = None
    special: tuple[str | AddedToken, ...] = ()
    pieces: str = "bytes"
    real: str = ""
    no_mark_behind_user: bool = False  # so that a system prompt or tool right behind it cannot be told from it


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", None, IM, real="qwen2_5"),
    "chatml, another eos": Family(CHATML, "<|endoftext|>", None, IM, real="qwen3"),
    "chatml, words": Family(CHATML, "<|im_end|>", "<s>", IM, "words", "internlm2"),
    "qwen": Family(QWEN, "<|endoftext|>", None, IM),
    "llama3": Family(
        LLAMA3, "<|eot_id|>", "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>"), real="llama3"
    ),
    "gemma": Family(GEMMA, "<eos>", "<bos>", TURN, "words", "gemma2"),
    "llama2": Family(LLAMA2, "</s>", "<s>", (), "words", "llama2"),
    "mistral v1": Family(MISTRAL_V1, "</s>", "<s>", (), "words", "llama2"),
    "mistral v7": Family(MISTRAL_V7, "</s>", "<s>", INST, real="mistral_nemo"),
    "vicuna": Family(VICUNA, "</s>", "<s>", (), "words", "llama2", no_mark_behind_user=True),
    "vicuna, bytes": Family(VICUNA, "</s>", no_mark_behind_user=True),
    "phi3": Family(PHI3, "<|endoftext|>", "<s>", tuple(AddedToken(t, rstrip=True) for t in PHI), "words", "llama2"),
    "phi3, newlines kept": Family(PHI3, "<|end|>", "<s>", PHI),
    "zephyr": Family(ZEPHYR, "</s>", "<s>", (), "words", "llama2"),
    "deepseek": Family(
        DEEPSEEK,
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
        real="deepseek_v3",
        no_mark_behind_user=True,
    ),
    "alpaca": Family(ALPACA, "</s>", no_mark_behind_user=True),
}
CORPUS = """user assistant system model tool USER: ASSISTANT: [INST] [/INST] <<SYS>> <</SYS>> ### Instruction: Response:
What color is it? Which star? You are helpful. Red. Blue. How many circles are there? Is it a star? No."""
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def small_tokenizer(pieces: str) -> str:
    """tokenizer.json of a small BPE: of bytes, split as Llama-3 and Qwen do, or of words with ▁, as Llama-2 does."""
    names = ["<unk>", "<pad>", "<image>"]
    if pieces == "bytes":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        names += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
    lines = [f"{line} {'(){}|<>_'}" for line in CORPUS.splitlines()] * 20
    more = ["\n", "\n\n", "\n\n\n", ":\n", ":\n\n", "?\n", "?<"] * 20 if pieces == "bytes" else []
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines + more, trainer)
    return tokenizer.to_str()


def real_tokenizer(package: str) -> Path:
    return Path(REAL) / package / "tokenizer.json"


def wrap(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaMergeProcessor:
    """The processor of a tokenizer."""
    return LlavaMergeProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        num_merged_tokens=NUM_TOKENS,
    )


def make_real_processor(package: str) -> LlavaMergeProcessor:
    """Of a package's tokenizer with its own chat template."""
    config = json.loads(real_tokenizer(package).with_name("tokenizer_config.json").read_text(encoding="utf-8"))
    eos, bos = (
        token["content"] if isinstance(token, dict) else token for token in (config["eos_token"], config["bos_token"])
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(real_tokenizer(package)),
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    template = config["chat_template"]
    return wrap(tokenizer, template if isinstance(template, str) else template[0]["template"])


@functools.cache
def make_processor(name: str, real: bool = False) -> LlavaMergeProcessor:
    """The processor of a family, with its small or real tokenizer."""
    family = FAMILIES[name]
    backend = (
        Tokenizer.from_file(str(real_tokenizer(family.real)))
        if real
        else Tokenizer.from_str(small_tokenizer(family.pieces))
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.eos,
        bos_token=family.bos,
        pad_token=family.eos,
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens([*family.special, "<|extra|>"], special_tokens=True)
    return wrap(tokenizer, family.template)


@functools.cache
def make_model(name: str, real: bool = False) -> LlavaMergeForConditionalGeneration:
    """A tiny model that has learnt the marks of the template."""
    processor = make_processor(name, real)
    tokenizer, stock = processor.tokenizer, tiny_config()
    stock.text_config.update({"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8})
    stock.text_config.update({"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id})
    stock.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    fields = stock.to_dict()
    fields.pop("model_type")
    merger_config = aware(NUM_TOKENS, question_start_token_ids=None, question_end_token_ids=None)
    model = LlavaMergeForConditionalGeneration(LlavaMergeConfig(merger_config=merger_config, **fields)).eval()
    model.set_question_marks(processor)
    return model


def user(text: str, image: bool = False) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def said(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def answer(text: str) -> dict:
    return said("assistant", text)


def questions(model, processor, ids: torch.Tensor, generating: bool = True, **masks) -> list[str]:
    """The text that each image of rows of ids (B, L) is merged for."""
    num_images = int((ids == model.config.image_token_id).sum()) // NUM_TOKENS
    prompt = model.model.read_prompt(ids, None, may_hold_answers=not generating, **masks)
    question = model.model.get_question(prompt, [NUM_TOKENS] * num_images)
    return [processor.tokenizer.decode(ids.flatten()[mask]) for mask in question.mask]


def read_with_marks(processor, ids: torch.Tensor) -> list[str]:
    """The same for a row (1, L), without a model."""
    marks = TurnMarks(*find_question_marks(processor).values(), [processor.tokenizer.eos_token_id], [])
    image_mask = ids == processor.tokenizer.convert_tokens_to_ids("<image>")
    first_placeholders = image_mask.flatten().nonzero()[::NUM_TOKENS, 0]
    question = question_of_images(ids[..., None], split_turns(ids, image_mask, marks), first_placeholders)
    return [processor.tokenizer.decode(ids.flatten()[mask]) for mask in question.mask]


def encode(processor, messages: list[dict] | str, generating: bool = True) -> torch.Tensor:
    """Ids (1, L) of a chat, or of a prompt by hand."""
    text = messages
    if not isinstance(messages, str):
        text = processor.apply_chat_template(messages, add_generation_prompt=generating)
    text = text.replace("<image>", "<image>" * NUM_TOKENS)
    return torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]])


Q, Q2 = "What color is it?", "How many circles are there?"
FIRST, LATER, SYSTEM = user(Q, image=True), user(Q2, image=True), said("system", "You are helpful.")
CHATS = {
    "one turn": ([FIRST], [Q]),
    "a system prompt": ([SYSTEM, FIRST], [Q]),
    "a later turn": ([user("Is it a star?"), answer("No."), FIRST], [Q]),
    "a later turn behind a system prompt": ([SYSTEM, user("Is it a star?"), answer("No."), FIRST], [Q]),
    "two turns with images": ([FIRST, answer("Red."), LATER], [Q, Q2]),
    "an answered turn": ([FIRST, answer("Red."), user("Is it a star?"), answer("No.")], [Q]),
    "a question of another user message": ([user("", image=True), user(Q)], [Q]),
    "a system prompt behind the question": ([FIRST, SYSTEM], [Q]),
    "a tool behind the question": ([FIRST, said("tool", "circles")], [Q]),
    "a tool": ([FIRST, answer("Red."), said("tool", "circles"), answer("Blue."), LATER], [Q, Q2]),
    "a tool and no answer": ([FIRST, answer("Red."), said("tool", "circles"), LATER], [Q, Q2]),
}
BEGINNINGS = ("", " ", "  ", "\n", "\n\n", "\n\n\n", " \n ", "<|extra|>")


def families(real: bool):
    """Parameters: every family, with its small or real tokenizer."""
    return [
        pytest.param(name, real, id=name + (", real" if real else ""))
        for name, family in FAMILIES.items()
        if not real or REAL and family.real
    ]


every_family = pytest.mark.parametrize("family, real", families(False) + families(True))


def takes(processor, messages: list[dict]) -> bool:
    """Whether the chat template takes a chat."""
    try:
        processor.apply_chat_template(messages)
    except Exception as error:
        assert "no system" in str(error) or "alternate" in str(error)
        return False
    return True


@every_family
class TestEveryTemplate:
    @pytest.mark.parametrize("chat, expected", CHATS.values(), ids=CHATS)
    def test_the_question_is_what_the_user_wrote(self, family, real, chat, expected):
        model, processor = make_model(family, real), make_processor(family, real)
        if not takes(processor, chat):
            pytest.skip("the template takes no such chat")
        if FAMILIES[family].no_mark_behind_user and chat[1:] and chat[1]["role"] in ("system", "tool"):
            pytest.skip("the template writes nothing between the two")
        read = questions(model, processor, encode(processor, chat))
        assert [text.strip() for text in read] == expected

    @pytest.mark.parametrize("beginning", [*BEGINNINGS, "eos", "bos", *string.punctuation, "](#", "]).", "<p>"])
    def test_an_answer_that_begins_with_anything_is_not_read(self, family, real, beginning):
        model, processor = make_model(family, real), make_processor(family, real)
        tokenizer = processor.tokenizer
        beginning = {"eos": tokenizer.eos_token, "bos": tokenizer.bos_token or ""}.get(beginning, beginning)
        for text in (beginning, f"{beginning}Red.", f"{beginning}Red. {Q}\n"):
            chat = [FIRST, answer(text), user("Is it a star?"), answer(text), LATER]
            read = questions(model, processor, encode(processor, chat))
            assert [text.strip() for text in read] == [Q, Q2]

    @pytest.mark.parametrize("beginning", BEGINNINGS)
    def test_a_question_that_begins_with_anything_is_read_whole(self, family, real, beginning):
        model, processor = make_model(family, real), make_processor(family, real)
        chat = [user(f"{beginning}{Q}", image=True), answer("Red."), user(f"{beginning}{Q2}", image=True)]
        read = questions(model, processor, encode(processor, chat))
        assert [text.strip().removeprefix("<|extra|>").strip() for text in read] == [Q, Q2]
        assert all(("extra" in text) == ("extra" in beginning) for text in read)

    def test_nothing_but_the_question_is_read(self, family, real):
        """To the last space, which `strip` hides above."""
        model, processor = make_model(family, real), make_processor(family, real)
        ends = {"alpaca": "\n\n"}.get(family, "")
        read = questions(model, processor, encode(processor, [FIRST, answer("\nRed."), LATER]))
        assert read == [Q + ends, Q2 + ends]

    def test_training_generation_and_serving_read_the_same(self, family, real):
        model, processor = make_model(family, real), make_processor(family, real)
        messages = [FIRST, answer("Red."), user("Is it a star?"), answer("\nNo."), LATER, answer("Blue.")]
        prompts = [encode(processor, messages[:length])[0] for length in (1, 5)]
        length = max(map(len, prompts))
        pad = processor.tokenizer.pad_token_id
        padded = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=pad) for row in prompts])
        mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in prompts])
        generated = questions(model, processor, padded, attention_mask=mask)
        assert [text.strip() for text in generated] == [Q, Q, Q2]

        collate = MergerCollator(processor, NUM_TOKENS)
        batch = [messages, [SYSTEM, *messages[:2]] if takes(processor, [SYSTEM, FIRST]) else messages[:2]]
        rows = [collate.encode(Sample("", chat, [])) for chat in batch]
        length = max(len(ids) for ids, _ in rows)
        ids, labels = (
            torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=fill) for row in kind])
            for kind, fill in zip(zip(*rows, strict=True), (pad, -100), strict=True)
        )
        mask = torch.stack([(torch.arange(length) < len(row)).long() for row, _ in rows])
        expected = [generated[0], generated[2], generated[0]]
        for labelled in (True, False):
            masks = {"attention_mask": mask} | ({"answer_mask": labels != -100} if labelled else {})
            assert questions(model, processor, ids, generating=False, **masks) == expected

        packed = torch.cat([row for row, _ in rows])[None]
        positions = torch.cat([torch.arange(len(row)) for row, _ in rows])[None]
        answers = torch.cat([row != -100 for _, row in rows])[None]
        for masks in ({"answer_mask": answers}, {}):
            assert questions(model, processor, packed, False, position_ids=positions, **masks) == expected

        row = packed[0].tolist()
        single = [id for index, id in enumerate(row) if id != model.config.image_token_id or row[index - 1] != id]
        served = RequestRules(model.config, 1024).questions(single, 3)
        assert [processor.tokenizer.decode(text) for text in served] == expected

    def test_a_picture_before_the_mark_of_the_question(self, family, real):
        """As in prompts by hand, and in old ones of LLaVA."""
        model, processor = make_model(family, real), make_processor(family, real)
        text = processor.apply_chat_template([user(Q)], add_generation_prompt=True)
        bos = processor.tokenizer.bos_token or ""
        bos = bos if text.startswith(bos) else ""
        read = questions(model, processor, encode(processor, f"{bos}<image>\n{text.removeprefix(bos)}"))
        assert [text.strip() for text in read] == [Q]

    def test_a_prompt_without_a_template(self, family, real):
        model, processor = make_model(family, real), make_processor(family, real)
        read = questions(model, processor, encode(processor, f"<image>\n{Q}"))
        assert [text.strip() for text in read] == [Q]


def test_old_prompts_of_llava():
    processor, model = make_processor("vicuna"), make_model("vicuna")
    for prompt in (f"<image>\nUSER: {Q}\nASSISTANT:", f"<s>USER: <image>\n{Q} ASSISTANT: Red.</s>"):
        read = questions(model, processor, encode(processor, prompt))
        assert [text.strip() for text in read] == [Q]
    chat = f"<image>\nUSER: {Q}\nASSISTANT: Red.</s><image>\nUSER: {Q2}\nASSISTANT:"
    assert [text.strip() for text in questions(model, processor, encode(processor, chat))] == [Q, Q2]


def test_a_system_prompt_written_as_a_users_message_is_not_read():
    processor = wrap(make_processor("mistral v7").tokenizer, MISTRAL_V7.replace("SYSTEM_PROMPT", "INST"))
    ids = encode(processor, CHATS["a later turn behind a system prompt"][0])
    assert read_with_marks(processor, ids) == [Q]
    assert read_with_marks(processor, encode(processor, [SYSTEM, FIRST])) == [Q]


def test_a_system_prompt_without_a_mark_inside_the_users_turn_is_part_of_it():
    """So Gemma 3 and Mistral Nemo write it; ids do not tell where it ends."""
    model, processor = make_model("gemma"), make_processor("gemma")
    prompt = f"<bos><start_of_turn>user\nYou are helpful.\n\n<image>{Q}<end_of_turn>\n<start_of_turn>model\n"
    assert questions(model, processor, encode(processor, prompt))[0].endswith(Q)


def marks_of(template: str, pieces: str = "bytes") -> dict[str, set[str]]:
    """The marks of a template, as text without the space around it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(small_tokenizer(pieces)), eos_token="</s>")
    marks = find_question_marks(wrap(tokenizer, template))
    return {name: {tokenizer.decode(ids).strip() for ids in sequences} for name, sequences in marks.items()}


def test_marks_of_a_template_that_takes_text_alone():
    name = "{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    text = "{% for m in messages %}" + name + "{{ m.content | trim }} {% endfor %}"
    expected = {"question_start_token_ids": {"USER:"}, "question_end_token_ids": {"ASSISTANT:"}}
    assert marks_of(text) == marks_of(VICUNA) == expected


def test_marks_that_share_no_word_are_those_of_later_turns():
    first = "{{ 'Question: ' if loop.index0 else 'Q: ' }}"
    template = "{% for m in messages %}{% if m.role == 'user' %}" + first + BODY + " {% else %}Answer: " + BODY + "\n"
    marks = marks_of(template + "{% endif %}{% endfor %}")
    assert marks == {"question_start_token_ids": {"Question:"}, "question_end_token_ids": {"Answer:"}}


def test_what_ends_answers_is_no_part_of_what_starts_questions():
    """Even where the template writes another end of sequence than the tokenizer has."""
    assert marks_of(VICUNA.replace("</s>", "<end>"))["question_start_token_ids"] == {"USER:"}


def test_a_prompt_by_hand_without_the_system_prompt_that_the_template_always_writes():
    prompt = f"<|im_start|>user\n<image>{Q}<|im_end|>\n<|im_start|>assistant\n"
    assert questions(make_model("qwen"), make_processor("qwen"), encode(make_processor("qwen"), prompt)) == [Q]


def test_a_template_with_nothing_before_questions():
    template = "{% for m in messages %}" + BODY + "{{ ' ->' if m.role == 'user' else '</s>' }}{% endfor %}"
    ends = {"->", "->>"}  # an answer that begins with ">" shares a token with it
    assert marks_of(template) == {"question_start_token_ids": set(), "question_end_token_ids": ends}


def test_a_mark_that_a_question_touches():
    """The tokenizer makes one token of the end of the one and the begin of the other."""
    template = (
        "{% for m in messages %}{{ '<USER>' if m.role == 'user' else '<AI>' }}" + BODY + "{{ '</s>' if m.role == "
        "'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}<AI>{% endif %}"
    )
    tokenizer = make_processor("vicuna, bytes").tokenizer
    processor = wrap(tokenizer, template)
    ids = encode(processor, [FIRST, answer("Red."), LATER])
    assert "?<" in tokenizer.convert_ids_to_tokens(ids[0])
    assert read_with_marks(processor, ids) == [Q.removesuffix("?"), Q2.removesuffix("?")]


def test_a_template_that_takes_no_chat():
    processor = make_processor("gemma")
    template, processor.chat_template = processor.chat_template, "{{ raise_exception('nothing') }}"
    try:
        with pytest.raises(ValueError, match="takes no question with an answer"):
            find_question_marks(processor)
    finally:
        processor.chat_template = template


@pytest.mark.skipif(not REAL, reason="LLAVA_MERGE_TOKENIZERS names no folder with tokenizers")
def test_the_real_tokenizers_are_there():
    found = {path.parent.name for path in Path(REAL).glob("*/tokenizer.json")}
    assert found >= {*WITH_TEMPLATE, *(family.real for family in FAMILIES.values() if family.real)}


@pytest.mark.skipif(not REAL, reason="LLAVA_MERGE_TOKENIZERS names no folder with tokenizers")
@pytest.mark.parametrize("package", WITH_TEMPLATE)
def test_templates_as_their_models_have_them(package):
    """Those that take no parts have the placeholder in the text."""
    processor = make_real_processor(package)
    for text in (*BEGINNINGS, "Red.", "\n\nRed."):
        first, answered, later = ("user", f"<image>{Q}"), ("assistant", text), ("user", f"<image>{Q2}")
        chat = [first, answered, ("user", "Is it a star?"), answered, later]
        for system in ([], [("system", "You are helpful.")] * (package not in SYSTEM_IN_TURN)):
            messages = [{"role": role, "content": content} for role, content in [*system, *chat]]
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            assert read_with_marks(processor, encode(processor, prompt)) == [Q, Q2]
