# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The `llava-merge` command itself, and what its subcommands share."""

import os
import sys
from contextlib import contextmanager
from functools import wraps
from typing import Annotated

from llava_merge import __version__


try:
    import PIL  # noqa: F401 - said here what is missing, not in the middle
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"The llava-merge command needs {error.name}: pip install '.[demo]' in a clone of llava_merge")

INTERRUPTED = 130  # as shells have it
ModelOption = Annotated[str | None, typer.Option(help="Directory or Hub repo of a LLaVA; default the bundled one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
NO_READER = 141  # as shells have it where nobody reads what is printed
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def say_version(yes: bool):
    """Prints the version and ends the command, if asked to."""
    if yes:
        typer.echo(f"llava-merge {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    shows_version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Print the version.")
    ] = False,
):
    """LLaVA with fewer visual tokens, merged in CLIP space, before the projector.

    Exit codes: 0 done, 1 a bug, 2 something given cannot be used, 130 interrupted.
    """


def command(name: str, extra: str | None = None):
    """Makes a function the command `name`, with errors of one line.

    Args:
        extra: The extra of the package that holds what it needs.
    """

    def register(function):
        @app.command(name)
        @wraps(function)
        def run(*args, **kwargs):
            with one_line_errors(extra):
                return function(*args, **kwargs)

        return function

    return register


@contextmanager
def one_line_errors(extra: str | None = None):
    """Ends the command with one line, and exit code 2, where something the user gave cannot be used."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:  # of `llava-merge mergers | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        raise typer.Exit(NO_READER) from error
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        fail(f"This needs {error.name}: pip install '.[{extra}]' in a clone of llava_merge", error)
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        fail(str(error), error)
    except Exception as error:
        if not is_network_error(error):
            raise
        fail(f"The Hub or a server could not be reached, or broke off: {error}", error)


def is_network_error(error: Exception) -> bool:
    """Whether httpx raised it, by whatever name transformers 5 has that: its errors are no OSErrors, as others' are."""
    return type(error).__module__.startswith("httpx")


def fail(message: str, error: Exception):
    """Ends the command with the first line of a message, or the error's name where it has none, and exit code 2."""
    if message.startswith("Caught ") and "DataLoader worker process" in message:  # with its traceback, as text
        message = message.rpartition(f"\n{type(error).__name__}: ")[2]
    typer.echo(f"Error: {message.partition(chr(10))[0] or type(error).__name__}", err=True)
    raise typer.Exit(2) from error
