# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""LLaVA with merged tokens in a few lines: answer, change the budget, save the merger, load it again.

python examples/quickstart.py                                                  # the embedded model and picture
python examples/quickstart.py llava-hf/llava-1.5-7b-hf photo.jpg "Who is this?"
"""

import sys
import tempfile

import torch
from PIL import Image

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.demo import MODEL_DIR, PICTURE


def answer(model, processor, image: Image.Image, question: str, num_merged_tokens: int | str | None = None) -> str:
    text = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt", num_merged_tokens=num_merged_tokens)
    inputs = inputs.to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(base: str = str(MODEL_DIR), picture: str = str(PICTURE), question: str = "What color is the tiny diamond?"):
    merger_config = {"merger_type": "fixed_pooling", "merge_ratio": 0.25, "attention_mass": 1.0}
    model = LlavaMergeForConditionalGeneration.from_pretrained(base, merger_config=merger_config, dtype=torch.float32)
    num_merged_tokens = model.config.merger_config.num_merged_tokens
    processor = LlavaMergeProcessor.from_pretrained(base, num_merged_tokens=num_merged_tokens)
    image = Image.open(picture).convert("RGB")
    print(f"{num_merged_tokens} tokens: {answer(model, processor, image, question)}")

    for budget in (16, "all"):  # another budget for this call; "all" is the stock model
        print(f"{budget} tokens: {answer(model, processor, image, question, budget)}")

    with tempfile.TemporaryDirectory() as directory:  # a merger is a checkpoint of its own
        model.save_merger(directory)
        again = LlavaMergeForConditionalGeneration.from_pretrained(base, merger=directory, dtype=torch.float32)
        print(f"loaded again, 16 tokens: {answer(again, processor, image, question, 16)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
