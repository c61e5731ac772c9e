"""How large the terms of every method are with its defaults, beside the cross-entropy, on CamVid.

    python -m benchmarks.term_sizes --data path/to/camvid --weights lite0.pth --teacher A --student B

A and B are checkpoints: the teacher and the student trained alone of `benchmarks/camvid_study.py`, which also says
where the weights come from. Distills a few steps, once into a fresh student, once into the one trained alone. The last
steps show what a critic, a projection or a memory has made of the terms since the first. Methods that are in the output
file already are not repeated.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import bpkd_sdk
from benchmarks.camvid_study import student_network
from bpkd_sdk.files import write_json
from bpkd_sdk.losses import METHODS

RESULTS = Path(__file__).parent / "results" / "losses-term-sizes.json"
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
    """Mean terms of the first and of the last steps."""
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


def table(content: dict[str, Any]) -> str:
    lines = ["| method | student | cross-entropy | terms |", "|---|---|---|---|"]
    for method, sizes in content["methods"].items():
        for start, windows in sizes.items():
            first, last = ({name: f"{float(f'{x:.2g}'):g}" for name, x in terms.items()} for terms in windows.values())
            entries = [f"{name} {first[name]} → {last[name]}" for name in first if name != "ce"]
            lines.append(f"| {method} | {start} | {first['ce']} → {last['ce']} | {', '.join(entries)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    arguments = parser.parse_args()
    data = bpkd_sdk.open_dataset("camvid", root=arguments.data, split="train")
    done = json.loads(RESULTS.read_text())["methods"] if RESULTS.is_file() else {}
    content = {"steps": STEPS, "window": WINDOW, "recipe": RECIPE, "torch": torch.__version__, "methods": done}
    for method in METHODS:
        if method not in done:
            sizes = {}
            for start in ("fresh", "trained"):
                torch.manual_seed(0)
                student = student_network(arguments.weights, data.num_classes)
                if start == "trained":
                    student = bpkd_sdk.load_model(arguments.student, model=student)
                sizes[start] = measure(method, arguments.teacher, student, data)
            done[method] = sizes
        write_json(RESULTS, content)
    print(table(content))


if __name__ == "__main__":
    main()
