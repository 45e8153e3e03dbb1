# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""KV caches that know where their images are: it goes with the request, not with the model."""

import functools

import torch
from transformers import Cache

from .token_layout import TokenLayout


class CarriesLayout:
    """Mixin of a cache: what picks, repeats or drops rows and tokens does so to the layout too."""

    token_layout: TokenLayout | None = None

    def reorder_cache(self, beam_idx):
        """As in transformers."""
        super().reorder_cache(beam_idx)
        self._change(lambda layout: layout.picked(beam_idx))

    def batch_select_indices(self, indices):
        """As in transformers."""
        super().batch_select_indices(indices)
        self._change(lambda layout: layout.picked(indices))

    def batch_repeat_interleave(self, repeats: int):
        """As in transformers."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda layout: layout.repeated(repeats))

    def crop(self, *args, **kwargs):
        """As in transformers."""
        super().crop(*args, **kwargs)
        self._change(lambda layout: layout.cut(int(self.get_seq_length())))

    def reset(self):
        """As in transformers."""
        super().reset()
        self.token_layout = None

    def _change(self, change):
        if self.token_layout is not None:
            self.token_layout = change(self.token_layout)

    def __reduce__(self):
        return empty_cache, (type(self).__mro__[2],), vars(self)


@functools.cache
def carrying(kind: type[Cache]) -> type[Cache]:
    """That kind of cache with a [`TokenLayout`], under the same name."""
    return type(kind.__name__, (CarriesLayout, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def empty_cache(kind: type[Cache]) -> Cache:
    """One of [`carrying`] `kind` whose attributes are still to come, as copy and pickle make it."""
    return object.__new__(carrying(kind))


def keep_layout(cache: Cache | None, layout: TokenLayout):
    """Lets a cache remember where its images are, and its own methods take it along.

    The cache of a forward that torch.compile has compiled remembers it, but its methods do not take it along.
    """
    if cache is None:
        return
    if not torch.compiler.is_compiling() and not isinstance(cache, CarriesLayout):
        cache.__class__ = carrying(type(cache))
    cache.token_layout = layout
