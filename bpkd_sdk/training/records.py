"""The state of an unfinished run: one safetensors file from which the run goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpkd_sdk.data import FileDataset, SegmentationDataset
from bpkd_sdk.errors import differences, flattened, listed
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.features import unwrapped
from bpkd_sdk.files import file_sha256, read_json, write_atomically, write_json
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.method import describe
from bpkd_sdk.models import get_spec, save_model
from bpkd_sdk.models.checkpoint import FORMAT, SUFFIX, content_hash, load_state, read_tensors, write_tensors
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.teacher import TeacherModel

if TYPE_CHECKING:
    from bpkd_sdk.training.loop import Task


RESUME_FILE = "resume.safetensors"
HISTORY_FILE = "history.jsonl"

# These may change between the parts of one run.
FREE_OPTIONS = {
    "accumulate",
    "channels_last",
    "check_data",
    "check_teacher",
    "compile",
    "device",
    "log_every",
    "trackers",
    "workers",
}


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        step: Steps done.
        seconds: Time spent in them.
        best_miou: Of the evaluations so far; -1 before the first.
    """

    step: int = 0
    seconds: float = 0.0
    best_miou: float = -1.0


def run_settings(
    config: TrainingConfig, method: DistillationLoss | None, protocol: EvaluationProtocol
) -> dict[str, Any]:
    """What the parts of one run must agree in, but for `FREE_OPTIONS`."""
    return config.to_dict() | {"method": describe(method), "protocol": asdict(protocol)}


def save_state(
    folder: Path,
    position: Position,
    settings: Mapping[str, Any],
    module: nn.Module,
    optimizer: Optimizer,
    scaler: Mapping[str, Any],
) -> None:
    """Write weights, optimiser and position to one file; a crash leaves the previous one."""
    state = optimizer.state_dict()
    tensors = {f"module/{key}": value for key, value in module.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    header = {
        "format": FORMAT,
        "position": vars(position),
        "settings": dict(settings),
        "param_groups": state["param_groups"],
        "optimizer_scalars": scalars,
        "scaler": dict(scaler),
    }
    write_tensors(folder / RESUME_FILE, tensors, header)


def try_checkpoint(network: nn.Module, folder: Path) -> None:
    """Write a checkpoint to the folder of a run and read it back, and remove it.

    Raises:
        ValueError: If the network, or what its spec says, cannot be written and read.
        OSError: If the folder cannot be written to.
    """
    path = folder / f".trial{SUFFIX}"
    try:
        save_model(network, path)
        header, state = read_tensors(path)
        if content_hash(state) != header["sha256"]:
            raise ValueError("what was read differs from what was written")
    except Exception as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"A checkpoint of {type(network).__name__} cannot be written and read again: {error}. The facts in its "
            "spec must be plain numbers and text."
        ) from error
    path.unlink()


def restore_state(
    folder: Path, settings: Mapping[str, Any], module: nn.Module, optimizer: Optimizer
) -> tuple[Position, dict[str, Any]]:
    """Load what `save_state` wrote.

    Returns:
        The position, and the state of the gradient scaler.

    Raises:
        ValueError: If the run was started with other settings, or with other networks.
    """
    path = folder / RESUME_FILE
    header, tensors = read_tensors(path)
    if missing := {"position", "settings", "param_groups", "optimizer_scalars", "scaler"} - header.keys():
        raise ValueError(f"{path} holds no state of a run: it lacks {', '.join(sorted(missing))}. Restore the file.")
    _check_same_run(path, header["settings"], settings)
    load_state(module, _below(tensors, "module"), source=str(path))
    slots: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in header["optimizer_scalars"].items()
    }
    for key, value in _below(tensors, "optimizer").items():
        index, name = key.split("/", 1)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": header["param_groups"]})
    return Position(**header["position"]), header["scaler"]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def _check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    defaults = TrainingConfig().to_dict() | {"protocol": asdict(EvaluationProtocol())}  # of what is newer than the run
    plain = (json.loads(json.dumps(facts)) for facts in (defaults | dict(before), now))
    if changed := differences(*({key: facts[key] for key in facts.keys() - FREE_OPTIONS} for facts in plain)):
        raise ValueError(
            f"The run in {path.parent} was started with other options, so it cannot be resumed with these:\n"
            f"{listed(changed)}\nPass the same options, or another output_dir."
        )


