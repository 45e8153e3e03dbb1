# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Files as people have them: each shape is read by training and by evaluation, or refused in one line."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import NUM_PATCHES, make_processor
from PIL import Image
from typer.testing import CliRunner

from llava_merge.cli import app
from llava_merge.evaluation.data import read_questions
from llava_merge.training.collator import MergerCollator
from llava_merge.training.data import read_dataset
from llava_merge.training.pictures import open_image


PNG = "0.png"
ASKED, ANSWER = "what color ?", "red"


def turns(question="<image>\n" + ASKED, answer=ANSWER, keys=("from", "value"), roles=("human", "gpt")):
    return [dict(zip(keys, turn, strict=True)) for turn in zip(roles, (question, answer), strict=True)]


def chat(question="<image>" + ASKED, answer=ANSWER):
    return turns(question, answer, ("role", "content"), ("user", "assistant"))


def parts(*extra):
    return [*extra, {"type": "text", "text": ASKED}]


def data_url():
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


QA = {"question": ASKED, "answer": ANSWER}
LLAVA = {"id": "1", "image": PNG, "conversations": turns()}
INLINE = chat(parts({"type": "image", "image": PNG}))
GOOD = {  # shape: (file, its content)
    "LLaVA-Instruct": ("a.json", [LLAVA]),
    "LLaVA-Instruct, several turns": ("a.json", [{**LLAVA, "conversations": turns() + turns("how many ?", "2")}]),
    "LLaVA-Instruct, as lines": ("a.jsonl", lines(LLAVA, LLAVA)),
    "lines with empty ones": ("a.jsonl", lines(LLAVA) + "\n\n" + lines(LLAVA)),
    "lines with commas": ("a.jsonl", json.dumps(LLAVA) + ",\n" + json.dumps(LLAVA) + ",\n"),
    "lines named .json": ("a.json", lines(LLAVA, LLAVA)),
    "a list named .jsonl": ("a.jsonl", json.dumps([LLAVA], indent=1)),
    "with a byte order mark": ("a.json", "\ufeff" + json.dumps([LLAVA])),
    "text beyond ASCII, with a line separator in it": (
        "a.jsonl",
        json.dumps({**LLAVA, "id": "a\u2028é"}, ensure_ascii=False) + "\n",
    ),
    "a list in an object": ("a.json", {"info": "x", "data": [LLAVA]}),
    "one row": ("a.json", LLAVA),
    "ShareGPT that begins with the answer": (
        "a.json",
        [{**LLAVA, "conversations": [{"from": "gpt", "value": "hello"}, *turns()]}],
    ),
    "ShareGPT that ends with a question about an image": (
        "a.json",
        [{"image": [PNG, PNG], "conversations": [*turns(), {"from": "human", "value": "<image> and this ?"}]}],
    ),
    "conversations as text": ("a.json", [{**LLAVA, "conversations": json.dumps(turns())}]),
    "LlamaFactory, sharegpt": ("a.json", [{"conversations": turns(), "images": [PNG], "system": "be short"}]),
    "LlamaFactory, messages": ("a.json", [{"messages": chat(), "images": [PNG]}]),
    "LlamaFactory, alpaca": (
        "a.json",
        [{"instruction": "<image>what", "input": "color ?", "output": ANSWER, "images": [PNG]}],
    ),
    "LlamaFactory, alpaca with history": (
        "a.json",
        [{"instruction": ASKED, "output": ANSWER, "images": [PNG], "history": [["<image> what ?", "a star"]]}],
    ),
    "ms-swift, messages": ("a.jsonl", lines({"messages": chat(), "images": [PNG]})),
    "ms-swift, loss of one answer": (
        "a.jsonl",
        lines({"messages": [*chat("<image>what ?"), *chat(ASKED)[:1], {**chat()[1], "loss": False}], "images": [PNG]}),
    ),
    "ms-swift, query and response": (
        "a.jsonl",
        lines({"query": "<image>" + ASKED, "response": ANSWER, "images": [PNG], "system": "be short"}),
    ),
    "TRL, images apart from text": ("a.json", [{"messages": chat(ASKED), "images": [PNG]}]),
    "TRL, prompt and completion": ("a.json", [{"prompt": chat()[:1], "completion": chat()[1:], "image": PNG}]),
    "TRL, plain prompt and completion": ("a.json", [{"prompt": ASKED, "completion": ANSWER, "image": PNG}]),
    "chat, image in its part": ("a.json", [{"messages": INLINE}]),
    "chat, image_url": ("a.json", [{"messages": chat(parts({"type": "image_url", "image_url": {"url": data_url()}}))}]),
    "chat, image as base64": (
        "a.json",
        [{"messages": chat(parts({"type": "image", "base64": data_url().partition(",")[2]}))}],
    ),
    "chat, image without type": ("a.json", [{"messages": chat(parts({"type": "image"})), "image": PNG}]),
    "chat, content of texts": ("a.json", [{"messages": chat(["<image>", ASKED]), "image": PNG}]),
    "chat, content an object": ("a.json", [{"messages": chat(parts()[0]), "image": PNG}]),
    "chat, answer a number": ("a.json", [{"messages": chat(answer=3), "image": PNG}]),
    "messages as text": ("a.json", [{"messages": json.dumps(INLINE)}]),
    "data URL": ("a.json", [{**QA, "image": data_url()}]),
    "file URL": ("a.json", [{**QA, "image": "file://{folder}/0.png"}]),
    "absolute path": ("a.json", [{**QA, "image": "{folder}/0.png"}]),
    "answer a number": ("a.json", [{**QA, "answer": 3, "image": PNG}]),
    "VQAv2": (
        "a.json",
        {"questions": [{"question": ASKED, "image_id": 42, "question_id": 1, "answers": [{"answer": ANSWER}] * 10}]},
    ),
    "GQA": ("a.json", {"201": {"question": ASKED, "imageId": "n7", "answer": ANSWER, "types": {"a": "b"}}}),
    "TextVQA": ("a.json", {"data": [{"question": ASKED, "image_id": "n7", "answers": [ANSWER] * 9 + ["blue"]}]}),
    "ChartQA": ("a.json", [{"imgname": PNG, "query": ASKED, "label": ANSWER}]),
    "POPE": ("a.json", lines({"question_id": 1, "image": PNG, "text": ASKED, "label": "yes"})),
    "text alone, said so": ("a.json", [{**QA, "image": None, "image_source": "web"}]),
    "an empty list beside the image": ("a.json", [{**QA, "images": [], "image": PNG, "video": None}]),
    "images as text": ("a.json", [{**QA, "images": json.dumps([PNG])}]),
    "an image in its message, and a column": ("a.json", [{"messages": INLINE, "image": "gone.png"}]),
    "a data URL in lines": ("a.json", [{**QA, "image": data_url()[:60] + "\n" + data_url()[60:]}]),
    "answers as text": ("a.json", [{"question": ASKED, "answers": json.dumps([ANSWER, "blue"]), "image": PNG}]),
    "ScienceQA": ("a.json", [{**QA, "choices": ["a cat", "a dog"], "answer": 1, "image": PNG}]),
    "A-OKVQA": (
        "a.json",
        [
            {
                "question": ASKED,
                "choices": ["cat", "dog"],
                "correct_choice_idx": 1,
                "direct_answers": ["x"],
                "image": PNG,
            }
        ],
    ),
    "MMBench": ("a.json", [{**QA, "A": "a cat", "B": "a dog", "C": None, "answer": "B", "image": PNG}]),
    "OpenAI, weight of one answer": (
        "a.jsonl",
        lines({"messages": [*chat(), *chat(ASKED)[:1], {**chat()[1], "weight": 0}], "images": [PNG]}),
    ),
    "parquet, messages as text": ("a.parquet", [{"messages": json.dumps(INLINE)}]),
    "parquet, image structs": ("a.parquet", [{"messages": chat(), "images": [{"bytes": b"{png}", "path": None}]}]),
    "parquet, image struct, question": ("a.parquet", [{**QA, "image": {"bytes": b"{png}", "path": "x"}}]),
    "parquet, path in a struct": ("a.parquet", [{**QA, "image": {"bytes": None, "path": PNG}}]),
}
IN_A = r"Error: .*a\.\w+"
BAD = {  # shape: (file, its content, what train says, what evaluate says where that differs)
    "a line cut off": (
        "a.jsonl",
        lines(LLAVA) + json.dumps(LLAVA)[:40],
        "sample 2: line 2 of a.jsonl is no JSON .*one object",
    ),
    "a list cut off": ("a.json", json.dumps([LLAVA])[:-5], "is no JSON: "),
    "a list with a comma at its end": ("a.json", json.dumps([LLAVA])[:-1] + ",]", "is no JSON: "),
    "an empty file": ("a.jsonl", "", "holds no (samples|questions)"),
    "an empty list": ("a.json", "[]", "holds no (samples|questions)"),
    "an empty file named .json": ("a.json", "", "is no JSON: "),
    "parquet without rows": ("a.parquet", [], "holds no (samples|questions)"),
    "no parquet": ("a.parquet", "hello", "cannot be read: .*Give a .json"),
    "latin-1": ("a.json", json.dumps([QA]).replace("red", "r\u00e9").encode("latin-1"), "is not in UTF-8"),
    "brackets without end": ("a.json", "[" * 100_000, "is no JSON: "),
    "a list of texts": ("a.json", ["hello"], "sample 1: element 1 of a.json is str; a row is an object"),
    "lines of texts": ("a.jsonl", '"hello"\n', "sample 1: line 1 of a.jsonl is str; a row is an object"),
    "an object of something": ("a.json", {"a": 1}, "sample 1: it has the columns a; a sample has"),
    "a csv": ("a.csv", "question,answer\n", "cannot be read: .csv is not read"),
    "other columns": ("a.json", [{"caption": "x"}], "sample 1: it has the columns caption; a sample has"),
    "an image under another name": ("a.json", [{**QA, "photo_file": PNG}], "'photo_file' looks like a picture's"),
    "conversations that are no JSON": ("a.json", [{"conversations": "hi"}], "'conversations' is text that is no JSON"),
    "conversations of texts": ("a.json", [{"conversations": ["a", "b"]}], "message 1 is str; a message has role"),
    "conversations of one object": ("a.json", [{"messages": {"role": "user"}}], "its turns are dict; give a list"),
    "another role": ("a.json", [{"messages": [{"role": "tool", "content": "x"}]}], "role 'tool' of message 1: has to"),
    "a video in a message": (
        "a.json",
        [{"messages": chat([{"type": "video"}])}],
        "content of type 'video' in message 1",
    ),
    "content true": ("a.json", [{"messages": chat(True)}], "the content of message 1 is bool"),
    "an answer true": ("a.json", [{**QA, "answer": True}], r"an answer is bool \(True\); write it as text"),
    "more placeholders": (
        "a.json",
        [{**LLAVA, "conversations": turns("<image><image>")}],
        "1 images for 2 placeholders",
    ),
    "an image in an answer": (
        "a.json",
        [{**LLAVA, "conversations": turns(answer="<image>")}],
        "an answer holds <image>",
        "1 images for 2 placeholders",
    ),
    "a video": ("a.json", [{**QA, "videos": ["a.mp4"]}], "its column 'videos' is not read"),
    "an image in its text": ("a.json", [{**QA, "question": "<img>0.png</img> what ?"}], "names a picture in its text"),
    "an image under an unknown name": ("a.json", [{**QA, "file_name": PNG}], "'file_name' looks like a picture's"),
    "an image under another name, and none": (
        "a.parquet",
        [{**QA, "image": None, "scan": {"bytes": b"{png}", "path": None}}],
        "'scan' looks like a picture's",
    ),
    "options that are a number": ("a.json", [{**QA, "choices": 3, "image": PNG}], "its options are int"),
    "an answer without a question": ("a.json", [{"messages": chat()[1:]}], "it has no question"),
    "a list of questions": ("a.json", [{**QA, "question": ["a", "b"]}], "the question is list"),
    "not a number": ("a.json", '[{"question": "a", "answer": NaN, "image": null}]', r"an answer is float \(nan\)"),
    "history that is a number": ("a.json", [{"query": "a", "response": "b", "history": 3}], "'history' has to hold"),
    "history of texts": ("a.json", [{"query": "a", "response": "b", "history": ["c"]}], "'history' has to hold pairs"),
    "an image that is an object": ("a.json", [{**QA, "image": {"a": 1}}], "image dict: has to be a path"),
    "no answer": ("a.json", [{"question": ASKED, "image": PNG}], "it has no answer", None),
}
BAD_PICTURES = {  # what stands for the image, and what is said of it
    "a name that is not there": ("gone.png", r"gone\.png: there is no such file"),
    "an id that is not there": (77, r"77\.jpg: there is no such file"),
    "ftp": ("ftp://example.org/a.png", "ftp:// is not read. Give a path, or a URL of http"),
    "s3": ("s3://bucket/a.png", "s3:// is not read"),
    "a file of another machine": ("file://server/a.png", "it is on the machine 'server'"),
    "base64 that is none": ("data:image/png;base64,@@@", "not a picture that can be opened: .*base64"),
    "a long data URL": ("data:image/png;base64," + "A" * 9999, r"… \(10021 characters\) is not a picture"),
    "no picture": ("a.json", "a.json is not a picture"),
    "nobody answers": ("http://127.0.0.1:9/a.png", "the download failed: .*refused"),
    "1 × 3000 pixels": ("long.png", r"long\.png .*An image of 1 × 3000 pixels: .* Crop it"),
    "404": ("http://127.0.0.1:{port}/gone.png", "the download failed: HTTP Error 404"),
    "a server that breaks off": ("http://127.0.0.1:{port}/cut.png", "the download broke off 995 bytes before its end"),
}


