# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""From files to batches: every format, labels on answers alone, and what cannot be trained on named before training."""

import json

import pytest
import torch
from conftest import ANSWER_ID, EOS_ID, IMAGE_ID, NUM_PATCHES, PAD_ID, WORDS, make_processor
from PIL import Image

from llava_merge.demo import MODEL_DIR
from llava_merge.training.budgets import IGNORED
from llava_merge.training.collator import MergerCollator
from llava_merge.training.data import ChatDataset, ChatStream, read_dataset
from llava_merge.training.samples import read_sample


def llava_row(question: str = "<image>\nwhat color ?", answer: str = "red", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a1", "image": "a.png", "conversations": turns, **fields}


@pytest.fixture
def folder(tmp_path, picture):
    """Three pictures, one of them broken, and files with rows about them."""
    picture.save(tmp_path / "a.png")
    picture.rotate(90).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def sample_of(row: dict, folder):
    return read_sample(row, "rows.json, sample 'a1'", folder)


PARTS = [{"type": "image"}, {"type": "text", "text": "what color ?"}]
ANSWER = [{"type": "text", "text": "red"}]


class TestFormats:
    @pytest.mark.parametrize(
        "row",
        [
            llava_row(),
            llava_row(image=["a.png"]),
            llava_row("what color ?\n<image>"),
            {"messages": [{"role": "user", "content": "<image>what color ?"}, {"role": "assistant", "content": "red"}]}
            | {"images": ["a.png"]},
            {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": ANSWER}]}
            | {"images": [{"bytes": None, "path": "a.png"}]},
            {"prompt": [{"role": "user", "content": PARTS}], "completion": [{"role": "assistant", "content": "red"}]}
            | {"images": ["a.png"]},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "a.png", "text": None}, PARTS[1]]},
                    {"role": "assistant", "content": ANSWER},
                ]
            },
        ],
    )
    def test_they_all_say_the_same(self, row, folder):
        sample = sample_of(row, folder)
        assert [message["role"] for message in sample.messages] == ["user", "assistant"]
        assert sorted(map(str, sample.messages[0]["content"])) == sorted(map(str, PARTS))
        assert sample.messages[1]["content"] == ANSWER
        (opened,) = sample.open_images()
        assert opened.tobytes() == Image.open(folder / "a.png").convert("RGB").tobytes()

    def test_pictures_may_be_open_or_bytes(self, folder, picture):
        for image in (picture, {"bytes": (folder / "a.png").read_bytes(), "path": None}, picture.convert("L")):
            (opened,) = sample_of(llava_row(image=image), folder).open_images()
            assert opened.size == picture.size and opened.mode == "RGB"

    def test_line_breaks_in_the_text_stay(self, folder):
        sample = sample_of(llava_row("<image>\nwhat\ncolor ?\n"), folder)
        assert sample.messages[0]["content"][1]["text"] == "what\ncolor ?\n"

    def test_rows_without_images_are_samples(self, folder):
        row = llava_row("what ?", image=None)
        assert sample_of(row, folder).images == []


