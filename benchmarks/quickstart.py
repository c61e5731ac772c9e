"""Compare the networks of `bpkd quickstart` over three seeds: teacher, student alone and by BPKD, ONNX and INT8.

    python -m benchmarks.quickstart

The command takes some minutes on a CPU. Seeds that are in quickstart.jsonl are not run again.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.records import EMPTY, Records, make_parser, markdown_table
from bpkd_sdk.files import read_json
from bpkd_sdk.quickstart import quickstart

SEEDS = (0, 1, 2)
SCORES = ("miou", "boundary_iou", "edge_accuracy", "body_accuracy")
HEADINGS = ("network", "M params", "GMACs", "mIoU", "boundary IoU", "edge", "body", "MB", "ms")


def table(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for networks in zip(*(run["rows"] for run in runs.values()), strict=True):
        first = networks[0]
        scores = [spread([100 * network[score] for network in networks], "{:.1f}") for score in SCORES]
        size = EMPTY if first["size"] is None else f"{first['size'] / 1e6:.2f}"
        costs = (f"{first['params'] / 1e6:.2f}", f"{first['macs'] / 1e9:.3f}")
        rows.append([first["name"], *costs, *scores, size, f"{statistics.median(row['ms'] for row in networks):.1f}"])
    gains = {
        score: [100 * (run["rows"][2][score] - run["rows"][1][score]) for run in runs.values()] for score in SCORES[:2]
    }
    return (
        f"{markdown_table(HEADINGS, rows)}\n"
        f"Scores in %, mean and standard deviation over {len(runs)} seeds; ms is the time from a uint8 image to its "
        "mask, in torch or for files in ONNX Runtime, on the CPU. Gain of BPKD over the student alone: "
        f"{spread(gains['miou'], '{:+.1f}')} mIoU (smallest {min(gains['miou']):+.1f}), "
        f"{spread(gains['boundary_iou'], '{:+.1f}')} boundary IoU. ONNX Runtime and torch predict the same class for "
        f"at least {min(run['agreement'] for run in runs.values()):.2%} of the pixels.\n"
    )


def spread(values: list[float], form: str) -> str:
    """Return mean and sample standard deviation; the latter is left out if the values are equal."""
    mean, deviation = form.format(statistics.mean(values)), statistics.stdev(values)
    return f"{mean} ±{deviation:.1f}" if deviation else mean


def main() -> None:
    options = make_parser(__doc__).parse_args()
    records = Records(options.output / "quickstart.jsonl")
    for seed in SEEDS:
        if (key := f"seed {seed}") not in records.runs:
            with tempfile.TemporaryDirectory() as folder:
                quickstart(folder, seed=seed)
                records.add(key, read_json(Path(folder) / "results.json"))
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
