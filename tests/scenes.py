"""Scenes of squares whose colours are their classes, in memory and in folders."""

import json

import numpy as np
import torch
from PIL import Image

import bpkd_sdk

COLORS = np.array([[30, 30, 30], [220, 40, 40], [40, 220, 40], [40, 40, 220]], np.uint8)
NAMES = ("background", "red", "green", "blue")


def scene(index, size=48, classes=3):
    """Return an image, uint8 (size, size, 3), and its label, uint8 (size, size)."""
    generator = np.random.default_rng(index)
    label = np.zeros((size, size), np.uint8)
    for class_id in range(1, classes):
        top, left = generator.integers(0, size - size // 3, 2)
        label[top : top + size // 3, left : left + size // 3] = class_id
    noise = generator.integers(-8, 8, (size, size, 3))
    return np.clip(COLORS[label].astype(int) + noise, 0, 255).astype(np.uint8), label


def save(pixels, path, _index=0):
    Image.fromarray(pixels).save(path)


def write_folder(root, names=NAMES[:3], *, train=8, val=4, size=48, classes=3, image=save, label=save):
    """Write a folder of scenes; `image` and `label` are functions that write a file from pixels, path and index."""
    for split, count, start in (("train", train, 0), ("val", val, 100)):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for index in range(count):
            pixels, ids = scene(start + index, size, classes)
            image(pixels, root / "images" / split / f"{index}.png", index)
            label(ids, root / "labels" / split / f"{index}.png", index)
    if names is not None:
        (root / "classes.json").write_text(json.dumps(names))
    return root


class Scenes(bpkd_sdk.SegmentationDataset):
    """A data set of scenes; `order` renumbers the classes: class i of the data is class order[i] of the scene."""

    def __init__(self, order=(0, 1, 2), *, start=0, length=8, size=48, names=None):
        self.name = "scenes"
        self.order, self.start, self.length, self.size = order, start, length, size
        self.class_names = tuple(NAMES[index] for index in order) if names is None else names
        self.palette = tuple(tuple(map(int, COLORS[index])) for index in order)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        pixels, label = scene(self.start + index, self.size, len(self.order))
        ids = np.argsort(self.order).astype(np.uint8)[label]
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(ids)
