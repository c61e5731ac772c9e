"""`benchmark`: artifacts of any format, timed in turns on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from torch import nn

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.shapes import render
from bpkd_sdk.export.benchmark.entry import GAP, Artifact, Entry
from bpkd_sdk.export.benchmark.environment import Environment, gpus
from bpkd_sdk.export.benchmark.report import BenchmarkReport
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import Runtime

ROUNDS = 5
BATCHES = 4  # of different images, taken in turns
DEFAULT_SIZE = (512, 1024)


def benchmark(
    artifacts: Artifact | Sequence[Artifact],
    data: SegmentationDataset | None = None,
    *,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    duration: float = 10.0,
    device: str = "auto",
    match_classes: bool = True,
) -> BenchmarkReport:
    """Measure artifacts side by side: what they are, how fast they are, what they need, how good they are.

    Each file is opened, timed and scored in a process of its own, so that its memory is told apart and a crash is its
    own; modules and runtimes are measured in this process. One after the other is opened, then warmed up: until the
    median of the last three calls differs by at most 5 % from that of the three before, for 20 seconds at most. Then
    the artifacts take turns in `ROUNDS` rounds, every second one in the opposite order, so that a machine that grows
    hot or busy hurts them alike; `GAP` seconds are idle between them. Two thirds of the time go to calls from host to
    host, the rest to calls that wait for the device after each stage.

    Args:
        artifacts: Paths or URLs of any of `bpkd_sdk.runtime.FORMATS`, modules in eval mode, or runtimes; such as
            ``TorchRuntime(torch.compile(model))``. One that cannot run here is a row with the reason.
        data: Its images are the input, and with labels all artifacts are scored on the whole of it. None: generated
            scenes, and no scores.
        batch: Images at a time.
        size: (height, width) of the images; those of `data` are resized for timing, not for scoring. None: that of
            the data, otherwise that of the first artifact that names one, otherwise 512x1024.
        duration: Seconds of timed calls for each artifact; each round has two calls and one in stages at least.
        device: "auto" (a CUDA GPU where there is one and the artifact can use it), "cpu", "cuda", ...
        match_classes: Hold the class names of each artifact against those of `data`, and score it in the data's order;
            False takes them by position.

    Raises:
        ValueError: For an argument out of its range.
    """
    sources = [artifacts] if isinstance(artifacts, (str, Path, nn.Module, Runtime)) else list(artifacts)
    if not sources:
        raise ValueError("Expected at least one artifact to benchmark, but got none.")
    if batch < 1 or duration <= 0:
        raise ValueError(f"Expected `batch` of at least 1 and `duration` above 0, but got {batch} and {duration}.")
    environment = Environment.here()
    with _started(sources, device, batch) as entries:
        for entry in track(entries, total=len(entries), description="Opening"):
            entry.open()
        size = _choose_size(size, data, entries)
        images = _images(data, size, batch)
        for entry in track(entries, total=len(entries), description="Warming up"):
            entry.warm_up(images)
        turns = [entry for index in range(ROUNDS) for entry in (entries if index % 2 == 0 else reversed(entries))]
        for entry in track(turns, total=len(turns), description="Timing"):
            entry.round(duration / ROUNDS)
        clocks = tuple(gpus())
        for entry in track(entries, total=len(entries), description="Looking into"):
            entry.look()
        if data is not None and data.has_labels:
            for entry in track(entries, total=len(entries), description="Scoring"):
                entry.score(data, match_classes)
    reference = next((entry for entry in entries if entry.warm and entry.problem is None), None)
    return BenchmarkReport(
        rows=tuple(entry.row(reference) for entry in entries),
        batch=batch,
        size=size,
        images=data.name if data is not None else "generated scenes",
        data=data.name if data is not None and data.has_labels else None,
        duration=duration,
        rounds=ROUNDS,
        gap=GAP,
        environment=environment,
        clocks_after=clocks,
    )


@contextmanager
def _started(sources: Sequence[Artifact], device: str, batch: int) -> Iterator[list[Entry]]:
    """The artifacts, whose processes end with the block."""
    entries: list[Entry] = []
    try:
        for source in sources:
            entries.append(Entry(source, device, batch))  # noqa: PERF401  (those before one that fails must be closed)
        yield entries
    finally:
        for entry in entries:
            entry.close()


def _choose_size(
    asked: tuple[int, int] | None, data: SegmentationDataset | None, entries: Sequence[Entry]
) -> tuple[int, int]:
    if asked is not None:
        return asked
    if data is not None:
        height, width = data[0][0].shape[1:]
        return height, width
    return next((entry.opened.size for entry in entries if entry.opened and entry.opened.size), DEFAULT_SIZE)


def _images(data: SegmentationDataset | None, size: tuple[int, int], batch: int) -> np.ndarray:
    """uint8 (BATCHES * batch, H, W, 3): the first of the data, over and over if they are few, or scenes."""
    indices = range(BATCHES * batch)
    if data is None:
        return np.stack([render(0, "benchmark", index, size)[0] for index in indices])
    images = (data[index % len(data)][0].permute(1, 2, 0).numpy() for index in indices)
    return np.stack([cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) for image in images])
