"""`DistillationLoss`, the interface of every distillation method, and the base class of the methods in this package.

Training uses `DistillationLoss` only. `Composition` combines several methods into one. `WeightedLoss` implements what
the methods of this package share, so that the file of a method contains only its equations, arguments and parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.arrays import at_least_float32
from bpkd_sdk.output import SegmentationOutput, as_output, comparable_outputs

Part = TypeVar("Part", bound=nn.Module)


class DistillationLoss(nn.Module, ABC):
    """A distillation method: a module that maps student output, teacher output and labels to named, weighted terms.

    Trainable parts of a method (a projection, for example) are parameters that require a gradient. They are optimised
    together with the student, and they are not saved with it. Parameters that do not require a gradient (a critic's)
    are trained by the method itself. The `state_dict` of a method contains everything that is needed to resume it.

    Attributes:
        name: Name of the method in folders of runs, in tables and in the terms of a `Composition`.
        needs_features: Whether each output must contain one feature map: the last one before the classifier, see
            `bpkd_sdk.features.feature_path`. Otherwise logits are enough.
        weights: Weight of each term, by the name of the term; empty if the method has no such numbers.
    """

    name: str = "method"
    needs_features: bool = False
    weights: Mapping[str, float] = {}

    def prepare(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        """Build the parts whose shapes depend on the networks, on the device of the outputs.

        Training calls this function once, before it makes the optimiser and before it loads a state. The default
        implementation builds nothing.

        Args:
            student: Output of the student for any batch of the training size.
            teacher: Output of the teacher for the same batch.
        """

    @abstractmethod
    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """Compute the loss terms of one batch.

        Args:
            student: Logits (N, C, h, w), or an output that contains them. Training passes two logits [0, z] for both
                networks if one of them has one logit z, see `bpkd_sdk.output.comparable_outputs`.
            teacher: Logits (N, C, h', w'), or an output that contains them; it receives no gradient.
            labels: (N, H, W) integers at the resolution of the images.

        Returns:
            Scalar tensors by name, multiplied by their weights. Training adds their sum to the cross-entropy.

        Raises:
            ValueError: If the outputs and the labels do not fit together.
        """


class Composition(DistillationLoss):
    """Several methods as one. Its terms are named "method/term", for example "bpkd/edge".

    The second method of the same name is called "cwd2", the third "cwd3". The same names are used in the state dict.

    Args:
        methods: One or more methods, each a different object.

    Raises:
        ValueError: If there is no method, or if the same object occurs twice.

    Examples:
        >>> from bpkd_sdk.losses import CWDLoss
        >>> Composition([CWDLoss(weight=3), CWDLoss(weight=0, feature_weight=50)]).weights
        {'cwd/logit': 3, 'cwd/feature': 0.0, 'cwd2/logit': 0, 'cwd2/feature': 50}
    """

    def __init__(self, methods: Sequence[DistillationLoss]) -> None:
        super().__init__()
        if not methods:
            raise ValueError("Expected at least one method, but got none. Name one, or call train() instead.")
        if len(set(methods)) < len(methods):
            raise ValueError("Expected methods that differ, but got the same object twice. Create one for each place.")
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
        """Prepare every method, see `DistillationLoss.prepare`."""
        for method in self.methods.values():
            method.prepare(student, teacher)  # type: ignore[operator]

    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """Compute the terms of every method, see `DistillationLoss.forward`."""
        return {
            f"{name}/{term}": value
            for name, method in self.methods.items()
            for term, value in method(student, teacher, labels).items()
        }


class WeightedLoss(DistillationLoss):
    """Base class of methods whose loss is a weighted sum of terms; a subclass implements `terms`.

    Args:
        num_classes: C, the number of classes, 2 for networks with one logit; None takes it from the first logits.
        ignore_index: Label of void pixels.
        weights: Weight of each term by name, 0 or above. A term of weight 0 is not computed.

    Attributes:
        feature_terms: Names of the terms that compare feature maps.

    Raises:
        ValueError: If a weight is below 0, or if all weights are 0.
    """

    feature_terms: tuple[str, ...] = ()

    def __init__(self, num_classes: int | None, ignore_index: int, weights: Mapping[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(
                    f"Expected the weight of {name!r} to be a finite number, 0 or above, but got {weight}."
                )
        if not any(weights.values()):
            raise ValueError(
                f"Expected at least one weight of {type(self).__name__} to be above 0, but the weights of "
                f"{', '.join(weights)} are 0. Set one of them, or call train() to train a student without a teacher."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.weights = weights
        self.needs_features = any(weights[name] for name in self.feature_terms)

    @abstractmethod
    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms of weight above 0, by name, without their weights.

        Args:
            outputs: Outputs of both networks.
            labels: (N, H, W) integers at the resolution of the images.
        """

    def build(self, outputs: OutputPair) -> None:
        """Build the parts whose shapes depend on the networks, see `DistillationLoss.prepare`."""

    def check_num_classes(self, num_classes: int) -> None:
        """Raise ValueError if an argument does not fit the number of classes."""

    def prepare(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        """Check the outputs and build the parts, see `DistillationLoss.prepare`."""
        self.build(self._pair(student, teacher))

    def forward(
        self, student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """Compute the terms and multiply them by their weights, see `DistillationLoss.forward`."""
        outputs = self._pair(as_output(student), as_output(teacher))
        logits = outputs.logits[0]
        if len(labels) != len(logits):
            raise ValueError(f"Expected labels for {len(logits)} images, but got {len(labels)}.")
        with torch.autocast(logits.device.type, enabled=False):
            terms = self.terms(outputs, labels)
            return {name: weight * terms[name] for name, weight in self.weights.items() if weight}

    def _pair(self, student: SegmentationOutput, teacher: SegmentationOutput) -> OutputPair:
        outputs = OutputPair(*comparable_outputs(student, teacher))
        if self.num_classes is None:
            self.num_classes = outputs.num_classes
        if outputs.num_classes != self.num_classes:
            raise ValueError(
                f"Expected logits of {self.num_classes} classes, but got {outputs.num_classes} (one logit has two)."
            )
        self.check_num_classes(self.num_classes)
        return outputs


@dataclass(frozen=True)
class OutputPair:
    """Outputs of student and teacher for one batch, made comparable.

    The properties return tensors of float32 or float64, the teacher's detached and resized to the student's size.

    Attributes:
        student: Output of the student.
        teacher: Output of the teacher.
    """

    student: SegmentationOutput
    teacher: SegmentationOutput

    @property
    def num_classes(self) -> int:
        """C, the number of channels of the student's logits."""
        return self.student.logits.shape[1]

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher, both (N, C, h, w).

        Raises:
            ValueError: If the two differ in the number of images or classes.
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
        """Feature maps of student (N, D_S, h, w) and teacher (N, D_T, h, w).

        Raises:
            ValueError: If an output does not contain exactly one feature map, or if the number of images differs.
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


def require_prepared(part: Part | None, owner: nn.Module) -> Part:
    """Return a part that `prepare` builds.

    Args:
        part: The part, or None if it was not built.
        owner: Module that the part belongs to, for the error message.

    Raises:
        RuntimeError: If `prepare` was not called.
    """
    if part is None:
        raise RuntimeError(
            f"{type(owner).__name__} has parts that depend on the networks' shapes. Call "
            "`method.prepare(student_output, teacher_output)` once, before the optimiser is made."
        )
    return part


def check_positive(**values: float) -> None:
    """Raise ValueError unless every argument is a finite number above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"Expected `{name}` to be a finite number above 0, but got {value}.")


def method_arguments(method: DistillationLoss | None) -> dict[str, Any]:
    """Return the class and the arguments of a method as plain JSON values; an empty dict for None.

    Arguments are the public attributes that are numbers, strings or collections, and the method's own buffers. The
    arguments of methods inside the method are listed under "parts".
    """
    if method is None:
        return {}
    facts: dict[str, Any] = {"class": type(method).__name__}
    for name, value in vars(method).items():
        plain = dict(value) if isinstance(value, Mapping) else value
        if name[0] != "_" and name != "training" and isinstance(plain, (bool, int, float, str, tuple, list, dict)):
            facts[name] = plain
    facts |= {name: buffer.tolist() for name, buffer in method.named_buffers(recurse=False)}
    parts = [part for child in method.children() for part in _methods_in(child)]
    return facts | ({"parts": [method_arguments(part) for part in parts]} if parts else {})


def _methods_in(module: nn.Module) -> list[DistillationLoss]:
    if isinstance(module, DistillationLoss):
        return [module]
    return [part for child in module.children() for part in _methods_in(child)]
