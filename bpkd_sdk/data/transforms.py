"""Joint augmentation of image and label map, with torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


def scaled_size(size: tuple[int, int], scale: float, base_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of a scaled image, the ratio of its sides kept.

    Args:
        size: (height, width) of the image.
        scale: Factor on `base_size`, or where there is none on the image's own size.
        base_size: (longer side, shorter side) that the image is fitted into; OpenMMLab's `img_scale` with `keep_ratio`.

    Returns:
        (height, width), each at least 1, a half rounded up.

    Example:
        >>> scaled_size((300, 400), 1.0, (2048, 512))
        (512, 683)
        >>> scaled_size((300, 400), 0.5)
        (150, 200)
    """
    factor = scale if base_size is None else scale * min(base_size[0] / max(size), base_size[1] / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


IMAGE_FILL = (124, 116, 104)  # ImageNet's mean colour, so that padding is near 0 after normalisation


class RandomScale(v2.Transform):  # type: ignore[misc]
    """Resize image and label by one random factor about pixel centres, keeping the ratio of the sides.

    Args:
        scale: Lowest and highest factor; drawn uniformly.
        base_size: (longer side, shorter side) that images are fitted into at factor 1; None: they stay as they are.
    """

    def __init__(self, scale: tuple[float, float], base_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.base_size = base_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        factor = float(torch.empty(()).uniform_(*self.scale))
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"size": list(scaled_size((height, width), factor, self.base_size))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes images bilinearly with antialiasing, and labels by `resize_label`."""
        if isinstance(inpt, tv_tensors.Mask):  # torchvision's own kernel for masks ignores pixel centres
            return tv_tensors.wrap(resize_label(inpt.as_subclass(Tensor), params["size"]), like=inpt)
        return v2.functional.resize(inpt, params["size"], antialias=True)


def resize_label(label: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes a label map: each output pixel takes the label pixel whose centre is nearest to its own centre.

    The centre of output row i lies at (i + 0.5) H / h rows of the label, as in bilinear resizing of images. This is the
    rule of torch's "nearest-exact", except where the centre lies exactly between two pixels, as it does everywhere at
    half the size. There, "nearest-exact" takes the later pixel, which moves all labels by a quarter of an output pixel.
    Here, even output pixels take the later one and odd output pixels the earlier one, so that the mean offset is 0.

    Args:
        label: Integers (..., H, W).
        size: (h, w) of the result.

    Returns:
        (..., h, w) of the same dtype; every value is copied, so that all ids stay exact.

    Example:
        >>> resize_label(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]]), (1, 4)).tolist()
        [[1, 2, 5, 6]]
        >>> resize_label(torch.tensor([[0, 1, 2, 3]]), (1, 8)).tolist()
        [[0, 0, 1, 1, 2, 2, 3, 3]]
    """
    rows, columns = (
        _nearest_pixels(length, cells, label.device) for length, cells in zip(label.shape[-2:], size, strict=True)
    )
    return label.index_select(-1, columns).index_select(-2, rows)


def _nearest_pixels(length: int, cells: int, device: torch.device) -> Tensor:
    """Index of the nearest of `length` pixels for each of `cells` output pixels, in exact integer arithmetic."""
    cell = torch.arange(cells, device=device)
    centre = (2 * cell + 1) * length  # in units of 1 / (2 cells) pixels
    pixel = centre // (2 * cells)
    is_tie = centre % (2 * cells) == 0
    return pixel - (is_tie & (cell % 2 == 1)).long()


class VariedCrop(v2.Transform):  # type: ignore[misc]
    """A random crop in which no class fills more than a share of what is not void, as far as ten draws can find one.

    Args:
        crop_size: (height, width); a side on which the image is smaller stays as it is.
        ignore_index: The void label.
        max_class_share: The share, up to 1, where any crop will do.
    """

    def __init__(self, crop_size: tuple[int, int], ignore_index: int, max_class_share: float) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.ignore_index = ignore_index
        self.max_class_share = max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the place."""
        label = next((inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask)), None)
        size = v2.functional.get_size(flat_inputs[0])
        params = self._place(size)
        if label is None or self.max_class_share >= 1:
            return params
        for _ in range(9):
            crop = self.transform(label, params)
            counts = torch.bincount(crop[crop != self.ignore_index].flatten())
            if counts.any() and counts.max() < self.max_class_share * counts.sum():
                break
            params = self._place(size)
        return params

    def _place(self, size: list[int]) -> dict[str, int]:
        height, width = map(min, size, self.crop_size)
        top, left = (
            int(torch.randint(whole - part + 1, ())) for whole, part in zip(size, (height, width), strict=True)
        )
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut out."""
        return v2.functional.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):  # type: ignore[misc]
    """OpenMMLab's change of colours, on uint8 RGB images; each of its parts is left out half of the time.

    Brightness is added (up to 32 of 255), contrast multiplies all values, saturation that of the HSV colour (both by
    0.5 to 1.5), and the hue is turned by up to a tenth of its circle. Contrast comes second or last. torchvision's own
    RandomPhotometricDistort multiplies for brightness, contrasts with the mean, and swaps channels.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the parts, in their order, and how much of each."""
        contrast = (adjust_contrast, (0.5, 1.5))
        parts = [
            (adjust_brightness, (-32, 32)),
            (adjust_saturation, (0.5, 1.5)),
            (v2.functional.adjust_hue, (-0.1, 0.1)),
        ]
        parts.insert(1 if _heads() else 3, contrast)
        return {"parts": [(part, float(torch.empty(()).uniform_(*limits))) for part, limits in parts if _heads()]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Images only."""
        if isinstance(inpt, tv_tensors.Image):
            for part, amount in params["parts"]:
                inpt = tv_tensors.wrap(part(inpt.as_subclass(Tensor), amount), like=inpt)
        return inpt


def _heads() -> bool:
    return bool(torch.rand(()) < 0.5)


def adjust_brightness(image: Tensor, amount: float) -> Tensor:
    """Add to all values of a uint8 image."""
    return image.float().add_(amount).clamp_(0, 255).to(torch.uint8)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Multiply all values of a uint8 image."""
    return image.float().mul_(factor).clamp_(0, 255).to(torch.uint8)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the S of the HSV colours of a uint8 image (3, H, W), up to its largest value; H and V stay."""
    value = image.amax(0)
    chroma = value - image.amin(0)
    # The other channels move away from the largest, or towards it, until the smallest is 0.
    factors = (value / chroma.clamp_(min=1)).clamp_(max=factor)
    return (value - (value - image) * factors).round_().to(torch.uint8)


class PadTo(v2.Transform):  # type: ignore[misc]
    """Append rows below and columns at the right, of ImageNet's mean colour and the void label, up to a size.

    Args:
        size: (height, width).
        ignore_index: The void label.
    """

    def __init__(self, size: tuple[int, int], ignore_index: int) -> None:
        super().__init__()
        self.size = size
        self.fills = {tv_tensors.Image: IMAGE_FILL, tv_tensors.Mask: ignore_index}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Images and labels."""
        height, width = v2.functional.get_size(inpt)
        missing = [0, 0, self.size[1] - width, self.size[0] - height]
        return v2.functional.pad(inpt, missing, fill=self.fills[type(inpt)]) if any(missing) else inpt


def training_transform(
    crop_size: tuple[int, int],
    *,
    ignore_index: int,
    scale: tuple[float, float] = (0.5, 2.0),
    base_size: tuple[int, int] | None = None,
    max_class_share: float = 1.0,
) -> v2.Transform:
    """Scale, crop, flip, change the colours, pad with void where the image is smaller: OpenMMLab's order, on uint8."""
    return v2.Compose(
        [
            RandomScale(scale, base_size),
            VariedCrop(crop_size, ignore_index, max_class_share),
            v2.RandomHorizontalFlip(),
            PhotometricDistortion(),
            PadTo(crop_size, ignore_index),
        ]
    )


def augment(transform: v2.Transform, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Apply one transform to an image (3, H, W) uint8 and its label (H, W); both keep their types."""
    out_image, out_label = transform(tv_tensors.Image(image), tv_tensors.Mask(label))
    return out_image.as_subclass(Tensor), out_label.as_subclass(Tensor)
