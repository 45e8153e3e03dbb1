# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Writes drawn scenes with questions as LLaVA-Instruct JSON and PNG files, to train mergers of the demo model on.

    python examples/make_demo_data.py demo_data

makes demo_data/train.json, demo_data/validation.json and demo_data/images. Scenes of validation are others than those
of training, and both are others than the demo model's test scenes.
"""

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from llava_merge.demo.scenes import QUESTION_TYPES, ask_question, draw_scene, sample_scene, scene_rng


def write_sample(split: str, index: int, num_turns: int, folder: Path) -> dict:
    """Draws a scene to a PNG file; its conversation, as LLaVA-Instruct has them."""
    rng = scene_rng(split, index)
    scene = sample_scene(rng)
    name = f"images/{split}-{index:06}.png"
    draw_scene(scene).save(folder / name)
    asked = [ask_question(scene, rng.choice(QUESTION_TYPES), rng) for _ in range(3 * num_turns)]
    turns = list(dict.fromkeys((item.text, item.answer) for item in asked if item))[:num_turns]
    conversations = []
    for number, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": f"{split}-{index:06}", "image": name, "conversations": conversations}


def write_split(split: str, num_scenes: int, num_turns: int, folder: Path, pool: ProcessPoolExecutor):
    rows = pool.map(write_sample, *zip(*((split, i, num_turns, folder) for i in range(num_scenes)), strict=True))
    rows = [row for row in tqdm(rows, split, total=num_scenes) if row["conversations"]]
    random.Random(0).shuffle(rows)
    (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-train", type=int, default=1000, help="scenes, with up to eight questions each")
    parser.add_argument("--num-validation", type=int, default=300, help="scenes, with one question each")
    args = parser.parse_args()
    (args.folder / "images").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        write_split("train", args.num_train, 8, args.folder, pool)
        write_split("validation", args.num_validation, 1, args.folder, pool)


if __name__ == "__main__":
    main()
