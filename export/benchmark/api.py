"""`benchmark`: measures artifacts of any format in turns on the same images."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from bpkd_sdk.data.shapes import render
from bpkd_sdk.errors import import_optional
from bpkd_sdk.export.benchmark.entry import GAP, Artifact, Entry
from bpkd_sdk.export.benchmark.environment import Environment, list_gpus
from bpkd_sdk.export.benchmark.report import BenchmarkReport
from bpkd_sdk.progress import track, working
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.runtime.fit import Fit, check_fit
from bpkd_sdk.sizes import check_size
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bpkd_sdk.data import SegmentationDataset

ROUNDS = 5
BATCHES = 4  # number of different batches, used in turns
DEFAULT_SIZE = (512, 1024)


def benchmark(
    sources: Artifact | Sequence[Artifact],
    data: Any = None,
    *,
    batch_size: int = 1,
    input_size: tuple[int, int] | None = None,
    duration: float = 10.0,
    device: str = "auto",
    fit: Fit = "slide",
    match_classes: bool = True,
) -> BenchmarkReport:
    """Measure the cost, latency, memory, precision and accuracy of artifacts side by side.

    Each file is opened, timed and scored in a process of its own, so that its memory is measured separately and a crash
    affects no other artifact. Modules and runtimes are measured in this process.

    All artifacts are opened, and then warmed up one after another: calls are repeated until the median of the last
    three differs by at most 5 % from that of the three before, for at most 20 seconds. Then the artifacts take turns
    in `ROUNDS` rounds. Every second round has the opposite order, so that a machine that heats up or becomes busy
    affects all artifacts alike. `GAP` seconds are idle before each turn. Two thirds of the time are for calls from
    host to host, one third for calls that wait for the device after each stage.

    Args:
        sources: Artifacts: paths or URLs of any of `bpkd_sdk.runtime.FORMATS`, modules in eval mode, or runtimes such
            as ``TorchRuntime(torch.compile(model))``. An artifact that cannot run here becomes a row with the reason.
        data: Data set whose images are the input, of any library (see `as_dataset`). If it has labels, all artifacts
            are scored on all of its images; if it does not state its classes, they are those of the first artifact.
            None: generated scenes, and no scores; torch is then needed only for artifacts that it runs.
        batch_size: Number of images per call.
        input_size: (height, width) of the images. Images of `data` are resized to it for timing, not for scoring.
            None: size of the data's first image; without data, the first size that an artifact states, or 512x1024.
        duration: Seconds of timed calls for each artifact. Each round has at least two whole calls and one in stages.
        device: "auto" (a GPU if there is one that the artifact supports, otherwise the CPU), "cpu", "cuda", ...
        fit: "slide", "resize" or "pad": rule for images of a size that an artifact does not accept, for timing and
            scoring; see `bpkd_sdk.runtime.fit`.
        match_classes: Whether to compare the class names of each artifact with those of `data`, and to score its masks
            in the order of the data. False: classes are matched by position.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: If `data` is passed and torch is not installed.
    """
    check_fit(fit)
    if input_size is not None:
        input_size = check_size("input_size", input_size)
    artifacts = _list_artifacts(sources)
    if not artifacts:
        raise ValueError("Expected at least one artifact to benchmark, but got none.")
    if batch_size < 1 or duration <= 0:
        raise ValueError(
            f"Expected `batch_size` of at least 1 and `duration` above 0, but got {batch_size} and {duration}."
        )
    adapt = None if data is None else import_optional("bpkd_sdk.data.adapt")
    environment = Environment.here()
    with _start(artifacts, device, batch_size, fit) as entries:
        for entry in track(entries, total=len(entries), description="Opening"):
            with working(f"Opening {entry.name}"):
                entry.open()
        if adapt is not None:
            names = (entry.description.spec.class_names for entry in entries if entry.description)
            data = adapt.as_dataset_of(data, next(filter(None, names), ()))
        input_size = input_size or _default_size(data, entries)
        images = _make_images(data, input_size, batch_size, _first_spec(entries))
        for entry in track(entries, total=len(entries), description="Warming up"):
            with working(f"Warming up {entry.name}"):
                entry.warm_up(images)
        turns = [entry for index in range(ROUNDS) for entry in (entries if index % 2 == 0 else reversed(entries))]
        for entry in track(turns, total=len(turns), description="Timing"):
            entry.measure_round(duration / ROUNDS)
        clocks_after = tuple(list_gpus())
        for entry in track(entries, total=len(entries), description="Inspecting"):
            entry.inspect()
        if data is not None and data.has_labels:
            for entry in track(entries, total=len(entries), description="Scoring"):
                with working(f"Scoring {entry.name}"):
                    entry.score(data, match_classes)
    reference = next((entry for entry in entries if entry.warm and entry.problem is None), None)
    return BenchmarkReport(
        rows=tuple(entry.row(reference) for entry in entries),
        batch_size=batch_size,
        input_size=input_size,
        images=data.name if data is not None else "generated scenes",
        data=data.name if data is not None and data.has_labels else None,
        duration=duration,
        rounds=ROUNDS,
        gap=GAP,
        environment=environment,
        clocks_after=clocks_after,
        fit=fit,
    )


def _list_artifacts(sources: Any) -> list[Artifact]:
    """Return artifacts as a list; modules of torch are artifacts, although some contain a sequence of others."""
    torch = sys.modules.get("torch")  # if it is not imported, no object is a module
    is_one = isinstance(sources, (str, Path, Runtime)) or (torch is not None and isinstance(sources, torch.nn.Module))
    return [sources] if is_one or not isinstance(sources, Iterable) else list(sources)


@contextmanager
def _start(artifacts: Sequence[Artifact], device: str, batch_size: int, fit: Fit) -> Iterator[list[Entry]]:
    """Yield the entries of the artifacts, and end their processes after the block."""
    entries: list[Entry] = []
    try:
        for source in artifacts:
            entries.append(Entry(source, device, batch_size, fit))  # noqa: PERF401  (if one fails, those before it are closed)
        yield entries
    finally:
        for entry in entries:
            entry.close()


def _default_size(data: SegmentationDataset | None, entries: Sequence[Entry]) -> tuple[int, int]:
    if data is not None:
        height, width = data[0][0].shape[1:]
        return height, width
    descriptions = (entry.description for entry in entries)
    return next((found.input_size for found in descriptions if found and found.input_size), DEFAULT_SIZE)


def _first_spec(entries: Sequence[Entry]) -> NetworkSpec:
    """Return the facts of the first artifact that could be opened."""
    return next((entry.description.spec for entry in entries if entry.description), NetworkSpec(None, 0))


def _make_images(
    data: SegmentationDataset | None, input_size: tuple[int, int], batch_size: int, spec: NetworkSpec
) -> np.ndarray:
    """Return images of the data, repeated if there are too few, or scenes as a network takes them.

    Args:
        data: Data set, or None for scenes.
        input_size: (height, width) of the images.
        batch_size: Number of images per call.
        spec: Facts of the network.

    Returns:
        (BATCHES * batch_size, H, W, channels).
    """
    indices = range(BATCHES * batch_size)
    if data is None:
        scenes = np.stack([render(0, "benchmark", index, input_size)[0] for index in indices])
        return np.ascontiguousarray(spec.imitate(scenes.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1))
    from bpkd_sdk.data.checks import checked_image

    samples = (index % len(data) for index in indices)
    return np.stack([_resize(checked_image(data, index, data[index][0]), input_size) for index in samples])


def _resize(image: Tensor, input_size: tuple[int, int]) -> np.ndarray:
    """Resize an image (channels, H, W) to (height, width, channels)."""
    pixels, side = np.ascontiguousarray(image.permute(1, 2, 0).numpy()), input_size[::-1]
    # OpenCV resizes at most four channels at once by area.
    parts = (np.ascontiguousarray(pixels[..., start : start + 4]) for start in range(0, pixels.shape[2], 4))
    return np.dstack([cv2.resize(part, side, interpolation=cv2.INTER_AREA) for part in parts])
