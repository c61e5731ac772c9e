"""Data sets: a length, classes, and pairs of an RGB image and a label map."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bpkd_sdk.errors import listed
from bpkd_sdk.models.spec import Color
from bpkd_sdk.progress import track

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Base of the data sets; one of your own needs the attributes, `__len__` and `__getitem__`.

    ``dataset[i]`` is an image, uint8 (3, H, W) RGB, and a label map, uint8 or int64 (H, W) with class ids in
    [0, num_classes) or `ignore_index`.

    Attributes:
        name: For reports.
        class_names: One per class.
        palette: One RGB colour (0..255) per class.
        ignore_index: The void label.
        has_labels: False where labels are blank because there are none.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    ignore_index: int = 255
    has_labels: bool = True

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def sample_name(self, index: int) -> str:
        """What to call a sample in an error text or a report."""
        return f"{self.name}[{index}]"

    def check(self) -> None:
        """Read everything once and refuse what cannot be used.

        Raises:
            ValueError: With the list of offenders: unreadable files, labels outside the classes, an image and a label
                of different sizes.
        """
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            results = pool.map(self._problem, range(len(self)))
            found = list(track(results, total=len(self), description=f"Checking {self.name}"))
        if offenders := [problem for problem in found if problem]:
            raise ValueError(
                f"{len(offenders)} of {len(self)} samples of {self.name} cannot be used:\n{listed(offenders)}"
            )

    def _problem(self, index: int) -> str | None:
        try:
            image, label = self[index]
        except ValueError as error:
            return str(error)
        if image.shape[1:] != label.shape:
            return f"{self.sample_name(index)}: image is {tuple(image.shape[1:])}, label is {tuple(label.shape)}"
        return self._label_problem(index, label)

    def _label_problem(self, index: int, label: Tensor) -> str | None:
        values = torch.unique(label).tolist()
        wrong = [value for value in values if value != self.ignore_index and not 0 <= value < self.num_classes]
        if not wrong:
            return None
        return (
            f"{self.sample_name(index)}: labels {wrong[:10]} are outside the classes 0..{self.num_classes - 1} "
            f"and not the void label {self.ignore_index}"
        )


@dataclass(frozen=True)
class Pair:
    """Paths of an image and of its label map; no label where a data set has none."""

    image: Path
    label: Path | None


class FileDataset(SegmentationDataset):
    """A data set of image files and label PNGs.

    Args:
        name: For reports.
        pairs: The files, in order.
        class_names: One per class.
        palette: One RGB colour per class.
        ignore_index: The void label.
    """

    def __init__(
        self,
        name: str,
        pairs: Sequence[Pair],
        class_names: Sequence[str],
        palette: Sequence[Color],
        ignore_index: int = 255,
    ) -> None:
        self.name = name
        self.pairs = tuple(pairs)
        self.class_names = tuple(class_names)
        self.palette = tuple(palette)
        self.ignore_index = ignore_index
        self.has_labels = all(pair.label is not None for pair in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one sample; ValueError if a file cannot be read."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = np.zeros(image.shape[:2], np.uint8) if pair.label is None else read_label(pair.label)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)

    def sample_name(self, index: int) -> str:
        """The path of the image."""
        return str(self.pairs[index].image)


def pair_files(images: Path, labels: Path | None) -> list[Pair]:
    """Match images and label PNGs by name, below two folders and their sub-folders.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If an image has no label, or two images share a name; the first offenders are listed.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"There is no folder {images}.")
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise FileNotFoundError(f"The folder {images} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    if labels is None:
        return [Pair(path, None) for path in found]
    pairs = [Pair(path, labels / path.relative_to(images).with_suffix(".png")) for path in found]
    if repeated := sorted({str(b.image) for a, b in pairwise(pairs) if a.label == b.label}):
        raise ValueError(f"{len(repeated)} images share the name, and so the label, of another:\n{listed(repeated)}")
    if orphans := [
        f"{pair.image} (expected {pair.label})" for pair in pairs if not (pair.label and pair.label.is_file())
    ]:
        raise ValueError(f"{len(orphans)} of {len(pairs)} images have no label:\n{listed(orphans)}")
    return pairs


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB; ValueError if the file cannot be decoded."""
    content = np.fromfile(path, np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if content.size else None
    if image is None:
        raise ValueError(f"{path}: cannot be read as an image")
    return np.asarray(image)


def read_label(path: Path) -> np.ndarray:
    """uint8 or uint16 ids (H, W) from a PNG, grey or with a palette (then the ids are its indices).

    Raises:
        ValueError: If the file cannot be decoded, or holds colours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            label = np.array(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as a label map ({error})") from error
    if label.ndim != 2:
        raise ValueError(f"{path}: holds colours {label.shape}, expected one class id per pixel (grey or palette PNG)")
    return label if label.dtype == np.uint8 else label.astype(np.int64)
