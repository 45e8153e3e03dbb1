# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of mergers on questions about pictures.

`data` reads the questions; `candidates` are the mergers and budgets that answer them, in `grid`, behind one pass of the
tower; `metrics` score the answers; `protocol` says how they were made; `report` is what comes out.
"""
