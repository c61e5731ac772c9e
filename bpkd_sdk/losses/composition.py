"""Several methods at once: their terms side by side, each under the name of its method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from bpkd_sdk.losses.method import DistillationLoss
from bpkd_sdk.output import SegmentationOutput


class Composition(DistillationLoss):
    """The terms of several methods, "bpkd/edge" for the term "edge" of the method "bpkd".

    A method whose name occurred before gets a number: "cwd", "cwd2". So does what the methods keep, in the state dict.

    Args:
        methods: One or more, none of them twice.

    Raises:
        ValueError: For no method, or the same object twice.

    Example:
        >>> from bpkd_sdk.losses import CWDLoss
        >>> Composition([CWDLoss(weight=3), CWDLoss(weight=0, feature_weight=50)]).weights
        {'cwd/logit': 3, 'cwd/feature': 0.0, 'cwd2/logit': 0, 'cwd2/feature': 50}
    """

    def __init__(self, methods: Sequence[DistillationLoss]) -> None:
        super().__init__()
        if not methods:
            raise ValueError("Expected at least one method, but got none. Name one, or call train() instead.")
        if len(set(methods)) < len(methods):
            raise ValueError("Expected methods that differ, but got the same object twice. Make one for each place.")
        named: dict[str, DistillationLoss] = {}
        count = Counter[str]()
        for method in methods:
            count[method.name] += 1
            named[f"{method.name}{count[method.name]}" if count[method.name] > 1 else method.name] = method
        self.methods = nn.ModuleDict(named)
        self.name = "+".join(named)
        self.needs_features = any(method.needs_features for method in methods)
        self.weights = {
            f"{name}/{term}": weight for name, method in named.items() for term, weight in method.weights.items()
        }

    def prepare(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        """Prepare every method; see `DistillationLoss.prepare`."""
        for method in self.methods.values():
            method.prepare(student, teacher)  # type: ignore[operator]

    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`."""
        return {
            f"{name}/{term}": value
            for name, method in self.methods.items()
            for term, value in method(student, teacher, labels).items()
        }
