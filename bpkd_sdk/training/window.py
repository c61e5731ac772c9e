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

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        """Add one step's terms, without waiting for the device."""
        self.images += images
        self.sums = {name: self.sums.get(name, torch.zeros_like(term)) + term for name, term in terms.items()}

    def record(self, step: int, accelerator: Accelerator) -> dict[str, Any]:
        """What happened since the last record, on all processes together.

        Raises:
            FloatingPointError: If a term was not finite.
        """
        means = torch.stack(list(self.sums.values())) / (step - self.first_step)
        terms = dict(zip(self.sums, accelerator.reduce(means, "mean").tolist(), strict=True))
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
