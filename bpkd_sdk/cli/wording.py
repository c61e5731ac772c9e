"""Translates messages of the Python API, which name its arguments and functions, into the words of the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import typer

from bpkd_sdk.cli.command import app

# Arguments of Python whose options have another name.
_OTHER_NAMES = {
    "calibration_data": "data",
    "examples": "example",
    "in_channels": "channels",
    "max_queue_delay_us": "max_queue_delay",
    "num_classes": "classes",
    "output_dir": "output",
    "preferred_batch_sizes": "preferred_batch_size",
    "push_to_hub": "push",
}
_COMMANDS = {
    **{name: name for name in ("benchmark", "compare", "distill", "evaluate", "profile", "reproduce", "train")},
    **dict.fromkeys(("to_onnx", "to_tensorrt", "to_web", "quantize"), "export"),
    "convert_annotations": "data convert",
    "list_models": "models",
    "save_pretrained": "share",
    "to_triton": "triton",
}
_PYTHON_ONLY = re.compile(r"\b(load_model|save_model|create_model|set_spec|as_dataset|EvaluationProtocol)\(")

_VALUE = r"True|False|None|'[^']*'|<[^>]*>|-?\d[\w.]*\b|\((?:\([^()]*\)|[^()])*\)|\[[^\[\]]*\]|\.\.\."
_ARGUMENT = re.compile(rf"`(\w+)`|\b(\w+)=({_VALUE})|(?<![\w./'\"=-])([a-z]+(?:_[a-z]+)+)(?![\w/'\"=(-]|\.\w)")
_CALL = re.compile(
    rf"`?(?:(?:bpkd_sdk\.(?:export\.)?)?\b({'|'.join(_COMMANDS)})\(((?:[^()]|\([^()]*\))*)\)"
    rf"|(?:bpkd_sdk\.(?:export\.)?({'|'.join(_COMMANDS)})|\b(to_onnx|to_tensorrt|to_triton|to_web))\b(?![\w(]))`?"
)
_NO_VALIDATION = "pass --val-share 0.1 to validate on a part of the training images"
# Advice for which the command line has another answer, and values of Python.
_PHRASES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (
        r"pass protocol=EvaluationProtocol\(crop_size=\(height, width\)\) with that size; to train without validation, "
        r"pass data=\(train, None\)",
        "train it in Python, with an EvaluationProtocol of that size",
    ),
    (r"pass (?:data=)?\(train, None\)(?: to train without(?: validation)?)?", _NO_VALIDATION),
    (r"Pass other images as data\[1\]", "Put other images into the split val"),
    (r"\(height, width\)", "HEIGHTxWIDTH"),
    (r"\(longer side, shorter side\)", "LONGERxSHORTER"),
    (r"\bto be a (?:tuple|list) (such as|of)\b", r"to be values \1"),
    (r" Pass a split by its name: open_dataset\([^()]*\)\.", ""),
    (r"the functions of bpkd_sdk\.export", "`bpkd export`"),
    (r"\(((?:'[^']*'(?:, )?)+),?\)", r"\1"),
)


def name_options(text: str, arguments: list[str]) -> str:
    """Return a message with the options and commands of the command line in place of arguments and functions of Python.

    Args:
        text: Message, which names arguments as `name` or as name=value.
        arguments: Arguments of the command line, whose first words are the command.

    Example:
        >>> name_options("export it with argmax=False, or pass `input_size`", ["export", "m.safetensors"])
        'export it with --no-argmax, or pass --input-size'
    """
    own, exported = _options_of(arguments), _options_of(["export"])
    for pattern, replacement in _PHRASES:
        text = re.sub(pattern, replacement, text)
    text = _CALL.sub(_replace_call, text)
    text = _replace_arguments(text, exported | own)
    text = re.sub(r"(?<!=)\((\d+), (\d+)\)", r"\1x\2", text)
    text = re.sub(r"(--[\w-]+)((?: [^\s(]+)?) \(\1\)", r"\1\2", text)  # "--option (--option)"
    if code := _PYTHON_ONLY.search(text):
        text += f" {code[1]} is a part of the Python package bpkd_sdk."
    return text


def _options_of(words: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Return the options of the command that words call, and their negative forms, by the name in Python."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
    return {
        parameter.name.strip("_"): (parameter.opts, parameter.secondary_opts)
        for parameter in command.params
        if parameter.param_type_name == "option"
    }


def _replace_call(match: re.Match[str]) -> str:
    """Return the command for a call of a function of Python; the call itself if the command lacks an argument."""
    name = next(part for part in (match[1], match[3], match[4]) if part)
    given = re.sub(r"^\.\.\.(?:, )?", "", match[2] or "")
    options = _replace_arguments(given, _options_of(_COMMANDS[name].split()))
    if given and not options.startswith("--"):
        return match[0]
    return f"`bpkd {_COMMANDS[name]}{' ' + options.replace(', --', ' --') if options else ''}`"


def _replace_arguments(text: str, options: dict[str, tuple[list[str], list[str]]]) -> str:
    def replace(match: re.Match[str]) -> str:
        name, value = match[1] or match[2] or match[4], match[3]
        positive, negative = options.get(_OTHER_NAMES.get(name, name), ([], []))
        if not positive or (value == "False" and not negative):
            return match[0]
        if value == "False":
            return negative[0]
        return _format_option(positive[0], value)

    return _ARGUMENT.sub(replace, text)


def _format_option(option: str, value: str | None) -> str:
    """Return an option with a value that is stated in Python.

    Example:
        >>> _format_option("--crop-size", "(64, 96)"), _format_option("--trackers", "('wandb', 'comet_ml')")
        ('--crop-size 64x96', '--trackers wandb --trackers comet_ml')
    """
    if value in (None, "True"):
        return option
    if value == "None":
        return f"no {option}"
    try:
        content = ast.literal_eval(str(value))
    except (ValueError, SyntaxError):
        return f"{option} {value}"
    if not isinstance(content, (tuple, list)):
        return f"{option} {content if content != '' else repr(content)}"
    if content and all(isinstance(item, tuple) for item in content):
        return f"{option} {','.join('x'.join(map(str, item)) for item in content)}"
    if len(content) == 2 and all(isinstance(item, int) for item in content):
        return f"{option} {content[0]}x{content[1]}"
    items = ("..." if item is ... else f"{option} {item}" for item in content)
    return " ".join(items) or f"no {option}"
