"""What every distillation method is: a module from two outputs and labels to named, weighted loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.output import SegmentationOutput, as_output

Part = TypeVar("Part", bound=nn.Module)


class DistillationLoss(nn.Module, ABC):
    """Base of the methods.

    A method owns its trainable parts, if it has any; they are optimised together with the student and left out of the
    saved student. Parameters that do not require a gradient (a critic's) are trained by the method itself. All that a
    method must remember to go on after a break is in its `state_dict`, which holds tensors only.

    Attributes:
        needs_features: Whether both outputs must hold a feature map, the last one before the classifier, see
            `bpkd_sdk.features.feature_path`. Without, logits are enough.
    """

    needs_features: bool = False

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
        """


def paired_logits(student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput) -> tuple[Tensor, Tensor]:
    """Both networks' logits as float32 (or wider) at the student's size; the teacher's resized bilinearly and constant.

    Raises:
        ValueError: If the two differ in images or classes.
    """
    z_student, z_teacher = as_output(student).logits, as_output(teacher).logits.detach()
    if z_student.shape[:2] != z_teacher.shape[:2]:
        raise ValueError(
            "Expected student and teacher logits to agree in images and classes, but got "
            f"{tuple(z_student.shape[:2])} and {tuple(z_teacher.shape[:2])}. "
            "Both networks must have the same classes in the same order."
        )
    z_student, z_teacher = at_least_float32(z_student), at_least_float32(z_teacher)
    if z_teacher.shape[2:] != z_student.shape[2:]:
        z_teacher = F.interpolate(z_teacher, z_student.shape[2:], mode="bilinear", align_corners=False)
    return z_student, z_teacher.to(z_student.dtype)


def paired_features(
    student: Tensor | SegmentationOutput, teacher: Tensor | SegmentationOutput
) -> tuple[Tensor, Tensor]:
    """Both networks' feature maps (N, D_S, h, w) and (N, D_T, h, w), treated as in `paired_logits`; D may differ.

    Raises:
        ValueError: If an output does not hold exactly one feature map, or the two differ in images.
    """
    f_student = at_least_float32(_only_feature(as_output(student), "student"))
    f_teacher = at_least_float32(_only_feature(as_output(teacher), "teacher").detach())
    if len(f_student) != len(f_teacher):
        raise ValueError(
            f"Expected features of the same images, but got {len(f_student)} of the student and {len(f_teacher)} of "
            "the teacher."
        )
    if f_teacher.shape[2:] != f_student.shape[2:]:
        f_teacher = F.interpolate(f_teacher, f_student.shape[2:], mode="bilinear", align_corners=False)
    return f_student, f_teacher.to(f_student.dtype)


def _only_feature(output: SegmentationOutput, role: str) -> Tensor:
    if len(output.features) != 1:
        got = ", ".join(map(repr, output.features)) or "none"
        raise ValueError(
            f"Expected one feature map of the {role}, the last before its classifier, but got {got}. "
            "Pass SegmentationOutput(logits, {path: feature}); bpkd_sdk.features.Capture records it."
        )
    return next(iter(output.features.values()))


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest labels at another size: cell i takes row floor(i H / h), and columns alike.

    Args:
        labels: (N, H, W) integers.
        size: (h, w).

    Returns:
        (N, h, w) int64.
    """
    rows, columns = (
        torch.arange(cells, device=labels.device) * length // cells
        for length, cells in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows.unsqueeze(1), columns].long()


def check_batch(logits: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless logits (N, C, h, w) are of `num_classes` and there are labels for as many images."""
    if logits.shape[1] != num_classes:
        raise ValueError(f"Expected logits of {num_classes} classes, but got {logits.shape[1]}.")
    if len(labels) != len(logits):
        raise ValueError(f"Expected labels for {len(logits)} images, but got {len(labels)}.")


def full_precision(x: Tensor) -> torch.autocast:
    """A ``with`` block without autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def projection(student: Tensor, teacher: Tensor) -> nn.Conv2d:
    """A 1x1 convolution without bias from the student's channels to the teacher's, both (N, D, h, w)."""
    return nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False, device=student.device)


def built(module: Part | None, method: DistillationLoss) -> Part:
    """The part that `prepare` built.

    Raises:
        RuntimeError: If it was not called.
    """
    if module is None:
        raise RuntimeError(
            f"{type(method).__name__} has parts that depend on the networks' shapes. Call "
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


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless every value is a finite number, 0 or above."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"Expected `{name}` to be a number, 0 or above, but got {value}.")
