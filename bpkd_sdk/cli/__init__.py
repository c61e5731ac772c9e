"""The command `bpkd`: a thin skin over the public API, one module for each group of commands."""

from __future__ import annotations

import sys

from bpkd_sdk.cli import (  # noqa: F401  (each adds its commands)
    deployment,
    networks,
    paper,
    serve,
    training,
)
from bpkd_sdk.cli.common import app, errors

__all__ = ["app", "main"]


def main() -> None:
    """Run the command; errors of the user's making end with one clear message instead of a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        errors.print(f"[bold red]Error:[/] {type(error).__name__}:", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        # typer turns Ctrl-C into this, and says nothing of what was done or left.
        interrupt = getattr(stop.__context__, "__cause__", None)
        if isinstance(interrupt, KeyboardInterrupt):
            errors.print(f"Interrupted: {interrupt or 'nothing was being trained'}.", markup=False, highlight=False)
        raise
