"""Comparison of a network's classes with those of the data; equal names in another order are reordered.

An `Order` contains, for each class of the data, the column of the network's logits that predicts it. None means that
the order is the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Protocol

from array_api_compat import device

from bpkd_sdk.arrays import Array, array_namespace, at_least_float32, select_channels
from bpkd_sdk.colors import distinct_colors
from bpkd_sdk.spec import Color, NetworkSpec

MAX_CLASSES = 256  # masks are uint8

Order = tuple[int, ...]

_UNNAMED = re.compile(r"((class|label)[ _-]?)?\d+", re.IGNORECASE)  # placeholders that libraries use for names


class ClassMismatchError(ValueError):
    """Error for a network and data, or two networks, of other classes."""


class ClassFacts(Protocol):
    """Class names and palette of a network or data set; each is empty where it is unknown."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour (0..255) per class."""


def class_order(
    network: ClassFacts, data: ClassFacts, *, network_name: str, data_name: str, match_classes: bool = True
) -> Order | None:
    """Find the network's column of each class of the data, by name.

    Names that differ only in case, spaces, hyphens and underscores count as equal. If the network or the data have no
    class names, the order is assumed to be the same, unless both have the same colours in another order.

    Args:
        network: Class names and palette of the network.
        data: Class names and palette of the data, or of another network.
        network_name: Name of the network in error messages.
        data_name: Name of the data in error messages.
        match_classes: Whether to compare the names; False assumes the same order for any names.

    Returns:
        The order, or None if it is the same.

    Raises:
        ClassMismatchError: If the names differ; the error lists both.

    Examples:
        >>> from bpkd_sdk import NetworkSpec
        >>> network = NetworkSpec(None, 3, class_names=("sky", "Car", "road"))
        >>> data = NetworkSpec(None, 3, class_names=("road", "sky", "car"))
        >>> class_order(network, data, network_name="teacher", data_name="data")
        (2, 0, 1)
    """
    if not match_classes:
        return None
    ours, theirs = list(network.class_names), list(data.class_names)
    unnamed = is_unnamed(ours) or is_unnamed(theirs)
    if len(ours) == 1 and len(theirs) == 2:  # one logit predicts the class of its name, or else the second class
        is_first = plain_name(ours[0]) == plain_name(theirs[0]) != plain_name(theirs[1])
        ours = [theirs[1 if is_first else 0], *ours]
    plain = list(map(plain_name, ours)), list(map(plain_name, theirs))
    if order := _permutation(ours, theirs) or _permutation(*plain):
        return order
    if ours == theirs or plain[0] == plain[1]:
        return None
    if unnamed:
        return _permutation(list(network.palette), list(data.palette))
    raise ClassMismatchError(
        f"{network_name} and {data_name} do not have the same classes.\n"
        f"  {network_name} has {len(network.class_names)}: {', '.join(network.class_names)}\n"
        f"  {data_name} has {len(theirs)}: {', '.join(theirs)}\n"
        "Use a network and data of the same classes (in any order). If only the names differ, and the order is the "
        "same, pass match_classes=False (--no-match-classes)."
    )


def _permutation(ours: Sequence[object], theirs: Sequence[object]) -> Order | None:
    """Return the positions of `theirs` in `ours`; None unless both have the same items in another order."""
    if ours == theirs or len(set(ours)) < len(ours) or len(ours) != len(theirs) or set(ours) != set(theirs):
        return None
    return tuple(map(ours.index, theirs))


def is_unnamed(class_names: Sequence[str]) -> bool:
    """Return whether there are no class names, or only placeholders such as "class 0" and "LABEL_0"."""
    return all(_UNNAMED.fullmatch(name) for name in class_names)


