# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Training of a merger by hand: what `llava-merge train` does, in a screenful, for scripts that need something else.

python examples/train_merger.py --model llava-hf/llava-1.5-7b-hf --data llava_instruct.json --image-folder coco
"""

import argparse

from transformers import TrainingArguments

from llava_merge import LlavaMergeForConditionalGeneration, LlavaMergeProcessor
from llava_merge.training.budgets import BudgetSchedule
from llava_merge.training.collator import MergerCollator
from llava_merge.training.data import read_dataset
from llava_merge.training.parts import describe_parts
from llava_merge.training.settings import LossSettings, TrainedSettings
from llava_merge.training.trainer import MergerTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub repo of a LLaVA")
    parser.add_argument("--data", required=True, help="LLaVA-Instruct JSON, or chat messages")
    parser.add_argument("--image-folder", help="default the folder of the data")
    parser.add_argument("--budgets", type=int, nargs="+", default=[144, 64, 36, 16], help="tokens of an image")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16, help="samples of a step on each GPU")
    parser.add_argument("--output", default="trained_merger")
    args = parser.parse_args()

    dataset = read_dataset(args.data, image_folder=args.image_folder)
    dataset.check()
    training_arguments = TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, args.steps // 10),
        logging_steps=10,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    model = LlavaMergeForConditionalGeneration.from_pretrained(
        args.model, merger_config={"num_merged_tokens": max(args.budgets)}, dtype="auto"
    )
    trainer = MergerTrainer(
        model,
        training_arguments,
        budgets=BudgetSchedule(args.budgets),
        loss_settings=LossSettings(cross_entropy=0.5, distillation=1.0),
        trained=TrainedSettings(parts="merger_projector"),
        data_collator=MergerCollator(LlavaMergeProcessor.from_pretrained(args.model), model.config.num_patches),
        train_dataset=dataset,
    )
    print(describe_parts(trainer.model))
    trainer.train()
    trainer.save_model()  # from_pretrained(args.model, merger=args.output) loads it


if __name__ == "__main__":
    main()
