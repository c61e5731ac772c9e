"""How this package says no: what it got, what is allowed, what to do."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any


def check_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message lists them and names the nearest."""
    allowed = list(choices)
    if value in allowed:
        return
    listed = ", ".join(repr(choice) for choice in allowed)
    raise ValueError(
        f"Expected `{argument}` to be one of {{{listed}}}, but got {value!r}.{did_you_mean(value, allowed)}"
    )


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """The sentence " Did you mean 'x'?" for the choice nearest to `value`, or an empty string."""
    nearest = get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def import_optional(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise ImportError with the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This needs the package {module!r}, which could not be imported ({error}). "
            f"Install it with: pip install 'bpkd-sdk[{extra}]'"
        ) from error


def listed(items: Iterable[object], limit: int = 10) -> str:
    """An indented list for an error text: the first `limit` items, then how many more there are."""
    lines = [f"  {item}" for item in items]
    more = [f"  ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(lines[:limit] + more)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of plain values, "key: was x, is y" for each; nested keys are joined by dots."""
    old, new = flattened(before), flattened(now)
    return [f"{key}: was {old.get(key)!r}, is {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)]


def flattened(facts: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested values on one level, under their keys joined by the separator."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, separator, name + separator) if isinstance(value, Mapping) else {name: value}
    return flat
