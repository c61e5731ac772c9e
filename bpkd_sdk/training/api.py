"""`train` and `distill`: resolve what the caller named, check that it fits together, run the loop."""

from __future__ import annotations

import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bpkd_sdk.data import DatasetSubset, SegmentationDataset, open_dataset
from bpkd_sdk.data.dataset import expect_dataset
from bpkd_sdk.errors import listed
from bpkd_sdk.evaluation import EvaluationProtocol, evaluate
from bpkd_sdk.losses import Method, create_method
from bpkd_sdk.models import get_spec
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.training.accelerator import broadcast_from_main, create_accelerator, teacher_dtype
from bpkd_sdk.training.config import Precision, TrainingConfig
from bpkd_sdk.training.loop import Task, TrainingResult, run
from bpkd_sdk.training.monitor import check_trackers
from bpkd_sdk.training.prepare import (
    Network,
    default_crop,
    feature_paths,
    match_student,
    match_teacher,
    open_network,
    open_teacher,
    probe,
    student_order,
)
from bpkd_sdk.training.records import HISTORY_FILE, try_checkpoint
from bpkd_sdk.training.teacher import TeacherModel
from bpkd_sdk.training.teacher_check import output_kind, warn_of_teacher

__all__ = ["distill", "train"]

WHOLE_IMAGES = EvaluationProtocol()

Data = str | Path | SegmentationDataset | tuple[SegmentationDataset, SegmentationDataset | None]