@pytest.fixture(scope="module")
def server():
    """A server that answers 404, or breaks off."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 - http.server's name
            if "cut" not in self.path:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running.server_port
    running.shutdown()


@pytest.fixture
def folder(tmp_path):
    """One picture under the names that datasets have for it."""
    for name in (PNG, "n7.jpg", "COCO_val2014_000000000042.jpg"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    Image.new("RGB", (3000, 1)).save(tmp_path / "long.png")
    return tmp_path


def written(folder, name: str, content) -> str:
    """The path of a file with this content; rows in parquet, or JSON."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        write_parquet(path, content)
    else:
        path.write_text(json.dumps(content).replace("{folder}", str(folder)))
    return str(path)


def write_parquet(path, rows):
    from datasets import Dataset

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return (path.parent / PNG).read_bytes() if value == b"{png}" else value

    Dataset.from_list(filled(rows)).to_parquet(path)


@pytest.mark.parametrize("shape", GOOD)
class TestShapesThatAreRead:
    def test_by_training(self, shape, folder):
        path = written(folder, *GOOD[shape])
        dataset = read_dataset(path).check(progress=False)
        item = dataset[0]
        ids, labels = MergerCollator(make_processor(), NUM_PATCHES).encode(item["sample"])
        asked = " ".join(part.get("text", "") for message in item["sample"].messages for part in message["content"])
        assert "what" in asked and "color ?" in asked
        assert len(item["pictures"]) == (shape != "text alone, said so") and (labels >= 0).any()
        if path.endswith(".jsonl") and not shape.startswith("a list"):
            streamed = list(read_dataset(path, streaming=True))
            assert [each["sample"].messages for each in streamed] == [
                dataset.sample(at).messages for at in range(len(dataset))
            ]

    def test_by_evaluation(self, shape, folder):
        (question, *_) = read_questions(written(folder, *GOOD[shape]))
        assert [each.size for each in question.open_images()] == [(20, 10)] * (shape != "text alone, said so")
        places = [part for message in question.messages for part in message["content"] if part["type"] == "image"]
        assert len(places) == len(question.images) and question.messages[-1]["role"] == "user"
        assert make_processor().apply_chat_template(question.messages, add_generation_prompt=True).count(
            "<image>"
        ) == len(places)
        right = {
            "answer a number": "3",
            "chat, answer a number": "3",
            "POPE": "yes",
            **dict.fromkeys(("ScienceQA", "A-OKVQA", "MMBench"), "B"),
            "ms-swift, loss of one answer": ANSWER,
        }
        assert question.answers[0] == right.get(shape, ANSWER)


