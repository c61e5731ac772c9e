"""The interface of data sets, and its implementation for files: pairs of an image and a label map."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bpkd_sdk.classes import check_data_classes
from bpkd_sdk.data.checks import check_samples
from bpkd_sdk.data.labels import read_class_ids
from bpkd_sdk.data.pairs import Pair
from bpkd_sdk.images import read_image as read_image  # for code that imports it from here
from bpkd_sdk.images import read_pixels
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.spec import Color


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Base class of all data sets. A subclass sets the attributes and defines `__len__` and `__getitem__`.

    ``dataset[i]`` is an image, uint8 (3, H, W) RGB, and a label map, uint8 or int64 (H, W), with class ids in
    [0, num_classes) or `ignore_index`. A data set of other images states `channels` and `value_range`: its images are
    uint8 (channels, H, W) for the range (0, 255), otherwise uint16 or float32 with values in `value_range`.

    Attributes:
        name: Name in reports and error messages.
        class_names: Names of the classes, in the order of their ids.
        palette: RGB colour (0..255) of each class.
        ignore_index: Label value of void pixels, which are neither learnt nor scored.
        has_labels: Whether the data have labels. If False, all label maps are blank.
        channels: Number of channels of the images, 1 to 16.
        value_range: Lowest and highest value that a channel can have; it is scaled to 0..1 before normalisation.
        bands: Indices of the visible channels, see `bpkd_sdk.pixels.PixelFormat`; colours are augmented if there are
            three.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    ignore_index: int = 255
    has_labels: bool = True
    channels: int = 3
    value_range: tuple[float, float] = (0, 255)
    bands: tuple[int, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def pixels(self) -> PixelFormat:
        """Format of the images: `channels`, `value_range` and `bands`."""
        return PixelFormat(self.channels, self.value_range, self.bands)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def sample_name(self, index: int) -> str:
        """Return the name of a sample in reports and error messages."""
        path = self.image_path(index)
        return f"{self.name}[{index}]" if path is None else str(path)

    def image_path(self, index: int) -> Path | None:
        """Return the path of a sample's image file, or None if the data set does not read files."""
        return None

    def label_advice(self, labels: Iterable[int]) -> str:
        """Return advice on how to map label values that are not classes; empty if there is no advice.

        Args:
            labels: Label values of the data set.
        """
        return ""

    def check_classes(self) -> None:
        """Check that the class names, the palette and the void label fit together. No sample is read.

        `channels`, `value_range` and `bands` are checked as well.

        Raises:
            ValueError: If there are fewer than 2 or more than 256 classes, if the palette has another length, or if
                the void label is the id of a class.
        """
        try:
            _ = self.pixels
        except ValueError as error:
            raise ValueError(f"{error} ({self.name})") from error
        check_data_classes(self.name, self.class_names, self.palette, self.ignore_index)

    def check(self) -> None:
        """Read all samples once, and refuse the data set if some cannot be used.

        `bpkd_sdk.data.checks.check_samples` lists the checks and warnings.

        Raises:
            ValueError: With a list of the samples that cannot be used.
        """
        check_samples(self)


class DatasetSubset(SegmentationDataset):
    """A selection of the samples of a data set.

    Args:
        dataset: Data set to select from.
        indices: Indices of the selected samples in `dataset`.
    """

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices
        self.name = dataset.name
        self.class_names = dataset.class_names
        self.palette = dataset.palette
        self.ignore_index = dataset.ignore_index
        self.has_labels = dataset.has_labels
        self.channels, self.value_range, self.bands = dataset.channels, dataset.value_range, dataset.bands

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset[self.indices[index]]

    def sample_name(self, index: int) -> str:
        """Return the name of the sample in the whole data set."""
        return self.dataset.sample_name(self.indices[index])

    def image_path(self, index: int) -> Path | None:
        """Return the path of the sample's image file in the whole data set."""
        return self.dataset.image_path(self.indices[index])

    def label_advice(self, labels: Iterable[int]) -> str:
        """Return the advice of the whole data set."""
        return self.dataset.label_advice(labels)


class FileDataset(SegmentationDataset):
    """A data set of image files and label files.

    Args:
        name: Name in reports and error messages.
        pairs: Paths of the images and their label maps, in the order of the samples.
        class_names: Names of the classes, in the order of their ids.
        palette: RGB colour (0..255) of each class.
        ignore_index: Label value of void pixels.
        ids: Class id, or `ignore_index`, of each value in the label files; None if the values are the class ids.
            A file with any other value is refused when it is read.
        colors: Class id, or `ignore_index`, of each RGB colour in the label files, which are then read by colour;
            None if the files are read by value. A file with any other colour is refused when it is read.
        pixels: Format of the images.
    """

    def __init__(
        self,
        name: str,
        pairs: Sequence[Pair],
        class_names: Sequence[str],
        palette: Sequence[Color],
        ignore_index: int = 255,
        ids: Mapping[int, int] | None = None,
        colors: Mapping[Color, int] | None = None,
        pixels: PixelFormat = PixelFormat(),  # noqa: B008  (frozen)
    ) -> None:
        self.name = name
        self.pairs = tuple(pairs)
        self.class_names = tuple(class_names)
        self.palette = tuple(palette)
        self.ignore_index = ignore_index
        self.ids = ids
        self.colors = colors
        self.has_labels = all(pair.label is not None for pair in self.pairs)
        self.channels, self.value_range, self.bands = pixels.channels, pixels.value_range, pixels.bands

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one sample.

        Raises:
            ValueError: If a file cannot be read, or if the label file contains a value or colour that is not mapped.
        """
        pair = self.pairs[index]
        image = read_pixels(pair.image, self.pixels)
        label = np.zeros(image.shape[:2], np.uint8) if pair.label is None else self.read_label(pair.label)
        # The channels stay interleaved, as they are decoded: copies and resizing are then several times as fast.
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)

    def image_path(self, index: int) -> Path:
        """Return the path of the image file."""
        return self.pairs[index].image

    def read_label(self, path: Path) -> np.ndarray:
        """Read a label file as class ids (H, W): uint8 if they fit, otherwise int64."""
        return read_class_ids(path, self.ids, self.colors, self.ignore_index, self.name)


def default_workers() -> int:
    """Return the default number of worker processes of a data loader: the cores of this process, at most 8.

    The launcher sets ``LOCAL_WORLD_SIZE``, the number of processes that share the cores of this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def ignore_interrupts(_worker: int) -> None:
    """Make a worker process ignore Ctrl-C, which the main process handles; a `worker_init_fn` of data loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
