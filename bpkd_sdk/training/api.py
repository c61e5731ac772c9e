"""`bpkd_sdk.train`, `bpkd_sdk.distill` and `bpkd_sdk.teach`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpkd_sdk.class_map import ClassMap
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.losses import Method
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.training.augmentation import Transform
from bpkd_sdk.training.config import CACHE_OPTIONS, TEACHER_OPTIONS, LabelSource, Precision, TrainingConfig
from bpkd_sdk.training.loop import TrainingResult, run_training
from bpkd_sdk.training.prepare import DataSource, prepare, write_cache
from bpkd_sdk.training.teacher import NetworkSource

__all__ = ["distill", "teach", "train"]

WHOLE_IMAGES = EvaluationProtocol()


def train(
    model: NetworkSource,
    data: DataSource,
    *,
    class_names: Sequence[str] | None = None,
    transform: Transform = "paper",
    steps: int = TrainingConfig.steps,
    batch_size: int = TrainingConfig.batch_size,
    crop_size: tuple[int, int] | None = None,
    learning_rate: float | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    protocol: EvaluationProtocol = WHOLE_IMAGES,
    output_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> TrainingResult:
    """Train a network on labelled images, without a teacher.

    Started by ``accelerate launch``, all processes train one network, see `bpkd_sdk.training.accelerator`.

    Args:
        model: Module, name that `create_model` accepts, or path of a checkpoint. A module is trained in place. The
            encoder of a network given by name starts from ImageNet weights, unless `backbone_weights` is "none" or the
            path of a file.
        data: "shapes", path of a folder (see `open_dataset`), data set of any library (see `as_dataset`), pair (train,
            val) of data sets, or mapping of splits such as a `DatasetDict`.
        class_names: Names of the classes in the order of their ids, for data that do not state them.
        transform: Augmentation of the training data, the same for teacher and student. "paper": random scale, crop,
            flip and colours, as OpenMMLab has them; "light": without colours; "none": random crop only. A transform of
            Albumentations or torchvision.transforms.v2, or a function (image, mask) -> (image, mask) of tensors,
            replaces them; results that are larger than the crops are cropped, and smaller ones padded with void. None
            uses the samples of a data set that augments them by itself as they are.
        steps: Number of optimiser steps.
        batch_size: Number of images per step, over all processes.
        crop_size: (height, width) of the training crops; None: the median size of the images, at most 512
            per side; see `bpkd_sdk.training.crop.default_crop`.
        learning_rate: Learning rate at the first step; None: 0.01 for SGD, 6e-4 for AdamW.
        precision: "auto", "fp32", "fp16" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        protocol: How validation images are segmented; by default whole, at their own size.
        output_dir: Folder of the run, on a file system that all processes share; None: a new one in ``runs``.
        resume: Whether to resume from the state in `output_dir`, if it contains one.
        seed: Seed of shuffling, augmentation and dropout.
        **options: Further fields of `TrainingConfig`, for example ``optimizer="adamw"``.

    Raises:
        ValueError: If data and network do not fit together; nearly always before anything is written.
        RuntimeError: If the device does not exist.
        FileExistsError: If `output_dir` contains a run and `resume` is False.
        FloatingPointError: If the loss is not finite.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    config = TrainingConfig.from_options(
        options
        | {
            "steps": steps,
            "batch_size": batch_size,
            "crop_size": crop_size,
            "learning_rate": learning_rate,
            "precision": precision,
            "device": device,
            "seed": seed,
        }
    )
    for name in TEACHER_OPTIONS:
        if (value := getattr(config, name)) != getattr(TrainingConfig, name):
            raise ValueError(f"{name}={value!r} needs a teacher, and train() has none. Leave it out, or use distill().")
    return run_training(prepare(None, model, None, data, config, protocol, output_dir, resume, class_names, transform))


