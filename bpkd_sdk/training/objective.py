"""The training objective: student and distillation method as one module, from a batch to its named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bpkd_sdk.class_map import ClassGroups
from bpkd_sdk.features import Capture
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.models import get_spec
from bpkd_sdk.output import SegmentationOutput, as_output, comparable_outputs
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.label_losses import LabelLosses, resize_to_labels


class Objective(nn.Module):
    """Student and method as one module that maps a batch to its loss terms.

    DistributedDataParallel and autocast wrap one forward pass of one module. The student inside is not wrapped, so that
    it is evaluated and saved in full precision and without torch.compile.

    Args:
        student: Network to train.
        capture: Recorder of the student's feature map.
        method: Distillation method, prepared for the two networks; None trains on the labels alone.
        config: Options of the run.
        label_losses: Losses on the labels.
        classes: The teacher's classes for each class of the data; the method compares those that the teacher has.
    """

    def __init__(
        self,
        student: nn.Module,
        capture: Capture,
        method: DistillationLoss | None,
        config: TrainingConfig,
        label_losses: LabelLosses,
        classes: ClassGroups | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.capture = capture
        self.config = config
        self.label_losses = label_losses
        self.classes = classes
        self.call_student = compiled_call(student, config)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        teacher_output: SegmentationOutput | None,
        labelled_pixels: Tensor,
        method_factor: float,
    ) -> dict[str, Tensor]:
        """Run the student on a batch and return the weighted loss terms.

        Args:
            images: uint8 or float32 (N, channels, h, w), not normalised.
            labels: Integers (N, h, w), class ids or void.
            teacher_output: Output of the teacher for these images; None without a teacher.
            labelled_pixels: Divisor of the losses that are sums over pixels, see `LabelLosses`.
            method_factor: Factor on the method's terms during its warm-up, above 0 and at most 1.

        Returns:
            Scalars by name: the losses on the labels, "aux" if the student has an auxiliary head, and the terms of the
            method.
        """
        labels = labels.long()  # converted on the device, because labels are transferred as uint8
        # Hooks record the feature map while the student runs.
        student_output = replace(self._run_student(images), features=self.capture.take())
        terms: dict[str, Tensor] = self.label_losses(student_output.logits, labels, labelled_pixels)
        if student_output.aux_logits is not None:
            auxiliary = self.label_losses(student_output.aux_logits, labels, labelled_pixels)
            terms["aux"] = self.config.aux_weight * torch.stack(list(auxiliary.values())).sum()
        if self.method is not None and teacher_output is not None:
            compared = student_output, teacher_output
            if self.classes is not None:
                compared = self.classes.select(student_output), self.classes.select(teacher_output)
                labels = self.classes.select_labels(labels, self.label_losses.ignore_index)
            method_terms = self.method(*comparable_outputs(*compared), labels)
            if both := terms.keys() & method_terms:
                raise ValueError(
                    f"The method {self.method.name!r} returns a term with the name of another loss: "
                    f"{', '.join(sorted(both))}. Give its terms other names."
                )
            terms |= {name: method_factor * term for name, term in method_terms.items()}
        return terms

    def _run_student(self, images: Tensor) -> SegmentationOutput:
        try:
            return as_output(self.call_student(network_input(self.student, images, self.config)))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"A batch of {len(images)} image is too small for the student's batch norm: one of its layers gets a "
                "single value per channel. Pass a larger batch_size or a smaller accumulate."
            ) from error

    def weights(self, terms: Mapping[str, object], method_factor: float) -> dict[str, float]:
        """Return the factor on each of these terms, the warm-up included; terms with an unknown factor are left out."""
        weights = {**self.config.loss_weights, "aux": self.config.aux_weight}
        if self.method is not None:
            weights |= {name: method_factor * weight for name, weight in self.method.weights.items()}
        return {name: weights[name] for name in terms if name in weights}


def compiled_call(network: nn.Module, config: TrainingConfig) -> Callable[..., Any]:
    """Return a function that calls the network, compiled by torch.compile if configured.

    It is a bound method and not a module, so it adds nothing to the state dict of a module that keeps it.
    """
    called = cast("nn.Module", torch.compile(network)) if config.compile else network
    return called.__call__


def network_input(network: nn.Module, images: Tensor, config: TrainingConfig) -> Tensor:
    """Normalise images (N, channels, H, W) to a network's float32 input, in the configured memory format.

    Args:
        network: Network, whose spec states the normalisation.
        images: uint8 or float32, in the value range of the spec.
        config: Options of the run.
    """
    inputs = get_spec(network).normalize(images)
    return inputs.contiguous(memory_format=torch.channels_last) if config.channels_last else inputs


def to_device(network: nn.Module, device: torch.device, config: TrainingConfig) -> nn.Module:
    """Move a network to a device, with its weights in the configured memory format."""
    network.to(device)
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


def predicted_labels(logits: Tensor, labels: Tensor, ignore_index: int, num_classes: int) -> Tensor:
    """Replace labels by the classes that logits predict; void pixels stay void.

    Pixels become void too where the classes of the teacher that are left out are likelier than every class of the data.

    Args:
        logits: (N, C, h, w), or (N, C + 1, h, w) with a channel of the classes that are left out. They are resized
            bilinearly to the size of the labels.
        labels: Integers (N, H, W); only their void pixels are used.
        ignore_index: Void label.
        num_classes: C, the number of classes of the data.

    Returns:
        int64 (N, H, W).
    """
    void = labels == ignore_index
    predicted = to_mask(resize_to_labels(logits, labels)).long()
    if logits.shape[1] > num_classes:
        void = void | (predicted == num_classes)
    return predicted.masked_fill(void, ignore_index)
