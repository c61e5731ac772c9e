"""Records of a run: its task, run.json (inputs and configuration) and history.jsonl (losses and scores)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import torch
from accelerate import Accelerator
from torch import nn

from bpkd_sdk.class_map import ClassGroups, ClassMap
from bpkd_sdk.data import FileDataset, SegmentationDataset
from bpkd_sdk.data.folder import FolderDataset
from bpkd_sdk.data.randomness import find_generators, seeded
from bpkd_sdk.errors import flatten, format_list, list_differences, warn
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.features import unwrap
from bpkd_sdk.files import (
    CHECKPOINT_SUFFIX,
    HISTORY_FILE,
    RUN_FILE,
    file_sha256,
    read_json,
    write_atomically,
    write_json,
)
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.method import method_arguments
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.checkpoint import content_hash
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.training.augmentation import Transform, describe_transform
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.state import FREE_OPTIONS, STATE_FILE
from bpkd_sdk.training.teacher import TeacherModel
from bpkd_sdk.training.teacher_cache import TeacherCache

_PACKAGES = (
    "bpkd-sdk",
    "torch",
    "torchvision",
    "accelerate",
    "numpy",
    "segmentation-models-pytorch",
    "timm",
)
_FINGERPRINT_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that a run needs, opened and checked.

    Attributes:
        title: Title of the run, for progress bars and folders.
        student: Network to train; its spec contains the data's classes.
        teacher: Module in eval mode or runtime that returns logits; None for supervised training, and if all outputs
            of the teacher are in its cache.
        cache: Outputs of the teacher for the training crops, which may have to be written first; None for a teacher
            that runs at every step.
        origin: Origin of the weights that "student" and "teacher" start with, plain JSON values by role.
        classes: The teacher's classes for each class of the data; None for the same classes in the same order.
        method: Distillation method, prepared for the two networks; None for supervised training.
        features: Module paths of the student's and the teacher's feature map; None if the method uses none.
        train: Training data.
        val: Validation data, or None.
        labels_from_teacher: Whether the teacher's predictions replace the labels, in training and in evaluation.
        crop_size: (height, width) of the training crops.
        transform: Augmentation of the training data.
        class_weights: Weight of each class in the cross-entropy; None for 1.
        config: Options of the run.
        protocol: How validation images are segmented.
        output_dir: Folder of the run.
        accelerator: Device, precision and processes.
    """

    title: str
    student: nn.Module
    teacher: TeacherModel | None
    cache: TeacherCache | None
    origin: Mapping[str, dict[str, Any]]
    classes: ClassGroups | None
    method: DistillationLoss | None
    features: tuple[str | None, str | None]
    train: SegmentationDataset
    val: SegmentationDataset | None
    labels_from_teacher: bool
    crop_size: tuple[int, int]
    transform: Transform
    class_weights: tuple[float, ...] | None
    config: TrainingConfig
    protocol: EvaluationProtocol
    output_dir: Path
    accelerator: Accelerator

    @property
    def class_map(self) -> ClassMap | None:
        """Names or ids of the teacher's classes for each class of the data; None if both have the same classes."""
        return None if self.classes is None else self.classes.class_map


