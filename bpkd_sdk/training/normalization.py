"""Format and normalisation of a student's images: taken from its spec, or measured on the training data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image
from bpkd_sdk.errors import warn
from bpkd_sdk.models import get_spec, set_spec
from bpkd_sdk.pixels import check_pixels
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.teacher import TeacherModel, teacher_spec
from bpkd_sdk.training.teacher_cache import TeacherCache

MEASURED_IMAGES = 64  # largest number of training images that mean and standard deviation are measured on


def choose_spec(network: nn.Module, dataset: SegmentationDataset, seed: int) -> tuple[NetworkSpec, str]:
    """Return the spec of a student for the images of the data, and a line that states what was measured.

    A spec that the network has already is kept, if it fits the data. Otherwise 8-bit RGB gets the normalisation that
    the network's library uses, and all other images get the mean and the standard deviation of the training data.

    Args:
        network: Network to train, which is not changed.
        dataset: Training data.
        seed: Seed of the selection of images that are measured.

    Raises:
        ValueError: If the network's spec is for other images than the data have.
    """
    spec, pixels = get_spec(network), dataset.pixels
    is_stated = isinstance(getattr(network, "spec", None), NetworkSpec) and bool(spec.mean)
    if is_stated or pixels.is_rgb8:
        check_pixels(spec.pixels, pixels, network_name="The student", data_name=dataset.name)
        return replace(spec, bands=pixels.bands), ""
    mean, std, count = measure_channels(dataset, seed)
    spec = replace(
        spec, in_channels=pixels.channels, value_range=pixels.value_range, bands=pixels.bands, mean=mean, std=std
    )
    shown = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, std, strict=True))
    return spec, (
        f"{pixels}; mean and standard deviation of each channel in 0..1, measured on {count} training images "
        f"(seed {seed}): {shown}."
    )


def measure_channels(dataset: SegmentationDataset, seed: int) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Measure mean and standard deviation of each channel, after the range is scaled to 0..1.

    A channel that has one value only gets the standard deviation 1, with a warning.

    Args:
        dataset: Data set to measure.
        seed: Seed of the selection of at most `MEASURED_IMAGES` images.

    Returns:
        Means, standard deviations, and the number of images.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    indices = sorted(order[:MEASURED_IMAGES].tolist())
    low, high = dataset.pixels.value_range
    pixels, total, squares = 0, torch.zeros(dataset.channels).double(), torch.zeros(dataset.channels).double()
    for index in indices:
        image: Tensor = checked_image(dataset, index, dataset[index][0])
        values = ((image.double() - low) / (high - low)).flatten(1)
        pixels += values.shape[1]
        total += values.sum(1)
        squares += values.square().sum(1)
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
    if constant := (std < 1e-6).nonzero().flatten().tolist():
        warn(
            f"Channels {constant} of {dataset.name} (counted from 0) have the same value in all pixels of "
            f"{len(indices)} images, so they contain no information. Leave them out of the data."
        )
        std[constant] = 1
    return tuple(mean.tolist()), tuple(std.tolist()), len(indices)


def check_teacher_images(teacher: TeacherModel | TeacherCache, dataset: SegmentationDataset) -> None:
    """Raise ValueError if a teacher takes other images than the data have, or if its normalisation is not known."""
    spec = teacher_spec(teacher)
    if spec.pixels.is_rgb8 and not dataset.pixels.is_rgb8 and dataset.channels > 3:
        raise ValueError(
            f"The teacher takes images of {spec.pixels}, as networks with ImageNet weights do, but {dataset.name} has "
            f"{dataset.pixels}. Pass a teacher that was trained on these channels, or a module that selects three of "
            "them (its forward returns teacher(x[:, [2, 1, 0]])) with its own spec: NetworkSpec(None, num_classes, "
            f"in_channels={dataset.channels}, value_range={dataset.pixels.value_range}, mean=..., std=...)."
        )
    check_pixels(spec.pixels, dataset.pixels, network_name="The teacher", data_name=dataset.name)
    spec.check_measured()


@contextmanager
def using_spec(network: nn.Module, spec: NetworkSpec) -> Iterator[None]:
    """Set the spec of a network, and restore its earlier one at the end."""
    before = getattr(network, "spec", None)
    set_spec(network, spec)
    try:
        yield
    finally:
        if before is None:
            del network.spec
        else:
            set_spec(network, before)
