"""Compare the time of `to_onnx`, and of its parts, with `torch.onnx.export` of the same network.

    python -m benchmarks.export_time

Both export a network for images of one size and any number of them. `to_onnx` also counts the cost, simplifies the
graph, makes the faster model for a CPU, and compares the file with torch on four images. The two take turns; times are
the medians over the rounds, in seconds of the clock, and in seconds of all cores in brackets. One export of a small
network comes before, so that imports do not count. Networks that are in export-time.jsonl are not repeated.

- tracing: torch's exporter and the simplification of the graph
- comparison: segmenting the images with torch and with ONNX Runtime
- other: check of the logits, count of operations, hashes, the model for a CPU, and writing the file
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bpkd_sdk
from benchmarks.records import Records, add_size, make_parser, markdown_table
from bpkd_sdk.export import onnx as exporter
from bpkd_sdk.export import to_onnx

NETWORKS = ("pspnet_r18", "hrnetv2p_w18s", "deeplabv3plus_mv2")
CLASSES, ROUNDS = 19, 3
PARTS = {"tracing": "trace", "comparison": "_verify_draft"}  # functions of bpkd_sdk.export.onnx

Seconds = tuple[float, float]  # by the clock, and CPU time of all cores


@contextmanager
def timed(times: dict[str, Seconds], name: str) -> Iterator[None]:
    """Store the time within the context under a name."""
    clock, cores = time.perf_counter(), time.process_time()
    yield
    times[name] = (time.perf_counter() - clock, time.process_time() - cores)


def export_ours(network: nn.Module, size: tuple[int, int], folder: Path) -> dict[str, Seconds]:
    """Run `to_onnx`, and return the time of each part and of the whole."""
    times: dict[str, Seconds] = {}
    originals = {part: getattr(exporter, function) for part, function in PARTS.items()}

    def with_timer(part: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with timed(times, part):
                return originals[part](*args, **options)

        return run

    try:
        for part, function in PARTS.items():
            setattr(exporter, function, with_timer(part))
        with timed(times, "to_onnx"):
            to_onnx(network, folder / "ours.onnx", input_size=size)
    finally:
        for part, function in PARTS.items():
            setattr(exporter, function, originals[part])
    clock, cores = (
        whole - sum(parts) for whole, *parts in zip(times["to_onnx"], *(times[part] for part in PARTS), strict=True)
    )
    return times | {"other": (clock, cores)}


def export_plain(network: nn.Module, size: tuple[int, int], folder: Path) -> dict[str, Seconds]:
    """Run `torch.onnx.export` as its documentation does, and return its time."""
    times: dict[str, Seconds] = {}
    with timed(times, "torch.onnx.export"):
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, *size),),
            folder / "plain.onnx",
            dynamo=True,
            opset_version=18,
            dynamic_shapes=({0: "batch"},),
            external_data=False,
            verbose=False,
        )
    return times


def measure(name: str, size: tuple[int, int]) -> dict[str, tuple[float, ...]]:
    """Return the median times of a network."""
    network = bpkd_sdk.create_model(name, CLASSES).eval()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        rounds = [export_plain(network, size, folder) | export_ours(network, size, folder) for _ in range(ROUNDS)]
    return {
        part: tuple(statistics.median(times[part][unit] for times in rounds) for unit in (0, 1)) for part in rounds[0]
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    columns = ("to_onnx", *PARTS, "other", "torch.onnx.export")
    lines = [
        (name, *(f"{row[part][0]:.1f} ({row[part][1]:.1f})" for part in columns), f"{ratio(row):.2f}")
        for name, row in rows.items()
    ]
    return markdown_table(("network", *columns, "to_onnx / torch.onnx.export"), lines)


def ratio(row: dict[str, Any]) -> float:
    """Return the ratio of the times on the clock."""
    return float(row["to_onnx"][0] / row["torch.onnx.export"][0])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    add_size(parser, 512, 1024)
    options = parser.parse_args()
    size = tuple(options.size)
    setting = {
        "size": size,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "onnx", "onnxscript", "onnxruntime")},
    }
    records = Records(options.output / "export-time.jsonl", setting)
    for name in options.networks:
        if name not in records.runs:
            with tempfile.TemporaryDirectory() as folder:  # imports, and the table of ONNX operators
                export_plain(nn.Conv2d(3, 2, 1).eval(), (32, 32), Path(folder))
                export_ours(nn.Conv2d(3, 2, 1).eval(), (32, 32), Path(folder))
            records.add(name, measure(name, size))
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
