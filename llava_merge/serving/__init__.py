# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints for serving engines, and the model as vLLM runs it."""