class TestRefused:
    @pytest.mark.parametrize(
        "row, message",
        [
            (llava_row("<image><image> what ?"), "it has 1 images for 2 placeholders"),
            (llava_row(image=None), "it has 0 images for 1 placeholders"),
            (llava_row(answer=" "), "answer 1 of 1 is empty"),
            (llava_row(answer="red <image>"), "an answer holds <image>"),
            ({"conversations": [{"from": "human", "value": "what ?"}]}, "it has no answer"),
            (
                {"conversations": [{"from": "robot", "value": "what ?"}]},
                "role 'robot' of message 1: has to be one of human, user",
            ),
            ({"id": 3, "text": "what ?"}, "it has no answer"),
            ({"id": 3, "caption": "a star"}, "it has the columns caption, id; a sample has conversations"),
            ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "content of type 'video'"),
            (llava_row(image=0.5), "image float: has to be a path"),
        ],
    )
    def test_the_sample_is_named(self, row, message, folder):
        with pytest.raises(ValueError, match=rf"rows.json, sample 'a1': {message}"):
            sample_of(row, folder)

    def test_check_finds_a_bad_sample_among_good_ones(self, folder):
        (folder / "rows.json").write_text(json.dumps([llava_row(), llava_row(answer="", id="bad")]))
        with pytest.raises(ValueError, match=r"rows.json, sample 'bad': answer 1 of 1 is empty"):
            read_dataset(str(folder / "rows.json")).check()
        (folder / "none.json").write_text("[]")
        with pytest.raises(ValueError, match="none.json holds no samples"):
            read_dataset(str(folder / "none.json")).check()

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("gone.json", None, "'.*gone.json' cannot be read: No such file"),
            ("gone.jsonl", None, "'.*gone.jsonl' cannot be read: No such file"),
            ("bad.json", "[", "'.*bad.json' is no JSON"),
            ("map.json", "{}", "'.*map.json' holds no list of samples"),
            ("no/such-dataset", None, "'no/such-dataset' cannot be read: .*[^.][.] Give a .json"),
        ],
    )
    def test_a_file_that_cannot_be_read(self, name, content, message, folder, monkeypatch):
        monkeypatch.chdir(folder)
        if content is not None:
            (folder / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_dataset(name)

    def test_a_folder_that_is_not_there(self, folder):
        (folder / "rows.json").write_text(json.dumps([llava_row()]))
        with pytest.raises(ValueError, match="image_folder='nowhere': there is no such folder"):
            read_dataset(str(folder / "rows.json"), image_folder="nowhere")
        with pytest.raises(ValueError, match="one JSON list, which is read whole"):
            read_dataset(str(folder / "rows.json"), streaming=True)


class TestFiles:
    @pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "folder"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_each_kind(self, kind, streaming, folder):
        rows = [llava_row(answer="red", id="0"), llava_row(answer="blue", id="1", image="b.png")]
        path = write_rows(rows, kind, folder)
        if kind == "json" and streaming:
            return
        dataset = read_dataset(path, image_folder=folder, streaming=streaming)
        assert isinstance(dataset, ChatStream if streaming else ChatDataset)
        items = list(dataset) if streaming else [dataset[index] for index in range(len(dataset))]
        assert [item["sample"].messages[1]["content"][0]["text"] for item in items] == ["red", "blue"]
        assert [item["index"] for item in items] == [0, 1]
        assert items[0]["pictures"][0].size == (120, 100) and items[1]["pictures"][0].size == (120, 100)
        if not streaming:
            dataset.check()
            assert len(dataset.first(1)) == 1

    def test_pictures_of_a_parquet_file_are_not_decoded_before_they_are_used(self, folder):
        from datasets import Dataset, Features, Sequence, Value
        from datasets import Image as ImageFeature

        message = {"role": Value("string"), "content": Value("string")}
        features = Features({"messages": [message], "images": Sequence(ImageFeature())})
        turns = [{"role": "user", "content": "<image>what ?"}, {"role": "assistant", "content": "red"}]
        images = [[{"bytes": (folder / name).read_bytes()}] for name in ("broken.png", "a.png")]
        table = Dataset.from_dict({"messages": [turns] * 2, "images": images}, features=features)
        table.to_parquet(folder / "rows.parquet")
        for streaming in (False, True):
            dataset = read_dataset(str(folder / "rows.parquet"), streaming=streaming)
            item = next(iter(dataset)) if streaming else dataset[0]
            assert item["num_skipped"] == 1 and item["index"] == 1 and item["pictures"][0].size == (120, 100)


def write_rows(rows: list[dict], kind: str, folder) -> str:
    from datasets import Dataset

    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return str(folder / "rows.json")
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder / "rows.jsonl")
    (folder / "table").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "table" / "train.parquet")
    return str(folder / "table" / ("train.parquet" if kind == "parquet" else ""))


class TestBrokenPictures:
    @pytest.fixture
    def rows(self):
        names = ["a.png", "broken.png", "gone.png", "b.png"]
        return [llava_row(image=name, id=name, answer=name[0]) for name in names]

    def test_they_are_skipped_counted_and_logged(self, rows, folder, caplog):
        dataset = ChatDataset(rows, "rows", folder)
        with caplog.at_level("WARNING", logger="transformers.llava_merge.training.data"):
            items = [dataset[index] for index in range(4)]
        assert [item["index"] for item in items] == [0, 3, 3, 3]
        assert [item["num_skipped"] for item in items] == [0, 2, 1, 0]
        assert "rows, sample 'broken.png': " in caplog.text and str(folder / "gone.png") in caplog.text
        stream = list(ChatStream(rows, "rows", folder))
        assert [item["index"] for item in stream] == [0, 3] and [item["num_skipped"] for item in stream] == [0, 2]

    def test_or_they_end_the_run(self, rows, folder):
        for dataset in (ChatDataset(rows, "rows", folder, "error"), ChatStream(rows, "rows", folder, "error")):
            with pytest.raises(ValueError, match=r"rows, sample 'broken.png': .*broken.png is not a picture"):
                list(iter(dataset)) if isinstance(dataset, ChatStream) else dataset[1]

    def test_a_dataset_of_broken_ones(self, folder):
        with pytest.raises(ValueError, match="none of its 2 samples can be used; why each was skipped is logged above"):
            ChatDataset([llava_row(image="broken.png")] * 2, "rows", folder)[0]


def item(sample, index: int = 0) -> dict:
    return {"sample": sample, "pictures": sample.open_images(), "index": index, "num_skipped": 0}


