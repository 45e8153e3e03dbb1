# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""A model compiled for inference: `generate` from graphs of fixed shapes. None of it travels to the Hub."""

from .generation import CompiledModel, compile_for_inference  # noqa: F401