def append_history(folder: Path, record: Mapping[str, Any]) -> None:
    """Append one record to history.jsonl."""
    with (folder / HISTORY_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_history(folder: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Read the records up to and including `last_step`, without an incomplete last line, which a crash can leave."""
    path = folder / HISTORY_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [record for record in records if last_step is None or record["step"] <= last_step]


def truncate_history(folder: Path, last_step: int) -> None:
    """Remove the records of the steps after `last_step`, which will be repeated."""
    kept = read_history(folder, last_step)
    write_atomically(folder / HISTORY_FILE, "".join(json.dumps(record) + "\n" for record in kept).encode())


def write_run(task: Task, first_step: int) -> None:
    """Write run.json: configuration, data, networks, versions and machine; a resumed run adds one more part."""
    path = task.output_dir / RUN_FILE
    facts = read_json(path) if first_step and path.is_file() else _run_facts(task)
    facts["parts"].append(_part_facts(task, first_step))
    write_json(path, facts)


def check_same_inputs(task: Task) -> None:
    """Compare the inputs of a resumed run with its run.json, and warn about other versions of packages.

    The data, the class names, the teacher, its class map, the student's architecture, the crop size, the augmentation
    and the feature maps are compared.
    The options are compared by `restore_state`.

    Raises:
        ValueError: If any of them differ; the message names them.
    """
    path = task.output_dir / RUN_FILE
    if not (task.output_dir / STATE_FILE).is_file() and any(task.output_dir.glob(f"*{CHECKPOINT_SUFFIX}")):
        warn(f"{task.output_dir} contains a run but no {STATE_FILE} to resume from, so the run starts from step 1.")
    if not path.is_file():
        warn(f"{path} is missing, so the data and the teacher cannot be compared with those of the run.")
        return
    before = read_json(path)
    if not isinstance(before, dict) or not before.get("parts"):
        raise ValueError(f"{path} does not describe a run. Restore it, or delete it to resume without the comparison.")
    known, now = (flatten(_input_facts(facts)) for facts in (before, json.loads(json.dumps(_run_facts(task)))))
    # A run.json of an earlier version contains fewer facts; only those are compared.
    if changed := list_differences(known, {key: value for key, value in now.items() if key in known}):
        raise ValueError(
            f"The run in {task.output_dir} was started with other inputs, so it cannot be resumed with these:\n"
            f"{format_list(changed)}\nPass the same data, networks and transform, or another output_dir."
        )
    if changed := list_differences(before["parts"][-1]["versions"], _versions()):
        warn(
            f"The run in {task.output_dir} resumes with other versions, so its weights may differ from those of an "
            f"uninterrupted run: {'; '.join(sorted(changed))}."
        )


def _input_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Select the facts of run.json that identify the inputs: no paths, names of data sets or Python classes."""
    teacher, student = facts.get("teacher") or {}, facts.get("student") or {}
    identity = "sha256" if teacher.get("sha256") else "file"
    return {
        "data": {
            split: {key: value for key, value in (data or {}).items() if key not in ("name", "selection")}
            for split, data in facts.get("data", {}).items()
        },
        "teacher": {identity: teacher.get(identity), "class_map": json.dumps(facts.get("class_map"))}
        | {"cache": teacher.get("cache")}
        | {key: (teacher.get("spec") or {}).get(key) for key in ("mean", "std")},
        "student": {key: student.get(key) for key in ("parameters", "spec")},  # the state file contains the weights
        "crop_size": facts.get("crop_size"),
        "features": facts.get("features"),
    } | {key: facts[key] for key in ("transform",) if key in facts}


def _run_facts(task: Task) -> dict[str, Any]:
    return {
        "title": task.title,
        "seed": task.config.seed,
        "config": task.config.to_dict(),
        "crop_size": task.crop_size,
        "transform": describe_transform(task.transform),
        "class_weights": task.class_weights,
        "protocol": dataclasses.asdict(task.protocol),
        "method": method_arguments(task.method),
        "features": dict(zip(("student", "teacher"), task.features, strict=True)),
        "student": _network_facts(task.student),
        "teacher": _network_facts(task.teacher) if task.cache is None else _cache_facts(task.cache),
        "origin": dict(task.origin),
        "class_map": task.class_map,
        "data": {"train": _data_facts(task.train), "val": _data_facts(task.val)},
        "parts": [],
    }


def _part_facts(task: Task, first_step: int) -> dict[str, Any]:
    accelerator = task.accelerator
    device = accelerator.device
    return {
        "first_step": first_step,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "options": {name: value for name, value in task.config.to_dict().items() if name in FREE_OPTIONS},
        "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        "versions": _versions(),
        "platform": platform.platform(),
        "git": _git_state(),
    }


def _versions() -> dict[str, str | None]:
    others = {"opencv": cv2.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    return {package: version(package) for package in _PACKAGES} | others


def _network_facts(network: TeacherModel | None) -> dict[str, Any] | None:
    if network is None:
        return None
    if isinstance(network, Runtime):
        sha256 = file_sha256(network.name) if Path(network.name).is_file() else None
        return {"file": network.name, "sha256": sha256, "spec": network.spec.to_dict()}
    module = unwrap(network)
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "sha256": content_hash(module.state_dict()),
        "spec": get_spec(network).to_dict(),
    }


def _cache_facts(cache: TeacherCache) -> dict[str, Any]:
    facts = cache.facts
    identity = {"sha256": facts.teacher["sha256"], "spec": facts.spec}
    return identity | {"cache": cache.digest, "precision": facts.precision}


def _data_facts(dataset: SegmentationDataset | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    return {
        "name": dataset.name,
        "images": len(dataset),
        "class_names": list(dataset.class_names),
        "fingerprint": fingerprint(dataset),
    } | ({"selection": dataset.selection} if isinstance(dataset, FolderDataset) and dataset.selection else {})


def fingerprint(dataset: SegmentationDataset, *, with_labels: bool = True) -> str:
    """Compute a SHA-256 that distinguishes data sets without reading all of their samples.

    The hash covers the classes, the number of samples, the pixels of 16 samples from the first to the last and, for
    data in files, the name and size of every file. It does not depend on the folder of the data.

    Args:
        dataset: Data set.
        with_labels: Whether the classes and the labels are part of it.
    """
    classes = f"{dataset.class_names} {dataset.ignore_index} " if with_labels else ""
    digest = hashlib.sha256(f"{classes}{len(dataset)}".encode())
    if isinstance(dataset, FileDataset):
        for pair in dataset.pairs:
            for path in filter(None, (pair.image, pair.label if with_labels else None)):
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    generators = find_generators(dataset)  # of data sets that augment their samples by themselves
    count = min(_FINGERPRINT_SAMPLES, len(dataset))
    for i in range(count):
        with seeded(0, generators):
            sample = dataset[i * (len(dataset) - 1) // max(1, count - 1)]
        for tensor in sample if with_labels else sample[:1]:
            digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the current folder's repository, and whether tracked files differ from it."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "modified": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path.cwd(),
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
