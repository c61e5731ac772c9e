"""One artifact of a benchmark: its process, the results collected so far, and its row of the report."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from array_api_compat import array_namespace

from bpkd_sdk.arrays import to_numpy
from bpkd_sdk.classes import class_order, reorder_masks
from bpkd_sdk.evaluation.agreement import mask_agreement
from bpkd_sdk.export.benchmark.facts import Facts
from bpkd_sdk.export.benchmark.process import ArtifactError, RemoteSubject
from bpkd_sdk.export.benchmark.report import STAGES, UNSTEADY, BenchmarkRow, Percentiles
from bpkd_sdk.export.benchmark.subject import Description, Subject, Times, WarmUp
from bpkd_sdk.files import find_network
from bpkd_sdk.runtime import AcceptedImages, Runtime, find_format
from bpkd_sdk.runtime.fit import Fit, fit_size
from bpkd_sdk.sizes import format_size

if TYPE_CHECKING:
    from torch import nn

    from bpkd_sdk.data import SegmentationDataset
    from bpkd_sdk.evaluation import Metrics

Artifact: TypeAlias = "str | Path | nn.Module | Runtime"
T = TypeVar("T")

GAP = 0.2  # seconds, in which the threads of the previous artifact become idle


class Entry:
    """An artifact and its results.

    Every step stores its result. After a step has failed, later steps do nothing.

    Args:
        source: Artifact. A path or URL is measured in a new process, which starts here; a module or a runtime is
            measured in this process.
        device: Device to run the artifact on.
        batch_size: Number of images per call.
        fit: Rule for images of a size that the artifact does not accept.

    Attributes:
        problem: Reason why the artifact could not be measured; None if it could.
        not_scored: Reason why the artifact has no scores although the data has labels; None otherwise.
    """

    def __init__(self, source: Artifact, device: str, batch_size: int, fit: Fit = "slide") -> None:
        self.source, self.device, self.batch_size, self.fit = source, device, batch_size, fit
        self.problem: str | None = None
        self.not_scored: str | None = None
        self.description: Description | None = None
        self.warm: WarmUp | None = None
        self.facts: Facts | None = None
        self.host_memory: int | None = None
        self.scores: Metrics | None = None
        self._rounds: list[Times] = []
        self._remote: RemoteSubject | None = None
        if isinstance(source, (str, Path)):
            path: str | Path = self._attempt(lambda: find_network(source)) or source
            self._attempt(lambda: find_format(str(path)))
            self.source = path
            self._remote = None if self.problem else RemoteSubject(path, device, batch_size, fit)
        self._subject: RemoteSubject | Subject | None = self._remote

    @property
    def name(self) -> str:
        """Path of the artifact, or name of its module."""
        return self._identify()[0]

    def open(self) -> None:
        """Open the artifact."""
        self.description = self._attempt(lambda: self._open_subject().describe())

    def warm_up(self, images: np.ndarray) -> None:
        """Call the artifact until its times settle."""
        self.warm = self._attempt(lambda: self._open_subject().warm_up(images))

    def measure_round(self, seconds: float) -> None:
        """Time calls of the artifact for a number of seconds, after a pause."""
        time.sleep(GAP)
        if (times := self._attempt(lambda: self._open_subject().measure_round(seconds))) is not None:
            self._rounds.append(times)

    def inspect(self) -> None:
        """Find the facts of the artifact."""
        if (inspected := self._attempt(lambda: self._open_subject().inspect())) is not None:
            self.facts, host_memory = inspected
            self.host_memory = host_memory if self._remote else None

    def score(self, data: SegmentationDataset, match_classes: bool = True) -> None:
        """Score the artifact on labelled data, in its own process, if no step has failed."""
        if self.problem is not None or self.description is None:
            return
        from bpkd_sdk.evaluation import evaluate

        runtime = _SubjectRuntime(self._open_subject(), self.description)
        try:
            self.scores = evaluate(runtime, data, batch_size=self.batch_size, match_classes=match_classes)
        except (ValueError, RuntimeError, ArtifactError) as error:
            self.not_scored = str(error)

    def close(self) -> None:
        """End the process of the artifact."""
        if self._remote:
            self._remote.close()

    def row(self, reference: Entry | None) -> BenchmarkRow:
        """Return the row of the report.

        Args:
            reference: Entry whose masks this artifact's masks are compared with, or None.
        """
        name, format_, size = self._identify()
        if self.problem is not None or not (self.description and self.warm and self.facts and self._rounds):
            return BenchmarkRow(name, format_, problem=self.problem, file_size=size)
        whole = [seconds for part in self._rounds for seconds in part.whole]
        stages = {stage: [seconds for part in self._rounds for seconds in getattr(part, stage)] for stage in STAGES}
        rounds = tuple(Percentiles.of(part.whole).p50 for part in self._rounds)
        agreement, edge_agreement = _agreement(self.description, self.warm, reference)
        return BenchmarkRow(
            name=name,
            format=format_,
            device=self.description.device,
            file_size=size,
            params=self.facts.params,
            macs=self.facts.macs,
            precision=self.facts.precision,
            claim=self.description.claim,
            placement=self.facts.placement,
            executed=self.facts.executed,
            latency=Percentiles.of(whole),
            stages={stage: Percentiles.of(seconds) for stage, seconds in stages.items()},
            throughput=self.batch_size * len(whole) / sum(whole),
            calls=len(whole),
            rounds=rounds,
            warm_up_calls=self.warm.calls,
            settled=self.warm.settled,
            host_memory=self.host_memory,
            device_memory=self.warm.device_memory if self._remote else None,
            miou=_none_if_nan(self.scores.miou) if self.scores else None,
            boundary_iou=_none_if_nan(self.scores.boundary_iou) if self.scores else None,
            agreement=agreement,
            edge_agreement=edge_agreement,
            notes=(*self._fit_notes(), *_notes(self.description, self.warm, self.facts, rounds, self.not_scored)),
        )

    def _fit_notes(self) -> Iterator[str]:
        """Yield how the timed images are given to the artifact, if it does not get them at their own size."""
        assert self.warm is not None and self.description is not None  # noqa: S101, PT018  (called by `row` only)
        height, width = self.warm.masks.shape[1:]
        fitted = fit_size((height, width), self.description.accepts, self.fit)
        window, count = format_size(fitted.window), len(fitted.corners())
        if count > 1:
            yield f"each image is segmented in {count} windows of {window}, because fit='{self.fit}'"
        elif fitted.inner != (height, width):
            yield f"each image is resized to {format_size(fitted.inner)}, because fit='{self.fit}'"
        if count == 1 and fitted.window != fitted.inner:
            yield f"each image is padded to {window}"

    def _open_subject(self) -> RemoteSubject | Subject:
        if self._subject is None:
            self._subject = Subject(self.source, self.device, self.batch_size, self.fit)
        return self._subject

    def _attempt(self, step: Callable[[], T]) -> T | None:
        """Return the result of a step; if it fails, store the reason and return None."""
        if self.problem is not None:
            return None
        try:
            return step()
        except ArtifactError as failure:
            self.problem = str(failure)
        except Exception as error:  # an artifact may fail in any way, and the others must still be measured
            self.problem = f"{type(error).__name__}: {error}"
        return None

    def _identify(self) -> tuple[str, str, int | None]:
        """Return the name, the format and the file size in bytes."""
        if not isinstance(self.source, (str, Path, Runtime)):
            return self.description.name if self.description else type(self.source).__name__, "torch", None
        name = self.source.name if isinstance(self.source, Runtime) else str(self.source)
        try:
            format_ = find_format(name).name
        except ValueError:
            format_ = "torch" if isinstance(self.source, Runtime) and self.source.is_module else "other"
        return name, format_, Path(name).stat().st_size if Path(name).is_file() else None


class _SubjectRuntime(Runtime):
    """A subject as a runtime for `evaluate`: images of any size go to its process, masks come back."""

    def __init__(self, subject: RemoteSubject | Subject, description: Description) -> None:
        inside = {"preprocess": True, "argmax": True}
        # The limits state that the subject takes whole images: it applies the rule for their size in its process.
        accepts = AcceptedImages(height=(1, sys.maxsize), width=(1, sys.maxsize))
        super().__init__(description.name, description.spec, inside, "cpu", accepts)
        self.subject = subject

    def infer(self, inputs: Any) -> Any:
        return array_namespace(inputs).asarray(self.subject.segment(to_numpy(inputs)))


def _none_if_nan(score: float) -> float | None:
    """Return None for an undefined score, such as boundary IoU where the labels have no boundaries."""
    return None if math.isnan(score) else score


def _agreement(description: Description, warm: WarmUp, reference: Entry | None) -> tuple[float | None, float | None]:
    """Return the share of pixels with the same class as in the reference's masks: of all pixels, and of its edge band.

    Classes with the same names are compared in any order. If the names differ, there is no agreement.
    """
    if reference is None or reference.description is None or reference.warm is None:
        return None, None
    spec, expected_spec = (
        dataclasses.replace(facts.spec, class_names=facts.spec.mask_names)
        for facts in (description, reference.description)
    )
    try:
        named = spec.class_names and expected_spec.class_names
        order = class_order(spec, expected_spec, network_name="it", data_name="the first") if named else None
    except ValueError:
        return None, None
    agreement = mask_agreement(reorder_masks(warm.masks, order), reference.warm.masks)
    return agreement.whole, agreement.edge


def _notes(
    description: Description, warm: WarmUp, facts: Facts, rounds: tuple[float, ...], not_scored: str | None
) -> list[str]:
    notes = list(description.warnings)
    if description.claim and facts.precision and description.claim not in facts.precision:
        notes.append(f"its metadata states {description.claim}, but its layers are {', '.join(facts.precision)}")
    if facts.executed and any(
        facts.executed.get(type_, 0) < count for type_, count in facts.precision.items() if type_ != "fp32"
    ):
        layers = ", ".join(f"{count} {type_}" for type_, count in facts.executed.items())
        notes.append(f"ONNX Runtime computes its layers as {layers} on this device")
    if not warm.settled:
        notes.append(f"its times had not settled after {warm.calls} calls")
    if max(rounds) > (1 + UNSTEADY) * min(rounds):
        notes.append(
            f"its times were not steady: the medians of its rounds are {min(rounds):.3g} to {max(rounds):.3g} ms"
        )
    if len(facts.placement) > 1:
        nodes = ", ".join(f"{count} on {provider}" for provider, count in facts.placement.items())
        notes.append(f"ONNX Runtime divides its nodes: {nodes}")
    if not_scored is not None:
        notes.append(f"not scored: {not_scored}")
    return notes