def plain_name(name: str) -> str:
    """Return a name without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()


def check_class_count(channels: int, num_classes: int, *, network_name: str, data_name: str) -> None:
    """Raise ClassMismatchError unless the number of logits fits the number of classes; one logit predicts two."""
    if max(channels, 2) == max(num_classes, 2):
        return
    raise ClassMismatchError(
        f"{network_name} predicts {max(channels, 2)} classes, but {data_name} has {num_classes}. "
        "Pass the data that the network was trained for, or a network with the same number of classes."
    )


def check_data_classes(
    data_name: str, class_names: Sequence[str], palette: Sequence[Sequence[int]], ignore_index: int
) -> None:
    """Check that the class names, the palette and the void label of a data set fit together.

    Raises:
        ValueError: If there are fewer than 2 or more than 256 classes, if the palette has another length, or if the
            void label is the id of a class.
    """
    names, count = class_names, len(class_names)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or len(set(names)) < count:
        raise ValueError(
            f"Expected class_names of {data_name} to be different strings, one per class, but got {names}."
        )
    if not isinstance(data_name, str) or type(ignore_index) is not int:
        raise ValueError(
            f"Expected `name` of a data set to be a string and `ignore_index` an int, but got {data_name!r} and "
            f"{ignore_index!r}."
        )
    if count == 1:
        raise ValueError(
            f"{data_name} has one class, {class_names[0]!r}. Add a class for all other pixels: class_names "
            f"['background', {class_names[0]!r}], labels 0 and 1. A network with one logit "
            "predicts these two classes as well."
        )
    if not 2 <= count <= MAX_CLASSES:
        raise ValueError(f"Expected 2 to {MAX_CLASSES} classes, since masks are uint8, but {data_name} has {count}.")
    colors = list(palette)
    if len(colors) != count or not all(len(c) == 3 and all(type(v) is int for v in c) for c in colors):
        raise ValueError(
            f"Expected `palette` of {data_name} to be {count} colours, one (r, g, b) of ints per class, but got "
            f"{len(colors)}: {colors[:3]}."
        )
    if 0 <= ignore_index < count:
        raise ValueError(
            f"The void label of {data_name}, ignore_index={ignore_index}, is also the id of the class "
            f"{class_names[ignore_index]!r}. Remove that name from the classes and map its id to void "
            '(in a folder: {"ids": {"0": "void", "1": ...}} in classes.json), or pass an ignore_index outside '
            f"0..{count - 1}."
        )


def check_mask_classes(num_classes: int) -> None:
    """Raise ValueError for more classes than the 256 values of a uint8 mask."""
    if num_classes > MAX_CLASSES:
        raise ValueError(
            f"Expected at most {MAX_CLASSES} classes, but this network has {num_classes}. Masks are uint8: train a "
            "network with fewer classes, or merge classes."
        )


def two_class_logits(logits: Array) -> Array:
    """Return the logits [0, z] of two classes, where z is the log odds of the second class.

    One logit is z itself: softmax([0, z]) is (1 - sigmoid(z), sigmoid(z)). Two logits (a, b) become [0, b - a], which
    has the same softmax. A loss per channel (CWD, the body term of BPKD) is 0 for the channel of zeros.

    Args:
        logits: (N, 1, ...) or (N, 2, ...), a numpy array or a torch tensor.

    Returns:
        (N, 2, ...) of the same kind, float32 or float64.

    Examples:
        >>> import numpy as np
        >>> two_class_logits(np.array([[1.5]])).tolist()
        [[0.0, 1.5]]
        >>> two_class_logits(np.array([[1.0, -1.0]])).tolist()
        [[0.0, -2.0]]
    """
    xp = array_namespace(logits)
    logits = at_least_float32(logits)
    odds = logits if logits.shape[1] == 1 else logits[:, 1:] - logits[:, :1]
    result: Array = xp.concat([xp.zeros_like(odds), odds], axis=1)
    return result


def reorder_logits(logits: Array, order: Order | None) -> Array:
    """Put logits in the data's order.

    Args:
        logits: (N, C, h, w), a numpy array or a torch tensor.
        order: Order of the classes: of C classes, or (1, 0) for one logit, whose class is the first of the data. The
            log odds of the second class are then the negative of the logit. None for the same order.
    """
    if order is None:
        return logits
    return -logits if logits.shape[1] == 1 else select_channels(logits, order)


def reorder_masks(masks: Array, order: Order | None) -> Array:
    """Convert the network's class ids to the data's.

    Args:
        masks: Class ids of any shape and integer dtype, a numpy array or a torch tensor.
        order: Order of the classes, or None for the same order.
    """
    if order is None:
        return masks
    xp = array_namespace(masks)
    classes = xp.asarray([order.index(column) for column in range(len(order))], dtype=masks.dtype, device=device(masks))
    result: Array = classes[xp.astype(masks, xp.int64)]
    return result


def reorder_labels(labels: Array, order: Order | None, ignore_index: int) -> Array:
    """Convert the data's class ids to the network's columns; void stays void.

    Args:
        labels: Class ids of any shape and integer dtype, a numpy array or a torch tensor.
        order: Order of the classes, or None for the same order.
        ignore_index: Label of void pixels.
    """
    if order is None:
        return labels
    xp = array_namespace(labels)
    columns = xp.asarray(order, dtype=xp.int64, device=device(labels))
    known = labels != ignore_index
    numbers = xp.astype(xp.where(known, labels, 0), xp.int64)
    result: Array = xp.astype(xp.where(known, columns[numbers], ignore_index), labels.dtype)
    return result


def names_and_colors(spec: NetworkSpec) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Return the name and the RGB colour of each class id that a mask can contain.

    Missing names are the ids, and missing colours are `distinct_colors`. A network with one class has two ids in its
    masks: 0 is the background.
    """
    check_mask_classes(spec.num_classes)
    num_ids = max(spec.num_classes, 2) if spec.num_classes else MAX_CLASSES
    names, palette = spec.mask_names, spec.palette
    if spec.num_classes == len(palette) == 1:
        palette = ((0, 0, 0), *palette)
    names = names or tuple(map(str, range(num_ids)))
    return names, palette or distinct_colors(names)
