"""Compare the sizes of every method's loss terms with the cross-entropy, with the default weights, on CamVid.

    python -m benchmarks.term_sizes --data path/to/camvid --weights lite0.pth --teacher A --student B

A and B are checkpoints of `benchmarks.camvid`: the teacher, and the student trained alone. That module also describes
the weight files. Each method distils for a few steps into a new student ("fresh"), and into B ("trained"). The last
steps show how a critic, a projection or a memory changes the terms. Methods that are in term-sizes.jsonl are not
repeated.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import bpkd_sdk
from benchmarks.records import Records, make_parser, markdown_table
from benchmarks.study.networks import lite0_network
from bpkd_sdk.losses import METHODS

STEPS, WINDOW = 20, 5
RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "gradient_clip": 10.0,
    "batch_size": 8,
    "crop_size": (224, 320),
}


def measure(
    method: str, teacher: Path, student: torch.nn.Module, data: bpkd_sdk.SegmentationDataset
) -> dict[str, dict[str, float]]:
    """Return the mean terms of the first steps and of the last steps."""
    with TemporaryDirectory() as folder:
        result = bpkd_sdk.distill(
            teacher,
            student,
            (data, None),
            method=method,
            steps=STEPS,
            log_every=WINDOW,
            check_data=False,
            output_dir=folder,
            **RECIPE,
        )
    first, *_, last = (record["terms"] for record in result.history)
    return {"first": first, "last": last}


def table(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for method, sizes in runs.items():
        for start, windows in sizes.items():
            first, last = ({name: f"{float(f'{x:.2g}'):g}" for name, x in terms.items()} for terms in windows.values())
            terms = [f"{name} {first[name]} → {last[name]}" for name in first if name != "ce"]
            rows.append((method, start, f"{first['ce']} → {last['ce']}", ", ".join(terms)))
    return markdown_table(("method", "student", "cross-entropy", "terms"), rows, text_columns=range(4))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    options = parser.parse_args()
    data = bpkd_sdk.open_dataset("camvid", root=options.data, split="train")
    setting = {"steps": STEPS, "window": WINDOW, "recipe": RECIPE, "torch": torch.__version__}
    records = Records(options.output / "term-sizes.jsonl", setting)
    for method in METHODS:
        if method in records.runs:
            continue
        sizes = {}
        for start in ("fresh", "trained"):
            torch.manual_seed(0)
            student = lite0_network(options.weights, data.num_classes)
            if start == "trained":
                student = bpkd_sdk.load_model(options.student, model=student)
            sizes[start] = measure(method, options.teacher, student, data)
        records.add(method, sizes)
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
