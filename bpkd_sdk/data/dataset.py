"""Data sets: a length, classes, and pairs of an RGB image and a label map."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
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
        if offenders := [finding.problem for finding in self.examine() if finding.problem]:
            raise ValueError(
                f"{len(offenders)} of {len(self)} samples of {self.name} cannot be used:\n{listed(offenders)}"
            )

    def examine(self) -> list[Finding]:
        """Read everything once and say of each sample what is in it, and why it cannot be used."""
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            findings = pool.map(self._examine, range(len(self)))
            return list(track(findings, total=len(self), description=f"Checking {self.name}"))

    def _examine(self, index: int) -> Finding:
        sample = self.sample_name(index)
        try:
            image, label = self[index]
        except (ValueError, OSError) as error:
            return Finding(sample, problem=str(error))
        size = (image.shape[1], image.shape[2])
        if size != tuple(label.shape):
            return Finding(sample, size, problem=f"{sample}: image is {size}, label is {tuple(label.shape)}")
        labels = tuple(torch.unique(label).tolist())
        return Finding(sample, size, labels, self._label_problem(sample, labels))

    def _label_problem(self, sample: str, labels: Sequence[int]) -> str | None:
        wrong = [value for value in labels if value != self.ignore_index and not 0 <= value < self.num_classes]
        if not wrong:
            return None
        return (
            f"{sample}: labels {wrong[:10]} are outside the classes 0..{self.num_classes - 1} "
            f"and not the void label {self.ignore_index}"
        )


@dataclass(frozen=True)
class Finding:
    """What one sample holds.

    Attributes:
        sample: What to call it.
        size: (height, width) of the image; None if it cannot be read.
        labels: Values of the label map, ascending.
        problem: Why the sample cannot be used, or None.
    """

    sample: str
    size: tuple[int, int] | None = None
    labels: tuple[int, ...] = ()
    problem: str | None = None


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
        ids: What each id in the files stands for, a class or the void label; None where they are the classes. A file
            with any other id is refused when it is read.
    """

    def __init__(
        self,
        name: str,
        pairs: Sequence[Pair],
        class_names: Sequence[str],
        palette: Sequence[Color],
        ignore_index: int = 255,
        ids: Mapping[int, int] | None = None,
    ) -> None:
        self.name = name
        self.pairs = tuple(pairs)
        self.class_names = tuple(class_names)
        self.palette = tuple(palette)
        self.ignore_index = ignore_index
        self.ids = ids
        self.has_labels = all(pair.label is not None for pair in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one sample; ValueError if a file cannot be read, or holds an id without a meaning."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = np.zeros(image.shape[:2], np.uint8) if pair.label is None else self._read_label(pair.label)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)

    def _read_label(self, path: Path) -> np.ndarray:
        label = read_label(path)
        if self.ids is None:
            return label
        table = np.full(257, -1, np.int16)  # the last entry stands for all ids above 255
        table[list(self.ids)] = list(self.ids.values())
        classes = table.take(label, mode="clip")
        if classes.min() < 0:
            strange = sorted(set(np.unique(label).tolist()) - self.ids.keys())
            raise ValueError(f"{path}: holds the ids {strange[:10]}, which mean nothing in {self.name}")
        return classes.astype(np.uint8)

    def head(self, count: int) -> FileDataset:
        """The first `count` samples as a data set of their own."""
        pairs = self.pairs[:count]
        return FileDataset(self.name, pairs, self.class_names, self.palette, self.ignore_index, self.ids)

    def sample_name(self, index: int) -> str:
        """The path of the image."""
        return str(self.pairs[index].image)


def pair_files(
    images: Path, labels: Path | None, label_name: Callable[[str], str] = lambda stem: f"{stem}.png"
) -> list[Pair]:
    """Match images and label PNGs by name, below two folders and their sub-folders.

    Args:
        images: Folder of the images.
        labels: Folder of the labels, or None where there are none.
        label_name: The name of a label, from that of its image without the suffix.

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
    pairs = [Pair(path, (labels / path.relative_to(images)).with_name(label_name(path.stem))) for path in found]
    if repeated := sorted({str(b.image) for a, b in pairwise(pairs) if a.label == b.label}):
        raise ValueError(f"{len(repeated)} images share the name, and so the label, of another:\n{listed(repeated)}")
    return complete(pairs)


def complete(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs, if all their files are there.

    Raises:
        ValueError: If images or labels are missing; the first offenders are listed.
    """
    pairs = list(pairs)
    if missing := [pair.image for pair in pairs if not pair.image.is_file()]:
        raise ValueError(f"{len(missing)} of {len(pairs)} images are missing:\n{listed(missing)}")
    if orphans := [
        f"{pair.image} (expected {pair.label})" for pair in pairs if pair.label and not pair.label.is_file()
    ]:
        raise ValueError(f"{len(orphans)} of {len(pairs)} images have no label:\n{listed(orphans)}")
    return pairs


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB; ValueError if the file cannot be decoded, or is cut short."""
    content = path.read_bytes()
    # A JPEG that is cut short decodes without an error, grey from there on. Its end marker tells: inside a scan it
    # cannot occur, and one of an embedded thumbnail comes before the last scan starts.
    if content.startswith(b"\xff\xd8") and content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):
        raise ValueError(f"{path}: is cut short")
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB) if content else None
    if image is None:
        raise ValueError(f"{path}: cannot be read as an image")
    return np.asarray(image)


def read_label(path: Path) -> np.ndarray:
    """Ids (H, W) from a PNG, grey or with a palette (then they are its indices): uint8 if they fit, otherwise int64.

    Raises:
        ValueError: If the file cannot be decoded, or holds colours.
    """
    try:
        with Image.open(path) as image:
            label = np.array(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as a label map ({error})") from error
    if label.ndim != 2:
        raise ValueError(f"{path}: holds colours {label.shape}, expected one class id per pixel (grey or palette PNG)")
    return label.astype(np.uint8 if label.min() >= 0 and label.max() < 256 else np.int64, copy=False)
