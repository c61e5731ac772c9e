"""What every method may spend: as many steps, or as many seconds of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

FIRST_TRIAL = 30  # steps of the first attempt to time a method
LOG_EVERY = 5  # steps between two readings of the clock; what lies before the first is warm-up
LONGEST_TRIAL = 30.0  # seconds


@dataclass(frozen=True)
class Budget:
    """An amount of training.

    Attributes:
        unit: "steps" or "seconds".
        amount: How many; steps are whole.
    """

    unit: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "steps=300" or "seconds=600".

        Raises:
            ValueError: For anything else.
        """
        unit, _, number = text.partition("=")
        try:
            amount = float(int(number) if unit == "steps" else float(number))
        except ValueError:
            amount = math.nan
        if unit not in ("steps", "seconds") or not 0 < amount < math.inf:
            raise ValueError(f"Expected `budget` to be like 'steps=300' or 'seconds=600', but got {text!r}.")
        return cls(unit, amount)

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:g}"

    def steps(self, ms_per_step: float) -> int:
        """Steps that fit into the seconds.

        Args:
            ms_per_step: Milliseconds that one step takes.

        Raises:
            ValueError: If not one step fits.
        """
        steps = int(1000 * self.amount / ms_per_step)
        if steps < 1:
            raise ValueError(f"A step takes {ms_per_step / 1000:.3g} s, so a budget of {self} holds none. Raise it.")
        return steps


def step_times(history: list[dict[str, Any]]) -> list[float]:
    """Milliseconds a step in each stretch of a run's history, evaluations left out."""
    times, last = [], 0
    for record in history:
        if "terms" in record:
            times.append(1000 * record["seconds"] / (record["step"] - last))
            last = record["step"]
    return times


def time_per_step(train: Callable[[int], list[dict[str, Any]]], seconds: float) -> float:
    """Milliseconds a step takes: the median over the stretches of a trial, the first left out.

    The trial is long enough to say: a twentieth of what it is asked for, but no more than half a minute.

    Args:
        train: Trains for so many steps with a record every `LOG_EVERY`, and returns the history.
        seconds: To be filled with steps.
    """
    steps = FIRST_TRIAL
    while True:
        times = step_times(train(steps))[1:]
        if LOG_EVERY * sum(times) / 1000 >= min(LONGEST_TRIAL, seconds / 20):
            return median(times)
        steps *= 4
