"""What a benchmark found: one row an artifact, with the machine that it was found on. To and from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import RenderableType

from bpkd_sdk.export.benchmark.environment import Environment

FORMAT = "bpkd-benchmark/1"
STAGES = ("pre", "inference", "post")

# An artifact whose slowest round was slower than its fastest by more than this share was not measured in peace.
UNSTEADY = 0.2


@dataclass(frozen=True)
class Percentiles:
    """Of times, in milliseconds, interpolated linearly."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Of calls that took so many seconds each."""
        return cls(*(float(1000 * value) for value in np.percentile(seconds, (50, 90, 99))))


@dataclass(frozen=True)
class BenchmarkRow:
    """One artifact.

    Attributes:
        name: Its path or URL; of a module its network's name.
        format: As the table of formats names it.
        problem: Why it could not be measured; all else but `name`, `format` and `file_size` is then unknown.
        device: Where it ran.
        file_size: In bytes.
        params: Of the network.
        macs: Multiply-accumulates for one image; None where the network is not known.
        precision: How many layers with weights compute in which type, as found.
        claim: The precision that its metadata states.
        placement: How many nodes ONNX Runtime ran on which provider.
        executed: How many layers ONNX Runtime ran in which type; on a CPU it computes half precision in float32.
        latency: Of a batch, from images on the host to masks on the host.
        stages: The same of its three stages, in calls of their own that wait for the device after each: "pre" (to the
            device, normalisation where it is not inside), "inference", "post" (argmax where it is not inside, to the
            host). The stages of one call overlap on a GPU, so they may add up to more than `latency`.
        throughput: Images per second, one batch after the other.
        calls: How many `latency` comes from.
        rounds: The median of each round in milliseconds: how steady the machine was.
        warm_up_calls: Before the first round.
        settled: Whether the times were steady after them.
        host_memory: Bytes of its process at the peak, beyond those before it was opened; None for a module, which runs
            in the caller's process, or where the system does not tell.
        device_memory: Bytes of the GPU at the peak, of opening and warming up, its code included; None without a GPU,
            and for a module or runtime, which may have been there before.
        miou: On the data, as a fraction.
        boundary_iou: On the data, as a fraction.
        agreement: Share of pixels with the class that the first artifact gives them, on the images of the timing.
        edge_agreement: The same within the edge band of the first artifact's masks, 7 pixels wide.
        notes: What else to know.
    """

    name: str
    format: str
    problem: str | None = None
    device: str | None = None
    file_size: int | None = None
    params: int | None = None
    macs: int | None = None
    precision: Mapping[str, int] = field(default_factory=dict)
    claim: str | None = None
    placement: Mapping[str, int] = field(default_factory=dict)
    executed: Mapping[str, int] = field(default_factory=dict)
    latency: Percentiles | None = None
    stages: Mapping[str, Percentiles] = field(default_factory=dict)
    throughput: float | None = None
    calls: int = 0
    rounds: tuple[float, ...] = ()
    warm_up_calls: int = 0
    settled: bool = False
    host_memory: int | None = None
    device_memory: int | None = None
    miou: float | None = None
    boundary_iou: float | None = None
    agreement: float | None = None
    edge_agreement: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchmarkRow:
        """From plain JSON values."""
        latency = values["latency"]
        return cls(
            **{
                **values,
                "latency": latency and Percentiles(**latency),
                "stages": {stage: Percentiles(**times) for stage, times in values["stages"].items()},
                "rounds": tuple(values["rounds"]),
                "notes": tuple(values["notes"]),
            }
        )


@dataclass(frozen=True)
class BenchmarkReport:
    """What `bpkd_sdk.export.benchmark` returns; print it with rich.

    Attributes:
        rows: In the order of the artifacts.
        batch: Images at a time.
        size: (height, width) of the images.
        images: Where they come from.
        data: The data set behind mIoU and boundary IoU; None without.
        duration: Seconds of timed calls for each artifact.
        rounds: How many rounds they were spread over; every second one in the opposite order.
        gap: Idle seconds before each artifact's part of a round.
        environment: The machine, before the first call.
        clocks_after: Facts of the GPUs right after the last call.
    """

    rows: tuple[BenchmarkRow, ...]
    batch: int
    size: tuple[int, int]
    images: str
    data: str | None
    duration: float
    rounds: int
    gap: float
    environment: Environment
    clocks_after: tuple[Mapping[str, str], ...] = ()

    @property
    def measured(self) -> tuple[BenchmarkRow, ...]:
        """The rows of artifacts that ran here."""
        return tuple(row for row in self.rows if row.problem is None)

    @property
    def setting(self) -> str:
        """How it was measured, in a sentence."""
        height, width = self.size
        return (
            f"Batches of {self.batch} image(s) of {height}x{width} from {self.images}; {self.duration:g} s of calls "
            f"for each artifact in {self.rounds} rounds in which they take turns, every second one in the opposite "
            f"order, {self.gap:g} s idle before each turn. From uint8 images to uint8 masks on the host."
        )

    def to_json(self) -> str:
        """All of it; `from_json` is the inverse."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchmarkReport:
        """Read what `to_json` wrote; ValueError for anything else."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"Expected JSON of BenchmarkReport.to_json (format {FORMAT!r}).")
        height, width = values["size"]
        return cls(
            **{
                **values,
                "rows": tuple(BenchmarkRow.from_dict(row) for row in values["rows"]),
                "size": (height, width),
                "environment": Environment.from_dict(values["environment"]),
                "clocks_after": tuple(values["clocks_after"]),
            }
        )

    def to_markdown(self) -> str:
        """The table, how it was measured, and the machine."""
        from bpkd_sdk.export.benchmark.table import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """A page that needs no other file: the table, and accuracy against latency as a plot."""
        from bpkd_sdk.export.benchmark.page import to_html

        return to_html(self)

    def __rich__(self) -> RenderableType:
        from bpkd_sdk.export.benchmark.table import to_rich

        return to_rich(self)
