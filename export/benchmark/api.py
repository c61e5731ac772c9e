"""`benchmark`: artifacts of any format, timed in turns on the same images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.classes import class_order, reorder_masks
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.shapes import render
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.evaluation.agreement import mask_agreement
from bpkd_sdk.export.benchmark.facts import Environment, Facts, gpus
from bpkd_sdk.export.benchmark.report import STAGES, UNSTEADY, BenchmarkReport, BenchmarkRow, Percentiles
from bpkd_sdk.export.benchmark.subject import ArtifactError, Opened, RemoteSubject, Subject, Times, WarmUp
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import Runtime, TorchRuntime, find_format

Artifact = str | Path | nn.Module | Runtime
T = TypeVar("T")

GAP = 0.2  # seconds, in which the threads of the artifact before go to sleep


class Entry:
    """An artifact and all that was found of it.

    Args:
        source: A path or URL gets a process of its own, which starts now; anything else is measured in this one.
        device: Where it shall run.
        batch: Images at a time.

    Attributes:
        problem: Why it could not be measured.
        not_scored: Why it has no scores, where it should.
    """

    def __init__(self, source: Artifact, device: str, batch: int) -> None:
        self.source, self.device, self.batch = source, device, batch
        self.problem: str | None = None
        self.opened: Opened | None = None
        self.warm: WarmUp | None = None
        self.facts: Facts | None = None
        self.host_memory: int | None = None
        self.scores: Metrics | None = None
        self.not_scored: str | None = None
        self._parts: list[Times] = []
        self._remote: RemoteSubject | None = None
        if isinstance(source, (str, Path)):
            self._attempt(lambda: find_format(str(source)))
            self._remote = None if self.problem else RemoteSubject(source, device, batch)
        self._subject: RemoteSubject | Subject | None = self._remote

    def open(self) -> None:
        """Open it."""
        self.opened = self._attempt(lambda: self._open().opened())

    def warm_up(self, images: np.ndarray) -> None:
        """Call it until its times settle."""
        self.warm = self._attempt(lambda: self._open().warm_up(images))

    def round(self, seconds: float) -> None:
        """Time it, after a pause."""
        time.sleep(GAP)
        if (times := self._attempt(lambda: self._open().round(seconds))) is not None:
            self._parts.append(times)

    def inspect(self) -> None:
        """Look into it."""
        if (found := self._attempt(lambda: self._open().inspect())) is not None:
            self.facts, host_memory = found
            self.host_memory = host_memory if self._remote else None

    def score(self, data: SegmentationDataset, match_classes: bool = True) -> None:
        """Score it on labelled data, in its own process, if it could be measured."""
        if self.problem is not None or self.opened is None:
            return
        try:
            self.scores = evaluate(
                _Scored(self._open(), self.opened), data, batch_size=self.batch, match_classes=match_classes
            )
        except (ValueError, RuntimeError, ArtifactError) as error:
            self.not_scored = str(error)

    def close(self) -> None:
        """End its process."""
        if self._remote:
            self._remote.close()

    def row(self, reference: Entry | None) -> BenchmarkRow:
        """All that was found, with the agreement of its masks with those of the first artifact."""
        name, format_, size = self._name()
        if self.problem is not None or not (self.opened and self.warm and self.facts and self._parts):
            return BenchmarkRow(name, format_, problem=self.problem, file_size=size)
        whole = [seconds for part in self._parts for seconds in part.whole]
        stages = {stage: [seconds for part in self._parts for seconds in getattr(part, stage)] for stage in STAGES}
        rounds = tuple(Percentiles.of(part.whole).p50 for part in self._parts)
        agreement, edge_agreement = _agreement(self.opened, self.warm, reference)
        return BenchmarkRow(
            name=name,
            format=format_,
            device=self.opened.device,
            file_size=size,
            params=self.facts.params,
            macs=self.facts.macs,
            precision=self.facts.precision,
            claim=self.opened.claim,
            placement=self.facts.placement,
            executed=self.facts.executed,
            latency=Percentiles.of(whole),
            stages={stage: Percentiles.of(seconds) for stage, seconds in stages.items()},
            throughput=self.batch * len(whole) / sum(whole),
            calls=len(whole),
            rounds=rounds,
            warm_up_calls=self.warm.calls,
            settled=self.warm.stable,
            host_memory=self.host_memory,
            device_memory=self.warm.device_memory if self._remote else None,
            miou=_known(self.scores.miou) if self.scores else None,
            boundary_iou=_known(self.scores.boundary_iou) if self.scores else None,
            agreement=agreement,
            edge_agreement=edge_agreement,
            notes=tuple(_notes(self.opened, self.warm, self.facts, rounds, self.not_scored)),
        )

    def _open(self) -> RemoteSubject | Subject:
        if self._subject is None:
            self._subject = Subject(self.source, self.device, self.batch)
        return self._subject

    def _attempt(self, step: Callable[[], T]) -> T | None:
        if self.problem is not None:
            return None
        try:
            return step()
        except ArtifactError as failure:
            self.problem = str(failure)
        except Exception as error:  # an artifact may fail in any way; the others are measured all the same
            self.problem = f"{type(error).__name__}: {error}"
        return None

    def _name(self) -> tuple[str, str, int | None]:
        """Name, format, and size in bytes."""
        if isinstance(self.source, nn.Module):
            return self.opened.name if self.opened else type(self.source).__name__, "torch", None
        name = self.source.name if isinstance(self.source, Runtime) else str(self.source)
        try:
            format_ = find_format(name).name
        except ValueError:
            format_ = "torch" if isinstance(self.source, TorchRuntime) else "other"
        return name, format_, Path(name).stat().st_size if Path(name).is_file() else None


class _Scored(Runtime):
    """A subject as `evaluate` takes it: the images go to its process, the masks come back."""

    def __init__(self, subject: RemoteSubject | Subject, opened: Opened) -> None:
        whole = {"preprocess": True, "argmax": True}
        super().__init__(opened.name, opened.spec, whole, torch.device("cpu"), opened.accepts)
        self.subject = subject

    def infer(self, inputs: Tensor) -> Tensor:
        return torch.from_numpy(self.subject.segment(inputs.numpy()))


def _known(score: float) -> float | None:
    """None for a score of nothing, such as the boundaries of labels that have none."""
    return None if math.isnan(score) else score


def _agreement(opened: Opened, warm: WarmUp, reference: Entry | None) -> tuple[float | None, float | None]:
    """Share of pixels of one class in both: of all, and of those in the edge band of the reference's masks.

    Classes of the same names are compared, whatever their order; of other names nothing agrees.
    """
    if reference is None or reference.opened is None or reference.warm is None:
        return None, None
    spec, wanted = opened.spec, reference.opened.spec
    try:
        named = spec.class_names and wanted.class_names
        order = class_order(spec, wanted, network_name="it", data_name="the first") if named else None
    except ValueError:
        return None, None
    masks = reorder_masks(torch.from_numpy(warm.masks).long(), order)
    agreement = mask_agreement(masks, torch.from_numpy(reference.warm.masks))
    return agreement.whole, agreement.edge


def _notes(opened: Opened, warm: WarmUp, facts: Facts, rounds: tuple[float, ...], not_scored: str | None) -> list[str]:
    notes = list(opened.warnings)
    if opened.claim and facts.precision and opened.claim not in facts.precision:
        notes.append(f"says that it is {opened.claim}, but its layers are {', '.join(facts.precision)}")
    if facts.executed and any(
        facts.executed.get(type_, 0) < count for type_, count in facts.precision.items() if type_ != "fp32"
    ):
        told = ", ".join(f"{count} {type_}" for type_, count in facts.executed.items())
        notes.append(f"ONNX Runtime computes its layers as {told} on this device")
    if not warm.stable:
        notes.append(f"its times had not settled after {warm.calls} calls")
    if max(rounds) > (1 + UNSTEADY) * min(rounds):
        notes.append(f"not steady: its rounds took {min(rounds):.3g} to {max(rounds):.3g} ms at the median")
    if len(facts.placement) > 1:
        told = ", ".join(f"{count} on {provider}" for provider, count in facts.placement.items())
        notes.append(f"ONNX Runtime runs it in parts: nodes {told}")
    if not_scored is not None:
        notes.append(f"not scored: {not_scored}")
    return notes


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
            entry.inspect()
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
