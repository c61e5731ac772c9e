"""Every network of the zoo on its way from torch to ONNX, to INT8, to a compiled engine: parity and precision found.

    python -m benchmarks.export_table

Random weights, a classifier fitted to generated scenes, small images: what is shown is that every network gets through,
that each file agrees with the one before, and that its layers have the precision asked for. Nothing here is timed.

- agreement: share of pixels of the same class, all of them, near the edges of the masks and away from them, in the
  worst run. fp32 and fp16: ONNX Runtime against torch in float32, on photographs (the committed table: on scenes, which
  `verify` took when it was made); files of any size at sizes and batches that were not traced. int8: against the
  float32 file, on scenes that did not calibrate it; the first and the last layer stay in float32.
- layers: types of the layers with weights, read from the file, and from the network that the compiler made of it.
- engine: compiled by TensorRT for RTX, which needs no GPU, for one GPU (sm89); static: one shape; dynamic: a range of
  batches, heights and widths.

What is in the JSON file is not made again. INT8 takes the time: every layer's damage is measured, so HRNet-W48 takes
the better part of an hour, the other large networks a quarter of an hour each.
"""

import argparse
import json
import math
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.networks import fitted
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import quantize, to_onnx, to_tensorrt
from bpkd_sdk.export.benchmark.facts import layer_precisions
from bpkd_sdk.files import write_atomically, write_json
from bpkd_sdk.models import ZOO
from bpkd_sdk.runtime import open_runtime

SIZE = (96, 128)
RANGES = {"batch": (1, 2, 4), "size": ((96, 96), SIZE, (192, 256))}
SHAPES = ("static", "dynamic")
PRECISIONS = ("fp32", "fp16", "int8")
IMAGES = 16
RESULTS = Path(__file__).parent / "results"


def make_rows(name: str, shapes: str) -> dict[str, dict[str, Any]]:
    """One network in its precisions, by precision."""
    dynamic = shapes == "dynamic"
    network = fitted(name, SIZE)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        for precision in PRECISIONS:
            target = Path(folder) / f"{precision}.onnx"
            if precision == "int8":
                data = ShapesDataset("calibration", length=IMAGES, size=SIZE)
                report = agreement = quantize(paths["fp32"], target, data, images=IMAGES, max_boundary_loss=1.0)
            else:
                options = {"precision": precision, "dynamic_batch": dynamic, "dynamic_size": dynamic}
                report = to_onnx(network, target, input_size=SIZE, **options)
                agreement = report.verification
            path = paths[precision] = report.path
            engine = to_tensorrt(
                path, Path(folder) / "m.engine", backend="tensorrt_rtx", hardware="sm89", **(RANGES if dynamic else {})
            )
            rows[precision] = {
                "whole": agreement.agreement,
                "edge": agreement.edge_agreement,
                "body": agreement.body_agreement,
                "onnx_mb": path.stat().st_size / 1e6,
                "onnx_layers": layer_precisions(open_runtime(path, "cpu")),
                "engine_mb": engine.size / 1e6,
                "engine_layers": engine.manifest.layers,
                "shapes": engine.manifest.inputs["images"],
            }
    return rows


def run(path: Path, names: list[str]) -> dict[str, Any]:
    """Make what is not in the file yet; all rows by "network shapes precision"."""
    done = json.loads(path.read_text())["rows"] if path.is_file() else {}
    for name, shapes in product(names, SHAPES):
        if all(f"{name} {shapes} {precision}" in done for precision in PRECISIONS):
            continue
        for precision, row in make_rows(name, shapes).items():
            done[f"{name} {shapes} {precision}"] = row
        content = {
            "size": SIZE,
            "versions": {package: version(package) for package in ("torch", "onnx", "tensorrt-rtx-cu13")},
            "rows": done,
        }
        write_json(path, content)
        write_atomically(path.with_suffix(".md"), table(done).encode())
        print(f"{name} {shapes}", flush=True)
    return done


def table(rows: dict[str, Any]) -> str:
    """Markdown, a line for each row."""
    lines = [
        "| network | shapes | precision | same % | at edges % | in bodies % | ONNX MB | layers | engine MB | layers |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---|",
    ]
    for name, shapes, precision in product(ZOO, SHAPES, PRECISIONS):
        if (row := rows.get(f"{name} {shapes} {precision}")) is None:
            continue
        agreement = " | ".join(_share(row[part]) for part in ("whole", "edge", "body"))
        engine = "; ".join(f"{_counted(types)} {kind.lower()}" for kind, types in row["engine_layers"].items())
        lines.append(
            f"| {name} | {shapes} | {precision} | {agreement} | {row['onnx_mb']:.1f} | {_counted(row['onnx_layers'])} "
            f"| {row['engine_mb']:.1f} | {engine} |"
        )
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _counted(types: dict[str, int]) -> str:
    return ", ".join(f"{count} {type_}" for type_, count in types.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "export-table.json")
    parser.add_argument("--networks", nargs="+", default=list(ZOO), choices=list(ZOO))
    options = parser.parse_args(arguments)
    print(table(run(options.output, options.networks)))


if __name__ == "__main__":
    main()
