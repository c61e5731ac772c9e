"""The networks of a run: opened from whatever names them, and held against the data and each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bpkd_sdk.classes import Order, ReorderedNetwork, class_order, reorder_classifier
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.errors import listed
from bpkd_sdk.features import Capture, eval_mode, feature_path, find_module, unwrapped
from bpkd_sdk.losses import METHODS, DistillationLoss, create_method
from bpkd_sdk.models import CHECKPOINT_SUFFIXES, create_model, get_spec, load_model
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.runtime import Runtime, match_runtime, open_runtime
from bpkd_sdk.runtime.formats import ENGINE_SUFFIXES
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.teacher import TeacherModel, open_onnx, teacher_logits

Network = nn.Module | str | Path


def open_network(network: Network, num_classes: int) -> nn.Module:
    """A module as it is, the network in a checkpoint, or one built by its name."""
    if isinstance(network, nn.Module):
        return network
    if Path(network).suffix in CHECKPOINT_SUFFIXES:
        return load_model(network)
    return create_model(str(network), num_classes)


def open_teacher(
    teacher: Network | Runtime, num_classes: int, config: TrainingConfig, device: torch.device
) -> TeacherModel:
    """A module in eval mode, or what runs an exported file.

    Raises:
        ValueError: If a module is in training mode, a file returns no logits, or an option is for another teacher.
    """
    suffix = Path(teacher).suffix if isinstance(teacher, (str, Path)) else ""
    if suffix == ".onnx":
        return _checked_runtime(open_onnx(Path(str(teacher)), device, config.teacher_mean, config.teacher_std), config)
    if config.teacher_mean or config.teacher_std:
        raise ValueError(
            "teacher_mean and teacher_std are for an ONNX file that does not say how images are normalised. A module "
            "says it by its spec: teacher.spec = NetworkSpec(name=None, num_classes=..., mean=..., std=...). A "
            "checkpoint or an engine says it itself."
        )
    if isinstance(teacher, Runtime) or suffix in ENGINE_SUFFIXES:
        return _checked_runtime(open_runtime(teacher, device), config)
    network = open_network(teacher, num_classes)
    if isinstance(teacher, (str, Path)) and suffix not in CHECKPOINT_SUFFIXES:
        warnings.warn(f"The teacher {teacher!r} is built by name and has random weights.", stacklevel=4)
        return network.eval()
    training = [name or "the network" for name, module in network.named_modules() if module.training]
    if training:
        raise ValueError(f"The teacher is in training mode ({training[0]}). Call teacher.eval() first.")
    return network


def match_teacher(teacher: TeacherModel, dataset: SegmentationDataset, config: TrainingConfig) -> TeacherModel:
    """Return the teacher with its classes in the data's order; it is not changed itself.

    Raises:
        ValueError: If its classes are not the data's.
    """
    if isinstance(teacher, Runtime):
        return match_runtime(teacher, dataset, dataset.name, match_classes=config.match_classes)
    order = class_order(
        get_spec(teacher),
        dataset,
        network_name="The teacher",
        data_name=dataset.name,
        match_classes=config.match_classes,
    )
    if order is None:
        return teacher
    matched = ReorderedNetwork(teacher, order).to(_device(teacher))
    matched.spec = replace(  # type: ignore[assignment]
        get_spec(teacher), class_names=dataset.class_names, palette=dataset.palette
    )
    return matched


def student_order(student: nn.Module, dataset: SegmentationDataset, config: TrainingConfig) -> Order | None:
    """Return the student's column of each class of the data; None for the same order.

    Raises:
        ValueError: If its classes are not the data's.
    """
    return class_order(
        get_spec(student),
        dataset,
        network_name="The student",
        data_name=dataset.name,
        match_classes=config.match_classes,
    )


def match_student(
    student: nn.Module, dataset: SegmentationDataset, crop_size: tuple[int, int], order: Order | None
) -> None:
    """Put the student's classifier in the data's order, in place, and give the student the data's classes.

    Raises:
        ValueError: If its classifier cannot be put in order.
    """
    if order is not None:
        images = torch.rand(1, 3, *crop_size, generator=torch.Generator().manual_seed(0)).to(_device(student))
        with eval_mode(student):
            reorder_classifier(unwrapped(student), order, images)
    student.spec = replace(  # type: ignore[assignment]
        get_spec(student), num_classes=dataset.num_classes, class_names=dataset.class_names, palette=dataset.palette
    )


def _checked_runtime(runtime: Runtime, config: TrainingConfig) -> Runtime:
    if runtime.metadata["argmax"]:
        raise ValueError(
            f"The teacher {runtime.name} returns masks, and methods compare logits. Export it with argmax=False."
        )
    if config.teacher_precision is not None:
        raise ValueError(f"{runtime.name} has a precision of its own; leave out teacher_precision.")
    return runtime


def default_crop(dataset: SegmentationDataset, networks: Sequence[TeacherModel]) -> tuple[int, int]:
    """The first image's size, at most 512 a side, as all networks take it; that of a file which takes only one."""
    for network in networks:
        if isinstance(network, Runtime) and network.accepts.fixed_size is not None:
            return network.accepts.fixed_size
    divisor = math.lcm(*(_divisor(network) for network in networks))
    height, width = (max(divisor, min(side, 512) // divisor * divisor) for side in dataset[0][0].shape[1:])
    return height, width


def _divisor(network: TeacherModel) -> int:
    return (network.spec if isinstance(network, Runtime) else get_spec(network)).size_divisor


def feature_paths(
    student: nn.Module, teacher: TeacherModel | None, method: DistillationLoss | None, config: TrainingConfig
) -> tuple[str | None, str | None]:
    """The paths of both feature maps, or None where the method needs none.

    Raises:
        ValueError: If it needs them and the teacher is a file; for a configured path that does not exist.
    """
    for network, path in ((student, config.student_feature), (teacher, config.teacher_feature)):
        if path is not None and isinstance(network, nn.Module):
            find_module(network, path)
    if teacher is None or method is None or not method.needs_features:
        return None, None
    if isinstance(teacher, Runtime):
        enough = [name for name in METHODS if not create_method(name, 1).needs_features]
        raise ValueError(
            f"The method {method.name!r} compares feature maps, and the teacher {teacher.name} gives logits only. Take "
            f"the teacher's checkpoint, or a method that needs no more:\n{listed(enough)}"
        )
    return config.student_feature or feature_path(student), config.teacher_feature or feature_path(teacher)


@torch.no_grad()
def probe(
    role: str,
    network: TeacherModel,
    feature: str | None,
    dataset: SegmentationDataset,
    crop_size: tuple[int, int],
    images: int,
) -> SegmentationOutput:
    """A network's output for black crops, once it is clear that it takes them and has the data's classes.

    Args:
        role: "student" or "teacher".
        network: Is left as it was.
        feature: Path of a feature map to record, or None.
        dataset: Training data.
        crop_size: (height, width).
        images: How many at once; a module takes any number, and is asked for one.

    Raises:
        ValueError: If it cannot take the crops, or has other classes.
    """
    divisor = _divisor(network)
    if any(side % divisor for side in crop_size):
        nearest = tuple(max(divisor, round(side / divisor) * divisor) for side in crop_size)
        raise ValueError(
            f"Expected `crop_size` to be multiples of {divisor}, which the {role} needs, but got {crop_size}. "
            f"Nearest: {nearest}."
        )
    if isinstance(network, Runtime):
        with _taking_crops(role, crop_size):
            output = SegmentationOutput(teacher_logits(network, torch.zeros(images, 3, *crop_size, dtype=torch.uint8)))
    else:
        with Capture(network, [] if feature is None else [feature]) as capture:
            with _taking_crops(role, crop_size), eval_mode(network):
                output = as_output(network(torch.zeros(1, 3, *crop_size, device=_device(network))))
            output = replace(output, features=capture.take())
    if output.logits.shape[1] != dataset.num_classes:
        raise ValueError(
            f"The {role} predicts {output.logits.shape[1]} classes, but {dataset.name} has {dataset.num_classes}: "
            f"{', '.join(dataset.class_names[:8])}{', ...' if dataset.num_classes > 8 else ''}."
        )
    return output


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


@contextmanager
def _taking_crops(role: str, crop_size: tuple[int, int]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"The {role} cannot take a crop of {crop_size}: {error}") from error
