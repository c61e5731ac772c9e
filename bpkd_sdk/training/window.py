"""The steps since the last record: means of the loss terms, and speed."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Window:
    """Sums up steps until `record` tells what happened in them.

    Args:
        step: Steps done before.
    """

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.started = time.perf_counter()
        self.images = 0
        self.sums: dict[str, Tensor] = {}
        self.teacher: Tensor | float = 0.0

    def add(self, terms: dict[str, Tensor], images: int, teacher: Tensor | float) -> None:
        """Add one step's terms and the sum of the teacher's logits, without waiting for the device."""
        self.images += images
        self.teacher = self.teacher + teacher
        self.sums = {name: self.sums.get(name, torch.zeros_like(term)) + term for name, term in terms.items()}

    def record(self, step: int, accelerator: Accelerator) -> dict[str, Any]:
        """What happened since the last record, on all processes together.

        Raises:
            FloatingPointError: If a term, or the teacher's logits, were not finite.
        """
        means = torch.stack(list(self.sums.values())) / (step - self.first_step)
        teacher = torch.as_tensor(self.teacher, dtype=means.dtype, device=means.device).view(1)
        *values, taught = accelerator.reduce(torch.cat([means, teacher]), "mean").tolist()
        terms = dict(zip(self.sums, values, strict=True))
        if not math.isfinite(taught):
            raise FloatingPointError(
                f"The teacher's logits are not finite between steps {self.first_step + 1} and {step}. The last "
                "checkpoint is older. Check the teacher's weights and the images it fails on; where it runs in half "
                "precision, pass teacher_precision='fp32'."
            )
        if broken := [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"The loss is not finite: {', '.join(broken)} between steps {self.first_step + 1} and {step}. "
                "The last checkpoint is older. Lower the learning rate, set gradient_clip, or use precision='fp32'."
            )
        seconds = time.perf_counter() - self.started
        return {
            "step": step,
            "loss": sum(terms.values()),
            "terms": terms,
            "images_per_second": self.images / seconds,
            "seconds": seconds,
        }
