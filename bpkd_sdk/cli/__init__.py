"""The command `bpkd`, a thin layer over the public API, with one module for each group of commands."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from bpkd_sdk.cli import (  # noqa: F401  (each module adds its commands to the application)
    deployment,
    networks,
    paper,
    serve,
    training,
)
from bpkd_sdk.cli.command import app
from bpkd_sdk.cli.common import errors
from bpkd_sdk.cli.wording import name_options
from bpkd_sdk.errors import explain_missing
from bpkd_sdk.progress import visible

__all__ = ["app", "main"]


def main() -> None:
    """Run the command. Expected errors print one message and exit with code 1, without a traceback."""
    try:
        with _short_warnings():
            app(prog_name="bpkd")
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, ImportError):
            error = explain_missing(error)
        errors.print("Error:", style="bold red", end=" ")
        errors.print(name_options(str(error), sys.argv[1:]), soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        # typer turns Ctrl-C into SystemExit without a message about the state of the run.
        interrupt = getattr(stop.__context__, "__cause__", None)
        if isinstance(interrupt, KeyboardInterrupt):
            text = f"Interrupted: {interrupt or 'nothing was being trained'}."
            errors.print(name_options(text, sys.argv[1:]), soft_wrap=True)
        raise


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print warnings as one line with the command's options, without the place in the code."""
    original = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {visible(name_options(str(message), sys.argv[1:]))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = original