class TestCollator:
    @pytest.fixture
    def collator(self):
        return MergerCollator(make_processor(), NUM_PATCHES)

    def test_answers_and_their_end_have_labels(self, collator, folder):
        row = llava_row("<image>\nwhat color ?", "red blue")
        row["conversations"] += llava_row("how many ?", "star")["conversations"]
        ids, labels = collator.encode(sample_of(row, folder))
        answers = [id for id, label in zip(ids.tolist(), labels.tolist(), strict=True) if label != IGNORED]
        assert answers == [WORDS.index("red"), WORDS.index("blue"), EOS_ID, WORDS.index("star"), EOS_ID]
        assert (ids == IMAGE_ID).sum() == NUM_PATCHES and (labels[ids == IMAGE_ID] == IGNORED).all()
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])

    def test_prompts_are_those_of_the_processor(self, folder):
        """Up to the answer, with the tiny tokenizer and with the demo model's byte-level one."""
        from llava_merge import LlavaMergeProcessor

        sample = sample_of(llava_row("<image>\nwhat color is the star ?", "red"), folder)
        for processor, num_patches in (
            (make_processor(), NUM_PATCHES),
            (LlavaMergeProcessor.from_pretrained(MODEL_DIR), 576),
        ):
            ids, labels = MergerCollator(processor, num_patches).encode(sample)
            prompt = processor.apply_chat_template(sample.messages[:1], add_generation_prompt=True)
            expected = processor(images=sample.open_images(), text=prompt, return_tensors="pt")["input_ids"][0]
            assert torch.equal(ids[: len(expected)], expected)
            assert (labels[: len(expected)] == IGNORED).all() and (labels[len(expected) :] != IGNORED).all()
            assert processor.tokenizer.decode(ids[len(expected) :]).strip() in ("red</s>", "red </s>")

    def test_a_template_that_ends_answers_itself_gets_no_second_end(self, folder):
        from llava_merge import LlavaMergeProcessor

        processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
        ids, _ = MergerCollator(processor, 576).encode(sample_of(llava_row(), folder))
        assert (ids == processor.tokenizer.eos_token_id).sum() == 1

    def test_pictures_as_bytes_are_normalised_later(self, folder):
        items = [item(sample_of(llava_row(image="a.png"), folder))]
        processor = make_processor()
        wanted = MergerCollator(processor, NUM_PATCHES)(items)["pixel_values"]
        collator = MergerCollator(processor, NUM_PATCHES, as_bytes=True)
        found = collator(items)["pixel_values"]
        assert found.dtype == torch.uint8 and found.unique().numel() > 10
        torch.testing.assert_close(collator.normalized(found), wanted, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("left_out", ["do_rescale", "do_normalize"])
    def test_a_processor_that_does_not_normalise_is_asked_as_it_is(self, left_out, folder):
        items = [item(sample_of(llava_row(image="a.png"), folder))]
        processor = make_processor()
        setattr(processor.image_processor, left_out, False)
        wanted = MergerCollator(processor, NUM_PATCHES)(items)["pixel_values"]
        found = MergerCollator(processor, NUM_PATCHES, as_bytes=True)(items)["pixel_values"]
        assert torch.equal(found, wanted)

    def test_a_batch_is_padded_on_the_right(self, collator, folder):
        rows = [llava_row("<image><image>\nwhat ?", image=["a.png", "b.png"]), llava_row("how many ?", image=None)]
        batch = collator([item(sample_of(row, folder), index) for index, row in enumerate(rows)])
        assert batch["pixel_values"].shape == (2, 3, 84, 84) and batch["sample_ids"].tolist() == [0, 1]
        lengths = batch["attention_mask"].sum(dim=1)
        assert lengths[0] == batch["input_ids"].shape[1] and lengths[1] < 10
        assert (batch["input_ids"][1, lengths[1] :] == PAD_ID).all()
        assert (batch["labels"][1, lengths[1] :] == IGNORED).all()
        assert (batch["input_ids"] == ANSWER_ID).sum() == 2

    def test_a_batch_of_text_alone_has_no_pixels(self, collator, folder):
        assert "pixel_values" not in collator([item(sample_of(llava_row("what ?", image=None), folder))])

    def test_a_template_without_answers_is_refused(self, collator, folder):
        collator.processor.chat_template = "USER: {{ messages[0]['content'][0]['text'] }}"
        collator.tokenizer.eos_token = None  # which would be put in their place
        with pytest.raises(ValueError, match="sample 'a1': the chat template writes none of its answers"):
            collator.encode(sample_of(llava_row("what ?", image=None), folder))

    def test_a_template_that_rewrites_earlier_turns_is_refused(self, collator, folder):
        collator.processor.chat_template = "{{ messages | length }}{{ messages[-1]['content'][0]['text'] }}"
        with pytest.raises(ValueError, match="sample 'a1': the chat template changes earlier turns"):
            collator.encode(sample_of(llava_row("what ?", image=None), folder))
