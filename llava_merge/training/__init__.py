# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Training of mergers on transformers' Trainer: settings, data and collator, losses and teacher, trainer, run.

`llava-merge train config.yaml` is `run.train(load_settings(...))`; examples/train_merger.py does the same by hand.
"""

from llava_merge.training.budgets import BudgetSchedule
from llava_merge.training.collator import MergerCollator
from llava_merge.training.data import ChatDataset, read_dataset
from llava_merge.training.run import train
from llava_merge.training.settings import Settings, load_settings
from llava_merge.training.trainer import MergerTrainer


__all__ = [
    "BudgetSchedule",
    "ChatDataset",
    "MergerCollator",
    "MergerTrainer",
    "Settings",
    "load_settings",
    "read_dataset",
    "train",
]
