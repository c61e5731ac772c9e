"""One artifact under measurement: opened, warmed up until its times settle, timed in rounds, then inspected."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from bpkd_sdk.arrays import to_numpy
from bpkd_sdk.export.benchmark.facts import Facts, find_facts
from bpkd_sdk.memory import GpuMemoryMeter, MemoryMeter, combined_peak
from bpkd_sdk.runtime import AcceptedImages, Runtime, find_format, open_runtime
from bpkd_sdk.runtime.device import Device, choose_device, choose_onnx_device
from bpkd_sdk.runtime.fit import Fit, StageTimer, fit_images, fit_size, fitted_masks
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

# The warm-up ends when the median time of the last WINDOW calls differs from that of the WINDOW calls before them by at
# most this share.
WINDOW, TOLERANCE = 3, 0.05
LONGEST_WARM_UP = 20.0  # seconds after the first call, which may compile

# Share of a round's time for whole calls; the rest is for calls in stages.
SHARE_OF_WHOLE = 2 / 3


@dataclass(frozen=True)
class Description:
    """The facts that an artifact states about itself.

    Attributes:
        name: Path or URL of the artifact, or name of a module's network.
        spec: Facts of the network.
        accepts: Shapes of images that the artifact accepts.
        device: Device that the artifact runs on.
        input_size: (height, width) of the images that the artifact accepts or was traced with; None if not stated.
        claim: Precision stated in the metadata; None for a module, which has no metadata.
        warnings: Warnings raised when the artifact was opened.
    """

    name: str
    spec: NetworkSpec
    accepts: AcceptedImages
    device: str
    input_size: tuple[int, int] | None
    claim: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class WarmUp:
    """The result of the first calls.

    Attributes:
        calls: Number of calls of the warm-up.
        settled: Whether the times settled within the time limit.
        masks: Masks of all images, uint8 (N, H, W).
        device_memory: Peak memory of the GPU in bytes, over opening and warm-up, if no other process used it; None
            without a GPU.
    """

    calls: int
    settled: bool
    masks: np.ndarray
    device_memory: int | None


@dataclass(frozen=True)
class Times:
    """Durations of calls, in seconds.

    Attributes:
        whole: Calls from images on the host to masks on the host.
        pre: Preprocessing of calls that wait for the device after each stage.
        inference: Inference of the same calls.
        post: Postprocessing of the same calls.
    """

    whole: list[float] = field(default_factory=list)
    pre: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    post: list[float] = field(default_factory=list)


class Subject:
    """An opened artifact with methods that measure it.

    Args:
        source: Artifact that `bpkd_sdk.runtime.open_runtime` can open.
        device: Device to run the artifact on.
        batch_size: Number of images per call.
        fit: Rule for images of a size that the artifact does not accept.
    """

    def __init__(
        self, source: str | Path | nn.Module | Runtime, device: str, batch_size: int, fit: Fit = "slide"
    ) -> None:
        self.batch_size = batch_size
        self.fit = fit
        self._host_meter = MemoryMeter()
        with (
            GpuMemoryMeter(_expected_device(source, device)) as self._opening,
            warnings.catch_warnings(record=True) as self._warnings,
        ):
            warnings.simplefilter("always")
            self.runtime = open_runtime(source, device)

    def describe(self) -> Description:
        """Return the facts that the artifact states about itself."""
        facts, runtime = self.runtime.metadata, self.runtime
        size = runtime.accepts.fixed_size or facts.get("input_size")
        input_size = size and (int(size[0]), int(size[1]))
        claim = None if runtime.is_module else facts.get("precision")
        texts = tuple(str(warning.message) for warning in self._warnings if warning.category is UserWarning)
        return Description(runtime.name, runtime.spec, runtime.accepts, str(runtime.device), input_size, claim, texts)

    def warm_up(self, images: np.ndarray) -> WarmUp:
        """Segment all images (N, H, W, channels), and then repeat the call until the times settle."""
        self.runtime.accepts.check_batch(self.batch_size, self.runtime.name)
        self.images = images
        batches = np.split(images, len(images) // self.batch_size)
        self._batches = cycle(batches)
        with GpuMemoryMeter(self.runtime.device) as warming:
            masks = np.concatenate([self.segment(batch) for batch in batches])
            calls, settled = settle(self._whole_call)
        gc.collect()
        return WarmUp(len(batches) + calls, settled, masks, combined_peak(self._opening, warming))

    def measure_round(self, seconds: float) -> Times:
        """Time calls for a number of seconds: at least two whole calls and one in stages."""
        times = Times()
        gc.disable()
        try:
            times.whole.extend(repeat(lambda: time_call(self._whole_call), seconds * SHARE_OF_WHOLE, 2))
            staged = repeat(self._staged_call, seconds * (1 - SHARE_OF_WHOLE), 1)
        finally:
            gc.enable()
        for stage, values in zip((times.pre, times.inference, times.post), zip(*staged, strict=True), strict=True):
            stage.extend(values)
        return times

    def segment(self, images: np.ndarray) -> np.ndarray:
        """Return the masks (N, H, W) of images (N, H, W, channels)."""
        return self._segment(images, None)

    def inspect(self) -> tuple[Facts, int | None]:
        """Return the facts of the artifact, and its peak host memory in bytes (None if unknown)."""
        peak = self._host_meter.peak()
        # The images of the benchmark are not part of the artifact.
        host_memory = None if peak is None else peak - self.images.nbytes
        images = self.images[: self.batch_size].transpose(0, 3, 1, 2)
        fitted = fit_size((images.shape[2], images.shape[3]), self.runtime.accepts, self.fit)
        height, width = fitted.window
        parts = fit_images(images, fitted, self.runtime.spec)[..., :height, :width].transpose(0, 2, 3, 1)
        return find_facts(self.runtime, parts, len(fitted.corners())), host_memory

    def _whole_call(self) -> None:
        self._segment(next(self._batches), None)

    def _staged_call(self) -> tuple[float, float, float]:
        images, timer = next(self._batches), StageTimer()
        self._segment(images, timer)
        return timer.stop()

    def _segment(self, images: np.ndarray, timer: StageTimer | None) -> np.ndarray:
        return to_numpy(fitted_masks(self.runtime, images.transpose(0, 3, 1, 2), self.fit, timer=timer))


def _expected_device(source: str | Path | nn.Module | Runtime, device: str) -> Device:
    """Return the device that an artifact will run on, before it is opened."""
    if isinstance(source, Runtime):
        return source.device
    runs_in_torch = not isinstance(source, (str, Path)) or find_format(str(source)).name not in ("ONNX", "Triton")
    return choose_device(device) if runs_in_torch else choose_onnx_device(device)


def settle(call: Callable[[], object]) -> tuple[int, bool]:
    """Repeat a call until its times settle.

    Returns:
        Number of calls, and whether the times settled within `LONGEST_WARM_UP`.
    """
    times = [time_call(call)]
    end = time.perf_counter() + LONGEST_WARM_UP
    while True:
        times.append(time_call(call))
        if len(times) < 2 * WINDOW:
            continue
        before, last = statistics.median(times[-2 * WINDOW : -WINDOW]), statistics.median(times[-WINDOW:])
        if abs(last - before) <= TOLERANCE * before:
            return len(times), True
        if time.perf_counter() > end:
            return len(times), False


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeat(call: Callable[[], T], seconds: float, least: int) -> list[T]:
    """Repeat a call for a number of seconds, but at least `least` times, and return its results."""
    end = time.perf_counter() + seconds
    results = [call() for _ in range(least)]
    while time.perf_counter() < end:
        results.append(call())
    return results
