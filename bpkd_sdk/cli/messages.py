"""Messages of the SDK in the words of the command line: options in place of arguments of Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import typer

from bpkd_sdk.cli.common import app

# Arguments of Python whose options have another name.
_OTHER_NAMES = {
    "input_size": "size",
    "input_sizes": "sizes",
    "output_dir": "output",
    "calibration_data": "data",
    "max_queue_delay_us": "max_queue_delay",
    "preferred_batch_sizes": "preferred_batch_size",
}
# Ends of the names and metavars of options that take a size like 512x1024.
_SIZES = ("size", "stride", "WIDTH", "SHORTER")
# Facts of a data set that a folder states in classes.json.
_CLASSES_KEYS = ("channels", "value_range", "bands", "ignore_index")
# Functions of Python that other commands than those of their name call.
_COMMANDS = {"to_onnx": "export", "to_tensorrt": "export", "quantize": "export", "to_triton": "triton"}
_NUMBER = r"-?\d[\d.e+-]*(?<=\d)"
_ITEMS = rf"(?:{_NUMBER}|'[\w:.-]+')(?:, (?:{_NUMBER}|'[\w:.-]+'|\.\.\.))*,?"
_VALUE = rf"True|False|None|'[\w.-]+'|[(\[]{_ITEMS}[)\]]|\(\({_ITEMS}\)(?:, \({_ITEMS}\))*\)|{_NUMBER}"
# name=True, name='text', name=3 and name=(512, 1024), but not name=Other(...); `name`; and words like val_share
_ARGUMENT = re.compile(
    rf"(?<![\w/.\"'-])(\w+)=({_VALUE})|`(\w+)`|(?<![\w/.\"'-])([a-z]+(?:_[a-z]+)+)(?![\w/\"'=(\[]|\.\w)"
)
# open_dataset(..., val_share=0.1) and distill(..., labels='teacher')
_CALL = re.compile(r"\b(\w+)\((?:\.\.\., )?(\w+=(?:[^()]|\([^()]*\))*)\)")


def name_options(text: str, arguments: list[str]) -> str:
    """Return a message with the options of a command in place of the arguments of Python that it names.

    Args:
        text: Message, which names arguments as `name` or as name=value.
        arguments: Arguments of the command line, whose first word is the command.

    Example:
        >>> name_options("export it with argmax=False, or pass `input_size`", ["export", "m.safetensors"])
        'export it with --no-argmax, or pass --size'
    """
    top: Any = typer.main.get_command(app)
    command = top
    for word in arguments:
        command = getattr(command, "commands", {}).get(word, command)

    def name_call(call: re.Match[str]) -> str:
        other = top.commands.get(_COMMANDS.get(call[1], call[1]), command)
        named = _ARGUMENT.sub(partial(_name_option, _options(other)), call[2]).replace(", ", " ")
        if named.startswith("--"):
            return named if other is command else f"`bpkd {other.name} ... {named}`"
        return call[0]

    text = _CALL.sub(name_call, text)
    return _ARGUMENT.sub(partial(_name_option, _options(top.commands["export"]) | _options(command)), text)


def _options(command: Any) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in command.params if parameter.param_type_name == "option"}


def _name_option(options: Mapping[str, Any], match: re.Match[str]) -> str:
    """Return the option for a match of `_ARGUMENT`; the key of classes.json for a fact of a folder."""
    name, value = match[1] or match[3] or match[4], match[2]
    option = options.get(_OTHER_NAMES.get(name, name))
    if option is None:
        is_fact = value is not None and name in _CLASSES_KEYS
        return f'"{name}": {value.replace("(", "[").replace(")", "]")} in classes.json' if is_fact else match[0]
    positive, negative = option.opts[0], option.secondary_opts
    if value == "False" and negative:
        return str(negative[0])
    if value in ("False", "None"):
        return f"no {positive}"
    if value in (None, "True"):
        return str(positive)
    if value.startswith("(("):
        return f"{positive} {','.join(part.replace(', ', 'x') for part in value.strip('()').split('), ('))}"
    items = [item.strip("'") for item in re.findall(rf"{_NUMBER}|'[\w:.-]+'", value)]
    if option.multiple:
        return " ".join(f"{positive} {item}" for item in items)
    return f"{positive} {('x' if (option.metavar or name).endswith(_SIZES) else ',').join(items)}"