def train(
    model: Network,
    data: Data,
    *,
    protocol: EvaluationProtocol = WHOLE_IMAGES,
    output_dir: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> TrainingResult:
    """Train a network on labelled images, without a teacher.

    Args:
        model: A module, a name that `create_model` knows, or a checkpoint.
        data: "shapes", a folder (see `open_dataset`), a data set, or a pair (train, val).
        protocol: How validation images are segmented; by default whole, at their own size.
        output_dir: The folder of the run, which all its processes must see; None: a new one below ``runs``.
        resume: Go on from the state in `output_dir`, if there is one.
        **options: Fields of `TrainingConfig`.

    Raises:
        ValueError: For data or networks that do not fit together, before anything is written.
        FileExistsError: If `output_dir` holds a run and `resume` is False.
        KeyboardInterrupt: After Ctrl-C, once a checkpoint is written.
    """
    config = TrainingConfig.from_options(options)
    if config.labels == "teacher":
        raise ValueError("labels='teacher' needs a teacher; train() has none. Use distill().")
    return run(_prepare(None, model, None, data, config, protocol, output_dir, resume))


def distill(
    teacher: Network | Runtime,
    student: Network,
    data: Data,
    *,
    method: Method = "bpkd",
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
    """Train a student on labelled images and on what a teacher makes of them.

    Started by ``accelerate launch``, all its processes train one student, see `bpkd_sdk.training.accelerator`.

    Args:
        teacher: A module in eval mode, or a checkpoint: ours, or an OpenMMLab ``.pth``. It is not changed. For methods
            that compare logits only also an exported file: an ONNX file of ours with ``argmax=False`` or anyone's that
            takes a normalised image and returns logits, a TensorRT engine, or an opened runtime.
        student: A module, a name that `create_model` knows, or a checkpoint. A module is trained in place.
        data: "shapes", a folder (see `open_dataset`), a data set, or a pair (train, val).
        method: A name in `bpkd_sdk.losses.METHODS`, a method with arguments of your own such as ``CWDLoss(weight=3)``,
            or a list of both.
        steps: Optimiser steps.
        batch_size: Images a step.
        crop_size: (height, width) of the training crops; None: the first image's size, at most 512 a side.
        learning_rate: At the first step; None: 0.01 for SGD, 6e-4 for AdamW.
        precision: "auto", "fp32", "fp16" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        protocol: How validation images are segmented; by default whole, at their own size.
        output_dir: The folder of the run, which all its processes must see; None: a new one below ``runs``.
        resume: Go on from the state in `output_dir`, if there is one.
        seed: Of shuffling, augmentation and dropout.
        **options: Further fields of `TrainingConfig`, for example ``optimizer="adamw"`` or ``labels="teacher"``.

    Raises:
        ValueError: For data or networks that do not fit together, before anything is written.
        FileExistsError: If `output_dir` holds a run and `resume` is False.
        FloatingPointError: If the loss stops being finite.
        KeyboardInterrupt: After Ctrl-C, once a checkpoint is written.
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
    return run(_prepare(teacher, student, method, data, config, protocol, output_dir, resume))


def _prepare(
    teacher: Network | Runtime | None,
    student: Network,
    method: Method | None,
    data: Data,
    config: TrainingConfig,
    protocol: EvaluationProtocol,
    output_dir: str | Path | None,
    resume: bool,
) -> Task:
    check_trackers(config.trackers)
    accelerator = create_accelerator(config)
    train_set, val_set = _open_data(data)
    for dataset in filter(None, (train_set, val_set)):
        dataset.check_classes()
    if len(train_set) < config.batch_size:
        raise ValueError(
            f"{train_set.name} has {len(train_set)} images, too few for a batch of {config.batch_size} different ones. "
            f"Pass batch_size={len(train_set)} or less, or more data."
        )
    if val_set is not None and not len(val_set):
        raise ValueError(f"{val_set.name} has no images to validate on; pass data=(train, None) to train without.")
    classes = train_set.num_classes
    torch.manual_seed(config.seed)
    guide = None if teacher is None else open_teacher(teacher, classes, config, accelerator.device)
    network = open_network(student, classes)
    for dataset in filter(None, (train_set, val_set)):
        if (first := dataset.examine_sample(0)).problem:
            if config.check_data:
                dataset.check()  # lists all problems
            raise ValueError(
                f"{dataset.name} cannot be used:\n{listed([first.problem])}{dataset.label_advice([first])}"
            )
    crop_size = config.crop_size or default_crop(train_set, [part for part in (network, guide) if part is not None])
    chosen = None if method is None else create_method(method, classes, ignore_index=train_set.ignore_index)
    features = feature_paths(network, guide, chosen, config)
    images = config.batch_size // (config.accumulate * accelerator.num_processes)
    outputs = [
        probe(role, module, path, train_set, crop_size, images)
        for role, module, path in zip(("student", "teacher"), (network, guide), features, strict=True)
        if module is not None
    ]
    _check_student(network, outputs[0].logits)
    if chosen is not None:
        chosen.prepare(*outputs)
    if not train_set.has_labels and config.labels == "dataset":
        raise ValueError(
            f"{train_set.name} has no labels. Use distill(..., labels='teacher') to learn from the teacher."
        )
    if val_set is not None and not val_set.has_labels and config.labels == "dataset":
        raise ValueError(f"{val_set.name} has no labels to validate with; pass (train, None) to train without.")
    guide = None if guide is None else match_teacher(guide, train_set, config)
    order = student_order(network, train_set, config)
    if accelerator.is_main_process:  # the others wait in _open_folder
        largest = _check_data(train_set, val_set, config)
        if guide is not None and config.check_teacher:
            dtype = teacher_dtype(config, accelerator)
            warn_of_teacher(guide, train_set, crop_size, accelerator.device, dtype, config.base_size)
        if val_set is not None:
            reference = guide if config.labels == "teacher" else None
            _try_validation(network, DatasetSubset(val_set, [largest]), reference, config, protocol, accelerator.device)
    match_student(network, train_set, crop_size, order)
    verb = "train" if chosen is None else chosen.name
    title = f"{verb} {get_spec(network).name or type(network).__name__}"
    folder, is_new = _open_folder(output_dir, title, resume, accelerator)
    if accelerator.is_main_process:
        try:
            try_checkpoint(network, folder)
        except Exception:
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
            raise
    return Task(
        title, network, guide, chosen, features, train_set, val_set, crop_size, config, protocol, folder, accelerator
    )


def _check_student(network: nn.Module, logits: Tensor) -> None:
    """Refuse a student that cannot be trained, and warn of one that returns probabilities."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("The student has no parameter that requires a gradient; call student.requires_grad_(True).")
    if not torch.isfinite(logits).all():
        raise ValueError("The student's outputs are not finite (NaN or infinity) before training. Check its weights.")
    if output_kind(list(logits)) == "probabilities":
        warnings.warn(
            "The student's outputs lie in 0..1 and sum to 1: it has a softmax inside, and the cross-entropy takes "
            "logits. Return the logits before the softmax (segmentation-models-pytorch: activation=None).",
            stacklevel=4,
        )


def _check_data(train_set: SegmentationDataset, val_set: SegmentationDataset | None, config: TrainingConfig) -> int:
    """Read all the data, if configured; return the position of the largest validation image, or of the first."""
    if not config.check_data:
        return 0
    if config.labels == "dataset":
        train_set.check_for_training()
    else:
        train_set.check()
    if val_set is None:
        return 0
    findings = val_set.examine()
    val_set.check_findings(findings)
    sizes = [finding.size or (0, 0) for finding in findings]
    return max(range(len(sizes)), key=lambda index: sizes[index][0] * sizes[index][1])


def _try_validation(
    network: nn.Module,
    sample: SegmentationDataset,
    reference: TeacherModel | None,
    config: TrainingConfig,
    protocol: EvaluationProtocol,
    device: torch.device,
) -> None:
    """Segment and score one validation image, so that errors of validation surface before the first step."""
    size = tuple(sample[0][0].shape[1:])
    try:
        evaluate(
            network,
            sample,
            boundary_width=config.boundary_width,
            reference=reference,
            match_classes=config.match_classes,
            device=device,
            protocol=protocol,
        )
    except Exception as error:  # networks may raise anything at a size that they were not made for
        raise ValueError(
            f"The validation image {sample.sample_name(0)} of {size} cannot be segmented and scored: {error}\n"
            "If the network takes images of the crops' size only, pass protocol=EvaluationProtocol(mode='slide', "
            "crop_size=(height, width)) with that size; to train without validation, pass data=(train, None)."
        ) from error


def _open_data(data: Data) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    if isinstance(data, (str, Path)):
        return open_dataset(data, split="train"), open_dataset(data, split="val")
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(f"Expected `data` to be a pair (train, val), but got {len(data)} entries.")
        train_set, val_set = data
        expect_dataset(train_set, "data[0]")
        if val_set is not None:
            expect_dataset(val_set, "data[1]")
        if val_set is not None and val_set.class_names != train_set.class_names:
            raise ValueError(
                f"Training and validation data have other classes: {train_set.class_names} and {val_set.class_names}."
            )
        return train_set, val_set
    expect_dataset(data, "data")
    return data, None


def _open_folder(
    output_dir: str | Path | None, title: str, resume: bool, accelerator: Accelerator
) -> tuple[Path, bool]:
    """The folder of the run, made if it is not there, and whether it was made."""
    if output_dir is None:
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        output_dir = Path("runs") / f"{stamp}-{title.replace('/', '-').replace(' ', '-')}"
    folder = Path(broadcast_from_main(str(output_dir)))
    if not resume and (folder / HISTORY_FILE).exists():
        raise FileExistsError(
            f"{folder} holds a run already. Pass resume=True to go on with it, or another output_dir."
        )
    accelerator.wait_for_everyone()  # until each has looked
    is_new = not folder.exists()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    return folder, is_new
