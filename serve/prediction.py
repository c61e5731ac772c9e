"""What comes of an image: the mask, what its ids mean, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bpkd_sdk.classes import MOST_CLASSES, check_mask_classes
from bpkd_sdk.models.spec import Color, NetworkSpec, distinct_colors


@dataclass(frozen=True)
class Timings:
    """Milliseconds for one image; of a batch each image has its share.

    Attributes:
        pre: Reading, checking, resizing, moving to the device.
        inference: The network.
        post: From what it returned to the mask on the host.
    """

    pre: float
    inference: float
    post: float

    @property
    def total(self) -> float:
        """All three."""
        return self.pre + self.inference + self.post


@dataclass(frozen=True)
class Prediction:
    """What a `Predictor` makes of one image.

    Attributes:
        mask: uint8 (H, W), class ids, at the image's own size.
        class_names: One per class.
        palette: One RGB colour (0..255) per class.
        timings: Where the time went.
        confidence: float32 (H, W), the probability (0..1) of the class in the mask; None unless asked for.
        entropy: float32 (H, W), of the probabilities of all classes: 0 where one is certain, 1 where all are alike;
            None unless asked for.
    """

    mask: np.ndarray
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    timings: Timings
    confidence: np.ndarray | None = None
    entropy: np.ndarray | None = None

    @property
    def latency_ms(self) -> float:
        """From image to mask."""
        return self.timings.total


def names_and_colors(spec: NetworkSpec) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Names and colours of the ids in the masks."""
    check_mask_classes(spec.num_classes)
    ids = max(spec.num_classes, 2) if spec.num_classes else MOST_CLASSES
    names, palette = spec.class_names, spec.palette
    if spec.num_classes == 1:
        names = ("background", *names) if len(names) == 1 else names
        palette = ((0, 0, 0), *palette) if len(palette) == 1 else palette
    return names or tuple(str(index) for index in range(ids)), palette or distinct_colors(ids)


class Clock:
    """Adds up the time in each stage; what is neither pre nor inference is post."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.spent = {"pre": 0.0, "inference": 0.0}

    @contextmanager
    def stage(self, name: Literal["pre", "inference"]) -> Iterator[None]:
        """Count what happens inside to this stage."""
        start = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - start

    def stop(self, images: int, reading: float) -> Timings:
        """Milliseconds an image; `reading` is the time to read one."""
        total = 1000 * (time.perf_counter() - self.start) / images
        pre, inference = (1000 * spent / images for spent in self.spent.values())
        return Timings(reading + pre, inference, total - pre - inference)
