"""Helpers for error messages, which state what was received, what is allowed, and what to do."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
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


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the choice that is similar to `value`; an empty string if none is similar."""
    nearest = get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def import_optional(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Name of the module.
        extra: Extra of bpkd-sdk that installs the package.

    Raises:
        ImportError: If the module cannot be imported; the message states how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This function needs the package {module!r}, which could not be imported ({error}). "
            f"Install it with: pip install 'bpkd-sdk[{extra}]'"
        ) from error


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
