# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes drawn scenes with questions as LLaVA-Instruct JSON and image files, to train mergers of the demo model on.

    python examples/make_demo_data.py demo_data

makes demo_data/train.json, demo_data/validation.json and demo_data/images. Scenes of validation are others than those
of training, and both are others than the demo model's test scenes. `--hard-share 0.5` makes every second scene a
hard one.
"""

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from llava_merge.demo.scenes import (
    HARD_QUESTION_TYPES,
    QUESTION_TYPES,
    ask_question,
    draw_scene,
    scene_of,
)


def write_scene(split: str, index: int, num_questions: int, hard: bool, file: Path) -> list[tuple]:
    """Draws a scene to a file; questions about it with answers."""
    scene, rng = scene_of(split, index, hard)
    draw_scene(scene).save(file, compress_level=1)
    types = HARD_QUESTION_TYPES if hard else QUESTION_TYPES
    asked = [ask_question(scene, rng.choice(types), rng) for _ in range(3 * num_questions)]
    return list(dict.fromkeys((item.text, item.answer) for item in asked if item))[:num_questions]


def conversation(image: str, turns: list[tuple]) -> dict:
    """Questions about a picture as LLaVA-Instruct has them."""
    written = []
    for number, (question, answer) in enumerate(turns):
        written.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        written.append({"from": "gpt", "value": answer})
    return {"id": f"{Path(image).stem}-{turns[0][0]}", "image": image, "conversations": written}


def write_split(split: str, num_scenes: int, num_questions: int, args: argparse.Namespace, pool: ProcessPoolExecutor):
    drawn = {}
    for index in range(num_scenes):
        name = f"images/{split}-{index:06}.{args.format}"
        hard = int((index + 1) * args.hard_share) > int(index * args.hard_share)
        drawn[name] = pool.submit(write_scene, split, index, num_questions, hard, args.folder / name)
    rows = []
    for name, future in tqdm(drawn.items(), split):
        turns = future.result()
        starts = range(0, len(turns), args.turns)
        rows += [conversation(name, turns[start : start + args.turns]) for start in starts]
    random.Random(0).shuffle(rows)
    (args.folder / f"{split}.json").write_text(json.dumps(rows, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-train", type=int, default=1000, help="scenes, with up to eight questions each")
    parser.add_argument(
        "--turns", type=int, default=8, help="questions in a conversation; more of a scene are more rows"
    )
    parser.add_argument("--num-validation", type=int, default=300, help="scenes, with one question each")
    parser.add_argument("--format", choices=("png", "bmp"), default="png", help="bmp is large, and quick to open")
    parser.add_argument("--hard-share", type=float, default=0.0, help="of hard scenes, from 0 to 1")
    args = parser.parse_args()
    (args.folder / "images").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        write_split("train", args.num_train, 8, args, pool)
        write_split("validation", args.num_validation, 1, args, pool)


if __name__ == "__main__":
    main()
