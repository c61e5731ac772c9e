"""Distillation methods: modules from student output, teacher output and labels to named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.bpkd import BPKDLoss
from bpkd_sdk.losses.canonical import CanonicalKDLoss
from bpkd_sdk.losses.cirkd import CIRKDLoss
from bpkd_sdk.losses.cwd import CWDLoss
from bpkd_sdk.losses.ifvd import IFVDLoss
from bpkd_sdk.losses.method import Composition, DistillationLoss
from bpkd_sdk.losses.skds import SKDSLoss

__all__ = [
    "METHODS",
    "BPKDLoss",
    "CIRKDLoss",
    "CWDLoss",
    "CanonicalKDLoss",
    "Composition",
    "DistillationLoss",
    "IFVDLoss",
    "Method",
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


Method = str | DistillationLoss | Sequence[str | DistillationLoss]


def create_method(method: Method, num_classes: int, *, ignore_index: int = 255) -> DistillationLoss:
    """The method that a name in `METHODS` stands for, with its defaults; one that is made already; or several as one.

    Args:
        method: A name, a method, or a list of both, which becomes a `Composition`.
        num_classes: C, for methods by name.
        ignore_index: The void label, for methods by name.

    Raises:
        ValueError: For an unknown name, or an empty list.
        TypeError: For anything else.
    """
    if isinstance(method, DistillationLoss):
        return method
    if isinstance(method, str):
        check_choice("method", method, METHODS)
        made = METHODS[method](num_classes, ignore_index=ignore_index)
        made.name = method
        return made
    if not isinstance(method, Sequence):
        raise TypeError(
            f"Expected the name of a method, a method such as CWDLoss(weight=3), or a list of them, but got {method!r}."
        )
    return Composition([create_method(one, num_classes, ignore_index=ignore_index) for one in method])