def append_history(folder: Path, record: Mapping[str, Any]) -> None:
    """Add one record to history.jsonl."""
    with (folder / HISTORY_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_history(folder: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records up to and including `last_step`; a line cut short by a crash is left out."""
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
    """Drop the records of steps that will be done again."""
    kept = read_history(folder, last_step)
    write_atomically(folder / HISTORY_FILE, "".join(json.dumps(record) + "\n" for record in kept).encode())


RUN_FILE = "run.json"

_PACKAGES = (
    "bpkd-sdk",
    "torch",
    "torchvision",
    "accelerate",
    "numpy",
    "segmentation-models-pytorch",
    "timm",
)
_SAMPLES = 16


def write_run(task: Task, first_step: int) -> dict[str, Any]:
    """Write run.json, or add one more part to that of a run that goes on; returns what it says."""
    path = task.output_dir / RUN_FILE
    facts = read_json(path) if first_step and path.is_file() else _facts(task)
    facts["parts"].append(_part(task, first_step))
    write_json(path, facts)
    return facts


def check_same_inputs(task: Task) -> None:
    """Hold the inputs of a run that goes on against its run.json; warn of other versions of packages.

    Compared are data, class names, teacher, network of the student, crop size and feature maps; the options are held
    against the state that the run goes on from.

    Raises:
        ValueError: If any of them differ; they are named.
    """
    path = task.output_dir / RUN_FILE
    if not (task.output_dir / RESUME_FILE).is_file() and any(task.output_dir.glob(f"*{SUFFIX}")):
        warnings.warn(
            f"{task.output_dir} holds a run but no {RESUME_FILE} to go on from; it starts again from the first step.",
            stacklevel=2,
        )
    if not path.is_file():
        warnings.warn(
            f"{path} is missing, so whether data and teacher are those of the run is not known.", stacklevel=2
        )
        return
    before = read_json(path)
    if not isinstance(before, dict) or not before.get("parts"):
        raise ValueError(f"{path} does not describe a run. Restore it, or delete it to go on without the comparison.")
    known, now = (flattened(_inputs(facts)) for facts in (before, json.loads(json.dumps(_facts(task)))))
    # An earlier version wrote fewer facts.
    if changed := differences(known, {key: value for key, value in now.items() if key in known}):
        raise ValueError(
            f"The run in {task.output_dir} was started with other inputs, so it cannot be resumed with these:\n"
            f"{listed(changed)}\nPass the same data and networks, or another output_dir."
        )
    if changed := differences(before["parts"][-1]["versions"], _versions()):
        warnings.warn(
            f"The run in {task.output_dir} goes on with other versions, so its weights may differ from those of one "
            f"that was never stopped: {'; '.join(sorted(changed))}.",
            stacklevel=2,
        )


def _inputs(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in run.json that identify the inputs; paths, names of data sets and Python classes do not."""
    teacher, student = facts.get("teacher") or {}, facts.get("student") or {}
    identity = "sha256" if teacher.get("sha256") else "file"
    return {
        "data": {
            split: {key: value for key, value in (data or {}).items() if key != "name"}
            for split, data in facts.get("data", {}).items()
        },
        "teacher": {identity: teacher.get(identity)}
        | {key: (teacher.get("spec") or {}).get(key) for key in ("mean", "std")},
        "student": {key: student.get(key) for key in ("parameters", "spec")},  # the state brings weights of its own
        "crop_size": facts.get("crop_size"),
        "features": facts.get("features"),
    }


def _facts(task: Task) -> dict[str, Any]:
    return {
        "title": task.title,
        "seed": task.config.seed,
        "config": task.config.to_dict(),
        "crop_size": task.crop_size,
        "protocol": dataclasses.asdict(task.protocol),
        "method": describe(task.method),
        "features": dict(zip(("student", "teacher"), task.features, strict=True)),
        "student": _network(task.student),
        "teacher": _network(task.teacher),
        "data": {"train": _data(task.train), "val": _data(task.val)},
        "parts": [],
    }


def _part(task: Task, first_step: int) -> dict[str, Any]:
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
    own = {"opencv": cv2.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    return {package: version(package) for package in _PACKAGES} | own


def _network(network: TeacherModel | None) -> dict[str, Any] | None:
    if network is None:
        return None
    if isinstance(network, Runtime):
        return {"file": network.name, "sha256": _file_hash(network.name), "spec": network.spec.to_dict()}
    inner = unwrapped(network)
    return {
        "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "sha256": content_hash(inner.state_dict()),
        "spec": get_spec(network).to_dict(),
    }


def _file_hash(path: str) -> str | None:
    return file_sha256(path) if Path(path).is_file() else None


def _data(dataset: SegmentationDataset | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    return {
        "name": dataset.name,
        "images": len(dataset),
        "class_names": list(dataset.class_names),
        "fingerprint": fingerprint(dataset),
    }


def fingerprint(dataset: SegmentationDataset) -> str:
    """SHA-256 that tells data sets apart, without reading all of them.

    It covers the classes, the number of samples, the pixels of 16 samples from the first to the last, and of data in
    files the name and size of each. Where they lie makes no difference.
    """
    digest = hashlib.sha256(f"{dataset.class_names} {dataset.ignore_index} {len(dataset)}".encode())
    if isinstance(dataset, FileDataset):
        for pair in dataset.pairs:
            for path in filter(None, (pair.image, pair.label)):
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    count = min(_SAMPLES, len(dataset))
    for i in range(count):
        for tensor in dataset[i * (len(dataset) - 1) // max(1, count - 1)]:
            digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _git_state() -> dict[str, Any] | None:
    """Commit of the repository one stands in, and whether tracked files differ from it; None outside."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "modified": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path.cwd(),
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
