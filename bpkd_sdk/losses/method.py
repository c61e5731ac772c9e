"""What every distillation method is: a module from two outputs and labels to named, weighted loss terms.

`DistillationLoss` is what training asks of a method. `WeightedTerms` is what the methods of this package share, so that
each of their files holds only its own equations, arguments and parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.output import SegmentationOutput, as_output

Part = TypeVar("Part", bound=nn.Module)
Terms = dict[str, Callable[[], Tensor]]


class DistillationLoss(nn.Module, ABC):
    """Base of the methods.

    A method owns its trainable parts, if it has any; they are optimised together with the student and left out of the
    saved student. Parameters that do not require a gradient (a critic's) are trained by the method itself. All that a
    method must remember to go on after a break is in its `state_dict`, which holds tensors only.

    Attributes:
        name: What runs and composed terms are called after.
        needs_features: Whether both outputs must hold a feature map, the last one before the classifier, see
            `bpkd_sdk.features.feature_path`. Without, logits are enough.
        weights: What each term is multiplied with, by the term's name, as far as the method has such numbers.
    """

    name: str = "method"
    needs_features: bool = False
    weights: Mapping[str, float] = {}

    def prepare(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        """Build the parts whose shapes depend on the networks, on the outputs' device.

        Called once with the outputs of any batch of training size, before the optimiser is made and before a state is
        loaded. Methods without such parts do nothing.
        """

    @abstractmethod
    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """The loss terms of one batch.

        Args:
            student: Logits (N, C, h, w), or a whole output.
            teacher: Logits (N, C, h', w'), or a whole output; no gradient reaches it.
            labels: (N, H, W) integers at image resolution.

        Returns:
            Scalar tensors by name, weights applied; their sum is what to add to the cross-entropy.

        Raises:
            ValueError: If the outputs and labels do not fit together.
        """


@dataclass(frozen=True)
class Outputs:
    """Both networks' outputs of one batch, as losses compare them.

    What a property gives is float32 or wider, of the student's size, and constant where it is the teacher's.
    """

    student: SegmentationOutput
    teacher: SegmentationOutput

    @property
    def num_classes(self) -> int:
        """C of the student's logits."""
        return self.student.logits.shape[1]

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Both (N, C, h, w).

        Raises:
            ValueError: If the two differ in images or classes.
        """
        student, teacher = self.student.logits, self.teacher.logits
        if student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                "Expected student and teacher logits to agree in images and classes, but got "
                f"{tuple(student.shape[:2])} and {tuple(teacher.shape[:2])}. "
                "Both networks must have the same classes in the same order."
            )
        return _comparable(student, teacher)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """(N, D_S, h, w) and (N, D_T, h, w).

        Raises:
            ValueError: If an output does not hold exactly one feature map, or the two differ in images.
        """
        student, teacher = _only_feature(self.student, "student"), _only_feature(self.teacher, "teacher")
        if len(student) != len(teacher):
            raise ValueError(
                f"Expected features of the same images, but got {len(student)} of the student and {len(teacher)} of "
                "the teacher."
            )
        return _comparable(student, teacher)


def _comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.interpolate(teacher, student.shape[2:], mode="bilinear", align_corners=False)
    return student, teacher.to(student.dtype)


def _only_feature(output: SegmentationOutput, role: str) -> Tensor:
    if len(output.features) != 1:
        got = ", ".join(map(repr, output.features)) or "none"
        raise ValueError(
            f"Expected one feature map of the {role}, the last before its classifier, but got {got}. "
            "Pass SegmentationOutput(logits, {path: feature}); bpkd_sdk.features.Capture records it."
        )
    return next(iter(output.features.values()))


class WeightedTerms(DistillationLoss):
    """A method that is a weighted sum of terms, each a function of the two `Outputs` and the labels.

    Args:
        num_classes: C; None: that of the first student's logits.
        ignore_index: The void label.
        weights: Of the terms, by name; a term of weight 0 is left out.

    Attributes:
        feature_terms: The terms that compare feature maps.

    Raises:
        ValueError: For a weight below 0, or if all are 0.
    """

    feature_terms: tuple[str, ...] = ()

    def __init__(self, num_classes: int | None, ignore_index: int, weights: Mapping[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"Expected the weight of {name!r} to be a number, 0 or above, but got {weight}.")
        if not any(weights.values()):
            raise ValueError(
                f"Expected one weight of {type(self).__name__} to be above 0, but {', '.join(weights)} have none: it "
                "would teach nothing. Call train() for a student alone."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.weights = weights
        self.needs_features = any(weights[name] for name in self.feature_terms)

    @abstractmethod
    def terms(self, outputs: Outputs, labels: Tensor) -> Terms:
        """By name, what computes each term without its weight; only those of a weight above 0 are called."""

    def check_classes(self, num_classes: int) -> None:
        """Raise ValueError if an argument does not go with so many classes."""

    def build(self, outputs: Outputs) -> None:
        """Build the parts whose shapes depend on the networks, see `DistillationLoss.prepare`."""

    def prepare(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        """See `DistillationLoss.prepare`."""
        self.build(self._outputs(student, teacher))

    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """See `DistillationLoss.forward`."""
        outputs = self._outputs(as_output(student), as_output(teacher))
        logits = outputs.logits[0]
        if len(labels) != len(logits):
            raise ValueError(f"Expected labels for {len(logits)} images, but got {len(labels)}.")
        with torch.autocast(logits.device.type, enabled=False):
            terms = self.terms(outputs, labels)
            return {name: weight * terms[name]() for name, weight in self.weights.items() if weight}

    def _outputs(self, student: SegmentationOutput, teacher: SegmentationOutput) -> Outputs:
        outputs = Outputs(student, teacher)
        if self.num_classes is None:
            self.num_classes = outputs.num_classes
        if outputs.num_classes != self.num_classes:
            raise ValueError(f"Expected logits of {self.num_classes} classes, but got {outputs.num_classes}.")
        self.check_classes(self.num_classes)
        return outputs


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Takes labels at another size by floor-nearest, as the authors' code does: cell i takes row floor(i H / h).

    This is torch's mode "nearest" and not about pixel centres. At a whole stride s the pixel taken lies (s - 1) / 2
    label pixels above and to the left of the cell's centre, so the labels' edges lie as far below and to the right of
    those in resized logits: 3.5 pixels, or 0.44 cells, at stride 8. Where the cells do not divide the labels, the
    offset is about half a cell. The fixtures made with the authors' code hold this rule.

    Args:
        labels: (N, H, W) integers.
        size: (h, w).

    Returns:
        (N, h, w) int64.

    Example:
        >>> labels_at(torch.arange(8).view(1, 1, 8), (1, 2)).tolist()
        [[[0, 4]]]
    """
    rows, columns = (
        torch.arange(cells, device=labels.device) * length // cells
        for length, cells in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows.unsqueeze(1), columns].long()


def projection(student: Tensor, teacher: Tensor) -> nn.Conv2d:
    """A 1x1 convolution without bias from the student's channels to the teacher's, both (N, D, h, w)."""
    return nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False, device=student.device)


def built(module: Part | None, owner: nn.Module) -> Part:
    """The part that `prepare` built.

    Raises:
        RuntimeError: If it was not called.
    """
    if module is None:
        raise RuntimeError(
            f"{type(owner).__name__} has parts that depend on the networks' shapes. Call "
            "`method.prepare(student_output, teacher_output)` once, before the optimiser is made."
        )
    return module


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_positive(**values: float) -> None:
    """Raise ValueError unless every value is a finite number above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"Expected `{name}` to be a number above 0, but got {value}.")


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


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor of the same shape on every process."""
    if process_count() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / process_count()


def rows_of_all_processes(x: Tensor) -> Tensor:
    """The rows of every process's (M, ...) one behind the other, by rank; M may differ."""
    if process_count() == 1:
        return x
    lengths = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(process_count())]
    dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
