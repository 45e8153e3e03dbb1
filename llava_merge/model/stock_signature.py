# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Overrides that take what the installed transformers' own method takes, without repeating its list of arguments.

And overrides of ours by others, which know no more than that.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar


_asked: ContextVar[dict[int, tuple] | None] = ContextVar("asked", default=None)


def takes_arguments_of(stock: Callable) -> Callable:
    """Decorator of an override with keyword arguments only: it is called as `stock` is, by position too.

    `inspect.signature`, from which `generate` and `Trainer` learn what a model takes, shows the parameters of `stock`
    in the installed release, then those that the override adds.
    """
    shown = inspect.signature(stock)
    *parameters, catch_all = shown.parameters.values()  # self, input_ids, ..., **kwargs
    names = [parameter.name for parameter in parameters[1:]]

    def decorate(override: Callable) -> Callable:
        own = [
            parameter
            for parameter in inspect.signature(override).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in shown.parameters
        ]

        @functools.wraps(override)
        def with_names(self, *args, **kwargs):
            if len(args) > len(names):
                raise TypeError(f"{override.__name__} takes at most {len(names)} arguments by position: {names}")
            return override(self, **dict(zip(names, args, strict=False)), **kwargs)

        with_names.__signature__ = shown.replace(parameters=[*parameters, *own, catch_all])
        return with_names

    return decorate


@contextmanager
def asking(model, *arguments):
    """Inside, [`asked_of`] the model returns these arguments, in this thread or task."""
    token = _asked.set({**(_asked.get() or {}), id(model): arguments})
    try:
        yield
    finally:
        _asked.reset(token)


def asked_of(model, *arguments) -> tuple:
    """The arguments of [`asking`], or these outside."""
    return (_asked.get() or {}).get(id(model), arguments)


def taken_by(function: Callable, arguments: dict) -> dict:
    """Those of the arguments, by name, that the function takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return arguments if takes_all else {name: arguments[name] for name in arguments if name in parameters}
