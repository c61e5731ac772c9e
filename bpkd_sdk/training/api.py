"""`train` and `distill`: resolve what the caller named, check that it fits together, run the loop."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bpkd_sdk.data import SegmentationDataset, open_dataset
from bpkd_sdk.features import Capture, evaluating, feature_path
from bpkd_sdk.losses import DistillationLoss, create_method
from bpkd_sdk.models import CHECKPOINT_SUFFIXES, create_model, get_spec, open_checkpoint
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.training.config import Precision, TrainingConfig
from bpkd_sdk.training.loop import Task, TrainingResult, run
from bpkd_sdk.training.state import HISTORY_FILE

__all__ = ["distill", "train"]

Data = str | Path | SegmentationDataset | tuple[SegmentationDataset, SegmentationDataset | None]
Network = nn.Module | str | Path


def train(
    model: Network,
    data: Data,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> TrainingResult:
    """Train a network on labelled images, without a teacher.

    Args:
        model: A module, a name that `create_model` knows, or a checkpoint.
        data: "shapes", a folder (see `open_dataset`), a data set, or a pair (train, val).
        output_dir: The folder of the run; None: a new one below ``runs``.
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
    return run(_prepare(None, model, None, data, config, output_dir, resume))


def distill(
    teacher: Network,
    student: Network,
    data: Data,
    *,
    method: str | DistillationLoss = "bpkd",
    steps: int = TrainingConfig.steps,
    batch_size: int = TrainingConfig.batch_size,
    crop_size: tuple[int, int] | None = None,
    learning_rate: float | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    output_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> TrainingResult:
    """Train a student on labelled images and on what a teacher makes of them.

    Args:
        teacher: A module in eval mode, or a checkpoint: ours, or an OpenMMLab ``.pth``. It is not changed.
        student: A module, a name that `create_model` knows, or a checkpoint. A module is trained in place.
        data: "shapes", a folder (see `open_dataset`), a data set, or a pair (train, val).
        method: A name in `bpkd_sdk.losses.METHODS`, or a method with arguments of your own.
        steps: Optimiser steps.
        batch_size: Images a step.
        crop_size: (height, width) of the training crops; None: the first image's size, at most 512 a side.
        learning_rate: At the first step; None: 0.01 for SGD, 6e-4 for AdamW.
        precision: "auto", "fp32", "fp16" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        output_dir: The folder of the run; None: a new one below ``runs``.
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
    return run(_prepare(teacher, student, method, data, config, output_dir, resume))


def _prepare(
    teacher: Network | None,
    student: Network,
    method: str | DistillationLoss | None,
    data: Data,
    config: TrainingConfig,
    output_dir: str | Path | None,
    resume: bool,
) -> Task:
    train_set, val_set = _open_data(data)
    classes = train_set.num_classes
    torch.manual_seed(config.seed)
    guide = None if teacher is None else _open_teacher(teacher, classes)
    network = _open_network(student, classes)
    crop_size = config.crop_size or _default_crop(train_set, [network, *([guide] if guide else [])])
    chosen = None if method is None else create_method(method, classes, ignore_index=train_set.ignore_index)
    features = _feature_paths(network, guide, chosen, config)
    outputs = [
        _probe(role, module, path, train_set, crop_size)
        for role, module, path in zip(("student", "teacher"), (network, guide), features, strict=True)
        if module is not None
    ]
    if chosen is not None:
        chosen.prepare(*outputs)
    if not train_set.has_labels and config.labels == "dataset":
        raise ValueError(
            f"{train_set.name} has no labels. Use distill(..., labels='teacher') to learn from the teacher."
        )
    if val_set is not None and not val_set.has_labels and config.labels == "dataset":
        raise ValueError(f"{val_set.name} has no labels to validate with; pass (train, None) to train without.")
    if config.check_data:
        for dataset in (train_set, val_set):
            if dataset is not None:
                dataset.check()
    network.spec = replace(  # type: ignore[assignment]
        get_spec(network), num_classes=classes, class_names=train_set.class_names, palette=train_set.palette
    )
    verb = "train" if chosen is None else (method if isinstance(method, str) else type(chosen).__name__)
    title = f"{verb} {get_spec(network).name or type(network).__name__}"
    folder = _open_folder(output_dir, title, resume)
    return Task(title, network, guide, chosen, features, train_set, val_set, crop_size, config, folder)


def _open_data(data: Data) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    if isinstance(data, (str, Path)):
        return open_dataset(data, split="train"), open_dataset(data, split="val")
    if isinstance(data, tuple):
        train_set, val_set = data
        if val_set is not None and val_set.class_names != train_set.class_names:
            raise ValueError(
                f"Training and validation data have other classes: {train_set.class_names} and {val_set.class_names}."
            )
        return train_set, val_set
    return data, None


def _open_network(network: Network, num_classes: int) -> nn.Module:
    if isinstance(network, nn.Module):
        return network
    if Path(network).suffix in CHECKPOINT_SUFFIXES:
        return open_checkpoint(network)
    return create_model(str(network), num_classes)


def _open_teacher(teacher: Network, num_classes: int) -> nn.Module:
    network = _open_network(teacher, num_classes)
    if not isinstance(teacher, nn.Module) and Path(teacher).suffix not in CHECKPOINT_SUFFIXES:
        warnings.warn(f"The teacher {teacher!r} is built by name and has random weights.", stacklevel=4)
        return network.eval()
    training = [name or "the network" for name, module in network.named_modules() if module.training]
    if training:
        raise ValueError(f"The teacher is in training mode ({training[0]}). Call teacher.eval() first.")
    return network


def _default_crop(dataset: SegmentationDataset, networks: list[nn.Module]) -> tuple[int, int]:
    divisor = math.lcm(*(get_spec(network).size_divisor for network in networks))
    height, width = (max(divisor, min(side, 512) // divisor * divisor) for side in dataset[0][0].shape[1:])
    return height, width


def _feature_paths(
    student: nn.Module, teacher: nn.Module | None, method: DistillationLoss | None, config: TrainingConfig
) -> tuple[str | None, str | None]:
    if teacher is None or method is None or not method.needs_features:
        return None, None
    return config.student_feature or feature_path(student), config.teacher_feature or feature_path(teacher)


@torch.no_grad()
def _probe(
    role: str, network: nn.Module, feature: str | None, dataset: SegmentationDataset, crop_size: tuple[int, int]
) -> SegmentationOutput:
    """The network's output for one black crop, once it is clear that it takes the crop and has the data's classes."""
    divisor = get_spec(network).size_divisor
    if any(side % divisor for side in crop_size):
        nearest = tuple(max(divisor, round(side / divisor) * divisor) for side in crop_size)
        raise ValueError(
            f"Expected `crop_size` to be multiples of {divisor}, which the {role} needs, but got {crop_size}. "
            f"Nearest: {nearest}."
        )
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with Capture(network, [] if feature is None else [feature]) as capture, evaluating(network):
        try:
            output = as_output(network(torch.zeros(1, 3, *crop_size, device=device)))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"The {role} cannot take a crop of {crop_size}: {error}") from error
        output = replace(output, features=capture.take())
    if output.logits.shape[1] != dataset.num_classes:
        raise ValueError(
            f"The {role} predicts {output.logits.shape[1]} classes, but {dataset.name} has {dataset.num_classes}: "
            f"{', '.join(dataset.class_names[:8])}{', ...' if dataset.num_classes > 8 else ''}."
        )
    return output


def _open_folder(output_dir: str | Path | None, title: str, resume: bool) -> Path:
    if output_dir is None:
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        output_dir = Path("runs") / f"{stamp}-{title.replace('/', '-').replace(' ', '-')}"
    folder = Path(output_dir)
    if not resume and (folder / HISTORY_FILE).exists():
        raise FileExistsError(
            f"{folder} holds a run already. Pass resume=True to go on with it, or another output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder
