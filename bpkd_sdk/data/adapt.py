"""`as_dataset`: data sets of other libraries as `SegmentationDataset`."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate

from bpkd_sdk.colors import distinct_colors
from bpkd_sdk.data.classes_file import VOID
from bpkd_sdk.data.dataset import DatasetSubset, SegmentationDataset
from bpkd_sdk.data.foreign import MaskRule, find_image_rule, find_size, to_image, to_label
from bpkd_sdk.data.labels import parse_hex_color
from bpkd_sdk.data.sources import Key, check_indexable, default_name, find_class_names, find_fields, own_facts
from bpkd_sdk.errors import warn
from bpkd_sdk.spec import Color

# Masks that are read to determine whether 0 and 255 are two classes: at most, and with the value 255.
_MAX_INSPECTED_MASKS, _MASKS_WITH_WHITE = 1000, 16

_reading = threading.Lock()  # data sets of other libraries are read by one thread at a time


def as_dataset(
    data: Any,
    *,
    class_names: Sequence[str] | None = None,
    palette: Sequence[Color] | None = None,
    ignore_index: int | None = None,
    ids: Mapping[int | str, str] | None = None,
    name: str | None = None,
    image: Key | None = None,
    label: Key | None = None,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
    bands: Sequence[int] | None = None,
) -> SegmentationDataset:
    """Turn a data set of any library into a `SegmentationDataset`; `train`, `distill` and `compare` call it.

    Accepted are:

    - every object with a length whose items are (image, mask), or a mapping with both: ``torch.utils.data.Dataset``,
      `TensorDataset`, a list;
    - a data set of the library `datasets` (Hugging Face) with an image column and a mask column;
    - `VOCSegmentation`, `SBDataset`, `Cityscapes` and `OxfordIIITPet` of torchvision, whose classes are known;
    - `Subset` (of `random_split`), `ConcatDataset` and `DataLoader` around them, or around data sets of this package.

    `bpkd_sdk.data.foreign.to_image` and `to_label` list the accepted images and masks. Masks of two classes that
    contain only 0 and 255 are read as 0 and 1. A data set whose items are images without masks has no labels.

    Args:
        data: Data set. A `SegmentationDataset` is returned as it is.
        class_names: Names of the classes, in the order of their ids. None: those of `ids`, of the data set's attribute
            of this name, or of a known data set.
        palette: RGB colour of each class, by which masks with three channels are read. None: distinct colours.
        ignore_index: Label value of void pixels; None: 255.
        ids: Name of the class, or "void", of each value in the masks, ``{1: "pet", 2: "background", 3: "void"}``; or of
            each colour, ``{"#ff0000": "car"}``. None: the values are the class ids.
        name: Name in reports and error messages; None: that of the class of `data`.
        image: Key or position of the image in an item; None: it is found.
        label: Key or position of the mask in an item; None: it is found.
        channels: Number of channels of the images; None: that of the first image, or 3 for grey images.
        value_range: Values of black and of white in the images. Images then keep their values; None: they are bytes, or
            bytes divided by 255.
        bands: Indices of the channels that are shown as red, green and blue, see `SegmentationDataset`; None: all of
            three channels or one, and none of other numbers.

    Raises:
        TypeError: If `data` is not a data set, or has no length.
        ValueError: If the classes are not known, or the first item cannot be read.

    Examples:
        >>> images, masks = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.ones(4, 8, 8, dtype=torch.int64)
        >>> data = torch.utils.data.TensorDataset(images, masks)
        >>> dataset = as_dataset(data, class_names=["background", "road"])
        >>> dataset.class_names, dataset[0][1].dtype
        (('background', 'road'), torch.uint8)
    """
    stated = {
        "class_names": class_names,
        "palette": palette,
        "ignore_index": ignore_index,
        "ids": ids,
        "name": name,
        "image": image,
        "label": label,
        "channels": channels,
        "value_range": value_range,
        "bands": bands,
    }
    return _adapt(data, {key: value for key, value in stated.items() if value is not None}, None)


def as_dataset_of(data: Any, class_names: Sequence[str]) -> SegmentationDataset:
    """Turn a data set into a `SegmentationDataset`; if it does not state its classes, they are those of a network.

    Args:
        data: Data set, as `as_dataset` accepts it.
        class_names: Class names of the network; empty if they are not known.
    """
    return _adapt(data, {"default_names": tuple(class_names)}, None)


def _adapt(data: Any, stated: dict[str, Any], indices: Sequence[int] | None) -> SegmentationDataset:
    """Turn a data set into a `SegmentationDataset`.

    Args:
        data: Data set.
        stated: Arguments of `as_dataset` that are not None, and "default_names" of `as_dataset_of`.
        indices: Indices of the samples that will be used; None: all.
    """
    if isinstance(data, SegmentationDataset):
        _check_agreement(data, stated)
        return data
    if isinstance(data, DataLoader):
        if data.collate_fn is not default_collate:
            warn(
                "Only the data set of the DataLoader is used; its collate_fn, sampler and batch size are not. Put what "
                "collate_fn does to a sample into the data set, or pass it as `transform`."
            )
        return _adapt(data.dataset, stated, indices)
    # Subclasses with a method of their own may change the samples, and are read as other data sets are.
    if isinstance(data, Subset) and type(data).__getitem__ is Subset.__getitem__:
        chosen: Sequence[int] = [int(index) for index in data.indices]
        used = chosen if indices is None else [chosen[index] for index in indices]
        return DatasetSubset(_adapt(data.dataset, stated, used), chosen)
    if isinstance(data, ConcatDataset) and type(data).__getitem__ is ConcatDataset.__getitem__:
        return ConcatenatedDataset([_adapt(part, stated, None) for part in data.datasets])
    check_indexable(data)
    used = range(len(data)) if indices is None else indices
    if not used:
        raise ValueError(f"{type(data).__name__} has no samples.")
    return AdaptedDataset(data, stated, used)


def _check_agreement(data: SegmentationDataset, stated: Mapping[str, Any]) -> None:
    """Raise ValueError if arguments of `as_dataset` differ from the facts of a data set of this package."""
    for key, value in stated.items():
        if key == "default_names":
            continue
        own = getattr(data, key, None)
        if own is None or (tuple(own) != tuple(value) if isinstance(own, tuple) else own != value):
            raise ValueError(
                f"{data.name} states its {key} itself: {own}. Leave out {key}={value!r}, or change the data set (in a "
                "folder: classes.json)."
            )


class AdaptedDataset(SegmentationDataset):
    """A data set of another library.

    Args:
        data: Data set whose items are images and masks.
        stated: Arguments of `as_dataset` that are not None.
        indices: Indices of the samples that may be inspected, at least one.
    """

    def __init__(self, data: Any, stated: Mapping[str, Any], indices: Sequence[int]) -> None:
        self.data = data
        self.name = stated.get("name") or default_name(data)
        facts = own_facts(data) | dict(stated)
        self.ignore_index = facts.get("ignore_index", 255)
        self.class_names, ids = find_class_names(data, facts, self.name)
        palette = tuple(tuple(color) for color in facts.get("palette", ()))
        self.palette = palette or distinct_colors(self.class_names)
        is_unique = len(set(palette)) == len(palette)
        colors: dict[Any, int] = {color: index for index, color in enumerate(palette)} if is_unique else {}
        values: dict[int, int] | None = None
        by_color = not all(type(key) is int for key in ids)
        if by_color:
            colors |= {_parse_color(key): self._class_id(target) for key, target in ids.items()}
        elif ids:
            void = {self.ignore_index: self.ignore_index}
            values = void | {int(value): self._class_id(target) for value, target in ids.items()}
        self.mask_rule = MaskRule(self.num_classes, self.ignore_index, values, colors, by_color)

        first = indices[0]
        with _named_errors(self.sample_name(first)):
            sample = self._item(first)
            self.fields = find_fields(data, sample, stated.get("image"), stated.get("label"))
            image, mask = self.fields.split(sample)
            size = find_size(image, mask)
            self.image_rule = find_image_rule(image, size, facts.get("channels"), facts.get("value_range"))
        self.has_labels = mask is not None
        self.channels, self.value_range = self.image_rule.channels, self.image_rule.value_range
        self.bands = tuple(facts["bands"]) if facts.get("bands") is not None else None
        if self.has_labels and not ids and self.num_classes == 2 and self.ignore_index == 255:
            self._read_white_as_class(indices)

    def _class_id(self, target: str) -> int:
        return self.ignore_index if target == VOID else self.class_names.index(target)

    def _read_white_as_class(self, indices: Sequence[int]) -> None:
        """Read 255 as class 1 if masks contain only 0 and 255; masks that are 0 everywhere do not count."""
        zero, one = self.class_names
        order = np.random.default_rng(0).permutation(len(indices))[:_MAX_INSPECTED_MASKS]
        masks_with_white = 0
        for position in order.tolist():
            values: set[int] = set()
            with suppress(ValueError):  # the check of all samples reports it
                values = set(torch.unique(self[indices[position]][1]).tolist())
            if values - {0, 255}:
                return
            masks_with_white += 255 in values
            if masks_with_white == _MASKS_WITH_WHITE:
                break
        if masks_with_white:
            warn(
                f"The masks of {self.name} contain only 0 and 255, and there are two classes: 0 is read as {zero!r} "
                f"and 255 as {one!r}. If 255 is void, pass as_dataset(data, ids={{0: {zero!r}, 1: {one!r}, 255: "
                f"{VOID!r}}})."
            )
            self.mask_rule = MaskRule(2, 255, {0: 0, 255: 1})

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read and convert one sample; raise ValueError with its name if it cannot be converted."""
        item = self._item(index)
        with _named_errors(self.sample_name(index)):
            image, mask = self.fields.split(item)
            size = find_size(image, mask)
            pixels = to_image(image, self.image_rule, size)
            if mask is None and self.has_labels:
                raise ValueError("the mask is None, but the first sample has one")
            if mask is None:
                return pixels, torch.zeros(pixels.shape[1:], dtype=torch.uint8)
            return pixels, to_label(mask, self.mask_rule, size)

    def _item(self, index: int) -> Any:
        with _reading:
            return self.data[index]

    def label_advice(self, labels: Iterable[int]) -> str:
        """Return the argument `ids` that maps these label values to the classes, in ascending order."""
        values = sorted(set(labels) - {self.ignore_index})
        known = dict(enumerate(self.class_names))
        if self.mask_rule.ids is not None or known.keys() >= set(values):
            return ""
        if values[0] > 0 and len(values) == self.num_classes:  # numbered from another value than 0
            known = dict(zip(values, self.class_names, strict=True))
        ids = {value: known.get(value, VOID) for value in values[:20]}
        return (
            "\nState the class of each value, here with the others as void; add the names of classes that are missing "
            f"from class_names: as_dataset(data, ids={ids})"
        )


