"""The application `bpkd` and the class of its commands: help in groups, and errors that state the right option."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup


class _Commands(TyperGroup):
    """The commands, which the help lists in the order in which they are used."""

    ORDER = (
        "quickstart",
        "data",
        "models",
        "train",
        "distill",
        "compare",
        "evaluate",
        "predict",
        "export",
        "benchmark",
    )

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return [*self.ORDER, *(name for name in super().list_commands(ctx) if name not in self.ORDER)]


# Without typer's markup, which removes what is in brackets, and its boxes, which leave 20 columns for a help text.
app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_USAGE_ERROR: Any = typer.BadParameter.__base__  # click's UsageError, from click or from the copy in typer
_TYPE = re.compile(r"<(?:list\[(\w+)\]|(\w+) range)>")  # of options that can be repeated, or that have a range
_NETWORK = "The network is an argument without an option."
_STEPS = "Training is counted in steps: --steps = epochs x images / --batch-size."

# For options of other tools and of earlier versions: options that replace it, the first that a command has, or a text
# for commands with the option that the text names.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "--size": ("--input-size", "--crop-size"),
    "--sizes": ("--input-sizes",),
    **dict.fromkeys(
        ("--imgsz", "--img", "--img-size", "--image-size", "--resolution"), ("--crop-size", "--input-size")
    ),
    **dict.fromkeys(("--crop", "--crop-shape", "--patch-size"), ("--crop-size",)),
    **dict.fromkeys(("--batch", "--bs", "--batchsize", "-b"), ("--batch-size", "--batch-sizes")),
    **dict.fromkeys(("--lr", "--lr0", "--base-lr"), ("--learning-rate",)),
    **dict.fromkeys(("--lrf", "--min-lr"), ("--final-learning-rate",)),
    **dict.fromkeys(("--warmup", "--warmup-steps", "--warmup-iters"), ("--learning-rate-warmup",)),
    "--wd": ("--weight-decay",),
    **dict.fromkeys(("--optim", "--opt"), ("--optimizer",)),
    **dict.fromkeys(("--epochs", "--epoch", "--max-epochs", "--num-epochs"), (_STEPS,)),
    **dict.fromkeys(("--iters", "--iterations", "--max-iters", "--max-steps", "--num-steps"), ("--steps",)),
    **dict.fromkeys(("--clip-grad", "--grad-clip", "--max-norm"), ("--gradient-clip",)),
    **dict.fromkeys(("--grad-accum", "--accumulation-steps"), ("--accumulate",)),
    **dict.fromkeys(("--amp", "--fp16", "--half"), ("--precision fp16",)),
    "--bf16": ("--precision bf16",),
    "--int8": ("--precision int8",),
    "--loss": ("--losses", "--method"),
    **dict.fromkeys(("--weights", "--pretrained"), ("--backbone-weights", _NETWORK)),
    **dict.fromkeys(("--model", "--checkpoint", "--ckpt", "--network", "--model-path"), (_NETWORK,)),
    **dict.fromkeys(("--dataset", "--data-dir", "--data-path", "--data-folder", "-d"), ("--data",)),
    "--data-root": ("--root", "--data"),
    **dict.fromkeys(("--val-split", "--val-ratio", "--val-fraction"), ("--val-share",)),
    **dict.fromkeys(("--out", "--out-dir", "--output-dir", "--output-folder", "-o"), ("--output",)),
    **dict.fromkeys(("--save-dir", "--work-dir", "--project", "--logdir", "--log-dir", "--name"), ("--output",)),
    **dict.fromkeys(("--gpu", "--gpus", "--gpu-id", "--cuda"), ("--device",)),
    **dict.fromkeys(("--cpu", "--no-cuda"), ("--device cpu",)),
    **dict.fromkeys(("--num-workers", "--n-workers", "--jobs"), ("--workers",)),
    **dict.fromkeys(("--log-interval", "--print-freq"), ("--log-every",)),
    **dict.fromkeys(("--eval-interval", "--eval-every", "--val-interval", "--val-every"), ("--evaluate-every",)),
    **dict.fromkeys(("--save-interval", "--save-every", "--save-freq"), ("--checkpoint-every",)),
    **dict.fromkeys(("--tracker", "--logger", "--report-to"), ("--trackers",)),
    "--wandb": ("--trackers wandb",),
    **dict.fromkeys(("--nc", "--num-classes"), ("--classes",)),
    **dict.fromkeys(("--in-channels", "--in-chans"), ("--channels",)),
    **dict.fromkeys(("--dynamic", "--dynamic-axes"), ("--dynamic-size", "--dynamic-batch")),
    "--tta": ("--flip",),
    "--save-overlay": ("--overlay",),
}


class Command(TyperCommand):
    """A command whose help has groups of options, and whose errors about unknown options state the right one."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of arguments and options, with a heading for each panel."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if (record := parameter.get_help_record(ctx)) is not None:
                panel = getattr(parameter, "rich_help_panel", None) or heading
                panels.setdefault(panel, []).append(
                    (_TYPE.sub(lambda match: f"<{match[1] or match[2]}>".lower(), record[0]), record[1])
                )
        if len(panels["Options"]) == 1:  # --help alone
            panels["Options"] = panels.pop("Options")
        for heading, records in panels.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an error about an unknown option then states the option that replaces it."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            name = getattr(error, "option_name", None)
            if type(error).__name__ == "NoSuchOption" and isinstance(name, str):
                # "-lr 0.1" is reported as "-l".
                start = next((text for text in given if text.startswith(name)), name).partition("=")[0]
                if advice := self._advice(start):
                    error.message, error.possibilities = f"No such option: {start}. {advice}", None
            raise

    def _advice(self, given: str) -> str:
        """Return the sentence that names the option in place of an unknown one; empty if there is none."""
        options = {text for parameter in self.params for text in (*parameter.opts, *parameter.secondary_opts)}
        name = f"--{given.lstrip('-').replace('_', '-').lower()}"
        for candidate in (name, *OTHER_NAMES.get(given, ()), *OTHER_NAMES.get(name, ())):
            if candidate == _NETWORK:
                if any(parameter.name in ("model", "network", "student") for parameter in self.params):
                    return candidate
            elif candidate == _STEPS:
                if "--steps" in options:
                    return candidate
            elif candidate.split()[0] in options:
                return f"Use {candidate}."
        return ""


def command(
    *examples: str, name: str | None = None, to: typer.Typer = app
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds a function to the application as a command.

    Args:
        examples: Calls of the command, shown below its help.
        name: Name of the command; None: that of the function.
        to: Application, or group of commands.
    """
    heading = "Example:" if len(examples) == 1 else "Examples:"
    epilog = "\n".join(["\b", heading, *(f"  {example}" for example in examples)])  # \b keeps the lines
    return to.command(name, cls=Command, epilog=epilog)


def _print_version(requested: bool) -> None:
    if requested:
        import bpkd_sdk

        typer.echo(f"bpkd-sdk {bpkd_sdk.__version__}")
        raise typer.Exit


@app.callback(epilog="The options of a command: bpkd COMMAND --help")
def _application(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Boundary-privileged knowledge distillation for semantic segmentation."""
