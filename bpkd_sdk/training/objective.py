"""What is minimised: student and method as one module, from a batch to its named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.features import Capture
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.method import at_least_float32
from bpkd_sdk.models import get_spec
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.training.config import TrainingConfig


class Objective(nn.Module):
    """Student and method as one module from a batch to its loss terms.

    One forward pass of one module is what distributed data parallelism and autocast wrap; the student inside stays as
    it is, so that it is evaluated and saved in full precision, and uncompiled.

    Args:
        student: The network to train.
        capture: Of its feature map.
        method: Prepared for the two networks, or None.
        config: All options.
        ignore_index: The void label.
    """

    def __init__(
        self,
        student: nn.Module,
        capture: Capture,
        method: DistillationLoss | None,
        config: TrainingConfig,
        ignore_index: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.capture = capture
        self.spec = get_spec(student)
        self.config = config
        self.ignore_index = ignore_index
        self.run_student = runner(student, config)

    def forward(
        self, images: Tensor, labels: Tensor, teacher: SegmentationOutput | None, pixels: Tensor, share: float
    ) -> dict[str, Tensor]:
        """The weighted terms of one batch.

        Args:
            images: (N, 3, h, w) uint8.
            labels: (N, h, w) integers.
            teacher: Its output for these images, or None.
            pixels: What the sum of the pixels' cross-entropies is divided by, see `cross_entropy`.
            share: How far the method's warm-up is, above 0 and at most 1.

        Returns:
            Scalars by name.
        """
        labels = labels.long()  # here, on the device: they come as bytes
        if self.config.labels == "teacher" and teacher is not None:
            labels = torch.where(labels == self.ignore_index, labels, to_mask(_resized(teacher.logits, labels)))
        student = replace(self._study(images), features=self.capture.take())
        terms = {"ce": cross_entropy(student.logits, labels, self.ignore_index, pixels)}
        if student.aux_logits is not None:
            auxiliary = cross_entropy(student.aux_logits, labels, self.ignore_index, pixels)
            terms["aux"] = self.config.aux_weight * auxiliary
        if self.method is not None and teacher is not None:
            terms |= {name: share * term for name, term in self.method(student, teacher, labels).items()}
        return terms

    def _study(self, images: Tensor) -> SegmentationOutput:
        try:
            return as_output(self.run_student(network_input(self.student, images, self.config)))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"{len(images)} image at a time is too few for the student's batch norm, one of which sees a single "
                "value per channel. Pass a larger batch_size, or a smaller accumulate."
            ) from error

    def weights(self, terms: Mapping[str, object], share: float) -> dict[str, float]:
        """What each of these terms was multiplied with, where it is known: its weight times the warm-up's share."""
        weights = {"ce": 1.0, "aux": self.config.aux_weight}
        if self.method is not None:
            weights |= {name: share * weight for name, weight in self.method.weights.items()}
        return {name: weights[name] for name in terms if name in weights}


def runner(network: nn.Module, config: TrainingConfig) -> Callable[..., Any]:
    """What calls the network, compiled if configured; no module itself, so it adds nothing to a state dict."""
    called = cast("nn.Module", torch.compile(network)) if config.compile else network
    return called.__call__


def network_input(network: nn.Module, images: Tensor, config: TrainingConfig) -> Tensor:
    """uint8 images (N, 3, H, W) as the network takes them: normalised, float32, in the configured memory format."""
    inputs = get_spec(network).normalize(images)
    return inputs.contiguous(memory_format=torch.channels_last) if config.channels_last else inputs


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, pixels: Tensor | None = None) -> Tensor:
    """Cross-entropy of the pixels that are not void, on logits resized to the labels; 0 where all are void.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) int64.
        ignore_index: The void label.
        pixels: What the sum over pixels is divided by; None: their number, so that it is their mean.
    """
    total = F.cross_entropy(_resized(logits, labels), labels, ignore_index=ignore_index, reduction="sum")
    return total / ((labels != ignore_index).sum().clamp(min=1) if pixels is None else pixels)


def _resized(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(at_least_float32(logits), labels.shape[1:], mode="bilinear", align_corners=False)