def one_line(*arguments) -> str:
    """What a command that fails says: one line, with exit code 2."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1 and "Traceback" not in done.output
    return said[0]


def train(folder, path, **data) -> str:
    """What `llava-merge train` says."""
    config = folder / "config.yaml"
    config.write_text(
        json.dumps({"data": {"train": path, **data}, "training": {"output_dir": str(folder / "run"), "report_to": []}})
    )
    return one_line("train", config)


@pytest.mark.parametrize("shape", BAD)
class TestShapesThatAreRefused:
    def test_by_training(self, shape, folder):
        name, content, *said = BAD[shape]
        message = train(folder, written(folder, name, content))
        assert_found(f"{IN_A}.*{said[0]}", message)

    def test_by_evaluation(self, shape, folder):
        name, content, *said = BAD[shape]
        if said[-1] is None:
            assert read_questions(written(folder, name, content))[0].answers == ()
        else:
            message = one_line("evaluate", written(folder, name, content), "--output", folder / "out")
            assert_found(f"{IN_A}.*{said[-1]}", message)


def assert_found(pattern: str, text: str):
    import re

    assert re.search(pattern, text), (pattern, text)


@pytest.mark.parametrize("shape", BAD_PICTURES)
class TestPicturesThatCannotBeHad:
    def test_in_training(self, shape, folder, server):
        image, message = BAD_PICTURES[shape]
        image = image.replace("{port}", str(server)) if isinstance(image, str) else image
        path = written(folder, "a.json", [{**QA, "id": "x1", "image": image}])
        with pytest.raises(ValueError) as error:
            read_dataset(path, on_broken_image="error").check(progress=False)[0]
        assert_found(rf"a\.json, sample 'x1': .*{message}", str(error.value))
        assert len(str(error.value)) < 700
        with pytest.raises(ValueError, match="none of its 1 samples can be used"):
            read_dataset(path).check(progress=False)[0]

    def test_in_evaluation(self, shape, folder, server):
        image, message = BAD_PICTURES[shape]
        image = image.replace("{port}", str(server)) if isinstance(image, str) else image
        path = written(folder, "a.json", [{**QA, "image": PNG}, {**QA, "id": "x1", "image": image}])
        said = one_line(
            "evaluate", path, "--merger", "tome", "--limit", 2, "--num-merged-tokens", 9, "--output", folder / "o"
        )
        assert_found(rf"a\.json, sample 'x1': .*{message}", said)
        assert len(read_questions(path, on_broken_row="skip")) == 1

    def test_in_demo(self, shape, folder, server):
        image, message = BAD_PICTURES[shape]
        if isinstance(image, int):
            return
        (folder / "a.json").write_text("{}")
        path = image.replace("{port}", str(server)) if "://" in image or "data:" in image else folder / image
        assert_found(message, one_line("demo", "--image", path, "--question", "what ?", "--output", folder / "o.png"))


class TestBrokenRows:
    def test_training_leaves_them_out_and_counts_them(self, folder, caplog):
        rows = [LLAVA, {"conversations": "hi"}, {**LLAVA, "id": "2"}]
        path = written(folder, "a.jsonl", lines(*rows) + "{cut")
        with caplog.at_level("WARNING", logger="transformers.llava_merge"):
            dataset = read_dataset(path, on_broken_row="skip").check(progress=False)
        assert [dataset.sample(at).name.partition("sample ")[2] for at in range(len(dataset))] == ["'1'", "'2'"]
        assert "2 of 4 rows are broken and left out" in caplog.text and "line 4 of a.jsonl is no JSON" in caplog.text
        streamed = list(read_dataset(path, streaming=True, on_broken_row="skip"))
        assert [(each["index"], each["num_skipped"]) for each in streamed] == [(0, 0), (2, 1)]
        with pytest.raises(ValueError, match="sample 2: 'conversations' is text that is no JSON"):
            list(read_dataset(path, streaming=True))

    def test_a_folder_is_read_by_the_rules_of_its_files(self, folder):
        data = folder / "data"
        data.mkdir()
        written(data, "train-0.jsonl", lines(LLAVA) + "{cut\n")
        written(data, "train-1.json", {"data": [{**LLAVA, "id": "2"}]})
        written(data, "test.jsonl", lines({**LLAVA, "id": "3"}))
        dataset = read_dataset(str(data), image_folder=folder, on_broken_row="skip").check(progress=False)
        assert [dataset.sample(at).name[-3:] for at in range(len(dataset))] == ["'1'", "'2'"]
        with pytest.raises(ValueError, match=r"sample 2: line 2 of train-0.jsonl is no JSON"):
            read_dataset(str(data), image_folder=folder).check(progress=False)
        assert len(read_questions(str(data), "test", folder)) == 1
        streamed = list(read_dataset(str(data), "test", folder, streaming=True))
        assert [item["sample"].name[-3:] for item in streamed] == ["'3'"]

    def test_options_stand_in_the_question(self, folder):
        for shape in ("ScienceQA", "MMBench"):
            (question,) = read_questions(written(folder, *GOOD[shape]))
            assert question.messages[0]["content"][1]["text"] == f"{ASKED}\nA. a cat\nB. a dog"
        row = {**QA, "question": "cat or dog ?", "choices": ["cat", "dog"], "image": PNG}
        (question,) = read_questions(written(folder, "a.json", [row]))
        assert question.messages[0]["content"][1]["text"] == "cat or dog ?"

    def test_a_table_stays_on_disk(self, folder):
        path = written(folder, "a.parquet", [{"messages": json.dumps(INLINE)}, {"messages": "x"}])
        dataset = read_dataset(path, on_broken_row="skip").check(progress=False)
        assert len(dataset) == 1 and hasattr(dataset.rows, "select")

    def test_evaluation_leaves_them_out_and_counts_them(self, folder, caplog):
        rows = [{**QA, "image": PNG}, {"caption": "x"}, {**QA, "image": "gone.png"}, QA | {"image": None}]
        with caplog.at_level("WARNING", logger="transformers.llava_merge"):
            questions = read_questions(written(folder, "a.json", rows), on_broken_row="skip")
        assert [len(question.images) for question in questions] == [1, 0]
        assert "2 of 4 rows cannot be asked and are left out" in caplog.text
        assert "1 of 2 questions have no picture" in caplog.text

    def test_the_first_answer_is_asked_with_its_pictures_alone(self, folder):
        row = {"image": [PNG, PNG], "conversations": turns() + turns("<image> and this ?", "2")}
        (question,) = read_questions(written(folder, "a.json", [row]))
        assert len(question.images) == 1 and question.answers == (ANSWER,)

    def test_answers_without_loss_have_no_labels(self, folder):
        sample = read_dataset(written(folder, *GOOD["ms-swift, loss of one answer"])).sample(0)
        processor = make_processor()
        ids, labels = MergerCollator(processor, NUM_PATCHES).encode(sample)
        learnt = processor.tokenizer.decode(ids[labels >= 0])
        assert learnt.count(ANSWER) == 1 and processor.tokenizer.decode(ids).count(ANSWER) == 2
        none = [{"messages": [chat()[0], {**chat()[1], "loss": False}], "image": PNG}]
        with pytest.raises(ValueError, match="each of its answers has loss: false"):
            read_dataset(written(folder, "a.json", none)).check(progress=False)

    def test_turns_that_are_left_out_are_counted(self, folder, caplog):
        shapes = ("ShareGPT that begins with the answer", "ShareGPT that ends with a question about an image")
        path = written(folder, "a.json", [row for shape in shapes for row in GOOD[shape][1]])
        with caplog.at_level("WARNING", logger="transformers.llava_merge"):
            read_dataset(path).check(progress=False)
        assert f"{path}: 2 turns are left out" in caplog.text

    def test_a_system_column_comes_first(self, folder):
        sample = read_dataset(written(folder, *GOOD["LlamaFactory, sharegpt"])).sample(0)
        assert sample.messages[0] == {"role": "system", "content": [{"type": "text", "text": "be short"}]}

    def test_a_template_that_takes_no_system_message_is_named(self, folder):
        sample = read_dataset(written(folder, *GOOD["LlamaFactory, sharegpt"])).sample(0)
        processor = make_processor()
        processor.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(
            ValueError, match="a.json, sample 1: the chat template refuses its messages: no system role"
        ):
            MergerCollator(processor, NUM_PATCHES).encode(sample)

    def test_the_most_frequent_answer_is_learnt(self, folder):
        row = {**QA, "image": PNG, "answers": ["blue", "red", "red"], "answer": "green"}
        sample = read_dataset(written(folder, "a.json", [row])).sample(0)
        assert sample.messages[-1]["content"] == [{"type": "text", "text": "red"}]


class TestOpening:
    @pytest.fixture
    def sideways(self, tmp_path):
        """A file of 200 × 100 pixels whose EXIF says that it stands upright."""
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg", exif=exif)
        return tmp_path / "a.jpg"

    def test_every_kind_is_upright(self, sideways):
        kinds = sideways, str(sideways), sideways.read_bytes(), Image.open(sideways), sideways.as_uri()
        assert {open_image(each).size for each in kinds} == {(100, 200)}

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_16_bits_are_scaled(self, dtype, tmp_path):
        values = np.linspace(0, 65535, 64, dtype=dtype).reshape(8, 8)
        Image.fromarray(values).save(tmp_path / "a.tiff")
        found = np.asarray(open_image(tmp_path / "a.tiff"))[..., 0].astype(int)
        assert np.abs(found - values / 257).max() <= 1
        dim = np.full((8, 8), 200, dtype=dtype)  # of 8 bits in a file of 16
        Image.fromarray(dim).save(tmp_path / "b.tiff")
        assert (np.asarray(open_image(tmp_path / "b.tiff")) == 200).all()

    def test_floats_are_scaled(self, tmp_path):
        values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(values).save(tmp_path / "a.tiff")
        assert np.abs(np.asarray(open_image(tmp_path / "a.tiff"))[..., 0] - values * 255).max() <= 0.5

    def test_urls_are_encoded(self, monkeypatch):
        asked = []
        monkeypatch.setattr(
            "llava_merge.training.pictures.urlopen", lambda request, **kwargs: asked.append(request.full_url)
        )
        with pytest.raises(ValueError, match="is not a picture that can be opened"):
            open_image("https://example.org/a b/\u00e9.png?x=%20&y=1")
        assert asked == ["https://example.org/a%20b/%C3%A9.png?x=%20&y=1"]

    def test_a_file_without_end_is_not_read_to_its_end(self, monkeypatch, server):
        monkeypatch.setattr("llava_merge.training.pictures.LARGEST_FILE", 3)

        class Answer(io.BytesIO):
            length = 0

        monkeypatch.setattr("llava_merge.training.pictures.urlopen", lambda *args, **kwargs: Answer(b"12345"))
        with pytest.raises(ValueError, match="it has more than 0 MiB"):
            open_image("https://example.org/a.png")
