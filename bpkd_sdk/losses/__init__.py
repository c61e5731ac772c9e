"""Distillation methods: modules from student output, teacher output and labels to named loss terms."""

from __future__ import annotations

from collections.abc import Callable

from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.bpkd import BPKDLoss
from bpkd_sdk.losses.canonical import CanonicalKDLoss
from bpkd_sdk.losses.cirkd import CIRKDLoss
from bpkd_sdk.losses.cwd import CWDLoss
from bpkd_sdk.losses.ifvd import IFVDLoss
from bpkd_sdk.losses.method import DistillationLoss
from bpkd_sdk.losses.skds import SKDSLoss

__all__ = [
    "METHODS",
    "BPKDLoss",
    "CIRKDLoss",
    "CWDLoss",
    "CanonicalKDLoss",
    "DistillationLoss",
    "IFVDLoss",
    "SKDSLoss",
    "create_method",
]

METHODS: dict[str, Callable[..., DistillationLoss]] = {
    "bpkd": BPKDLoss,
    "bpkd_paper": BPKDLoss.paper,
    "cwd": CWDLoss,
    "skds": SKDSLoss,
    "ifvd": IFVDLoss,
    "cirkd": CIRKDLoss,
    "canonical": CanonicalKDLoss,
}


def create_method(method: str | DistillationLoss, num_classes: int, *, ignore_index: int = 255) -> DistillationLoss:
    """A method by its name in `METHODS`, with its defaults; a module is returned as it is.

    Raises:
        ValueError: For an unknown name.
    """
    if isinstance(method, DistillationLoss):
        return method
    check_choice("method", method, METHODS)
    return METHODS[method](num_classes, ignore_index=ignore_index)
