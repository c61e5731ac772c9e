"""Compare all methods with their default weights on CamVid, by the commands of the package, at 40 steps and 40 seconds.

    python -m benchmarks.camvid.defaults --data path/to/camvid --weights lite2.pth lite0.pth

The budget is small, for two CPU cores; `python -m benchmarks.camvid` is the study with tuned weights, and describes the
weight files. The commands resume where they were stopped, so the same call can be repeated.
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bpkd_sdk
from benchmarks.records import Records, make_parser
from benchmarks.study.networks import load_encoder
from bpkd_sdk.data.public import CAMVID_CLASSES
from bpkd_sdk.files import read_json

NETWORKS = {"teacher": "smp/FPN/timm-tf_efficientnet_lite2", "student": "smp/PAN/timm-tf_efficientnet_lite0"}
RECIPE = (
    "--optimizer",
    "adamw",
    "--learning-rate",
    6e-4,
    "--gradient-clip",
    10,
    "--batch-size",
    8,
    "--scale",
    0.75,
    1.5,
)
BUDGETS = ("--steps=40", "--seconds=40")


def write_initial_networks(folder: Path, weights: list[Path]) -> None:
    """Write checkpoints whose encoders have ImageNet weights; the commands read initial weights from checkpoints."""
    for (role, name), path in zip(NETWORKS.items(), weights, strict=True):
        network = bpkd_sdk.create_model(name, len(CAMVID_CLASSES))
        load_encoder(network, path)
        network.spec = replace(network.spec, mean=(0.5,) * 3, std=(0.5,) * 3)
        bpkd_sdk.save_model(network, folder / f"{role}.safetensors")


def bpkd(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "bpkd_sdk.cli", *map(str, arguments)], check=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs=2, required=True, metavar=("LITE2", "LITE0"))
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid-defaults"), help="folder of the training runs")
    options = parser.parse_args()
    runs, data = options.runs, ("--data", "camvid", "--root", options.data)
    if not (runs / "start" / "student.safetensors").is_file():
        write_initial_networks(runs / "start", options.weights)
    bpkd(
        *("train", runs / "start" / "teacher.safetensors", *data, *RECIPE, "--precision", "bf16"),
        *("--crop-size", "224x320", "--steps", 300, "--checkpoint-every", 50, "--output", runs / "teacher", "--resume"),
    )
    records, tables = Records(options.output / "camvid-defaults.jsonl"), []
    for budget in BUDGETS:
        name = budget.removeprefix("--").replace("=", "-")
        bpkd(
            *("compare", "--methods", "all", "--teacher", runs / "teacher" / "last.safetensors"),
            *("--student", runs / "start" / "student.safetensors", *data, *RECIPE, "--crop-size", "192x256"),
            *("--evaluate-every", 20, budget, "--seeds", 1, "--output", runs / name),
        )
        records.add(name, read_json(runs / name / "table.json"))
        tables.append((runs / name / "table.md").read_text())
        shutil.copy(runs / name / "miou_over_time.png", options.output / f"camvid-defaults-{name}.png")
    records.write_table("\n".join(tables))


if __name__ == "__main__":
    main()
