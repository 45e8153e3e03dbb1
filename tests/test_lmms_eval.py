# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The model of lmms-eval, with the real package on a local task; in an environment that has it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image


pytest.importorskip("lmms_eval")

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MODEL_DIR, find_merger
from llava_merge.evaluation.lmms_eval import LlavaMergeChat, cut_at, generation_options
from llava_merge.evaluation.metrics import exact_match


EXAMPLES = Path(__file__).parents[1] / "examples" / "lmms_eval"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the task of the example."""
    folder = tmp_path_factory.mktemp("task")
    command = [sys.executable, str(EXAMPLES / "make_demo_task.py"), str(folder), "--per-type", "1"]
    subprocess.run(command, check=True, timeout=120)
    return folder


def written_by_generate(merger: str, rows: list[dict]) -> list[str]:
    """What the model answers one by one, without lmms-eval."""
    model = LlavaMergeForConditionalGeneration.from_pretrained(
        MODEL_DIR, merger=find_merger(merger), dtype=torch.float32
    )
    processor = LlavaMergeProcessor.from_pretrained(MODEL_DIR)
    texts = []
    for row in rows:
        prompt, picture = f"USER: <image>\n{row['question']} ASSISTANT:", Image.open(row["image"]).convert("RGB")
        inputs = processor(images=picture, text=prompt, num_merged_tokens=16, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_it_is_found_and_answers_in_batches_as_generate_does_alone(task, tmp_path):
    arguments = {"pretrained": MODEL_DIR, "merger": "question_aware", "num_merged_tokens": 16, "dtype": "float32"}
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_merge", "--include_path", str(task)]
    command += ["--tasks", "llava_merge_demo", "--batch_size", "5", "--output_path", str(tmp_path), "--log_samples"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()) + ",device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    (samples,) = tmp_path.rglob("*samples_llava_merge_demo.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    rows = json.loads((task / "questions.json").read_text())
    expected = written_by_generate("question_aware", rows)
    found = {row["doc_id"]: row["filtered_resps"] for row in logged}
    assert [
        (found[index] if isinstance(found[index], str) else found[index][0]) for index in range(len(rows))
    ] == expected
    (results,) = tmp_path.rglob("*_results.json")
    score = json.loads(results.read_text())["results"]["llava_merge_demo"]["exact_match,none"]
    right = [exact_match(text, [row["answer"]]) for text, row in zip(expected, rows, strict=True)]
    assert score == pytest.approx(sum(right) / len(right)) and score > 0.7, done.stderr


@pytest.fixture(scope="module")
def chat():
    return LlavaMergeChat(pretrained=str(MODEL_DIR), merger="agnostic", dtype="float32", device="cpu")


class Request:
    def __init__(self, *args):
        self.args = args


def test_the_likelihood_of_a_right_answer_is_higher(chat, task):
    row = json.loads((task / "questions.json").read_text())[0]
    assert row["question"] and chat.budget == 64
    picture = Image.open(row["image"]).convert("RGB")
    chat.task_dict = {"demo": {"test": [row]}}
    requests = [
        Request(row["question"], text, lambda _: [picture], 0, "demo", "test") for text in (row["answer"], "on")
    ]
    (right, greedy), (wrong, other) = chat.loglikelihood(requests)
    assert greedy and not other and -0.5 < right <= 0 and wrong < right - 2


def test_tasks_of_several_rounds_are_refused(chat):
    with pytest.raises(ValueError, match="does not do tasks of several rounds"):
        chat.generate_until_multi_round([])


def test_a_merger_that_is_none_keeps_all_tokens():
    chat = LlavaMergeChat(pretrained=str(MODEL_DIR), merger="none", num_merged_tokens=9, dtype="float32", device="cpu")
    assert chat.budget == "all"
    with pytest.raises(ValueError, match="merger 'topme' is neither a method"):
        LlavaMergeChat(pretrained=str(MODEL_DIR), merger="topme", dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("given", "options", "until"),
    [
        ({}, {"max_new_tokens": 256, "do_sample": False}, []),
        ({"max_new_tokens": 8, "temperature": 0, "do_sample": True}, {"max_new_tokens": 8, "do_sample": False}, []),
        (
            {"until": "\n", "temperature": 0.5, "do_sample": True, "top_p": 0.9, "num_beams": 1},
            {"max_new_tokens": 256, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 1},
            ["\n"],
        ),
    ],
)
def test_options_of_a_task(given, options, until):
    assert generation_options(given) == (options, until)


def test_answers_end_where_the_task_says():
    assert cut_at("a\nb;c", [";", "\n"]) == "a" and cut_at("abc", ["", "x"]) == "abc"


def test_the_core_does_not_need_lmms_eval():
    assert importlib.util.find_spec("llava_merge.evaluation.lmms_eval") is not None
    code = "import llava_merge, sys; assert not [name for name in sys.modules if name.startswith('lmms_eval')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
