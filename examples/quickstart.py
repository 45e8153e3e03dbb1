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


def answer(model, processor, image: Image.Image, question: str) -> str:
    inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(base: str = str(MODEL_DIR), picture: str = str(PICTURE), question: str = "What color is the star?"):
    merger_config = {"merger_type": "fixed_pooling", "merge_ratio": 0.25}
    model = LlavaMergeForConditionalGeneration.from_pretrained(base, merger_config=merger_config, dtype=torch.float32)
    num_merged_tokens = model.config.merger_config.num_merged_tokens
    processor = LlavaMergeProcessor.from_pretrained(base, num_merged_tokens=num_merged_tokens)
    image = Image.open(picture).convert("RGB")
    print(f"{num_merged_tokens} tokens: {answer(model, processor, image, question)}")

    model.set_num_merged_tokens(16, processor)  # another budget, the same weights
    print(f"16 tokens: {answer(model, processor, image, question)}")

    with model.merger_bypassed():  # the stock model
        processor.num_merged_tokens = None
        print(f"all tokens: {answer(model, processor, image, question)}")

    with tempfile.TemporaryDirectory() as directory:  # a merger is a checkpoint of its own
        model.save_merger(directory)
        again = LlavaMergeForConditionalGeneration.from_pretrained(base, merger=directory, dtype=torch.float32)
        processor.num_merged_tokens = 16
        print(f"loaded again, 16 tokens: {answer(again, processor, image, question)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
