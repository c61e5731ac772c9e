"""Error messages, which state what was received, what is allowed, and what to do; warnings; optional packages."""

from __future__ import annotations

import importlib
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any


def check_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message lists them and states the nearest.

    Args:
        argument: Name of the argument in the message.
        value: Value that was passed.
        choices: Allowed values.
    """
    allowed = list(choices)
    if value in allowed:
        return
    names = ", ".join(map(repr, allowed))
    raise ValueError(
        f"Expected `{argument}` to be one of {{{names}}}, but got {value!r}.{did_you_mean(value, allowed)}"
    )


def no_network(value: object, expected: str) -> TypeError:
    """Return the error for a value that is not a network; for a result of training, it names the network in it.

    Args:
        value: Value that was passed.
        expected: What is allowed, for the message.

    Example:
        >>> no_network(3, "a torch module")
        TypeError('Expected a torch module, but got 3.')
    """
    kind = type(value)
    got = f"{value!r:.80}" if kind.__module__ == "builtins" else f"a {kind.__name__}"
    hint = " Pass the network in it, which is .model." if hasattr(value, "model") and not callable(value) else ""
    return TypeError(f"Expected {expected}, but got {got}.{hint}")


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the choice that is similar to `value`; an empty string if none is similar."""
    nearest = get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the place from which this package was called, so that Python shows a line of the user's code."""
    frames = enumerate(traceback.walk_stack(inspect.currentframe()), start=1)
    own = [
        level for level, (frame, _) in frames if frame.f_globals.get("__name__", "").partition(".")[0] == __package__
    ]
    warnings.warn(message, category, stacklevel=own[-1] + 1)


# Extra of bpkd-sdk that installs each optional package, by the name that it is imported by.
EXTRAS = {
    **dict.fromkeys(("accelerate", "filelock", "safetensors", "segmentation_models_pytorch"), "train"),
    **dict.fromkeys(("timm", "torch", "torchvision"), "train"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxslim"), "export"),
    **dict.fromkeys(("asgi_correlation_id", "av", "fastapi", "fastapi_offline", "gradio", "jinja2"), "serve"),
    **dict.fromkeys(("matplotlib", "multipart", "prometheus_client", "starlette", "uvicorn"), "serve"),
    "huggingface_hub": "hub",
    "pycocotools": "data",
    "scipy": "compare",
    "tensorboard": "track",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "transformers": "transformers",
    "tritonclient": "triton",
}


def import_optional(module: str, extra: str | None = None) -> ModuleType:
    """Import an optional package, or a module of this package that imports some.

    Args:
        module: Name of the module.
        extra: Extra of bpkd-sdk that the message names; None: the extra of the missing package in `EXTRAS`.

    Raises:
        ImportError: If the module cannot be imported; the message states how to install what is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        explained = explain_missing(error, module, extra)
        if explained is error:
            raise
        raise explained from error


def explain_missing(error: ImportError, module: str = "", extra: str | None = None) -> ImportError:
    """Return an error that states which extra installs the missing package; the same error if no extra does.

    Args:
        error: Error of an import statement.
        module: Name of the module that was imported, for an error that names none.
        extra: Extra of bpkd-sdk that the message names; None: the extra of the missing package in `EXTRAS`.
    """
    package = (error.name or module).partition(".")[0]
    extra = extra or EXTRAS.get(package)
    if package == "onnxruntime":
        return ImportError(f"onnxruntime is missing ({error}): pip install onnxruntime, or onnxruntime-gpu for a GPU")
    if extra is None or package in ("", "bpkd_sdk"):
        return error
    problem = "is not installed" if isinstance(error, ModuleNotFoundError) else f"could not be imported ({error})"
    return ImportError(f"This needs the package {package!r}, which {problem}: pip install 'bpkd-sdk[{extra}]'")


def lazy_names(package: str, modules: Mapping[str, Sequence[str]], extra: str | None = None) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose names are imported from their modules when they are first used.

    Args:
        package: Name of the package.
        modules: Names by the module that defines them. No module may be an attribute of the package of the same name.
        extra: Extra of bpkd-sdk that installs the packages that these modules import; as for `import_optional`.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_optional(module_of[name], extra), name)

    return get


def format_list(items: Iterable[object], limit: int = 10) -> str:
    """Format an indented list: the first `limit` items, one per line, then the number of the others."""
    lines = [f"  {item}" for item in items]
    more = [f"  ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(lines[:limit] + more)


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differences of two mappings of plain values as "key: was x, is y"; nested keys are joined by dots."""
    old, new = flatten(before), flatten(now)
    return [f"{key}: was {old.get(key)!r}, is {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)]


def flatten(facts: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one level, with keys joined by the separator.

    Args:
        facts: Mapping whose values may be mappings.
        separator: Text between the keys.
        prefix: Text before every key.
    """
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, separator, name + separator) if isinstance(value, Mapping) else {name: value}
    return flat
