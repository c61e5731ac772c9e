"""Data sets of other libraries: where image and mask are in a sample, and the classes that the data set states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from bpkd_sdk.data.classes_file import VOID
from bpkd_sdk.data.dataset import SegmentationDataset
from bpkd_sdk.data.foreign import describe
from bpkd_sdk.data.public import CITYSCAPES_CLASS_OF_ID, CITYSCAPES_CLASSES
from bpkd_sdk.errors import did_you_mean

Key = str | int  # key of a mapping, or position in a tuple

_MASK_NAME = re.compile("mask|label|annot|seg|target|gt|truth", re.IGNORECASE)
_PIXEL_FEATURES = ("Image", "Array2D", "Array3D")  # of Hugging Face datasets

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True)
class Fields:
    """The places of image and mask in a sample.

    Attributes:
        image: Key or position of the image; None if the sample is the image.
        label: Key or position of the mask; None if there is none.
    """

    image: Key | None
    label: Key | None

    def split(self, sample: Any) -> tuple[object, object]:
        """Return the image and the mask, or None without a mask, of a sample."""
        if self.image is None:
            return sample, None
        try:
            return sample[self.image], None if self.label is None else sample[self.label]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"sample is {_outline(sample)}, expected {self.image!r} and {self.label!r} in it, as in the first one"
            ) from None


def find_fields(data: Any, sample: object, image: Key | None, label: Key | None) -> Fields:
    """Find the image and the mask in the samples of a data set.

    A tuple is (image, mask). In a mapping, the mask is the array with a name such as "mask", "label" or "annotation",
    and the image is the other one. Columns of Hugging Face data sets are selected by the types of their features.

    Args:
        data: Data set of any library.
        sample: First sample.
        image: Key or position of the image that the user stated, or None.
        label: Key or position of the mask that the user stated, or None.

    Raises:
        ValueError: If the sample has none of these forms, or if several values may be the image or the mask.
    """
    if _is_pixels(sample):
        return Fields(None, None)
    if isinstance(sample, Mapping):
        for key in (image, label):
            if key is not None and key not in sample:
                raise ValueError(f"sample is {_outline(sample)}, and has no {key!r}.{did_you_mean(key, sample)}")
        return _choose_keys(sample, _pixel_keys(data, sample), image, label)
    if isinstance(sample, (tuple, list)):
        if image is not None:
            return Fields(image, label)
        if len(sample) <= 2 and label is None:
            return Fields(0, 1 if len(sample) == 2 and sample[1] is not None else None)
    raise ValueError(
        f"sample is {_outline(sample)}, expected (image, mask), or a dict with both. State where they are: "
        "as_dataset(data, image=0, label=1), or the keys of a dict"
    )


def _choose_keys(sample: Mapping[Any, Any], keys: list[Any], image: Key | None, label: Key | None) -> Fields:
    masks = [key for key in keys if _MASK_NAME.search(str(key)) and key != image] if label is None else [label]
    images = [key for key in keys if key not in masks] if image is None else [image]
    if len(images) == 1 and len(masks) <= 1 and (masks or len(keys) == 1):
        return Fields(images[0], masks[0] if masks else None)
    raise ValueError(
        f"sample is {_outline(sample)}, and it is not clear which is the image and which the mask: "
        f"{', '.join(map(repr, keys)) or 'nothing'} may be. State both, for example as_dataset(data, image='image', "
        "label='mask')"
    )


def _pixel_keys(data: Any, sample: Mapping[Any, Any]) -> list[Any]:
    """Return the keys of the values that may be images or masks."""
    features = getattr(data, "features", None)
    if is_hugging_face(data) and isinstance(features, Mapping) and sample.keys() <= features.keys():
        return [key for key in sample if type(features[key]).__name__ in _PIXEL_FEATURES]
    return [key for key, value in sample.items() if _is_pixels(value)]


def _is_pixels(value: object) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim >= 2)


def _outline(sample: object) -> str:
    """Describe a sample with its entries."""
    if isinstance(sample, Mapping):
        return f"a dict with {', '.join(f'{key!r} ({describe(value)})' for key, value in sample.items())}"
    if isinstance(sample, (tuple, list)):
        return f"a {type(sample).__name__} of {len(sample)} ({', '.join(map(describe, sample[:4]))})"
    return describe(sample)


def is_hugging_face(data: object) -> bool:
    """Return whether an object is a data set of the library `datasets`."""
    return type(data).__module__.split(".")[0] == "datasets"


def check_indexable(data: Any) -> None:
    """Raise TypeError unless an object has a length and returns samples by their index."""
    expected = "Expected a data set that has a length and returns (image, mask), or a dict of both, by index"
    if isinstance(data, (np.ndarray, Tensor)):
        raise TypeError(
            f"{expected}, but got {describe(data)}. Pair images and masks: torch.utils.data.TensorDataset(images, "
            "masks) for tensors (N, C, H, W) and (N, H, W), list(zip(images, masks)) for arrays."
        )
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        cure = "Open a folder or a named data set with bpkd_sdk.open_dataset."
        if not isinstance(data, (str, bytes)) and hasattr(data, "__iter__"):
            cure = "Data that are only iterated over cannot be shuffled and resumed: store them, or put them in a list."
        raise TypeError(f"{expected}, but got {describe(data)}. {cure}")
    if isinstance(data, Mapping):
        raise TypeError(
            f"{expected}, but got a {type(data).__name__} with {', '.join(map(repr, data))}. Pass one split."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of torchvision


@dataclass(frozen=True)
class KnownData:
    """The classes of a data set of torchvision.

    Attributes:
        class_names: Names of the classes.
        ids: Name of the class, or "void", of each value in the masks; empty if the values are the class ids.
        option: Name and value of the option of the class with which it returns masks, and the attribute with the
            current value.
    """

    class_names: tuple[str, ...]
    ids: Mapping[int | str, str] = field(default_factory=dict)
    option: tuple[str, str, str] | None = None


TORCHVISION = {
    "VOCSegmentation": KnownData(VOC_CLASSES),
    "SBDataset": KnownData(VOC_CLASSES, option=("mode", "segmentation", "mode")),
    "Cityscapes": KnownData(
        tuple(CITYSCAPES_CLASSES),
        {value: (*CITYSCAPES_CLASSES, "void")[min(index, 19)] for value, index in CITYSCAPES_CLASS_OF_ID.items()},
        ("target_type", "semantic", "target_type"),
    ),
    # The trimaps are 1 in the pet, 2 in the background, and 3 at the border, which is not classified.
    "OxfordIIITPet": KnownData(
        ("background", "pet"),
        {1: "pet", 2: "background", 3: "void"},
        ("target_types", "segmentation", "_target_types"),
    ),
}


def torchvision_facts(data: object) -> KnownData | None:
    """Return the classes of a data set of torchvision; None for other data sets.

    Raises:
        ValueError: If the data set does not return masks as it was created.
    """
    for base in type(data).__mro__:
        known = TORCHVISION.get(base.__name__) if base.__module__.startswith("torchvision.datasets") else None
        if known is None:
            continue
        if known.option is not None:
            option, value, attribute = known.option
            if (current := getattr(data, attribute)) not in (value, [value]):
                raise ValueError(
                    f"{base.__name__} returns {current} and no masks of classes. Create it with {option}={value!r}."
                )
        return known
    return None


def default_name(data: Any) -> str:
    """Return the name of a data set: that of its class, or of a Hugging Face data set and its split."""
    info = getattr(data, "info", None) if is_hugging_face(data) else None
    parts = [getattr(info, "dataset_name", None), getattr(data, "split", None)] if info is not None else []
    return "/".join(str(part) for part in parts if part) or type(data).__name__


def own_facts(data: Any) -> dict[str, Any]:
    """Return the class names that a data set states, or the facts of the data set of this package that it wraps."""
    inner = getattr(data, "dataset", None)
    if isinstance(inner, SegmentationDataset):
        pixels = (
            {} if inner.pixels.is_rgb8 else {key: getattr(inner, key) for key in ("channels", "value_range", "bands")}
        )
        return {key: getattr(inner, key) for key in ("class_names", "palette", "ignore_index")} | pixels
    names = getattr(data, "class_names", None)
    return {"class_names": names} if names else {} if inner is None else own_facts(inner)


def find_class_names(data: Any, facts: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], Mapping[int | str, str]]:
    """Return the class names of a data set, and the name for each value or colour in its masks, if they are mapped.

    Args:
        data: Data set of another library.
        facts: Arguments of `as_dataset` that are not None, and facts that the data set states.
        name: Name of the data set in error messages.
    """
    ids: Mapping[int | str, str] = facts.get("ids", {})
    known = torchvision_facts(data)
    if known is not None and "class_names" not in facts and not ids:
        if known.ids and getattr(data, "target_transform", None) is not None:
            raise ValueError(
                f"{name} has a target_transform, so the values in its masks are not known. Leave it out, or state the "
                "classes of the values: as_dataset(data, class_names=[...]), or ids={value: name}."
            )
        return known.class_names, known.ids
    names = facts.get("class_names") or [each for each in dict.fromkeys(ids.values()) if each != VOID]
    names = names or facts.get("default_names")
    if not names:
        raise ValueError(
            f"{name} does not state its classes. Pass their names in the order of the ids in the masks: "
            "class_names=['background', 'road', ...]."
        )
    if isinstance(names, str) or not all(isinstance(each, str) for each in names):
        raise ValueError(f"Expected `class_names` to be a list of strings, but got {names!r}.")
    if unknown := [each for each in ids.values() if each not in names and each != VOID]:
        raise ValueError(
            f"`ids` names {unknown[0]!r}, which is not a class; the classes are {', '.join(names)}, and {VOID!r}."
            f"{did_you_mean(unknown[0], names)}"
        )
    return tuple(names), ids