@contextmanager
def _named_errors(sample: str) -> Iterator[None]:
    """Put the name of a sample before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{sample}: {error}.") from error


class ConcatenatedDataset(SegmentationDataset):
    """Several data sets of the same classes, one after the other.

    Args:
        parts: Data sets, at least one.

    Raises:
        ValueError: If their classes or other facts differ.
    """

    def __init__(self, parts: Sequence[SegmentationDataset]) -> None:
        self.parts = tuple(parts)
        first = parts[0]
        for part in parts[1:]:
            for fact in ("class_names", "ignore_index", "has_labels", "pixels"):
                ours, theirs = getattr(first, fact), getattr(part, fact)
                if ours != theirs:
                    raise ValueError(
                        f"Expected data sets that are concatenated to have the same {fact}, but {first.name} has "
                        f"{ours}, and {part.name} has {theirs}."
                    )
        self.name = " + ".join(dict.fromkeys(part.name for part in parts))
        self.class_names = first.class_names
        self.palette = first.palette
        self.ignore_index = first.ignore_index
        self.has_labels = first.has_labels
        self.channels, self.value_range, self.bands = first.channels, first.value_range, first.bands
        self.ends = tuple(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        part, position = self._place(index)
        return part[position]

    def _place(self, index: int) -> tuple[SegmentationDataset, int]:
        """Return the data set of a sample, and the index of the sample in it."""
        number = bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)

    def sample_name(self, index: int) -> str:
        """Return the name of the sample in its data set."""
        part, position = self._place(index)
        return part.sample_name(position)

    def image_path(self, index: int) -> Path | None:
        """Return the path of the sample's image file in its data set."""
        part, position = self._place(index)
        return part.image_path(position)

    def label_advice(self, labels: Iterable[int]) -> str:
        """Return the advice of the first data set that has one."""
        values = list(labels)
        return next(filter(None, (part.label_advice(values) for part in self.parts)), "")


def _parse_color(key: object) -> Color:
    try:
        return parse_hex_color(str(key))
    except ValueError:
        raise ValueError(
            f'Expected the keys of `ids` to be all values (int), or all colours ("#ff0000"), but got {key!r}.'
        ) from None
