"""Scenes of squares with four channels of 12 bits: red, green, blue and near infrared, which alone shows the class."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image

import bpkd_sdk
import bpkd_sdk.export
from tests.scenes import scene

RANGE = (0, 4095)
NAMES = ("soil", "plant")


def band_scene(index, size=48):
    """Return an image, uint16 (size, size, 4) in 0..4095, and its label, uint8 (size, size)."""
    generator = np.random.default_rng(index)
    _, label = scene(index, size, classes=2)
    image = generator.integers(300, 500, (size, size, 4))
    image[..., 3] += 1500 * label.astype(int)
    return image.astype(np.uint16), label


class BandScenes(bpkd_sdk.SegmentationDataset):
    """A data set in memory; its images are uint16 tensors (4, size, size)."""

    channels = 4
    value_range = RANGE
    bands = (0, 1, 2)
    class_names = NAMES
    palette = ((120, 80, 40), (40, 160, 60))

    def __init__(self, *, start=0, length=8, size=48):
        self.name, self.start, self.length, self.size = "bands", start, length, size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image, label = band_scene(self.start + index, self.size)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0))), torch.from_numpy(label)


def write_bands(root, *, train=8, val=4, size=48, **facts):
    """Write a folder of these scenes: TIFF files, PNG labels, and ``classes.json`` with the format of the images."""
    for split, count, start in (("train", train, 0), ("val", val, 100)):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for index in range(count):
            image, label = band_scene(start + index, size)
            tifffile.imwrite(
                root / f"images/{split}/{index}.tif", image, photometric="minisblack", planarconfig="contig"
            )
            Image.fromarray(label).save(root / f"labels/{split}/{index}.png")
    content = {"class_names": NAMES, "channels": 4, "value_range": RANGE, "bands": (2, 1, 0)} | facts
    (root / "classes.json").write_text(json.dumps(content))
    return root


class Bands(NamedTuple):
    """Results of `train_on_bands`; `root` is the folder of the data, `run` the result of the training."""

    root: Path
    run: bpkd_sdk.TrainingResult
    onnx: Path
    report: bpkd_sdk.export.ExportReport


def train_on_bands(folder):
    """Write the data, train a student with one logit, and export it to a file that is compared on validation images."""
    root = write_bands(folder / "data")
    torch.manual_seed(0)
    run = bpkd_sdk.train(
        bpkd_sdk.create_model("smp/Linknet/tu-test_resnet", 1, in_channels=4),
        root,
        steps=40,
        evaluate_every=40,
        batch_size=4,
        learning_rate=0.05,
        output_dir=folder / "run",
        device="cpu",
    )
    val = bpkd_sdk.open_dataset(root, split="val")
    report = bpkd_sdk.to_onnx(run.checkpoint, folder / "student.onnx", input_size=(48, 48), verify_on=val)
    return Bands(root, run, report.path, report)
