"""Conversion of the images and masks that other libraries return to tensors; what is ambiguous is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bpkd_sdk.data.labels import hex_color, narrow
from bpkd_sdk.images.samples import from_pil
from bpkd_sdk.pixels import MAX_CHANNELS
from bpkd_sdk.sizes import Size
from bpkd_sdk.spec import Color

BYTES = (0.0, 255.0)


@dataclass(frozen=True)
class ImageRule:
    """Rule by which the images of a data set become tensors (channels, H, W).

    Attributes:
        channels: Number of channels of the tensors.
        value_range: Values of black and of white.
        is_stated: Whether the user stated another value range than 0..255. Images then keep their values, as uint16 or
            float32; otherwise they become uint8.
        unit_floats: Whether floating-point images lie in 0..1 and not in 0..255.
    """

    channels: int = 3
    value_range: tuple[float, float] = BYTES
    is_stated: bool = False
    unit_floats: bool = False


@dataclass(frozen=True)
class MaskRule:
    """Rule by which the masks of a data set become label maps.

    Attributes:
        num_classes: Number of classes.
        ignore_index: Label value of void pixels.
        ids: Class id, or `ignore_index`, of each value in the masks; None if the values are the class ids.
        colors: Class id, or `ignore_index`, of each RGB colour in masks with three channels; empty if none are known.
        by_color: Whether all masks are read by colour.
    """

    num_classes: int
    ignore_index: int = 255
    ids: Mapping[int, int] | None = None
    colors: Mapping[Color, int] = field(default_factory=dict)
    by_color: bool = False


def as_array(pixels: object) -> np.ndarray:
    """Return an array, a tensor or nested lists of numbers as an array; raise ValueError for other objects."""
    if isinstance(pixels, Tensor):
        return np.asarray(pixels.detach().cpu().as_subclass(Tensor).numpy())
    array = np.asarray(pixels) if isinstance(pixels, (np.ndarray, list)) else None
    if array is not None and array.dtype.kind in "biuf":
        return array
    raise ValueError(f"is {describe(pixels)}, expected a PIL image, an array (H, W, C) or a tensor (C, H, W)")


def describe(pixels: object) -> str:
    """Describe an object of a sample in an error message: its type, and the dtype and shape of arrays."""
    if isinstance(pixels, (np.ndarray, Tensor)):
        dtype = str(pixels.dtype).removeprefix("torch.")
        return f"{'an array' if isinstance(pixels, np.ndarray) else 'a tensor'}, {dtype} {tuple(pixels.shape)}"
    if isinstance(pixels, Image.Image):
        return f"a PIL image of mode {pixels.mode!r}"
    return f"a {type(pixels).__name__}"


def find_size(image: object, mask: object) -> Size:
    """Return the (height, width) of an image: that of its mask, if one of the image's layouts has this size.

    Arrays are (H, W, C), and tensors (C, H, W). The other layout is used only if it alone fits the mask.
    """
    if isinstance(mask, (int, np.integer)):
        raise ValueError(
            f"mask is {mask!r}, which is a class of the whole image and not of each pixel. For images without masks, "
            "return the image only"
        )
    sizes, of_mask = _possible_sizes(image), [] if mask is None else _possible_sizes(mask)
    return next((size for size in sizes if size in of_mask), sizes[0])


def _possible_sizes(pixels: object) -> list[Size]:
    """Return the possible sizes of an image or a mask, that of the usual layout first."""
    if isinstance(pixels, Image.Image):
        return [(pixels.height, pixels.width)]
    shape = as_array(pixels).shape
    if len(shape) == 2:
        return [(shape[0], shape[1])]
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"is {describe(pixels)}, expected two dimensions (H, W), or three with the channels")
    # Arrays of some libraries have the channels first, and tensors made from arrays have them last.
    layouts = [((shape[1], shape[2]), shape[0]), ((shape[0], shape[1]), shape[2])]
    if not isinstance(pixels, Tensor):
        layouts.reverse()
    return [size for size, channels in layouts if channels <= MAX_CHANNELS] or [layouts[0][0]]


def _planes(pixels: object, size: Size) -> np.ndarray:
    """Return an image or a mask as an array (C, H, W)."""
    array = as_array(pixels)
    if array.ndim == 2:
        return array[None]
    sizes = _possible_sizes(pixels)
    chosen = size if size in sizes else sizes[0]
    is_first = array.shape[1:] == chosen and (isinstance(pixels, Tensor) or array.shape[:2] != chosen)
    return array if is_first else array.transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def find_image_rule(
    image: object, size: Size, channels: int | None, value_range: tuple[float, float] | None
) -> ImageRule:
    """Determine how the images of a data set are read.

    Args:
        image: First image of the data set.
        size: (height, width) of the image.
        channels: Number of channels that the user stated, or None.
        value_range: Values of black and of white that the user stated, or None.
    """
    is_unit = True
    if not isinstance(image, Image.Image):
        planes = _planes(image, size)
        if channels is None and len(planes) == 4:
            raise ValueError(
                f"image is {describe(image)} with four channels, which may be RGB with transparency or four bands. "
                "Return the three RGB channels, or pass channels=4 to as_dataset"
            )
        channels = channels or (3 if len(planes) == 1 else len(planes))
        is_unit = planes.dtype.kind == "f" and bool(np.nanmax(planes, initial=0) <= 1)
    low, high = value_range or BYTES
    return ImageRule(channels or 3, (low, high), (low, high) != BYTES, is_unit)


def to_image(image: object, rule: ImageRule, size: Size) -> Tensor:
    """Convert an image to a tensor (channels, H, W).

    - PIL images become RGB as in files: grey is repeated, and transparent parts are put over white.
    - Grey images are repeated for three channels.
    - Integers must lie in 0..255. Floating-point images must lie in 0..255 and be whole numbers, or be such numbers
      divided by 255, as torchvision's ToTensor returns them.
    - If the value range is stated, values are kept.

    Args:
        image: PIL image, array or tensor.
        rule: Rule of the data set.
        size: (height, width) of the image, see `find_size`.

    Raises:
        ValueError: If the image has another number of channels, or values that are not known to be brightnesses.
    """
    if isinstance(image, Image.Image):
        if image.mode in ("1", "L") and rule.channels == 1:
            image = np.array(image.convert("L"))
        elif image.mode == "I" or image.mode.startswith(("F", "I;")):
            image = np.array(image).astype(np.uint16 if image.mode.startswith("I;16") else np.float32)
        else:
            image = from_pil(image, orientation=1).to_rgb()
    planes = _planes(image, size)
    if len(planes) == 1 and rule.channels == 3:
        planes = planes.repeat(3, 0)
    if len(planes) != rule.channels:
        raise ValueError(f"image is {describe(image)}, expected {rule.channels} channels, as in the first image")
    if not planes.size:
        raise ValueError(f"image is {describe(image)} without pixels")
    return _tensor(_stated_values(planes) if rule.is_stated else _bytes(planes, rule))


def _stated_values(planes: np.ndarray) -> np.ndarray:
    if planes.dtype == np.uint16:
        return planes
    values = planes.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"image is {describe(planes)} with NaN or infinity, expected numbers")
    return values


def _bytes(planes: np.ndarray, rule: ImageRule) -> np.ndarray:
    """Return the values of an image as uint8; raise ValueError if they are not 0..255, or these divided by 255."""
    if planes.dtype == np.uint8:
        return planes
    if planes.dtype == np.bool_:
        return planes.astype(np.uint8) * np.uint8(255)
    is_float = planes.dtype.kind == "f"
    scaled = planes * 255 if is_float and rule.unit_floats else planes
    rounded = np.rint(scaled)
    if rounded.min() >= 0 and rounded.max() <= 255 and np.abs(scaled - rounded).max() <= 0.01:
        return np.asarray(rounded.astype(np.uint8))
    low, high = planes.min(), planes.max()
    found = f"image is {describe(planes)}, and its values go from {low:.4g} to {high:.4g}"
    if low < 0:
        raise ValueError(
            f"{found}: it is normalised already. Remove the normalisation (Normalize), and return the pixels as bytes "
            "of 0 to 255, since training and export normalise images by the mean and std of each network"
        )
    raise ValueError(
        f"{found}, which are neither bytes of 0 to 255 nor these divided by 255. Return the pixels as bytes, or state "
        f"the values of black and of white for all images: as_dataset(data, value_range=({0:g}, {_white(high):g}))"
    )


def _white(highest: float) -> float:
    """Return a usual value of white that is not below the highest value of an image."""
    return next((white for white in (1, 255, 1023, 4095, 16383, 65535) if highest <= white), float(highest))


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def to_label(mask: object, rule: MaskRule, size: Size) -> Tensor:
    """Convert a mask to a label map (H, W) of class ids, uint8 if they fit and int64 otherwise.

    - A mask with one value per pixel, (H, W), (1, H, W) or (H, W, 1), contains class ids, or the values that `ids`
      maps. PIL palette images contain the indices. Floating-point values must be whole numbers.
    - A mask with one channel per class contains 1 in exactly one channel of each pixel.
    - A mask with three other channels contains colours that the rule maps, or the same value three times.

    Args:
        mask: PIL image, array or tensor.
        rule: Rule of the data set.
        size: (height, width) of the image, see `find_size`.

    Raises:
        ValueError: If the mask is none of these.
    """
    if isinstance(mask, Image.Image):
        mask = _pil_values(mask, rule)
    planes = _planes(mask, size)
    if rule.by_color and len(planes) != 3:
        raise ValueError(f"mask is {describe(mask)}, but `ids` maps colours: expected three channels, RGB")
    if len(planes) == 1:
        values = _whole_numbers(planes[0], mask)
    elif len(planes) == rule.num_classes and not rule.by_color and ((planes == 0) | (planes == 1)).all():
        values = _from_one_hot(planes, mask)
    elif len(planes) == 3:
        colors = _whole_numbers(planes, mask)
        if rule.colors or (colors != colors[:1]).any():
            return _tensor(narrow(_from_colors(colors, mask, rule)))
        values = colors[0]
    else:
        raise ValueError(
            f"mask is {describe(mask)}, expected class ids (H, W), colours with three channels, or one channel of 0 "
            f"and 1 for each of the {rule.num_classes} classes"
        )
    if rule.ids is not None:
        is_white = planes.dtype == np.bool_ and 1 not in rule.ids and 255 in rule.ids
        values = map_values(values * 255 if is_white else values, rule.ids)
    return _tensor(narrow(values))


def _tensor(values: np.ndarray) -> Tensor:
    """Return an array as a tensor, without a copy if torch can use its memory."""
    is_usable = values.flags.writeable and min(values.strides, default=0) >= 0
    return torch.from_numpy(values if is_usable else values.copy())


def _pil_values(mask: Image.Image, rule: MaskRule) -> np.ndarray:
    if mask.mode in ("RGBA", "LA", "PA"):
        if (np.array(mask.convert("RGBA"))[..., 3] < 255).any():
            raise ValueError("mask has transparent pixels, whose class is not known. Remove the transparency")
        mask = mask.convert("RGB")
    if mask.mode not in ("1", "L", "P", "I", "F", "RGB") and not mask.mode.startswith("I;16"):
        raise ValueError(f"mask is {describe(mask)}, expected class ids (L, P, I) or colours (RGB)")
    return np.array(mask.convert("RGB") if rule.by_color else mask)


def _whole_numbers(values: np.ndarray, mask: object) -> np.ndarray:
    """Return the values of a mask as integers; raise ValueError for fractions."""
    if values.dtype.kind != "f":
        return values.astype(np.uint8) if values.dtype == np.bool_ else values
    rounded = np.rint(values)
    if not np.array_equal(rounded, values) or not np.isfinite(values).all():
        is_divided = (
            values.min() >= 0 and values.max() <= 1 and np.abs(values * 255 - np.rint(values * 255)).max() < 0.01
        )
        reason = (
            "Its values are class ids divided by 255, as ToTensor returns them: use torchvision's PILToTensor for masks"
            if is_divided
            else "Resize and warp masks by the nearest pixel, and return class ids"
        )
        raise ValueError(f"mask is {describe(mask)} with fractions, expected class ids. {reason}")
    return np.asarray(rounded.astype(np.int64))


def _from_one_hot(planes: np.ndarray, mask: object) -> np.ndarray:
    counts = planes.astype(np.uint8).sum(0)
    if (counts != 1).any():
        raise ValueError(
            f"mask is {describe(mask)}, one channel per class, but {int((counts == 0).sum())} pixels are in no class "
            f"and {int((counts > 1).sum())} are in several. Return class ids (H, W), with `ignore_index` where there "
            "is no class"
        )
    return np.asarray(planes.argmax(0))


def _from_colors(planes: np.ndarray, mask: object, rule: MaskRule) -> np.ndarray:
    """Return the class ids of the colours (3, H, W); raise ValueError for colours that are not mapped."""
    colors = planes.astype(np.int64)
    packed = (colors[0] << 16) | (colors[1] << 8) | colors[2]
    known = {(red << 16) | (green << 8) | blue: index for (red, green, blue), index in rule.colors.items()}
    unknown = [key for key in np.unique(packed).tolist() if key not in known]
    if unknown or planes.min() < 0 or planes.max() > 255:
        listed = ", ".join(hex_color((key >> 16, key >> 8 & 255, key & 255)) for key in unknown[:10])
        raise ValueError(
            f"mask is {describe(mask)} with the colours {listed}, which are not those of classes. Pass the colour of "
            "each class, as_dataset(data, class_names=[...], palette=[(r, g, b), ...]), or map colours to classes: "
            f'ids={{"{listed[:7]}": "void"}}'
        )
    return map_values(packed, known)


def map_values(values: np.ndarray, ids: Mapping[int, int]) -> np.ndarray:
    """Return the class id of each value; raise ValueError for a value that is not mapped."""
    keys = np.array(sorted(ids))
    classes = np.array([ids[key] for key in keys.tolist()])
    positions = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    if not np.array_equal(keys[positions], values):
        unknown = sorted(set(np.unique(values).tolist()) - ids.keys())
        raise ValueError(
            f"mask contains the values {unknown[:10]}, which `ids` does not map. Map them to classes or void"
        )
    return np.asarray(classes[positions])
