"""Describes a run at its start and at its end, in one block of aligned lines each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.evaluation import Metrics
from bpkd_sdk.evaluation.profile import count_macs
from bpkd_sdk.features import unwrap
from bpkd_sdk.files import LAST_CHECKPOINT
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.spec import get_provenance
from bpkd_sdk.progress import format_rows, format_seconds, format_si
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.sizes import Size
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.origin import format_origin
from bpkd_sdk.training.records import Task
from bpkd_sdk.training.state import BEST
from bpkd_sdk.training.teacher import TeacherModel
from bpkd_sdk.training.teacher_cache import TeacherCache

_SHOWN_CLASSES = 12
_SCORES = {"mIoU": "miou", "boundary IoU": "boundary_iou", "edge": "edge_accuracy", "body": "body_accuracy"}


def describe_run(task: Task, choices: Mapping[str, str], *, resumes: bool) -> str:
    """Describe a run before its first step.

    Args:
        task: Run, with everything opened and checked.
        choices: Texts on what was chosen for this run, by the name of their line, such as "Crops".
        resumes: Whether the student's weights are read from the folder of the run.
    """
    config, train = task.config, task.train
    passes = config.steps * config.batch_size / len(train)
    every = f"evaluated every {config.evaluation_interval}" if task.val is not None else "no evaluation"
    rows = describe_data(train, task.val)
    student = format_origin(task.origin["student"])
    if resumes:
        student = f"{task.origin['student']['network']} with the weights of the run in {task.output_dir}"
    rows["Student"] = student + describe_cost(task.student, task.crop_size)
    if "teacher" in task.origin:
        rows["Teacher"] = format_origin(task.origin["teacher"])
        if task.teacher is not None:
            rows["Teacher"] += describe_cost(task.teacher, task.crop_size)
    if task.cache is not None:
        rows["Teacher's cache"] = _describe_cache(task.cache)
    labels = ", labels predicted by the teacher" if task.labels_from_teacher else ""
    rows |= {
        "Method": "training on labels, without a teacher" if task.method is None else f"{task.method.name}{labels}",
        "Loss": _describe_loss(task.method, config, has_aux=get_spec(task.student).aux_head),
        "Steps": f"{config.steps} of {config.batch_size} images ({passes:.3g} passes over the data), {every}",
        "Crops": f"{task.crop_size[0]}x{task.crop_size[1]} pixels (height x width)",
        "Optimiser": f"{config.optimizer}, learning rate {config.start_learning_rate:g} falling to "
        f"{config.final_learning_rate:g}, weight decay {config.weight_decay:g}",
        "Device": _describe_device(task),
    }
    return format_rows({**rows, **choices, "Output": str(task.output_dir)})


def _describe_cache(cache: TeacherCache) -> str:
    facts = cache.facts
    scales = [f"scale {facts.scale:g}"] if facts.scale != 1 else []
    averaged = [f"averaged with {', '.join(map(str, facts.augment))}"] if facts.augment else []
    kept = [f"{facts.top_k} of {facts.num_classes} logits"] if facts.top_k else []
    details = "; ".join([f"{facts.views} crops of each image", *scales, *averaged, *kept])
    todo = "" if cache.is_complete else ", written before the first step"
    return f"{cache.folder}, {details}{todo}"


def describe_data(train: SegmentationDataset, val: SegmentationDataset | None) -> dict[str, str]:
    """Describe data and classes of a run, by the name of the line."""
    names = list(train.class_names)
    more = [f"and {len(names) - _SHOWN_CLASSES} more"] if len(names) > _SHOWN_CLASSES else []
    rows = {"Data": f"{train.name}, {len(train)} images"}
    if val is not None:
        rows["Validation"] = f"{val.name}, {len(val)} images"
    return rows | {"Classes": f"{len(names)}: {', '.join(names[:_SHOWN_CLASSES] + more)}"}


def describe_cost(network: TeacherModel, crop_size: Size) -> str:
    """Describe parameters and operations of a network as the end of a line; empty for an exported file."""
    module = network if isinstance(network, Runtime) else unwrap(network)
    if not isinstance(module, nn.Module):
        return ""
    text = f"; {format_si(sum(parameter.numel() for parameter in module.parameters()))} parameters"
    macs = count_macs(module, crop_size, get_spec(module).size_divisor)
    return text if macs is None else f"{text}, {format_si(macs)} MACs per crop"


def _describe_loss(method: DistillationLoss | None, config: TrainingConfig, *, has_aux: bool) -> str:
    weights = config.loss_weights | ({"aux": config.aux_weight} if has_aux else {})
    weights |= method.weights if method is not None else {}
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


def _describe_device(task: Task) -> str:
    accelerator = task.accelerator
    device, precision = accelerator.device, accelerator.mixed_precision
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    number = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{name}, {'fp32' if precision == 'no' else precision}{number}"


def describe_result(task: Task, metrics: Metrics | None, steps: int, seconds: float) -> str:
    """Describe a finished run.

    Args:
        task: Run.
        metrics: Scores of the final weights; None without validation data.
        steps: Number of steps that were done since the call.
        seconds: Time since the call.
    """
    rows = {"Finished": f"{steps} steps in {format_seconds(seconds)}"}
    if metrics is not None:
        rows["Scores"] = _format_scores(metrics.to_dict())
    if scores := _teacher_scores(task):
        rows["Teacher"] = _format_scores(scores)
    best = f", {BEST} (highest mIoU)" if (task.output_dir / BEST).is_file() else ""
    rows["Weights"] = f"{task.output_dir / LAST_CHECKPOINT}{best}"
    return format_rows(rows)


def _teacher_scores(task: Task) -> Mapping[str, Any] | None:
    """Return the scores that the teacher's checkpoint states, if the student's scores were measured in the same way."""
    if task.val is None or not isinstance(task.teacher, nn.Module) or task.labels_from_teacher:
        return None
    facts = get_provenance(unwrap(task.teacher))
    scores = facts.get("metrics")
    if not isinstance(scores, Mapping) or facts.get("validation_data") != task.val.name:
        return None
    is_same = (
        scores.get("images") == len(task.val)
        and set(scores.get("class_names") or ()) == set(task.val.class_names)
        and scores.get("boundary_width") == task.config.boundary_width
        and facts.get("config", {}).get("labels") == task.config.labels  # otherwise they state an agreement
        and facts.get("protocol") == json.loads(json.dumps(asdict(task.protocol)))
    )
    return scores if is_same else None


def _format_scores(scores: Mapping[str, Any]) -> str:
    values = {name: scores.get(key) for name, key in _SCORES.items()}
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)
