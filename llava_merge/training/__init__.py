# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Training of mergers on transformers' Trainer.

`run` is a whole run from `settings`; `data` and `collator` make batches of `samples`; `trainer` takes the `losses` at
the `budgets`, with the answers of the `teacher`, and trains the `parts`; `validation`, `curves` and `checkpoints` are
what comes out. examples/train_merger.py puts them together by hand.
"""