def distill(
    teacher: NetworkSource | Runtime,
    student: NetworkSource,
    data: DataSource,
    *,
    class_names: Sequence[str] | None = None,
    transform: Transform = "paper",
    method: Method = "bpkd",
    labels: LabelSource = "dataset",
    class_map: ClassMap | None = None,
    steps: int = TrainingConfig.steps,
    batch_size: int = TrainingConfig.batch_size,
    crop_size: tuple[int, int] | None = None,
    learning_rate: float | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    protocol: EvaluationProtocol = WHOLE_IMAGES,
    output_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> TrainingResult:
    """Train a student on labelled images and on the outputs of a teacher.

    Started by ``accelerate launch``, all processes train one student, see `bpkd_sdk.training.accelerator`.

    Args:
        teacher: Module in eval mode, path of a checkpoint (``.safetensors``, or ``.pth`` of OpenMMLab), or name of a
            network that its library has with all weights, as for `load_model`: ``transformers/<folder or hub id>``.
            Its weights and its mode are not changed; a module is moved to the device. For methods that use logits only,
            the teacher may also be an exported file or an opened runtime. Such a file is an ONNX file of `to_onnx` with
            ``argmax=False``, an ONNX file of another exporter that maps a normalised image to logits, or a TensorRT
            engine.
        student: Module, name that `create_model` accepts, or path of a checkpoint. A module is trained in place. The
            encoder of a network given by name starts from ImageNet weights, unless `backbone_weights` is "none" or the
            path of a file.
        data: "shapes", path of a folder (see `open_dataset`), data set of any library (see `as_dataset`), pair (train,
            val) of data sets, or mapping of splits such as a `DatasetDict`.
        class_names: Names of the classes in the order of their ids, for data that do not state them.
        transform: Augmentation of the training data, the same for teacher and student. "paper": random scale, crop,
            flip and colours, as OpenMMLab has them; "light": without colours; "none": random crop only. A transform of
            Albumentations or torchvision.transforms.v2, or a function (image, mask) -> (image, mask) of tensors,
            replaces them; results that are larger than the crops are cropped, and smaller ones padded with void. None
            uses the samples of a data set that augments them by itself as they are.
        method: Name in `bpkd_sdk.losses.METHODS`, a method with other arguments such as ``CWDLoss(weight=3)``, or a
            list of both.
        labels: "dataset" for the labels of the data, or "teacher" for the teacher's predictions, for images without
            labels.
        class_map: Names or ids of the teacher's classes for each class of the data, for a teacher with other classes:
            ``{"road": ["road", "parking"], "background": "*"}``. None matches equal names; further classes of the
            teacher are then left out. `bpkd_sdk.class_map` states what the losses then compare.
        steps: Number of optimiser steps.
        batch_size: Number of images per step, over all processes.
        crop_size: (height, width) of the training crops; None: the median size of the images, at most 512
            per side; see `bpkd_sdk.training.crop.default_crop`.
        learning_rate: Learning rate at the first step; None: 0.01 for SGD, 6e-4 for AdamW.
        precision: "auto", "fp32", "fp16" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        protocol: How validation images are segmented; by default whole, at their own size.
        output_dir: Folder of the run, on a file system that all processes share; None: a new one in ``runs``.
        resume: Whether to resume from the state in `output_dir`, if it contains one.
        seed: Seed of shuffling, augmentation and dropout.
        **options: Further fields of `TrainingConfig`, for example ``optimizer="adamw"``.

    Raises:
        ValueError: If data and networks do not fit together; nearly always before anything is written.
        RuntimeError: If the device does not exist.
        FileExistsError: If `output_dir` contains a run and `resume` is False.
        FloatingPointError: If the loss is not finite.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    config = TrainingConfig.from_options(
        options
        | {
            "labels": labels,
            "steps": steps,
            "batch_size": batch_size,
            "crop_size": crop_size,
            "learning_rate": learning_rate,
            "precision": precision,
            "device": device,
            "seed": seed,
        }
    )
    if method is None or teacher is None:
        raise TypeError("distill() needs a teacher and a method. Use train() to train without them.")
    return run_training(
        prepare(teacher, student, method, data, config, protocol, output_dir, resume, class_names, transform, class_map)
    )


def teach(
    teacher: NetworkSource | Runtime,
    data: DataSource,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    transform: Transform = "paper",
    views: int | None = None,
    crop_size: tuple[int, int] | None = None,
    features: bool = False,
    class_map: ClassMap | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    **options: Any,
) -> Path:
    """Write a teacher's cache: its outputs for a number of crops of each training image.

    ``distill(..., teacher_cache=path)`` then reads the outputs and does not load the teacher, for any student, method
    and seed. An interrupted call is continued by the same call. Started by ``accelerate launch``, all processes share
    the work. `bpkd_sdk.training.teacher_cache` describes the files.

    Args:
        teacher: Module in eval mode, checkpoint, name or exported file, as for `distill`.
        data: Training data, or pair (train, val) of which the first is used, as for `distill`.
        path: Folder of the cache, new or empty or with a part of this cache.
        class_names: Names of the classes in the order of their ids, for data that do not state them.
        transform: Augmentation whose geometry makes the crops, as for `distill`; the colours of a preset have no
            effect.
        views: Number of different crops of each image; None: 12, or as many as a part of the cache has.
        crop_size: (height, width) of the crops; None: as for `distill`.
        features: Whether the teacher's feature map is kept too, for methods that compare features.
        class_map: Names or ids of the teacher's classes for each class of the data. The cache keeps the teacher's own
            classes; the map only allows a teacher with other classes to be checked on the labels.
        precision: Precision of the teacher: "auto", "fp32", "fp16" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        **options: Further fields of `TrainingConfig` in `bpkd_sdk.training.config.CACHE_OPTIONS`, for example
            ``teacher_augment=("flip", 0.75)``, which costs nothing at training time, ``teacher_top_k=10`` for many
            classes, or ``batch_size=4``.

    Returns:
        The folder.

    Raises:
        TypeError: For an option that does not change a cache.
        ValueError: If data and teacher do not fit together, or the folder contains another cache.
        OSError: If the disk is too small.
    """
    if unused := options.keys() - set(CACHE_OPTIONS):
        raise TypeError(f"{', '.join(sorted(unused))} cannot be passed to teach(). Pass it to distill().")
    config = TrainingConfig.from_options(
        options
        | {"teacher_cache": path, "views": views, "crop_size": crop_size, "precision": precision, "device": device}
    )
    return write_cache(teacher, data, config, class_names, transform, class_map, features=features)
