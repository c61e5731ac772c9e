"""The embedded `shapes` scenes as a data set: no download, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from bpkd_sdk.data.dataset import SegmentationDataset
from bpkd_sdk.data.shapes import CLASS_NAMES, PALETTE, render


class ShapesDataset(SegmentationDataset):
    """Generated scenes of overlapping, textured, thin and thick objects.

    Args:
        split: "train", "val" or any other word; each is a stream of its own.
        length: Number of scenes; None: 400 for "train", 100 for others.
        size: (height, width) in pixels.
        seed: Of all scenes.
    """

    def __init__(
        self, split: str = "train", *, length: int | None = None, size: tuple[int, int] = (128, 128), seed: int = 0
    ) -> None:
        self.name = f"shapes/{split}"
        self.class_names = CLASS_NAMES
        self.palette = PALETTE
        self.split = split
        self.length = length if length is not None else (400 if split == "train" else 100)
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"Expected an index in [0, {self.length}), but got {index}.")
        image, label = render(self.seed, self.split, index, self.size)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)
