"""`check_teacher`: runs a teacher on a few crops and reports what looks wrong, with what to do about it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bpkd_sdk.class_map import ClassGroups
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.transforms import IMAGE_FILL
from bpkd_sdk.errors import warn
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.sizes import Size
from bpkd_sdk.training.teacher import ExternalOnnxRuntime, TeacherModel
from bpkd_sdk.training.teacher_check.crops import Sample, cut_crops, read_samples
from bpkd_sdk.training.teacher_check.inputs import InputFormat, TeacherRunner
from bpkd_sdk.training.teacher_check.scores import (
    MAX_LEFT_OUT,
    Kind,
    LabelScores,
    class_ranges,
    left_out_shares,
    measure_scores,
    output_kind,
)


class TeacherWarning(UserWarning):
    """Warning about a finding of `check_teacher`."""


@dataclass(frozen=True)
class TeacherCheck:
    """Result of `check_teacher`.

    Attributes:
        images: Number of training images that crops were cut from.
        pixels: Number of pixels of these crops.
        accuracy: Share of labelled pixels that the teacher predicts correctly; None without labels.
        cross_entropy: Mean cross-entropy over labelled pixels; probabilities are treated as such. None without labels.
        findings: One line for each thing that looks wrong, with what to do; empty if there is none.
    """

    images: int
    pixels: int
    accuracy: float | None
    cross_entropy: float | None
    findings: tuple[str, ...]


def check_teacher(
    teacher: TeacherModel,
    dataset: SegmentationDataset,
    crop_size: Size,
    *,
    device: torch.device,
    dtype: torch.dtype,
    base_size: Size | None = None,
    classes: ClassGroups | None = None,
) -> TeacherCheck:
    """Check a teacher on a few training images.

    Its weights, buffers and training flags, and the global random state, stay unchanged. A module is moved to the
    device, as in training.

    Args:
        teacher: Module, or runtime that returns logits.
        dataset: Training data.
        crop_size: (height, width) of the training crops, which the teacher accepts.
        device: Device of the training.
        dtype: Data type of a module's autocast; float32 for none.
        base_size: (longer side, shorter side) that training resizes images into; None: they keep their size.
        classes: The teacher's classes for each class of the data; None for the same classes in the same order.

    Raises:
        ValueError: If outputs are not finite.
    """
    with _keep_random_state(device), torch.no_grad():
        checked = TeacherRunner(teacher, device, dtype, classes)
        crops, outputs = _run_on_crops(checked, read_samples(dataset, base_size), crop_size)
        _check_finite(checked, crops, outputs)
        kind = output_kind(outputs)
        scores = measure_scores(crops, outputs, kind, classes)
        is_labelled = dataset.num_classes > 1 and scores.total > 0
        images = f"{len(crops)} training image{'s' if len(crops) > 1 else ''}"
        findings = []
        if _is_constant(crops, outputs, dataset.pixels.value_range):
            findings.append(
                f"The teacher returns the same output for every pixel of {images}. Check that its weights are loaded "
                "and that teacher.spec normalises images as in its training."
            )
        else:
            if kind != "logits":
                findings.append(_kind_finding(checked, kind, images))
            if classes is not None:
                findings.extend(_left_out_findings(checked, crops, outputs, kind, classes, images))
            if is_labelled:
                findings.extend(_score_findings(checked, crops, kind, scores, dataset.class_names, images))
    return TeacherCheck(
        images=len(crops),
        pixels=sum(crop.label.numel() for crop in crops),
        accuracy=scores.accuracy if is_labelled else None,
        cross_entropy=scores.cross_entropy if is_labelled else None,
        findings=tuple(findings),
    )


def warn_about_teacher(
    teacher: TeacherModel,
    dataset: SegmentationDataset,
    crop_size: Size,
    device: torch.device,
    dtype: torch.dtype,
    base_size: Size | None,
    classes: ClassGroups | None = None,
) -> None:
    """Warn about each finding of `check_teacher`; arguments and errors are the same."""
    check = check_teacher(teacher, dataset, crop_size, device=device, dtype=dtype, base_size=base_size, classes=classes)
    for finding in check.findings:
        warn(finding, TeacherWarning)


@contextmanager
def _keep_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch, which a data set or a teacher may use."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _run_on_crops(
    teacher: TeacherRunner, samples: Sequence[Sample], crop_size: Size
) -> tuple[list[Sample], list[Tensor]]:
    """Cut crops that the teacher accepts, and run it on them."""
    fill = IMAGE_FILL if teacher.spec.pixels.is_rgb8 else teacher.spec.mean_pixel
    crops = cut_crops(samples, [teacher.crop_size(sample.size, crop_size) for sample in samples], fill)
    try:
        return crops, teacher(crops, teacher.own_format)
    except (RuntimeError, ValueError, AssertionError):  # some modules accept only the size of the training crops
        if isinstance(teacher.model, Runtime) or all(crop.size == crop_size for crop in crops):
            raise
    crops = cut_crops(samples, [crop_size] * len(samples), fill)
    return crops, teacher(crops, teacher.own_format)


def _check_finite(teacher: TeacherRunner, crops: Sequence[Sample], outputs: Sequence[Tensor]) -> None:
    """Raise ValueError for outputs with NaN or infinity."""
    broken = _count_not_finite(outputs)
    if not any(broken):
        return
    if isinstance(teacher.model, Runtime):
        precision = teacher.model.metadata["precision"]
        advice = f"Its precision is {precision}: export it again with precision='fp32', from weights that are finite."
    elif teacher.dtype != torch.float32:
        name = str(teacher.dtype).removeprefix("torch.")
        teacher.dtype = torch.float32
        if any(_count_not_finite(teacher(crops, teacher.own_format))):
            advice = f"They are not finite in float32 either, so {name} is not the reason: check its weights."
        else:
            advice = f"They are finite in float32 but not in {name}: pass teacher_precision='fp32'."
    else:
        advice = "Check its weights, and that teacher.spec normalises images as in its training."
    raise ValueError(
        f"The teacher's outputs are not finite (NaN or infinity) for {sum(map(bool, broken))} of {len(crops)} training "
        f"images, in {sum(broken)} of {sum(output[0].numel() for output in outputs)} pixels. {advice}"
    )


def _count_not_finite(outputs: Sequence[Tensor]) -> list[int]:
    """Count the pixels of each output that contain a value which is not finite."""
    return [int((~torch.isfinite(output)).any(0).sum()) for output in outputs]


def _is_constant(crops: Sequence[Sample], outputs: Sequence[Tensor], value_range: tuple[float, float]) -> bool:
    """Return whether outputs are the same for every pixel, although the images vary."""
    images = [crop.image for crop in crops]
    low, high = value_range
    if max(image.max().item() for image in images) - min(image.min().item() for image in images) < (high - low) / 16:
        return False
    lowest, highest = class_ranges(outputs)
    return bool((highest - lowest).max() <= 1e-4 * torch.maximum(highest.abs(), lowest.abs()).max())


def _kind_finding(teacher: TeacherRunner, kind: Kind, images: str) -> str:
    softmax = kind == "probabilities"
    measured, layer = ("lie in 0..1 and sum to 1", "softmax") if softmax else ("all lie in 0..1", "sigmoid")
    inverse = "x.clamp(min=1e-6).log()" if softmax else "x.logit(eps=1e-6)"
    if isinstance(teacher.model, Runtime):
        advice = f"Export it again without its last {layer}."
    else:
        advice = (
            f"Return the logits before the {layer} (segmentation-models-pytorch: activation=None), or pass a module "
            f"that returns {inverse} of its output x."
        )
    return (
        f"The teacher has a {layer} inside: over {images} its outputs {measured}. Distillation takes logits. {advice}"
    )


def _left_out_findings(
    teacher: TeacherRunner,
    crops: Sequence[Sample],
    outputs: Sequence[Tensor],
    kind: Kind,
    classes: ClassGroups,
    images: str,
) -> list[str]:
    """Report classes that the class map leaves out and that the teacher finds in many pixels."""
    shares = left_out_shares(crops, outputs, kind, classes)
    if sum(shares.values()) <= MAX_LEFT_OUT:
        return []
    names = teacher.spec.class_names
    found = ", ".join(
        f"{names[column] if column < len(names) else f'class {column}'} {share:.0%}"
        for column, share in list(shares.items())[:5]
    )
    return [
        f"The teacher finds classes that class_map leaves out: over {images} they are the likeliest in "
        f"{sum(shares.values()):.0%} of the pixels ({found}). There it can only teach which class of the data is next "
        'best. Assign them in class_map, for example to a rest class: {"other": "*"}.'
    ]


def _score_findings(
    teacher: TeacherRunner,
    crops: Sequence[Sample],
    kind: Kind,
    scores: LabelScores,
    class_names: Sequence[str],
    images: str,
) -> list[str]:
    """Search for a better input format, and for outputs that are unrelated to the labels."""
    if not scores.can_improve:
        return []
    better = _better_format(teacher, crops, kind, scores)
    if better is not None:
        input_format, better_scores = better
        return [
            f"The teacher fits the labels better with {input_format.description}: over {images} its accuracy is "
            f"{better_scores.accuracy:.3f} instead of {scores.accuracy:.3f}, and its cross-entropy "
            f"{better_scores.cross_entropy:.3f} instead of {scores.cross_entropy:.3f}. "
            f"{_format_advice(teacher, input_format, len(class_names))}"
        ]
    if not scores.is_chance:
        return []
    channels = teacher.spec.in_channels
    not_tried = (
        f" Other normalisations and orders of the {channels} channels were not tried: they are known for RGB only."
    )
    not_tried = "" if channels == 3 else not_tried
    return [
        f"The teacher is no better than chance: over {images} its accuracy is {scores.accuracy:.3f} (always "
        f"{class_names[int(scores.counts.sum(0).argmax())]!r}: {scores.majority_accuracy:.3f}), and its cross-entropy "
        f"{scores.cross_entropy:.3f} (the classes' frequencies: {scores.entropy:.3f}). Check that its weights are "
        f"loaded, that its classes are in the data's order, and that it was trained for these classes.{not_tried}"
    ]


def _better_format(
    teacher: TeacherRunner, crops: Sequence[Sample], kind: Kind, scores: LabelScores
) -> tuple[InputFormat, LabelScores] | None:
    """Try other input formats on the first crop, and the best of them on all crops.

    Returns:
        The best format with its scores, if it is clearly better than the teacher's own; otherwise None.
    """
    best, best_scores = teacher.own_format, scores.first
    for input_format in teacher.other_formats():
        other_scores = measure_scores(crops[:1], teacher(crops[:1], input_format), kind, teacher.classes)
        if other_scores.cross_entropy < best_scores.cross_entropy:
            best, best_scores = input_format, other_scores
    if best == teacher.own_format:
        return None
    best_scores = measure_scores(crops, teacher(crops, best), kind, teacher.classes)
    return (best, best_scores) if best_scores.is_clearly_better(scores) else None


def _format_advice(teacher: TeacherRunner, input_format: InputFormat, num_classes: int) -> str:
    """Return the code to write so that the teacher gets its images in this format."""
    mean, std = _format_values(input_format.mean), _format_values(input_format.std)
    if isinstance(teacher.model, Runtime):
        advice = []
        if input_format.name and isinstance(_innermost(teacher.model), ExternalOnnxRuntime):
            advice.append(f"Pass teacher_mean={mean}, teacher_std={std}.")
        elif input_format.name:
            advice.append(f"Export it again from a network whose spec has mean={mean}, std={std}.")
        if input_format.is_bgr:
            advice.append("Export it again from a module whose forward returns network(x.flip(1)).")
        return " ".join(advice)
    spec = teacher.spec
    if spec.name or spec.class_names:
        code = f"dataclasses.replace(get_spec(teacher), mean={mean}, std={std})"
    else:
        divisor = f", size_divisor={spec.size_divisor}" if spec.size_divisor > 1 else ""
        count = num_classes if teacher.classes is None else teacher.classes.channels or "..."
        code = f"NetworkSpec(name=None, num_classes={count}, mean={mean}, std={std}{divisor})"
    if not input_format.is_bgr:
        return f"Set teacher.spec = {code}."
    return f"Swap its channels: pass a module whose forward returns teacher(x.flip(1)), with its spec = {code}."


def _format_values(values: Sequence[float]) -> str:
    return f"({', '.join('1 / 255' if value == 1 / 255 else f'{value:g}' for value in values)})"


def _innermost(runtime: Runtime) -> Runtime:
    """Return the runtime inside the wrappers that change the order of the classes."""
    while isinstance(inner := getattr(runtime, "runtime", None), Runtime):
        runtime = inner
    return runtime
