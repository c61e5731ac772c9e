"""Compatibility of the networks of a run with the data and with each other: crops, classes and feature maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from bpkd_sdk.class_map import ClassGroups, ClassMap, class_map_advice, group_classes, map_by_name
from bpkd_sdk.classes import Order, class_order
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.errors import format_list, warn
from bpkd_sdk.features import Capture, eval_mode, feature_path, find_module, unwrap
from bpkd_sdk.losses import METHODS, DistillationLoss, create_method
from bpkd_sdk.models import get_spec, identify, set_spec
from bpkd_sdk.models.classifier import reorder_classifier
from bpkd_sdk.output import SegmentationOutput, as_output, check_final_activation
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.teacher import TeacherModel, teacher_logits, teacher_spec
from bpkd_sdk.training.teacher_cache import TeacherCache
from bpkd_sdk.training.teacher_check import output_kind
from bpkd_sdk.views import ViewedNetwork


def size_divisor(network: TeacherModel) -> int:
    """Return the number that both sides of a network's input must be multiples of."""
    return teacher_spec(network).size_divisor


def feature_paths(
    student: nn.Module,
    teacher: TeacherModel | TeacherCache | None,
    method: DistillationLoss | None,
    config: TrainingConfig,
) -> tuple[str | None, str | None]:
    """Return the module paths of the student's and the teacher's feature map; None if the method uses none.

    Raises:
        ValueError: If the method compares feature maps and the teacher is an exported file or its cache has none, or
            if a configured path does not exist.
    """
    for network, path in ((student, config.student_feature), (teacher, config.teacher_feature)):
        if path is not None and isinstance(network, nn.Module):
            find_module(network, path)
    if teacher is None or method is None or not method.needs_features:
        return None, None
    if isinstance(teacher, Runtime):
        on_logits = [name for name in METHODS if not create_method(name, 1).needs_features]
        raise ValueError(
            f"The method {method.name!r} compares feature maps, but the teacher {teacher.name} returns logits only. "
            f"Pass the teacher's checkpoint, or a method that uses logits only:\n{format_list(on_logits)}"
        )
    student_path = config.student_feature or feature_path(student)
    if isinstance(teacher, TeacherCache):
        if teacher.facts.feature is None:
            raise ValueError(
                f"The method {method.name!r} compares feature maps, but the teacher's cache in {teacher.folder} has "
                "none. Write one with features to another folder: `bpkd_sdk.teach(..., features=True)` or `bpkd teach "
                "--features`."
            )
        return student_path, teacher.facts.feature
    return student_path, config.teacher_feature or feature_path(teacher)


@torch.no_grad()
def run_on_black_crops(
    role: str,
    network: TeacherModel,
    feature: str | None,
    dataset: SegmentationDataset,
    crop_size: tuple[int, int],
    batch_size: int,
) -> SegmentationOutput:
    """Run a network on black crops, to check that it accepts them.

    Args:
        role: "student" or "teacher", named in errors.
        network: Network to run; it is not changed.
        feature: Module path of a feature map to record, or None.
        dataset: Training data.
        crop_size: (height, width) of the crops.
        batch_size: Number of crops for an exported file; a module accepts any number and gets one crop.

    Returns:
        The output of the network in its own classes, with the recorded feature map.

    Raises:
        ValueError: If the network does not accept the crops, or ends with a sigmoid or a softmax.
    """
    divisor = size_divisor(network)
    if any(side % divisor for side in crop_size):
        nearest = tuple(max(divisor, round(side / divisor) * divisor) for side in crop_size)
        raise ValueError(
            f"Expected `crop_size` to be multiples of {divisor}, as the {role} requires, but got {crop_size}. Nearest: "
            f"{nearest}."
        )
    if isinstance(network, Runtime):
        with _crop_errors(role, crop_size, dataset):
            crops = dataset.pixels.canonical(torch.zeros(batch_size, dataset.channels, *crop_size, dtype=torch.uint8))
            output = SegmentationOutput(teacher_logits(network, crops))
    else:
        with Capture(network, [] if feature is None else [feature]) as capture:
            crop = torch.zeros(1, dataset.channels, *crop_size, device=_device(network))
            with _crop_errors(role, crop_size, dataset), eval_mode(network):
                output = as_output(network(crop))
            output = replace(output, features=capture.take())
        with eval_mode(network):
            inner = network.network if isinstance(network, ViewedNetwork) else network
            logits = output.logits if inner is network else as_output(inner(crop)).logits
            check_final_activation(f"The {role}", inner, crop, logits)
    return output


