"""What every distillation method is: a module from two outputs and labels to named, weighted loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.output import SegmentationOutput, as_output


class DistillationLoss(nn.Module, ABC):
    """Base of the methods.

    A method owns its trainable parts, if it has any; they are optimised together with the student and left out of the
    saved student.
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
