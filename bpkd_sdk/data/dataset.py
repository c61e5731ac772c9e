"""Data sets: a length, classes, and pairs of an RGB image and a label map."""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bpkd_sdk.classes import MOST_CLASSES
from bpkd_sdk.data.labels import fitted, read_colors, read_label
from bpkd_sdk.errors import listed
from bpkd_sdk.images import bit_depth, exif_orientation, read_image
from bpkd_sdk.models.spec import Color
from bpkd_sdk.progress import track

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LABEL_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


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
        """Return what errors and reports call a sample."""
        return f"{self.name}[{index}]"

    def check_classes(self) -> None:
        """Check the class names, the palette and the void label against each other, without reading a sample.

        Raises:
            ValueError: For fewer than 2 or more than 256 classes, a palette of another length, or a void label that is
                one of the classes.
        """
        names, count = self.class_names, self.num_classes
        if isinstance(names, str) or not all(isinstance(name, str) for name in names) or len(set(names)) < count:
            raise ValueError(
                f"Expected class_names of {self.name} to be different texts, one per class, but got {names}."
            )
        if not isinstance(self.name, str) or type(self.ignore_index) is not int:
            raise ValueError(
                f"Expected `name` of a data set to be a text and `ignore_index` an int, but got {self.name!r} and "
                f"{self.ignore_index!r}."
            )
        if count == 1:
            raise ValueError(
                f"{self.name} has one class, {self.class_names[0]!r}. Add a class for all other pixels: class_names "
                f"['background', {self.class_names[0]!r}], labels 0 and 1. A network of one logit is scored on these "
                "two classes as well."
            )
        if not 2 <= count <= MOST_CLASSES:
            raise ValueError(
                f"Expected 2 to {MOST_CLASSES} classes, since masks are uint8, but {self.name} has {count}."
            )
        palette = list(self.palette)
        if len(palette) != count or not all(len(c) == 3 and all(type(v) is int for v in c) for c in palette):
            raise ValueError(
                f"Expected `palette` of {self.name} to be {count} colours, one (r, g, b) of ints per class, but got "
                f"{len(palette)}: {palette[:3]}."
            )
        if 0 <= self.ignore_index < count:
            raise ValueError(
                f"The void label of {self.name}, ignore_index={self.ignore_index}, is the class "
                f"{self.class_names[self.ignore_index]!r}. Take that name out of the classes and map its id to void, "
                'for a folder by {"ids": {"0": "void", "1": ...}} in classes.json; or pass an ignore_index outside '
                f"0..{count - 1}."
            )

    def check(self) -> None:
        """Read everything once and refuse what cannot be used.

        Images that EXIF data turn, and 16-bit images that are scaled by different depths, are warned of.

        Raises:
            ValueError: With the list of offenders: unreadable files, images that are not uint8 RGB, labels outside the
                classes, an image and a label of different sizes; and as `check_classes`.
        """
        self.check_classes()
        self.check_findings(self.examine())

    def check_findings(self, findings: Sequence[Finding]) -> None:
        """Raise and warn as `check`, of what `examine` returned."""
        if offenders := [finding.problem for finding in findings if finding.problem]:
            raise ValueError(
                f"{len(offenders)} of {len(self)} samples of {self.name} cannot be used:\n{listed(offenders)}"
                f"{self.label_advice(findings)}"
            )
        if self.has_labels and findings and not any(set(f.labels) - {self.ignore_index} for f in findings):
            raise ValueError(
                f"All labels of {self.name} are void ({self.ignore_index}), so there is nothing to learn or to score. "
                "If that value is a class, pass another ignore_index."
            )
        if findings and max(finding.brightest for finding in findings) <= 1:
            raise ValueError(
                f"All images of {self.name} hold only the values 0 and 1, expected 0 to 255. Do not divide images by "
                "255: training and export normalise them."
            )
        if turned := [finding.sample for finding in findings if finding.turned]:
            warnings.warn(
                f"EXIF data turn {len(turned)} of {len(self)} images of {self.name}; labels are read as they are "
                "stored. Make sure that these labels were drawn on the turned images, or store the images upright:\n"
                f"{listed(turned)}",
                stacklevel=2,
            )
        depths = Counter(finding.bit_depth for finding in findings if finding.bit_depth > 8)
        if len(depths) > 1:
            found = ", ".join(f"{depth} bits in {count}" for depth, count in sorted(depths.items()))
            warnings.warn(
                f"The 16-bit images of {self.name} do not say how many bits they use, and their largest values need "
                f"{found} of them. Each is scaled by its own depth, so that they are not equally bright: store them "
                "with 8 bits, or with values that fill 16 bits.",
                stacklevel=2,
            )

    def check_for_training(self) -> None:
        """Check as `check`, and warn of the classes that no label has."""
        self.check_classes()
        findings = self.examine()
        self.check_findings(findings)
        self.warn_of_absent_classes(findings)

    def unknown_labels(self, label: Tensor) -> list[int]:
        """Return the values of a label map that are neither a class nor the void label, ascending."""
        wrong = label[(label < 0) | (label >= self.num_classes)]
        return sorted(set(wrong[wrong != self.ignore_index].tolist()))

    def warn_of_absent_classes(self, findings: Sequence[Finding]) -> None:
        """Warn of the classes that no label has, of what `examine` returned."""
        absent = absent_classes(self, findings)
        if absent and self.has_labels:
            warnings.warn(
                f"No label of {self.name} has the class{'es' if len(absent) > 1 else ''} {', '.join(map(repr, absent))}"
                f"; a network cannot learn what no label shows. The labels hold {_found_labels(findings)}, and "
                f"{self.ignore_index} is void.",
                stacklevel=3,
            )

    def examine(self) -> list[Finding]:
        """Read everything once and report for each sample what it holds, and why it cannot be used."""
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            findings = pool.map(self.examine_sample, range(len(self)))
            return list(track(findings, total=len(self), description=f"Checking {self.name}"))

    def examine_sample(self, index: int) -> Finding:
        """Read one sample and report what it holds, and why it cannot be used."""
        sample = self.sample_name(index)
        try:
            image, label = self[index]
        except (ValueError, OSError) as error:
            return Finding(sample, problem=_naming(sample, str(error)))
        except Exception as error:  # a data set of the user's own may raise anything
            return Finding(sample, problem=_naming(sample, f"{type(error).__name__}: {error}"))
        if problem := image_problem(image) or label_problem(label):
            return Finding(sample, problem=f"{sample}: {problem}")
        size = (image.shape[1], image.shape[2])
        if size != tuple(label.shape):
            problem = f"{sample}: image is {size}, label is {tuple(label.shape)}{self._size_advice(index, size, label)}"
            return Finding(sample, size, problem=problem)
        labels = tuple(torch.unique(label).tolist())
        wrong = self.unknown_labels(label)
        problem = (
            f"{sample}: labels {wrong[:10]} are outside the classes 0..{self.num_classes - 1} "
            f"and not the void label {self.ignore_index}"
        )
        return Finding(
            sample,
            size,
            labels,
            problem if wrong else None,
            self._is_turned(index, size),
            int(image.max().item()),
            self._bit_depth(index),
        )

    def _bit_depth(self, index: int) -> int:
        """Return the bits per channel that an image uses in its file."""
        return 8

    def _is_turned(self, index: int, size: tuple[int, int]) -> bool:
        """Return whether EXIF data turn an image in a way that its label need not have followed."""
        return False

    def _size_advice(self, index: int, size: tuple[int, int], label: Tensor) -> str:
        """Return what to add to the problem of an image and a label of different sizes."""
        return ""

    def label_advice(self, findings: Sequence[Finding]) -> str:
        """Return how to give labels that are outside the classes a meaning."""
        return ""