def in_classes_of_data(
    role: str, output: SegmentationOutput, dataset: SegmentationDataset, classes: ClassGroups | None
) -> SegmentationOutput:
    """Return an output in the classes of the data.

    Args:
        role: "student" or "teacher", named in errors.
        output: Output of the network in its own classes.
        dataset: Training data.
        classes: The network's classes for each class of the data; None for the same classes.

    Raises:
        ValueError: If the network has another number of classes than the data.
    """
    if classes is not None:
        output = replace(output, logits=classes.merge(output.logits))
    channels = output.logits.shape[1]
    if max(channels, 2) != dataset.num_classes:
        advice = " To teach other classes, pass class_map (--class-map)." if role == "teacher" else ""
        raise ValueError(
            f"The {role} predicts {'two classes by one logit' if channels == 1 else f'{channels} classes'}, but "
            f"{dataset.name} has {dataset.num_classes}: "
            f"{', '.join(dataset.class_names[:8])}{', ...' if dataset.num_classes > 8 else ''}.{advice}"
        )
    return output


@contextmanager
def _crop_errors(role: str, crop_size: tuple[int, int], dataset: SegmentationDataset) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"The {role} cannot process a crop of {crop_size} with {dataset.channels} channels: {error}"
        ) from error


def check_trainable(student: nn.Module, logits: Tensor) -> None:
    """Raise ValueError for a student that cannot be trained, and warn about one that returns probabilities.

    Args:
        student: Network to train.
        logits: Its logits (N, C, h, w) for some crops.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("The student has no parameter that requires a gradient; call student.requires_grad_(True).")
    if not torch.isfinite(logits).all():
        raise ValueError("The student's outputs are not finite (NaN or infinity) before training. Check its weights.")
    if (kind := output_kind(list(logits))) != "logits":
        measured, layer = ("and sum to 1", "softmax") if kind == "probabilities" else ("and vary", "sigmoid")
        warn(
            f"The student's outputs lie in 0..1 {measured}, so it contains a {layer}, but the losses expect logits. "
            f"Return the logits before the {layer} (segmentation-models-pytorch: activation=None)."
        )


def match_teacher(
    teacher: TeacherModel | TeacherCache,
    dataset: SegmentationDataset,
    config: TrainingConfig,
    class_map: ClassMap | None,
) -> ClassGroups | None:
    """Find the teacher's classes for each class of the data.

    Args:
        teacher: Teacher, whose spec has its class names.
        dataset: Training data.
        config: Options of the run.
        class_map: Names or ids of the teacher's classes for each class of the data, see `bpkd_sdk.class_map`. None:
            equal names; a teacher that has further classes teaches without them.

    Returns:
        The teacher's classes for each class of the data; None for the same classes in the same order.

    Raises:
        ValueError: If the class map does not fit, or if there is none and the teacher lacks a class of the data.
    """
    spec = teacher_spec(teacher)
    if class_map is None and config.match_classes:
        class_map = map_by_name(spec, dataset, network_name="The teacher", data_name=dataset.name)
    if class_map is not None:
        return group_classes(class_map, spec, dataset, network_name="the teacher", data_name=dataset.name)
    with class_map_advice("If the classes differ, pass", spec, dataset):
        order = class_order(
            spec, dataset, network_name="The teacher", data_name=dataset.name, match_classes=config.match_classes
        )
    return None if order is None else ClassGroups(tuple((column,) for column in order))


def describe_left_out(classes: ClassGroups, dataset: SegmentationDataset) -> str:
    """Return a sentence on a teacher that has all classes of the data and more, found without a class map."""
    left = (classes.channels or 0) - dataset.num_classes
    return (
        f"The teacher's {dataset.num_classes} classes of {dataset.name} are found by name; its {left} others are left "
        "out, unless class_map assigns them."
    )


def student_order(student: nn.Module, dataset: SegmentationDataset, config: TrainingConfig) -> Order | None:
    """Return the channel of the student's logits for each class of the data; None if the order is the same.

    Raises:
        ValueError: If the student has other classes than the data.
    """
    return class_order(
        get_spec(student),
        dataset,
        network_name="The student",
        data_name=dataset.name,
        match_classes=config.match_classes,
    )


def match_student(
    student: nn.Module,
    spec: NetworkSpec,
    dataset: SegmentationDataset,
    crop_size: tuple[int, int],
    order: Order | None,
    num_logits: int,
) -> None:
    """Put the student's classifier in the data's order, in place, and set its spec with the data's classes.

    A student with one logit predicts the second class by it, and its spec has both class names.

    The spec also gets the configuration that builds an instance of a known library again, see `identify`.

    Raises:
        ValueError: If the classifier cannot be reordered.
    """
    if order is not None:
        images = torch.rand(1, dataset.channels, *crop_size, generator=torch.Generator().manual_seed(0)).to(
            _device(student)
        )
        with eval_mode(student):
            reorder_classifier(unwrap(student), order, images)
    known = identify(student)
    spec = replace(
        spec,
        name=known.name,
        aux_head=known.aux_head,
        config=known.config,
        num_classes=num_logits,
        class_names=dataset.class_names,
        palette=dataset.palette,
    )
    set_spec(student, spec)


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
