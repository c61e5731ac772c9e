"""One artifact on its way through the benchmark, in its own process or here; after a failure the rest is skipped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.boundary import edge_band
from bpkd_sdk.classes import class_order, reorder_masks
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.evaluation import Metrics, evaluate
from bpkd_sdk.export.benchmark.facts import Facts
from bpkd_sdk.export.benchmark.process import ArtifactError, RemoteSubject
from bpkd_sdk.export.benchmark.report import STAGES, UNSTEADY, BenchmarkRow, Percentiles
from bpkd_sdk.export.benchmark.subject import Opened, Subject, Times, WarmUp
from bpkd_sdk.export.verify import EDGE_WIDTH
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

    def look(self) -> None:
        """Look into it."""
        if (found := self._attempt(lambda: self._open().look())) is not None:
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
    expected = torch.from_numpy(reference.warm.masks).long()
    same = reorder_masks(torch.from_numpy(warm.masks).long(), order) == expected
    edge = edge_band(expected, EDGE_WIDTH, ignore_index=-1)
    return same.double().mean().item(), same[edge].double().mean().item() if edge.any() else None


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
