# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Draws what 16 merged tokens keep of one picture for two questions, with the answers.

python examples/draw_questions.py examples/images/questions.png
"""

import sys

from llava_merge.demo import MERGERS
from llava_merge.demo.compare import Comparison
from llava_merge.demo.scenes import draw_scene, scene_of
from llava_merge.visualization import draw_weights, side_by_side, thumbnail


SCENE = 38
QUESTIONS = ("What number is shown?", "What color is the tiny diamond?")


def main(output: str):
    picture = draw_scene(scene_of("test", SCENE, hard=True)[0])
    comparison = Comparison(num_merged_tokens=16, merger=MERGERS[0])
    drawn = {"576 patches": thumbnail(picture)}
    for question in QUESTIONS:
        answers = comparison.with_all_tokens(picture, question, 1), comparison.with_merged_tokens(picture, question, 1)
        print(f"{question} {answers[0].num_image_tokens} tokens: {answers[0].text}, 16 tokens: {answers[1].text}")
        source = comparison.source(picture, question)
        drawn[f"{question} {answers[1].text}"] = draw_weights(thumbnail(picture), source, comparison.processor)
    side_by_side([*drawn.values()], [*drawn]).save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
