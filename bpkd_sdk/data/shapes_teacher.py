"""Trains the teacher for the scenes "shapes" that this package contains, in an hour on two CPU cores.

    python -m bpkd_sdk.data.shapes_teacher runs/shapes_teacher

The command continues an interrupted run in the same folder, and writes the network to ``shapes_teacher.safetensors``
there, in half precision. Random numbers are seeded, but bfloat16 arithmetic differs between processors, so that another
machine trains other weights. The record of the run is ``benchmarks/results/shapes-teacher.jsonl``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.models.spec import get_provenance

NETWORK = "smp/Unet/tu-test_resnet"  # 2.3 million parameters; its logits have the size of the image
STEPS = 3000


def train_teacher(folder: Path) -> Path:
    """Train the teacher in a folder, and return the path of the network in half precision."""
    torch.manual_seed(0)
    model = bpkd_sdk.create_model(NETWORK, ShapesDataset().num_classes)
    result = bpkd_sdk.train(
        model,
        (ShapesDataset("train", length=200_000), ShapesDataset("val")),
        steps=STEPS,
        batch_size=16,
        crop_size=(128, 128),
        scale=(1.0, 1.0),
        transform="light",  # without random colours: the hue belongs to the class
        optimizer="adamw",
        learning_rate=4e-3,
        learning_rate_warmup=100,
        weight_decay=0.01,
        gradient_clip=5.0,
        precision="bf16",
        channels_last=True,
        device="cpu",
        workers=1,
        check_data=False,
        checkpoint_every=200,
        output_dir=folder,
        resume=True,
    )
    path = folder / "shapes_teacher.safetensors"
    bpkd_sdk.save_model(result.model.half(), path, training=get_provenance(result.model))
    return path


if __name__ == "__main__":
    (folder,) = sys.argv[1:] or ["runs/shapes_teacher"]
    print(train_teacher(Path(folder)))  # noqa: T201
