"""Joint augmentation of an image and its label map, with torchvision.transforms.v2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from bpkd_sdk.sizes import Size, resize_label, scaled_size
from bpkd_sdk.spec import IMAGENET_STD, NetworkSpec

PRESETS = ("paper", "light", "none")
_BYTES = torch.arange(256, dtype=torch.uint8)
IMAGE_FILL = (124, 116, 104)  # mean colour of ImageNet, so that padding is near 0 after normalisation


class RandomScale(v2.Transform):  # type: ignore[misc]
    """Resizing of image and label by the same random factor; the aspect ratio is kept, and pixel centres are aligned.

    Args:
        scale: Lowest and highest factor, which is drawn uniformly; None: the image keeps its size.
        base_size: (longer side, shorter side) of a rectangle that images are fitted into at factor 1; None: factor 1
            is the size of the image.
    """

    def __init__(self, scale: tuple[float, float] | None, base_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.base_size = base_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size that the image is resized to; all of it is shown."""
        size = self._draw_size(flat_inputs)
        return {"size": size, "rows": slice(0, size[0]), "columns": slice(0, size[1])}

    def _draw_size(self, flat_inputs: list[Any]) -> Size:
        height, width = v2.functional.get_size(flat_inputs[0])
        if self.scale is None:
            return height, width
        return scaled_size((height, width), float(torch.empty(()).uniform_(*self.scale)), self.base_size)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image bilinearly with antialiasing, or a label by `resize_label`."""
        # torchvision's own kernel for masks ignores pixel centres.
        tensor = inpt.as_subclass(Tensor)
        is_label = isinstance(inpt, tv_tensors.Mask)
        shown = resize_label(tensor, **params) if is_label else _planar(_resized_part(tensor, **params))
        return tv_tensors.wrap(shown, like=inpt)


class VariedCrop(RandomScale):
    """A random crop of the resized image and label in which no class fills more than a share of the labelled pixels.

    The tenth crop is taken if none of the first nine fulfils this. Only what the crop shows is resized.

    Args:
        crop_size: (height, width) of the crop. A side of the image that is shorter keeps its length.
        ignore_index: Label value of void pixels.
        max_class_share: Largest share of one class, in (0, 1]; 1 takes the first crop.
        scale: Lowest and highest factor, as for `RandomScale`.
        base_size: (longer side, shorter side) at factor 1, as for `RandomScale`.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        ignore_index: int,
        max_class_share: float,
        scale: tuple[float, float] | None = None,
        base_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(scale, base_size)
        self.crop_size = crop_size
        self.ignore_index = ignore_index
        self.max_class_share = max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size that the image is resized to, and the position of the crop."""
        label = next((inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask)), None)
        size = self._draw_size(flat_inputs)
        params = self._draw_crop(size)
        if label is None or self.max_class_share >= 1:
            return params
        for _ in range(9):
            crop = self.transform(label, params)
            counts = torch.bincount(crop[crop != self.ignore_index].flatten())
            if counts.any() and counts.max() < self.max_class_share * counts.sum():
                break
            params = self._draw_crop(size)
        return params

    def _draw_crop(self, size: Size) -> dict[str, Any]:
        height, width = map(min, size, self.crop_size)
        top, left = (
            int(torch.randint(whole - part + 1, ())) for whole, part in zip(size, (height, width), strict=True)
        )
        return {"size": size, "rows": slice(top, top + height), "columns": slice(left, left + width)}


def _resized_part(image: Tensor, size: Size, rows: slice, columns: slice) -> Tensor:
    """Resize an image (C, H, W) bilinearly with antialiasing, and return a part of the result, equal to the last bit.

    torch resizes rows first and then columns, so the first pass needs only the rows that the part depends on, and the
    second pass only the columns of the part.
    """
    height, width = image.shape[1:]
    if size == (height, width):
        return image[:, rows, columns]
    ratio = height / size[0]
    support = math.ceil(max(ratio, 1)) + 1
    first = max(0, math.floor(rows.start * ratio) - support)
    last = min(height, math.ceil(rows.stop * ratio) + support)
    strip = _interleaved(image[:, first:last])
    wide: Tensor = v2.functional.resize(strip, [last - first, size[1]], antialias=True)[..., columns]
    if size[0] == height:
        return wide[:, rows.start - first : rows.stop - first]
    whole = wide.new_zeros(height, wide.shape[2], len(wide)).permute(2, 0, 1)
    whole = whole if image.dtype == torch.uint8 else whole.contiguous()
    whole[:, first:last] = wide
    resized: Tensor = v2.functional.resize(whole, [size[0], wide.shape[2]], antialias=True)
    return resized[:, rows]


def _interleaved(image: Tensor) -> Tensor:
    """Return bytes (C, H, W) with interleaved channels, which torch resizes several times as fast; others unchanged."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if image.dtype == torch.uint8 else image


