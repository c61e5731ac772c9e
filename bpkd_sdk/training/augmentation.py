"""`transform=`: from a sample of a data set to a training crop, by a preset or by a transform of the user."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

import cv2
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image
from bpkd_sdk.data.foreign import ImageRule, MaskRule, describe, find_image_rule, find_size, to_image, to_label
from bpkd_sdk.data.randomness import find_generators, seeded
from bpkd_sdk.data.transforms import PRESETS, PadTo, VariedCrop, augment, padding, training_transform
from bpkd_sdk.errors import check_choice
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.config import TrainingConfig

# "paper", "light", "none"; None for data that augment by themselves; an Albumentations or torchvision v2 transform; or
# a function of image and label.
Transform = Any
_FUNCTION_NOTE = " Functions get tensors: the image, uint8 (channels, H, W), and the mask (H, W) of class ids."
Sample = tuple[Tensor, Tensor]


def check_transform(transform: Transform, config: TrainingConfig) -> None:
    """Check the type of a transform, and that no option is set that it does not use.

    Raises:
        TypeError: If it is neither a preset nor a function.
        ValueError: For an unknown preset, a transform of images only, or an option without an effect.
    """
    if isinstance(transform, str):
        check_choice("transform", transform, PRESETS)
    elif transform is not None and not callable(transform):
        raise TypeError(
            f"Expected `transform` to be one of {', '.join(PRESETS)}, None, a transform of Albumentations or of "
            f"torchvision.transforms.v2, or a function (image, mask) -> (image, mask), but got {describe(transform)}."
        )
    elif any(base.__module__.startswith("torchvision.transforms.transforms") for base in type(transform).__mro__):
        raise ValueError(
            f"`transform` is torchvision.transforms.{type(transform).__name__}, which changes the image and not the "
            "mask. Use the same name from torchvision.transforms.v2."
        )
    unused = {"paper": (), "light": (), "none": ("scale",)}.get(str(transform), ("scale", "base_size"))
    if transform is None:
        unused = (*unused, "max_class_share")
    for name in unused:
        if (value := getattr(config, name)) != getattr(TrainingConfig, name):
            raise ValueError(
                f"{name}={value!r} has no effect with transform={describe_transform(transform)!r}. Leave it out, or "
                "use transform='paper' or 'light'."
            )


def describe_transform(transform: Transform) -> str | None:
    """Describe a transform in text that is the same in every process: by name, its arguments, or a hash of its code."""
    if transform is None or isinstance(transform, str):
        return transform
    if isinstance(transform, partial):
        arguments = [*map(repr, transform.args), *(f"{key}={value!r}" for key, value in transform.keywords.items())]
        return f"{describe_transform(transform.func)} with {_one_line(', '.join(arguments))}"
    if inspect.isfunction(transform):
        digest = hashlib.sha256(_code_text(transform.__code__).encode()).hexdigest()[:12]
        used = [describe_transform(each) for each in find_generators(transform) if _is_albumentations(each)]
        return "".join(
            [f"{transform.__module__}.{transform.__qualname__}, code {digest}", *(f", {use}" for use in used)]
        )
    return _one_line(repr(transform))


def describe_crops(transform: Transform, config: TrainingConfig, crop_size: tuple[int, int]) -> dict[str, Any]:
    """Describe size and random geometry of the training crops, which the colours of a preset do not change."""
    facts: dict[str, Any] = {"crop_size": crop_size}
    if config.max_class_share < 1:  # only then do crops depend on labels
        facts |= {"max_class_share": config.max_class_share, "labels": config.labels}
    if not isinstance(transform, str):
        return facts | {"transform": describe_transform(transform)}
    scale = (1.0, 1.0) if transform == "none" else config.scale
    return facts | {"flip": transform != "none", "scale": scale, "base_size": config.base_size}


def _one_line(text: str) -> str:
    """Return a description on one line and without addresses in memory."""
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", text))


def _code_text(code: CodeType) -> str:
    """Return the instructions, names and constants of a function as text."""
    constants = []
    for value in code.co_consts:
        ordered = sorted(value, key=repr) if isinstance(value, frozenset) else value
        constants.append(_code_text(value) if isinstance(value, CodeType) else repr(ordered))
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


class Augmentation:
    """A seeded transform from the samples of a data set to training crops.

    Args:
        transform: Preset, None, or transform of the user, see `bpkd_sdk.train`.
        dataset: Training data.
        config: Options of the run.
        crop_size: (height, width) of the crops; None leaves out the crop, to find the size of the transform's results.
        network: Facts of the student: format and mean of the images.
    """

    def __init__(
        self,
        transform: Transform,
        dataset: SegmentationDataset,
        config: TrainingConfig,
        crop_size: tuple[int, int] | None = None,
        network: NetworkSpec = NetworkSpec(None, 0),  # noqa: B008  (frozen)
    ) -> None:
        self.transform = transform
        self.dataset = dataset
        self.crop_size = crop_size
        self.generators = find_generators(dataset, transform)
        self._rule: ImageRule | None = None
        self._geometry: v2.Transform | None = None
        self._finish: v2.Transform | None = None
        void, share = dataset.ignore_index, config.max_class_share
        if crop_size is not None and isinstance(transform, str):
            self._geometry, self._finish = training_transform(
                crop_size,
                ignore_index=void,
                scale=config.scale,
                base_size=config.base_size,
                max_class_share=share,
                preset=transform,
                network=network,
            ).transforms
        elif crop_size is not None and transform is not None:
            self._geometry = VariedCrop(crop_size, void, share)
            self._finish = PadTo(crop_size, void, padding(network))
        if transform is not None and not isinstance(transform, str):
            if _is_albumentations(transform) and dataset.num_classes > 255 and void not in range(256):
                raise ValueError(
                    f"Albumentations accepts masks of bytes only, and {dataset.name} has {dataset.num_classes} classes "
                    f"and the void label {void}. Use torchvision.transforms.v2."
                )
            self._try_user_transform()

    def _try_user_transform(self) -> None:
        """Transform an image with all values of the range, to determine how results are read."""
        pixels = self.dataset.pixels
        low, high = pixels.value_range
        noise = low + (high - low) * torch.rand(self.dataset[0][0].shape, generator=torch.Generator().manual_seed(0))
        image = noise.round().byte() if pixels.is_uint8 else noise
        with seeded(0, self.generators):
            result, _ = self._apply_user_transform(image, torch.zeros(image.shape[1:], dtype=torch.uint8))
        if pixels.is_too_dark(result.max().item()):
            raise ValueError(
                f"The transform returns values of at most {result.max():.4g} for images of {self.dataset.name} with "
                f"values of {low:g} to {high:g}. Let it keep the range. Albumentations limits images in float to 0..1: "
                "scale the images of the data set to it, and state value_range=(0, 1)."
            )

    def __call__(self, image: Tensor, label: Tensor) -> Sample:
        """Augment a sample with the random numbers that the caller has seeded.

        Args:
            image: uint8 or float32 (channels, H, W).
            label: uint8 or int64 (H, W).

        Raises:
            ValueError: If the transform of the user fails, or returns something else than an image and a label map.
        """
        return self.finish(*self.crop(image, label))

    def crop(self, image: Tensor, label: Tensor) -> Sample:
        """Scale, crop and flip a sample; with a transform of the user, apply all of it. Small images stay smaller."""
        if self.transform is not None and not isinstance(self.transform, str):
            image, label = self._apply_user_transform(image, label)
        if self.dataset.ignore_index not in range(256):
            label = label.long()  # `finish` pads crops with the void label, which uint8 cannot hold
        if self._geometry is not None:
            return augment(self._geometry, image, label)
        size = tuple(image.shape[1:])
        if self.transform is None and self.crop_size not in (None, size):
            raise ValueError(
                f"the sample is {size}, but the training crops are {self.crop_size}, and transform=None uses samples "
                "as they are. Let the data set return one size, or pass transform='none' to cut random crops"
            )
        return image, label

    def finish(self, image: Tensor, label: Tensor) -> Sample:
        """Change the colours of a crop, if the preset does, and pad it to the size of the crops."""
        return (image, label) if self._finish is None else augment(self._finish, image, label)

    def draw(self, index: int, seed: int) -> Sample:
        """Read and augment one sample of the data set with a seed."""
        with seeded(seed, self.generators):
            image, label = self.dataset[index]
            return self(checked_image(self.dataset, index, image), label)

    def result_size(self) -> tuple[int, int] | None:
        """Return the (height, width) of the results of the transform; None if it varies, and for presets.

        Raises:
            ValueError: If the size of data that are used as they are varies.
        """
        if isinstance(self.transform, str):
            return None
        indices = [*range(min(4, len(self.dataset))), 0, len(self.dataset) - 1]
        sizes = {tuple(self.draw(index, seed)[0].shape[1:]) for seed, index in enumerate(indices)}
        if len(sizes) == 1:
            height, width = sizes.pop()
            return height, width
        if self.transform is None:
            raise ValueError(
                f"transform=None uses samples as they are, but those of {self.dataset.name} have different sizes: "
                f"{', '.join(map(str, sorted(sizes)))}. Let the data set crop them to one size, or pass "
                "transform='none' to cut random crops."
            )
        return None

    def _apply_user_transform(self, image: Tensor, label: Tensor) -> Sample:
        of_albumentations = _is_albumentations(self.transform)
        name = f"The transform {getattr(self.transform, '__name__', type(self.transform).__name__)}"
        try:
            if of_albumentations:
                result: Any = _call_albumentations(self.transform, image, label, self.dataset.ignore_index)
            else:
                result = _call_function(self.transform, image, label)
        except Exception as error:  # the code of the user may raise any exception
            note = "" if of_albumentations else _FUNCTION_NOTE
            raise ValueError(f"{name} failed: {type(error).__name__}: {error}.{note}") from error
        if not (isinstance(result, (tuple, list)) and len(result) == 2):
            raise ValueError(f"{name} returned {describe(result)}, expected (image, mask).")
        try:
            size = find_size(*result)
            if self._rule is None:  # the first result, of an image with all values, determines how the others are read
                pixels = self.dataset.pixels
                value_range = None if pixels.is_uint8 else pixels.value_range
                self._rule = find_image_rule(result[0], size, pixels.channels, value_range)
            mask_rule = MaskRule(self.dataset.num_classes, self.dataset.ignore_index)
            new_image, new_label = to_image(result[0], self._rule, size), to_label(result[1], mask_rule, size)
        except ValueError as error:
            raise ValueError(f"{name} returned an image or a mask that cannot be used: {error}") from error
        if new_image.shape[1:] != new_label.shape:
            raise ValueError(
                f"{name} returned an image of {tuple(new_image.shape[1:])} and a mask of {tuple(new_label.shape)}. "
                "Crop and resize both in the same way."
            )
        return new_image, new_label


def _is_albumentations(transform: object) -> bool:
    return any(base.__module__.split(".")[0] == "albumentations" for base in type(transform).__mro__)


def _call_albumentations(transform: Callable[..., Any], image: Tensor, label: Tensor, void: int) -> tuple[Any, Any]:
    """Call a transform of Albumentations, which accepts masks of bytes only: void is 255 in them if it is no byte."""
    mask = label.numpy().copy() if void in range(256) else torch.where(label == void, 255, label).byte().numpy()
    pixels = image.permute(1, 2, 0)
    if pixels.is_contiguous():
        copied = pixels.numpy().copy()
    else:
        copied = cv2.merge(list(image.contiguous().numpy())).reshape(pixels.shape)  # 20 times as fast as numpy's copy
    result = transform(image=copied, mask=mask)
    new_mask = result["mask"]
    if void not in range(256):
        values = torch.as_tensor(new_mask).long()
        new_mask = torch.where(values == 255, void, values)
    return result["image"], new_mask


def _call_function(transform: Callable[..., Any], image: Tensor, label: Tensor) -> Any:
    """Call a function or a torchvision transform with copies, whose types let torchvision treat masks as masks."""
    return transform(tv_tensors.Image(image.clone()), tv_tensors.Mask(label.clone()))
