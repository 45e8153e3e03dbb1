# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Which models a thread or task wants to answer without merging. Requests side by side do not reach each other."""

import threading
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn


_bypassed: ContextVar[frozenset[int]] = ContextVar("bypassed", default=frozenset())
_lock = threading.Lock()


class Bypassable:
    """Mixin of a module that can be asked to do nothing inside `bypassing(module)`."""

    _num_bypassing = 0  # in all threads; where it is 0, torch.compile need not look at the context

    @property
    def is_bypassed(self) -> bool:
        """Whether this thread answers without merging now."""
        return self._num_bypassing > 0 and id(self) in _bypassed.get()


@contextmanager
def bypassing(module: nn.Module):
    """Inside, `module.is_bypassed` for this thread or asyncio task, and for nobody else."""
    token = _bypassed.set(_bypassed.get() | {id(module)})
    with _lock:
        module._num_bypassing += 1
    try:
        yield
    finally:
        with _lock:
            module._num_bypassing -= 1
        _bypassed.reset(token)