def expect_dataset(data: object, argument: str) -> None:
    """Raise TypeError unless an argument is a data set of this package, opened."""
    if not isinstance(data, SegmentationDataset):
        raise TypeError(
            f"Expected `{argument}` to be a SegmentationDataset, but got {type(data).__name__}. Open a folder or a "
            "named data set with bpkd_sdk.open_dataset, or subclass bpkd_sdk.SegmentationDataset."
        )


class DatasetSubset(SegmentationDataset):
    """Some samples of a data set.

    Args:
        dataset: The whole.
        indices: Positions of the samples in it.
    """

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices
        self.name = dataset.name
        self.class_names = dataset.class_names
        self.palette = dataset.palette
        self.ignore_index = dataset.ignore_index
        self.has_labels = dataset.has_labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset[self.indices[index]]

    def sample_name(self, index: int) -> str:
        """Return what the whole data set calls the sample."""
        return self.dataset.sample_name(self.indices[index])


@dataclass(frozen=True)
class Finding:
    """What one sample holds.

    Attributes:
        sample: Its name in reports.
        size: (height, width) of the image; None if it cannot be read.
        labels: Values of the label map, ascending.
        problem: Why the sample cannot be used, or None.
        turned: Whether EXIF data turn the image in a way that the label, read as stored, need not have followed.
        brightest: The largest value in the image; 255 where it could not be read.
        bit_depth: Bits per channel that the image uses in its file; 8 where that is not known.
    """

    sample: str
    size: tuple[int, int] | None = None
    labels: tuple[int, ...] = ()
    problem: str | None = None
    turned: bool = False
    brightest: int = 255
    bit_depth: int = 8


