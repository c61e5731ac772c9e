"""The command `bpkd`, a thin layer over the public API, with one module for each group of commands."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from bpkd_sdk.cli import (  # noqa: F401  (each module adds its commands to the application)
    deployment,
    networks,
    paper,
    serve,
    training,
)
from bpkd_sdk.cli.command import app
from bpkd_sdk.cli.common import errors
from bpkd_sdk.errors import explain_missing

__all__ = ["app", "main"]


# Arguments of Python whose options have another name.
_OTHER_NAMES = {"output_dir": "output", "calibration_data": "data"}
# `name`, name=True, name='text', name=3 and name=(512, 1024), but not name=Other(...)
_ARGUMENT = re.compile(r"`(\w+)`|\b(\w+)=(True|False|'[\w.-]+'|[\d.]+\b|\(\d+, \d+\))")


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


def name_options(text: str, arguments: list[str]) -> str:
    """Return a message with the options of a command in place of the arguments of Python that it names.

    Args:
        text: Message, which names arguments as `name` or as name=value.
        arguments: Arguments of the command line, whose first word is the command.

    Examples:
        >>> name_options("export it with argmax=False, or pass `input_size`", ["export", "m.safetensors"])
        'export it with --no-argmax, or pass --input-size'
    """
    commands = getattr(typer.main.get_command(app), "commands", {})
    named = next((commands[word] for word in arguments if word in commands), None)
    options = {
        parameter.name: (parameter.opts, parameter.secondary_opts)
        for command in (commands["export"], named)
        for parameter in getattr(command, "params", ())
        if parameter.param_type_name == "option"
    }

    def replace(match: re.Match[str]) -> str:
        name, value = match[1] or match[2], match[3]
        positive, negative = options.get(_OTHER_NAMES.get(name, name), ((), ()))
        if value == "False":
            return negative[0] if negative else match[0]
        if not positive:
            return match[0]
        if value in (None, "True"):
            return str(positive[0])
        return f"{positive[0]} {value.strip('()').replace(', ', 'x').strip(chr(39))}"

    return _ARGUMENT.sub(replace, text)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print warnings as one line with the command's options, without the place in the code."""
    original = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_, **__: (
        f"{category.__name__}: {name_options(str(message), sys.argv[1:])}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = original
