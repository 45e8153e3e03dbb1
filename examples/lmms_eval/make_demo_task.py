# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes a task of lmms-eval about drawn scenes: pictures, questions, and the task's YAML and functions.

python examples/lmms_eval/make_demo_task.py demo_task
"""

import argparse
import json
from pathlib import Path

from llava_merge.evaluation.data import demo_questions


TASK = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.json
task: llava_merge_demo
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: !function functions.doc_to_text
doc_to_target: answer
process_results: !function functions.process_results
generation_kwargs:
  max_new_tokens: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """from PIL import Image

from llava_merge.evaluation.metrics import exact_match


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact_match": exact_match(results[0], [doc["answer"]])}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-type", type=int, default=5, help="questions of a type, simple and hard")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for hard in (False, True):
        for question in demo_questions("test", args.per_type, hard):
            image = folder / f"{len(rows):04}.png"
            question.open_images()[0].save(image)
            text = question.messages[0]["content"][1]["text"]
            rows.append({"question": text, "answer": question.answers[0], "image": str(image)})
    (folder / "questions.json").write_text(json.dumps(rows, indent=1))
    (folder / "llava_merge_demo.yaml").write_text(TASK.format(folder=folder))
    (folder / "functions.py").write_text(FUNCTIONS)


if __name__ == "__main__":
    main()