def absent_classes(dataset: SegmentationDataset, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Names of the classes that are in no label."""
    seen = {label for finding in findings for label in finding.labels}
    return tuple(name for index, name in enumerate(dataset.class_names) if index not in seen)


def _found_labels(findings: Sequence[Finding]) -> str:
    values = sorted({label for finding in findings for label in finding.labels})
    return ", ".join(map(str, values[:20])) + (", ..." if len(values) > 20 else "")


def _naming(sample: str, problem: str) -> str:
    """The problem with the sample's name in front, unless it names the sample or its label already."""
    return problem if Path(sample).stem in problem else f"{sample}: {problem}"


def image_problem(image: object) -> str | None:
    """Return why an image of a data set cannot be used, or None for uint8 (3, H, W)."""
    if not isinstance(image, Tensor):
        return f"image is a {type(image).__name__}, expected a torch tensor, uint8 (3, H, W)"
    if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel():
        return None
    problem = f"image is {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}, expected uint8 (3, H, W) RGB"
    if image.is_floating_point() and image.numel():
        problem += (
            f". Its values go from {image.min().item():.3g} to {image.max().item():.3g}; return the pixels as bytes of "
            "0 to 255, since training and export scale and normalise them themselves"
        )
    return problem


def label_problem(label: object) -> str | None:
    """Return why a label map of a data set cannot be used, or None for integers (H, W)."""
    if isinstance(label, Tensor) and label.ndim == 2 and label.dtype in LABEL_TYPES:
        return None
    found = (
        f"{str(label.dtype).removeprefix('torch.')} {tuple(label.shape)}"
        if isinstance(label, Tensor)
        else f"a {type(label).__name__}"
    )
    return f"label is {found}, expected a torch tensor of class ids, uint8 or int64 (H, W)"


@dataclass(frozen=True)
class Pair:
    """Paths of an image and of its label map; no label where a data set has none."""

    image: Path
    label: Path | None


class FileDataset(SegmentationDataset):
    """A data set of image files and label files.

    Args:
        name: For reports.
        pairs: The files, in order.
        class_names: One per class.
        palette: One RGB colour per class.
        ignore_index: The void label.
        ids: Class, or void label, of each id in the files; None where the ids are the classes. A file with any other id
            is refused when it is read.
        colors: Class, or void label, of each RGB colour in the files, which are then read by colour; None where files
            hold ids. A file with any other colour is refused when it is read.
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
    ) -> None:
        self.name = name
        self.pairs = tuple(pairs)
        self.class_names = tuple(class_names)
        self.palette = tuple(palette)
        self.ignore_index = ignore_index
        self.ids = ids
        self.colors = colors
        self.has_labels = all(pair.label is not None for pair in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one sample; ValueError if a file cannot be read, or holds an id or colour without a meaning."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = np.zeros(image.shape[:2], np.uint8) if pair.label is None else self.read_label(pair.label)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)

    def read_label(self, path: Path) -> np.ndarray:
        """Read a label file as class ids (H, W); uint8 if they fit, otherwise int64."""
        if self.colors is not None:
            return read_colors(path, self.colors, self.ignore_index)
        label = read_label(path)
        if label.dtype == np.bool_:  # white is 255 where that is the id of a class and 1 is none
            is_255 = self.ids and 1 not in self.ids and self.ids.get(255, self.ignore_index) != self.ignore_index
            label = label.astype(np.uint8) * np.uint8(255 if is_255 else 1)
        if self.ids is None:
            return label
        table = np.full(max(self.ids) + 2, -1, np.int64)  # the last entry stands for all ids above
        table[list(self.ids)] = list(self.ids.values())
        classes = table.take(label, mode="clip")
        if classes.min() < 0 or label.min() < 0:
            strange = sorted(set(np.unique(label).tolist()) - self.ids.keys())
            raise ValueError(f"{path}: holds the ids {strange[:10]}, which mean nothing in {self.name}")
        return fitted(classes)

    def sample_name(self, index: int) -> str:
        """Return the path of the image."""
        return str(self.pairs[index].image)

    def _bit_depth(self, index: int) -> int:
        return bit_depth(self.pairs[index].image)

    def _is_turned(self, index: int, size: tuple[int, int]) -> bool:
        # Where turning exchanges height and width, a label of the turned size cannot have been drawn on the stored one.
        orientation = exif_orientation(self.pairs[index].image) if self.has_labels else 1
        return orientation > 1 and (orientation < 5 or size[0] == size[1])

    def _size_advice(self, index: int, size: tuple[int, int], label: Tensor) -> str:
        if exif_orientation(self.pairs[index].image) < 5 or size != tuple(reversed(label.shape)):
            return ""
        return "; EXIF data turn the image, and the label fits it as stored: turn the label, or store the image upright"


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


def spare_cores() -> int:
    """Up to 8 of the cores that fall to this process; the launcher says how many processes share the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def leave_interrupts_to_the_main_process(_worker: int) -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
