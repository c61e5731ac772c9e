"""Compare the exported files of every network of the zoo: torch, ONNX, INT8, engine; agreement and precision.

    python -m benchmarks.export_table

The networks have random weights and a classifier fitted to generated scenes, and the images are small. The table shows
that every network can be exported, that each file agrees with the one before, and that its layers have the requested
precision. No times are measured.

- agreement: share of pixels with the same class, over all pixels, near the edges of the masks, and away from them, in
  the worst run. fp32 and fp16: ONNX Runtime against torch in float32 on photographs (in the committed table: on scenes,
  which `verify` used at that time); files of dynamic size at sizes and batches that were not traced. int8: against the
  float32 file, on scenes that were not used for calibration; the first and the last layer stay in float32.
- layers: types of the layers with weights, as read from the file, and from the network that the compiler built.
- engine: compiled by TensorRT for RTX, which needs no GPU, for one GPU (sm89). static: one shape; dynamic: a range of
  batches, heights and widths.

Rows that are in export-table.jsonl are not repeated. Most of the time is spent on INT8, because the damage of every
layer is measured.
"""

import math
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.networks import fitted
from benchmarks.records import EMPTY, Records, make_parser, markdown_table
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import quantize, to_onnx, to_tensorrt
from bpkd_sdk.export.benchmark.facts import layer_precisions
from bpkd_sdk.models import ZOO
from bpkd_sdk.runtime import open_runtime

SIZE = (96, 128)
RANGES = {"batch_sizes": (1, 2, 4), "input_sizes": ((96, 96), SIZE, (192, 256))}
SHAPES = ("static", "dynamic")
PRECISIONS = ("fp32", "fp16", "int8")
IMAGES = 16


def make_rows(name: str, shapes: str) -> dict[str, dict[str, Any]]:
    """Export one network in every precision, and return the rows by precision."""
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


def run(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Make the rows that are not in the file yet, and return all rows by "network shapes precision"."""
    versions = {package: version(package) for package in ("torch", "onnx", "tensorrt-rtx-cu13")}
    records = Records(folder / "export-table.jsonl", {"size": SIZE, "versions": versions})
    for name, shapes in product(names, SHAPES):
        if all(f"{name} {shapes} {precision}" in records.runs for precision in PRECISIONS):
            continue
        rows = make_rows(name, shapes)
        records.update({f"{name} {shapes} {precision}": row for precision, row in rows.items()})
        print(f"{name} {shapes}", flush=True)
    records.write_table(table(records.runs))
    return records.runs


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    headings = (
        *("network", "shapes", "precision", "same %", "at edges %", "in bodies %", "ONNX MB", "layers"),
        *("engine MB", "layers"),
    )
    lines = []
    for name, shapes, precision in product(ZOO, SHAPES, PRECISIONS):
        if (row := rows.get(f"{name} {shapes} {precision}")) is None:
            continue
        agreement = (format_share(row[part]) for part in ("whole", "edge", "body"))
        engine = "; ".join(f"{format_counts(types)} {kind.lower()}" for kind, types in row["engine_layers"].items())
        onnx = (f"{row['onnx_mb']:.1f}", format_counts(row["onnx_layers"]))
        lines.append((name, shapes, precision, *agreement, *onnx, f"{row['engine_mb']:.1f}", engine))
    return markdown_table(headings, lines, text_columns=(0, 1, 2, 7, 9))


def format_share(value: float | None) -> str:
    return EMPTY if value is None or math.isnan(value) else f"{100 * value:.2f}"


def format_counts(types: dict[str, int]) -> str:
    return ", ".join(f"{count} {type_}" for type_, count in types.items())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(ZOO), choices=list(ZOO))
    options = parser.parse_args()
    run(options.output, options.networks)


if __name__ == "__main__":
    main()
