"""The result of a benchmark: one row per artifact, and the machine; written to and read from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult

from bpkd_sdk.export.benchmark.environment import Environment
from bpkd_sdk.files import parse_record
from bpkd_sdk.runtime.fit import Fit

FORMAT = "bpkd-benchmark/2"
STAGES = ("pre", "inference", "post")

# The times of an artifact are not steady if its slowest round took longer than its fastest by more than this share.
UNSTEADY = 0.2


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of times in milliseconds, interpolated linearly."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Compute the percentiles of times in seconds."""
        return cls(*(float(1000 * value) for value in np.percentile(seconds, (50, 90, 99))))


@dataclass(frozen=True)
class BenchmarkRow:
    """The results of one artifact.

    Attributes:
        name: Path or URL of the artifact; for a module, the name of its network.
        format: Name of the format in the table of formats.
        problem: Reason why the artifact could not be measured; only `name`, `format` and `file_size` are then known.
        device: Device that the artifact ran on.
        file_size: Size of the file in bytes.
        params: Number of parameters of the network.
        macs: Number of multiply-accumulates for one image; None if the network is not available.
        precision: Number of layers with weights by the type that they compute in, as found in the artifact.
        claim: Precision that the metadata states.
        placement: Number of nodes by the execution provider of ONNX Runtime.
        executed: Number of layers by the type in which ONNX Runtime ran them; on a CPU it computes half precision in
            float32.
        latency: Time of one batch, from images on the host to masks on the host.
        stages: Time of the three stages of one batch, in separate calls that wait for the device after each stage:
            "pre" (transfer to the device; normalisation unless it is inside the artifact), "inference", and "post"
            (argmax unless it is inside the artifact; transfer to the host). On a GPU the stages of one call overlap,
            so their sum may exceed `latency`.
        throughput: Number of images per second, one batch after another.
        calls: Number of calls that `latency` is computed from.
        rounds: Median latency of each round in milliseconds, which shows how steady the machine was.
        warm_up_calls: Number of calls before the first round.
        settled: Whether the times were steady after the warm-up.
        host_memory: Peak resident memory of the artifact's process in bytes, less that before it was opened; None for
            a module, which runs in the caller's process, and where the system does not record the peak.
        device_memory: Peak memory of the GPU in bytes over opening and warm-up, with the code of the libraries; None
            without a GPU, and for a module or runtime, which may have been on the GPU before.
        miou: Mean IoU on the data, 0 to 1.
        boundary_iou: Boundary IoU on the data, 0 to 1.
        agreement: Share of pixels with the same class as in the masks of the first artifact, on the timed images.
        edge_agreement: The same share within the edge band of the first artifact's masks, 7 pixels wide.
        notes: Further facts about the artifact, one per text.
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


@dataclass(frozen=True)
class BenchmarkReport:
    """The result of `bpkd_sdk.export.benchmark`. It can be printed with rich.

    Attributes:
        rows: Results in the order of the artifacts.
        batch_size: Number of images per call.
        input_size: (height, width) of the timed images.
        images: Name of the source of the timed images.
        data: Name of the data set behind mIoU and boundary IoU; None without scores.
        duration: Seconds of timed calls for each artifact.
        rounds: Number of rounds that the calls were spread over; every second round had the opposite order.
        gap: Idle seconds before each artifact's turn in a round.
        environment: State of the machine before the first call.
        clocks_after: Facts of the GPUs directly after the last call.
        fit: Rule for images of a size that an artifact does not accept.
    """

    rows: tuple[BenchmarkRow, ...]
    batch_size: int
    input_size: tuple[int, int]
    images: str
    data: str | None
    duration: float
    rounds: int
    gap: float
    environment: Environment
    clocks_after: tuple[Mapping[str, str], ...] = ()
    fit: Fit = "slide"

    @property
    def measured(self) -> tuple[BenchmarkRow, ...]:
        """Rows of the artifacts that ran on this machine."""
        return tuple(row for row in self.rows if row.problem is None)

    @property
    def setting(self) -> str:
        """Description of the measurement in two sentences."""
        height, width = self.input_size
        return (
            f"Batches of {self.batch_size} image(s) of {height}x{width} from {self.images}; {self.duration:g} s of "
            f"calls for each artifact in {self.rounds} rounds in which they take turns, every second one in the "
            f"opposite order, {self.gap:g} s idle before each turn. From images to uint8 masks on the host."
        )

    def to_json(self) -> str:
        """Return the whole report as JSON; `from_json` is the inverse."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchmarkReport:
        """Read the JSON that `to_json` returns.

        Raises:
            ValueError: If the text is not JSON of this format, or a field has the wrong type.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"Expected JSON of BenchmarkReport.to_json (format {FORMAT!r}).")
        return parse_record(cls, values, "The benchmark report")

    def to_markdown(self) -> str:
        """Return the table, the setting and the machine as Markdown."""
        from bpkd_sdk.export.benchmark.table import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """Return one HTML page that needs no other file: the table, and plots of accuracy against latency.

        Raises:
            ImportError: If matplotlib or jinja2 is not installed.
        """
        from bpkd_sdk.export.benchmark.page import to_html

        return to_html(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from bpkd_sdk.export.benchmark.table import to_rich

        yield to_rich(self, options.max_width)