def _planar(image: Tensor) -> Tensor:
    """Return an image (C, H, W) with its channels one after the other in memory."""
    if image.stride(0) != 1 or len(image) == 1:
        return image.contiguous()
    # OpenCV takes a tenth of torch's time for this copy.
    return torch.stack([torch.from_numpy(plane) for plane in cv2.split(image.permute(1, 2, 0).numpy())])


class PhotometricDistortion(v2.Transform):  # type: ignore[misc]
    """OpenMMLab's photometric distortion of RGB images. Each adjustment is applied with probability 0.5.

    - Brightness: a number between -32 and 32 is added to all values.
    - Contrast: all values are multiplied by 0.5 to 1.5. It comes second or last.
    - Saturation: the S of the HSV colour is multiplied by 0.5 to 1.5.
    - Hue: the hue is rotated by up to a tenth of its circle.

    torchvision's RandomPhotometricDistort differs: its brightness multiplies, its contrast is relative to the mean, and
    it swaps channels.

    Of images that are not 8-bit RGB, the three visible bands are distorted in the same way, in their range scaled to
    0..1. The number for brightness is relative to the spread of the values, as it is for natural images: their standard
    deviation is 0.23 of the range.

    Args:
        network: Facts of the student: format of the images, and their standard deviation.
    """

    def __init__(self, network: NetworkSpec = NetworkSpec(None, 0)) -> None:  # noqa: B008  (frozen)
        super().__init__()
        self.pixels = network.pixels
        self.brightness = 1.0
        if not self.pixels.is_rgb8:
            self.brightness = sum(network.std) / len(network.std) / (sum(IMAGENET_STD) / 3)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the adjustments, their order and their amounts."""
        contrast = (adjust_contrast, (0.5, 1.5))
        adjustments = [
            (adjust_brightness, (-32, 32)),
            (adjust_saturation, (0.5, 1.5)),
            (adjust_hue, (-0.1, 0.1)),
        ]
        adjustments.insert(1 if _coin_flip() else 3, contrast)
        drawn = [(adjust, float(torch.empty(()).uniform_(*limits))) for adjust, limits in adjustments if _coin_flip()]
        return {"adjustments": drawn}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Adjust an image; return a label unchanged."""
        if isinstance(inpt, tv_tensors.Image):
            image = inpt.as_subclass(Tensor)
            if self.pixels.is_rgb8:
                for adjust, amount in params["adjustments"]:
                    image = adjust(image, amount)
            elif params["adjustments"]:
                image = self._distort_bands(image, params["adjustments"])
            inpt = tv_tensors.wrap(image, like=inpt)
        return inpt

    def _distort_bands(self, image: Tensor, adjustments: list[tuple[Any, float]]) -> Tensor:
        """Return an image whose visible bands are adjusted."""
        (low, high), bands = self.pixels.value_range, list(self.pixels.bands or ())
        visible = (image[bands].float() - low) / (high - low)
        for adjust, amount in adjustments:
            visible = adjust(visible, amount * self.brightness if adjust is adjust_brightness else amount)
        image = image.clone()
        values = visible * (high - low) + low
        image[bands] = values.round().to(torch.uint8) if self.pixels.is_uint8 else values
        return image


def _coin_flip() -> bool:
    return bool(torch.rand(()) < 0.5)


def adjust_brightness(image: Tensor, amount: float) -> Tensor:
    """Add a number to all values of a uint8 image, or a 255th of it to a float image in 0..1."""
    if image.is_floating_point():
        return (image + amount / 255).clamp_(0, 1)
    return _mapped(image, _BYTES.float().add_(amount).clamp_(0, 255).to(torch.uint8))


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Multiply all values of a uint8 image, or of a float image in 0..1, by a factor."""
    if image.is_floating_point():
        return (image * factor).clamp_(0, 1)
    return _mapped(image, _BYTES.float().mul_(factor).clamp_(0, 255).to(torch.uint8))


def _mapped(image: Tensor, table: Tensor) -> Tensor:
    """Replace each byte of an image (3, H, W) by its entry in a table of 256 bytes."""
    mapped = cv2.LUT(image.contiguous().view(-1, image.shape[2]).numpy(), table.numpy())
    return torch.from_numpy(mapped).view(image.shape)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the S of the HSV colours of an image (3, H, W), uint8 or float, up to its largest; keep H and V."""
    red, green, blue = image
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    if image.is_floating_point():
        return value - (value - image) * (value / chroma.clamp_(min=1e-12)).clamp_(max=factor)
    # The other channels move away from the largest one, or towards it, until the smallest is 0.
    factors = value.float().div_(chroma.clamp_(min=1).float()).clamp_(max=factor)
    difference = (value - image).float().mul_(factors)
    return torch.sub(value.float(), difference, out=difference).round_().to(torch.uint8)


