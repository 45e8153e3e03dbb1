# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Folds an adapter of `llava-merge train` (`trained.parts: merger_lora`) into its base model.

    python examples/merge_lora.py demo_mergers/lora_agnostic demo_mergers/lora_agnostic-model

What is written is a whole LLaVA with its merger, which runs as fast as without LoRA and loads on every transformers.
"""

import argparse
import json
from pathlib import Path

from peft import PeftModel

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor, MergerConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder that llava-merge train wrote")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    base = json.loads((args.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    merger = MergerConfig.from_json_file(args.adapter / "merger_config.json")
    model = LlavaMergeForConditionalGeneration.from_pretrained(base, merger_config=merger)
    model = PeftModel.from_pretrained(model, args.adapter).merge_and_unload()
    processor = LlavaMergeProcessor.from_pretrained(base)
    processor.num_merged_tokens = model.config.merger_config.num_merged_tokens
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
