"""What is compared: methods by name, in lists, or in a mapping from names of one's own to methods with arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bpkd_sdk.losses import METHODS, DistillationLoss, Method, create_method

ALONE = "alone"  # the student without a teacher, which the methods are measured by

Methods = str | Sequence[str] | Mapping[str, Method]


def named_methods(methods: Methods, num_classes: int, ignore_index: int) -> dict[str, DistillationLoss | None]:
    """Each method under its name, the student alone (None) first.

    Args:
        methods: "all"; names, a list or with commas between, where "bpkd+cwd" composes two; or a mapping from any name
            to a method as `distill` takes it.
        num_classes: Of the data.
        ignore_index: Of the data.

    Raises:
        ValueError: For an unknown method, or a name that no folder can have.
    """
    if isinstance(methods, str):
        methods = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    if not isinstance(methods, Mapping):
        methods = {name: _parts(name) for name in methods}
    chosen: dict[str, DistillationLoss | None] = {ALONE: None}
    for name, method in methods.items():
        if not re.fullmatch(r"[\w+. ()-]*\w[\w+. ()-]*", name):
            raise ValueError(
                f"Expected a method's name to be of letters, digits, spaces and +-_.() only, but got {name!r}."
            )
        if name != ALONE:
            chosen[name] = create_method(method, num_classes, ignore_index=ignore_index)
    return chosen


def _parts(name: str) -> Method:
    parts = name.split("+")
    return parts if len(parts) > 1 else name
