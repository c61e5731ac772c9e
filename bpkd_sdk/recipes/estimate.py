"""Estimates the cost of a run: memory from counts of the networks, time from one step of two images on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.models.zoo import ZOO, build_network
from bpkd_sdk.output import as_output
from bpkd_sdk.recipes.plan import Plan
from bpkd_sdk.training.accelerator import create_accelerator
from bpkd_sdk.training.label_losses import cross_entropy

BYTES_PER_FLOAT = 4
BYTES_PER_TRAINED_WEIGHT = 3 * BYTES_PER_FLOAT  # the weight, its gradient and its momentum
LOGIT_TENSORS = 3  # resized logits, their log-softmax and its gradient
TIMED_IMAGES = 2  # batch norm after global pooling needs more than one image
CPU_SHRINKING = 4  # divisor of both sides of the timed crop on a CPU


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run, without data loading, evaluation and the method's own terms.

    Attributes:
        processes: Number of processes that share the images of a step. All values below except `step_macs` are per
            process.
        step_macs: Multiply-accumulates of a step: the teacher's forward pass, the student's forward pass and its
            backward pass, which counts twice.
        weight_bytes: Size in float32 of the weights of both networks and of the student's gradients and momentum.
        activation_bytes: Approximate size of the tensors for the backward pass: outputs of the student's layers, and
            logits at the labels' size with their softmax, in float32, for all images in the networks at once.
        seconds_per_step: Time of the timed step, scaled to the number of images and the pixels of the crop. It is
            rather too long, since small images use a device less efficiently.
        timed: Description of the timed step.
    """

    processes: int
    step_macs: int
    weight_bytes: int
    activation_bytes: int
    seconds_per_step: float
    timed: str


def estimate(plan: Plan) -> Estimate:
    """Count the operations and sizes of a plan's networks, and time a small step with random weights.

    The step runs on the device of the plan.

    Raises:
        ValueError: If the device does not exist.
    """
    config, recipe = plan.config, plan.recipe
    crop = config.crop_size or recipe.crop_size
    with torch.device("meta"):
        student, teacher = _build_networks(plan)
    student_cost = profile(student, crop)
    teacher_cost = None if teacher is None else profile(teacher, crop)
    heads = 1 + ZOO[recipe.student].has_aux_head
    logit_bytes = LOGIT_TENSORS * heads * recipe.num_classes * crop[0] * crop[1] * BYTES_PER_FLOAT
    accelerator = create_accelerator(config)
    images = config.batch_size // accelerator.num_processes
    seconds, timed = _time_step(plan, crop, accelerator)
    return Estimate(
        processes=accelerator.num_processes,
        step_macs=config.batch_size * (3 * student_cost.macs + (teacher_cost.macs if teacher_cost else 0)),
        weight_bytes=student_cost.params * BYTES_PER_TRAINED_WEIGHT
        + (teacher_cost.params * BYTES_PER_FLOAT if teacher_cost else 0),
        activation_bytes=images // config.accumulate * (student_cost.activation_bytes + logit_bytes),
        seconds_per_step=images * seconds,
        timed=timed,
    )


def _build_networks(plan: Plan) -> tuple[nn.Module, nn.Module | None]:
    recipe = plan.recipe
    student = build_network(recipe.student, recipe.num_classes, aux_head=ZOO[recipe.student].has_aux_head)
    return student, None if plan.method == "none" else build_network(recipe.teacher, recipe.num_classes).eval()


def _time_step(plan: Plan, crop: tuple[int, int], accelerator: Accelerator) -> tuple[float, str]:
    """Return the seconds for one image of the crop's size, and a description of the timed step."""
    device = accelerator.device
    shrink = CPU_SHRINKING if device.type == "cpu" else 1
    height, width = (32 * math.ceil(side / shrink / 32) for side in crop)
    student, teacher = (None if network is None else network.to(device) for network in _build_networks(plan))
    assert student is not None  # noqa: S101  (only the teacher may be None)
    images = torch.zeros(TIMED_IMAGES, 3, height, width, device=device)
    labels = torch.zeros(TIMED_IMAGES, height, width, dtype=torch.int64, device=device)

    def step() -> float:
        started = time.perf_counter()
        with accelerator.autocast():
            if teacher is not None:
                with torch.inference_mode():
                    teacher(images)
            output = as_output(student(images))
            heads = [logits for logits in (output.logits, output.aux_logits) if logits is not None]
            loss = torch.stack([cross_entropy(logits, labels, 255) for logits in heads]).sum()
        accelerator.backward(loss)
        loss.item()
        return time.perf_counter() - started

    step()  # the first step also allocates memory and selects kernels
    seconds = step() / TIMED_IMAGES * (crop[0] * crop[1]) / (height * width)
    timed = f"one step of {TIMED_IMAGES} images of {height}x{width} on {device}, scaled by images and pixels"
    return seconds, timed
