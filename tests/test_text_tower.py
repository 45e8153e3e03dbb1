# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""CLIP's text tower as the judge of `cdpruner`, on a tiny CLIP whose tokens are letters."""

import json
import shutil

import pytest
import torch
from conftest import END, LONGEST, START, WORDS, aware, make_processor, pixels, prompts, tiny_model
from transformers import CLIPModel

from llava_merge import LlavaMergeForConditionalGeneration, Question
from llava_merge.model.relevance import TextTower


pytestmark = pytest.mark.core

M, N = 9, 36


@pytest.fixture
def model(clip_folder):
    model = tiny_model({**aware(M), "merger_type": "cdpruner", "text_tower": clip_folder})
    model.set_question_marks(make_processor())
    return model


def slow_relevance(clip_folder: str, features: torch.Tensor, text: str) -> torch.Tensor:
    """By METHODS, one patch and one segment after the other: (N,)."""
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    vocab = json.loads(open(f"{clip_folder}/vocab.json").read())
    letters = letters_of(text, vocab)
    segments = [letters[at : at + LONGEST - 2] for at in range(0, len(letters), LONGEST - 2)]
    texts = []
    for segment in segments:
        ids = torch.tensor([[vocab[START], *segment, vocab[END]]])
        texts.append(clip.text_projection(clip.text_model(ids).pooler_output)[0])
    relevance = []
    for patch in features:
        seen = clip.visual_projection(clip.vision_model.post_layernorm(patch))
        relevance.append(sum(-torch.cosine_similarity(seen, text, dim=0) for text in texts) / len(texts))
    return torch.stack(relevance)


def letters_of(text: str, vocab: dict[str, int]) -> list[int]:
    """Ids of a text."""
    return [vocab[f"{letter}</w>" if last else letter] for word in text.split() for letter, last in spell(word)]


def spell(word: str) -> list[tuple[str, bool]]:
    """The letters of a word, and which ends it; CLIP splits punctuation off."""
    stem = word.rstrip("?")
    parts = [part for part in (stem, word[len(stem) :]) if part]
    return [(letter, index == len(part) - 1) for part in parts for index, letter in enumerate(part)]


def about(model, *texts: str) -> Question:
    """A question of each image, by text."""
    words = [[WORDS.index(word) for word in text.split()] for text in texts]
    longest = max(map(len, words))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in words])
    return Question.of_each_image(model.get_input_embeddings()(ids), ids != 0, ids)


def relevance_of(model, question) -> torch.Tensor:
    return model.model.get_merge_extras(pixels(2), question=question).relevance


@torch.no_grad()
def test_relevance_equals_the_slow_reference(model, clip_folder):
    texts = ("what color is the star ?", "red")  # of three segments and one
    relevance = relevance_of(model, about(model, *texts))
    for features, text, found in zip(model.get_vision_features(pixels(2)), texts, relevance, strict=True):
        torch.testing.assert_close(found, slow_relevance(clip_folder, features, text), atol=1e-5, rtol=1e-4)
    assert relevance.dtype == torch.float32 and (relevance[0] - relevance[1]).abs().max() > 0.1


