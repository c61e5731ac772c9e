"""Train students for 200 steps, with the options of `bpkd quickstart`, to see which of them gain from the teacher.

    python -m benchmarks.quickstart_students

Each run takes about a minute on two cores. Runs that are in quickstart-students.jsonl are not run again.
"""

import tempfile
from typing import Any

import torch

import bpkd_sdk
from benchmarks.records import Records, make_parser, markdown_table
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.files import SHAPES_TEACHER
from bpkd_sdk.quickstart import OPTIONS, STUDENT

STUDENTS = (STUDENT, "smp/Linknet/tu-test_byobnet", "smp/DeepLabV3Plus/tu-test_byobnet")
STEPS = 200
METHODS = {"alone": None, "BPKD": "bpkd"}
SCORES = ("miou", "boundary_iou", "edge_accuracy", "body_accuracy")


def train(student: str, method: str | None) -> dict[str, float]:
    """Train a student for `STEPS` steps, and return its scores, 0..1."""
    data = ShapesDataset("train", length=2400), ShapesDataset("val")
    torch.manual_seed(0)
    network = bpkd_sdk.create_model(student, data[0].num_classes)
    options = OPTIONS | {"steps": STEPS, "crop_size": data[0].size}
    with tempfile.TemporaryDirectory() as folder:
        if method is None:
            result = bpkd_sdk.train(network, data, output_dir=folder, **options)
        else:
            teacher = bpkd_sdk.load_model(SHAPES_TEACHER)
            result = bpkd_sdk.distill(teacher, network, data, method=method, output_dir=folder, **options)
    return {score: getattr(result.metrics, score) for score in SCORES}


def table(runs: dict[str, dict[str, Any]]) -> str:
    headings = ("student", "training", "mIoU", "boundary IoU", "edge", "body")
    rows = [[run["student"], run["method"], *(f"{100 * run[score]:.1f}" for score in SCORES)] for run in runs.values()]
    return (
        f"{markdown_table(headings, rows, text_columns=(0, 1))}\n"
        f"Scores in %, one seed, {STEPS} steps. Standard deviations over three seeds are in quickstart.md.\n"
    )


def main() -> None:
    records = Records(make_parser(__doc__).parse_args().output / "quickstart-students.jsonl")
    for student in STUDENTS:
        for name, method in METHODS.items():
            if (key := f"{student} {name}") not in records.runs:
                records.add(key, {"student": student, "method": name} | train(student, method))
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
