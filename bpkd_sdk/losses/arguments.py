"""What a method was made with, for records of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bpkd_sdk.losses.method import DistillationLoss


def describe(method: DistillationLoss | None) -> dict[str, Any]:
    """The arguments of a method, as far as it keeps them, as plain JSON values."""
    if method is None:
        return {}
    facts: dict[str, Any] = {"class": type(method).__name__}
    for name, value in vars(method).items():
        plain = dict(value) if isinstance(value, Mapping) else value
        if name[0] != "_" and name != "training" and isinstance(plain, (bool, int, float, str, tuple, list, dict)):
            facts[name] = plain
    facts |= {name: buffer.tolist() for name, buffer in method.named_buffers(recurse=False)}
    parts = [part for child in method.children() for part in _methods_in(child)]
    return facts | ({"parts": [describe(part) for part in parts]} if parts else {})


def _methods_in(module: nn.Module) -> list[DistillationLoss]:
    if isinstance(module, DistillationLoss):
        return [module]
    return [part for child in module.children() for part in _methods_in(child)]
