# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The calls of a model that run now in any thread, so that none of them sees its merger change halfway."""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch


class RunningCalls:
    """Of one model. A copy of it, or one in another process, has none running."""

    def __init__(self):
        self._lock = threading.RLock()  # held while the model is changed; calls that begin then wait
        self._number = 0

    @contextmanager
    def one_more(self):
        """Inside, a call runs."""
        with self._lock:
            self._number += 1
        try:
            yield
        finally:
            with self._lock:
                self._number -= 1

    @contextmanager
    def none_beside(self, change: str):
        """Inside, no call runs or begins.

        Raises:
            RuntimeError: One runs already.
        """
        with self._lock:
            if self._number:
                raise RuntimeError(
                    f"{change}: a call of this model is running, and would be answered half by the old merger and half "
                    f"by the new one. Wait till it has ended, or give each call its own num_merged_tokens."
                )
            yield

    def __reduce__(self):
        return RunningCalls, ()  # for copies too


def counted(method: Callable) -> Callable:
    """Decorator of a model's method that reads its merger: the merger does not change while it runs.

    Compiled into a graph it is not counted.
    """

    @functools.wraps(method)
    def counting(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with self.headless_model.running_calls.one_more():
            return method(self, *args, **kwargs)

    return counting
