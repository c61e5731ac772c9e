"""Compare the networks of `bpkd quickstart`: the teacher, the student trained alone, by BPKD, and exported to ONNX.

    python -m benchmarks.quickstart

The command takes a few minutes on a CPU. Networks that are in quickstart.jsonl are not measured again.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.records import EMPTY, Records, make_parser, markdown_table
from bpkd_sdk.files import read_json
from bpkd_sdk.quickstart import quickstart

SCORES = ("miou", "macc", "boundary_iou", "edge_accuracy", "body_accuracy")


def table(runs: dict[str, dict[str, Any]]) -> str:
    headings = ("network", "M params", "GMACs", "mIoU", "mAcc", "boundary IoU", "edge", "body", "torch ms", "ONNX ms")
    rows = []
    for name, run in runs.items():
        if name == "export":
            continue
        times = (run["torch_ms"], run["onnxruntime_ms"])
        rows.append([name, f"{run['params'] / 1e6:.2f}", f"{run['macs'] / 1e9:.3f}"])
        rows[-1] += [f"{run[score]:.3f}" for score in SCORES]
        rows[-1] += [EMPTY if ms is None else f"{ms:.1f}" for ms in times]
    export = runs["export"]
    agreement = (
        f"ONNX file: {export['bytes'] / 1e6:.2f} MB; {export['agreement']:.2%} of the pixels agree with torch.\n"
    )
    return f"{markdown_table(headings, rows)}\n{agreement}"


def main() -> None:
    options = make_parser(__doc__).parse_args()
    records = Records(options.output / "quickstart.jsonl")
    if not records.runs:
        with tempfile.TemporaryDirectory() as folder:
            quickstart(folder)
            results = read_json(Path(folder) / "results.json")
        rows = {row.pop("name"): row for row in results.pop("rows")}
        records.update(rows | {"export": results})
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
