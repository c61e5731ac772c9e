"""What a run will cost: memory from the networks' own counts, time from a step of two small images on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.models.zoo import ZOO, build
from bpkd_sdk.output import as_output
from bpkd_sdk.recipes.reproduction import Plan
from bpkd_sdk.training.accelerator import create_accelerator
from bpkd_sdk.training.objective import cross_entropy

FLOAT = 4  # bytes
TRAINED = 3 * FLOAT  # a weight, its gradient, its momentum
LOGITS_KEPT = 3  # resized logits, their log-softmax and its gradient
IMAGES = 2  # of the timed step: batch norm behind global pooling needs more than one
ON_CPU = 4  # the timed crop is so much smaller on each side


@dataclass(frozen=True)
class Estimate:
    """The cost of a run, without loading data, evaluation and the method's own terms.

    Attributes:
        processes: What shares the images of a step; below, all but `step_macs` is for each of them.
        step_macs: Multiply-accumulates of a step: the teacher forward, the student forward and backward (twice the
            forward pass).
        weight_bytes: Weights of both networks, gradients and momentum of the student, in float32.
        activation_bytes: What the student's layers put out, in float32, and the logits at the labels' size with their
            softmax, for all images that are in the networks at once: about what is kept for the backward pass.
        seconds_per_step: The timed step, scaled to the number of images and the pixels of the crop. Small images use a
            device less well, so it is rather too long than too short.
        timed: What was timed.
    """

    processes: int
    step_macs: int
    weight_bytes: int
    activation_bytes: int
    seconds_per_step: float
    timed: str


def estimate(plan: Plan) -> Estimate:
    """Count the networks of a plan, and time a small step of them with random weights on the plan's device.

    Raises:
        ValueError: If the device is not there.
    """
    config, recipe = plan.config, plan.recipe
    crop = config.crop_size or recipe.crop_size
    with torch.device("meta"):
        student, teacher = _networks(plan)
    cost = profile(student, crop)
    guide = None if teacher is None else profile(teacher, crop)
    heads = 1 + ZOO[recipe.student].has_aux_head
    logits = LOGITS_KEPT * heads * recipe.num_classes * crop[0] * crop[1] * FLOAT
    accelerator = create_accelerator(config)
    images = config.batch_size // accelerator.num_processes
    seconds, timed = _time(plan, crop, accelerator)
    return Estimate(
        processes=accelerator.num_processes,
        step_macs=config.batch_size * (3 * cost.macs + (guide.macs if guide else 0)),
        weight_bytes=cost.params * TRAINED + (guide.params * FLOAT if guide else 0),
        activation_bytes=images // config.accumulate * (cost.activation_bytes + logits),
        seconds_per_step=images * seconds,
        timed=timed,
    )


def _networks(plan: Plan) -> tuple[nn.Module, nn.Module | None]:
    recipe = plan.recipe
    student = build(recipe.student, recipe.num_classes, aux_head=ZOO[recipe.student].has_aux_head)
    return student, None if plan.method == "none" else build(recipe.teacher, recipe.num_classes).eval()


def _time(plan: Plan, crop: tuple[int, int], accelerator: Accelerator) -> tuple[float, str]:
    """Seconds for one image of the crop's size, and what was timed."""
    device = accelerator.device
    shrink = ON_CPU if device.type == "cpu" else 1
    height, width = (32 * math.ceil(side / shrink / 32) for side in crop)
    student, teacher = (None if network is None else network.to(device) for network in _networks(plan))
    assert student is not None  # noqa: S101  (only the teacher may be missing)
    images = torch.zeros(IMAGES, 3, height, width, device=device)
    labels = torch.zeros(IMAGES, height, width, dtype=torch.int64, device=device)

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

    step()  # the first one also allocates, and picks its kernels
    seconds = step() / IMAGES * (crop[0] * crop[1]) / (height * width)
    timed = f"one step of {IMAGES} images of {height}x{width} on {device}, scaled by images and pixels"
    return seconds, timed
