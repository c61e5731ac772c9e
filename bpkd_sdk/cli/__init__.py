"""The command `bpkd`, a thin layer over the public API, with one module for each group of commands."""

from __future__ import annotations

import sys

from bpkd_sdk.cli import (  # noqa: F401  (each module adds its commands to the application)
    deployment,
    networks,
    paper,
    serve,
    training,
)
from bpkd_sdk.cli.common import app, errors

__all__ = ["app", "main"]


def main() -> None:
    """Run the command. Expected errors print one message and exit with code 1, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        errors.print(f"[bold red]Error:[/] {type(error).__name__}:", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        # typer turns Ctrl-C into SystemExit without a message about the state of the run.
        interrupt = getattr(stop.__context__, "__cause__", None)
        if isinstance(interrupt, KeyboardInterrupt):
            errors.print(f"Interrupted: {interrupt or 'nothing was being trained'}.", markup=False, highlight=False)
        raise