@torch.no_grad()
def test_relevance_for_each_word_equals_the_slow_reference(clip_folder):
    model = tiny_model({**aware(M), "merger_type": "mmtok", "text_tower": clip_folder})
    model.set_question_marks(make_processor())
    texts = ("what color is the star ?", "red", "")  # of three segments and one
    extras = model.model.get_merge_extras(pixels(3), question=about(model, *texts))
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    vocab = json.loads(open(f"{clip_folder}/vocab.json").read())
    for features, text, found in zip(model.get_vision_features(pixels(3)), texts, extras.word_relevance, strict=True):
        letters = letters_of(text, vocab)
        assert found.isfinite().all(dim=0).sum() == len(letters)
        for at in range(0, len(letters), LONGEST - 2):
            ids = torch.tensor([[vocab[START], *letters[at : at + LONGEST - 2], vocab[END]]])
            words = clip.text_projection(clip.text_model(ids).last_hidden_state)[0, 1:-1]
            seen = clip.visual_projection(clip.vision_model.post_layernorm(features))
            expected = -torch.cosine_similarity(seen[:, None], words[None], dim=-1)
            torch.testing.assert_close(found[:, at : at + len(words)], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_image_is_as_if_it_were_alone_and_without_question_has_none(model):
    together = relevance_of(model, about(model, "what color is the star ?", ""))
    other = relevance_of(model, about(model, "what color is the star ?", "how many"))
    torch.testing.assert_close(together[0], other[0])
    assert together[1].abs().max() == 0 and other[1].std() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_generate_read_the_text_of_the_prompt(model, dtype):
    model.to(dtype)
    read = []
    assert model.model.text_tower is None  # not loaded before it is needed
    tower = model.model.find_text_tower(model.config.merger_config)
    embed = tower.mean_directions
    tower.mean_directions = lambda texts: read.append(texts) or embed(texts)
    batch = {**prompts([2, 1], M), "pixel_values": pixels(3).to(dtype)}
    with torch.no_grad():
        model(**batch)
        generated = model.generate(**batch, max_new_tokens=2)
    words = [" ".join(WORDS[id] for id in row.tolist() if id > WORDS.index("ASSISTANT:")) for row in batch["input_ids"]]
    assert read == 2 * [[words[0], words[0], words[1]]] and words[0] != words[1]
    assert generated.shape[1] == batch["input_ids"].shape[1] + 2


def test_it_decides_which_patches_are_kept(model, clip_folder):
    batch = {**prompts([1, 1], M), "pixel_values": pixels(2)}
    with torch.no_grad():
        judged = model(**batch).logits
        model.set_merger({**aware(M), "merger_type": "cdpruner"})
        assert (model(**batch).logits - judged).abs().max() > 1e-2


def test_it_is_no_part_of_the_model_but_of_its_configuration(model, clip_folder, tmp_path):
    model(**prompts([1], M), pixel_values=pixels(1))
    assert model.model.text_tower is not None
    names = [*model.state_dict(), *(name for name, _ in model.named_modules())]
    assert not any("text_tower" in name or "text_projection" in name for name in names)
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    loaded = LlavaMergeForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.merger_config.text_tower == clip_folder and loaded.model.text_tower.name == clip_folder
    batch = {**prompts([1, 1], M), "pixel_values": pixels(2)}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    model.save_merger(tmp_path / "merger")
    other = tiny_model({**aware(M), "merger_type": "cdpruner"})
    other.load_merger(tmp_path / "merger")
    assert other.model.text_tower.name == clip_folder


class TestBadInput:
    def test_its_absence_is_said_at_once_and_changes_nothing(self, tmp_path):
        model = tiny_model(aware(M))
        for name in (tmp_path / "nothing", "openai/no-such-clip"):
            with pytest.raises(ValueError, match=r"text_tower='.*' cannot be loaded: .* or leave text_tower out"):
                model.set_merger({**aware(M), "merger_type": "cdpruner", "text_tower": str(name)})
        assert model.config.merger_config.merger_type == "fixed_pooling"
        tiny_model({**aware(M), "merger_type": "cdpruner"}).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot be loaded"):
            LlavaMergeForConditionalGeneration.from_pretrained(tmp_path, merger_config={"text_tower": "no/clip"})

    def test_a_pickle_is_not_opened(self, clip_folder, tmp_path):
        clip = CLIPModel.from_pretrained(clip_folder)
        clip.config.save_pretrained(tmp_path)
        torch.save(clip.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded: .*safetensors"):
            TextTower(str(tmp_path), 32)

    def test_a_clip_of_another_width_or_without_weights(self, clip_folder, tmp_path):
        with pytest.raises(ValueError, match="judges features 32 wide, and this model's are 64 wide"):
            TextTower(clip_folder, 64)
        clip = CLIPModel.from_pretrained(clip_folder)
        weights = {key: tensor for key, tensor in clip.state_dict().items() if "text_projection" not in key}
        clip.save_pretrained(tmp_path, state_dict=weights)
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (tmp_path / name).write_text(open(f"{clip_folder}/{name}").read())
        with pytest.raises(ValueError, match="lacks weights .*text_projection"):
            TextTower(str(tmp_path), 32)

    def test_a_question_that_is_no_text(self, model):
        batch = prompts([1], M)
        with pytest.raises(ValueError, match="given as embeddings alone. Pass input_ids"):
            model(
                inputs_embeds=model.get_input_embeddings()(batch["input_ids"]),
                attention_mask=batch["attention_mask"],
                pixel_values=pixels(1),
            )
        model.model.question_tokenizer = None
        with pytest.raises(ValueError, match=r"Call model.set_question_marks\(processor\)"):
            model(**batch, pixel_values=pixels(1))

    def test_it_is_an_option_of_cdpruner(self, clip_folder):
        message = "text_tower='.*': merger_type='tome' does not read it, only cdpruner, mmtok"
        with pytest.raises(ValueError, match=message):
            tiny_model({"merger_type": "tome", "num_merged_tokens": M, "text_tower": clip_folder})
        with pytest.raises(ValueError, match="text_tower=3: has to be a directory or Hub repo"):
            tiny_model({**aware(M), "merger_type": "cdpruner", "text_tower": 3})


def test_a_kernel_that_its_configuration_names_is_refused(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["text_config"]["_attn_implementation_internal"] = "evil/kernel"
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded: .*evil/kernel.*whose code would run"):
        tiny_model(aware(M)).set_merger({**aware(M), "merger_type": "cdpruner", "text_tower": str(tmp_path / "clip")})