def adjust_hue(image: Tensor, amount: float) -> Tensor:
    """Rotate the hue of an image (3, H, W), uint8 or float in 0..1, by a share of its circle.

    It is torchvision's function of this name in a fifth of the time; one value in ten thousand differs, by 1 of 255.
    """
    pixels = cv2.merge(list(image.contiguous().numpy())).astype(np.float32)
    if not image.is_floating_point():
        pixels *= np.float32(1 / 255)
    hsv: np.ndarray = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 0] += 360 * (amount % 1)  # in degrees; larger ones are accepted, negative ones are not
    rotated: np.ndarray = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not image.is_floating_point():
        rotated = (rotated * np.float32(255.999)).astype(np.uint8)
    return _planar(torch.from_numpy(rotated).permute(2, 0, 1))


class PadTo(v2.Transform):  # type: ignore[misc]
    """Padding at the bottom and at the right, with the mean of the images and the void label, up to a size.

    Args:
        size: Smallest (height, width) of the result.
        ignore_index: Label value of void pixels.
        fill: Value of each channel.
    """

    def __init__(self, size: tuple[int, int], ignore_index: int, fill: Sequence[float] = IMAGE_FILL) -> None:
        super().__init__()
        self.size = size
        self.fills = {tv_tensors.Image: fill, tv_tensors.Mask: ignore_index}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad an image or a label."""
        height, width = v2.functional.get_size(inpt)
        missing = [0, 0, self.size[1] - width, self.size[0] - height]
        return v2.functional.pad(inpt, missing, fill=self.fills[type(inpt)]) if any(missing) else inpt


def padding(network: NetworkSpec) -> Sequence[float]:
    """Return the value of each channel in padding, which is near 0 after normalisation."""
    return IMAGE_FILL if network.pixels.is_rgb8 else network.mean_pixel


def training_transform(
    crop_size: tuple[int, int],
    *,
    ignore_index: int,
    scale: tuple[float, float] = (0.5, 2.0),
    base_size: tuple[int, int] | None = None,
    max_class_share: float = 1.0,
    preset: str = "paper",
    network: NetworkSpec = NetworkSpec(None, 0),  # noqa: B008  (frozen)
) -> v2.Compose:
    """Return a training transform of images and labels, in OpenMMLab's order.

    It has two parts, `transforms`: one for the geometry, and one for colours and padding.

    "paper" scales, crops, flips, distorts the colours, and pads with void if the image is smaller than the crop.
    Colours are distorted only if three channels are visible. "light" leaves out the colours, and "none" only resizes to
    `base_size`, crops and pads.

    Args:
        crop_size: (height, width) of the result.
        ignore_index: Label value of void pixels.
        scale: Lowest and highest factor, as for `VariedCrop`.
        base_size: (longer side, shorter side) that images are fitted into at factor 1; None: their own size.
        max_class_share: Largest share of one class in a crop, as for `VariedCrop`.
        preset: One of `PRESETS`.
        network: Facts of the student: format and mean of the images.
    """
    is_visible = len(network.pixels.shown) == 3 and network.pixels.bands != ()
    geometry = [
        VariedCrop(crop_size, ignore_index, max_class_share, (1.0, 1.0) if preset == "none" else scale, base_size),
        *([] if preset == "none" else [v2.RandomHorizontalFlip()]),
    ]
    colours = [PhotometricDistortion(network)] if preset == "paper" and is_visible else []
    pad = PadTo(crop_size, ignore_index, padding(network))
    return v2.Compose([v2.Compose(geometry), v2.Compose([*colours, pad])])


def augment(transform: v2.Transform, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a transform to an image, uint8 or float32 (C, H, W), and its label (H, W); both keep their dtype."""
    out_image, out_label = transform(tv_tensors.Image(image), tv_tensors.Mask(label))
    return out_image.as_subclass(Tensor), out_label.as_subclass(Tensor)
