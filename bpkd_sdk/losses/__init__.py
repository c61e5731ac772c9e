"""Distillation methods by name. `bpkd_sdk.losses.method` defines the interface that they implement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.bpkd import BPKDLoss
from bpkd_sdk.losses.canonical import CanonicalKDLoss
from bpkd_sdk.losses.cirkd import CIRKDLoss
from bpkd_sdk.losses.cwd import CWDLoss
from bpkd_sdk.losses.dist import DISTLoss
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
    "DISTLoss",
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
    "dist": DISTLoss,
}


Method = str | DistillationLoss | Sequence[str | DistillationLoss]


def create_method(method: Method, num_classes: int, *, ignore_index: int = 255) -> DistillationLoss:
    """Create a method by name with its defaults, or combine several methods into one.

    Args:
        method: Name in `METHODS`, a method object (returned unchanged), or a list of both, which becomes a
            `Composition`.
        num_classes: C, the number of classes, for methods that are given by name.
        ignore_index: Label of void pixels, for methods that are given by name.

    Raises:
        ValueError: If a name is unknown, or if the list is empty.
        TypeError: If `method` is none of these.
    """
    if isinstance(method, DistillationLoss):
        return method
    if isinstance(method, str):
        check_choice("method", method, METHODS)
        created = METHODS[method](num_classes, ignore_index=ignore_index)
        created.name = method
        return created
    if not isinstance(method, Sequence):
        raise TypeError(
            f"Expected the name of a method, a method such as CWDLoss(weight=3), or a list of them, but got {method!r}."
        )
    return Composition([create_method(part, num_classes, ignore_index=ignore_index) for part in method])
