"""Compares an artifact with the network that it was made from, at sizes and batches that were not traced."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpkd_sdk.classes import check_class_count, class_order, reorder_masks
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.adapt import as_dataset_of
from bpkd_sdk.data.checks import checked_image
from bpkd_sdk.data.photos import photo
from bpkd_sdk.evaluation.agreement import mask_agreement
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.models import get_spec, load_model
from bpkd_sdk.models.mask_classification import adapt_network
from bpkd_sdk.pixels import check_pixels
from bpkd_sdk.runtime import AcceptedImages, Runtime, TorchRuntime, match_runtime, open_runtime
from bpkd_sdk.runtime.base import Range
from bpkd_sdk.runtime.fit import Fit, check_fit, fit_images, fit_size, fitted_bands
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.runtime.module import whole_logits
from bpkd_sdk.sizes import check_size

_SMALLEST_SIDE = 33  # pixels


@dataclass(frozen=True)
class VerificationRun:
    """Agreement of an artifact and its network on one batch.

    Attributes:
        size: (height, width) of the images in pixels.
        batch_size: Number of images.
        whole: Share (0..1) of all pixels with the same class.
        edge: Share of the pixels with the same class within the 7x7 edge band of the network's mask; None if the mask
            has no edge.
        body: Share of the pixels with the same class outside the band; None if the band covers all.
        largest_difference: Largest difference between both logits, over the largest logit; None if the artifact returns
            masks.
    """

    size: tuple[int, int]
    batch_size: int
    whole: float
    edge: float | None
    body: float | None
    largest_difference: float | None


@dataclass(frozen=True)
class VerificationReport:
    """Result of `verify`.

    Attributes:
        runs: Runs on the embedded photographs, then on the images of the data set.
        network: Scores of the network on the data set; None without labels.
        artifact: Scores of the artifact on the data set; None without labels.
    """

    runs: tuple[VerificationRun, ...]
    network: Metrics | None = None
    artifact: Metrics | None = None

    @property
    def agreement(self) -> float:
        """Share (0..1) of pixels with the same class, in the worst run."""
        return self.worst.whole

    @property
    def worst(self) -> VerificationRun:
        """The run with the lowest agreement."""
        return min(self.runs, key=lambda run: run.whole)

    @property
    def edge_agreement(self) -> float | None:
        """Share of pixels with the same class within the edge band, in the worst run; None if no run has an edge."""
        return min(_without_none(run.edge for run in self.runs), default=None)

    @property
    def body_agreement(self) -> float | None:
        """Share of pixels with the same class outside the edge band, in the worst run."""
        return min(_without_none(run.body for run in self.runs), default=None)

    @property
    def largest_difference(self) -> float | None:
        """Largest difference between both logits over the largest logit, in the worst run; None for masks."""
        return max(_without_none(run.largest_difference for run in self.runs), default=None)

    @property
    def miou_change(self) -> float | None:
        """The artifact's mIoU minus the network's, on the data set; None without labels."""
        return self.artifact.miou - self.network.miou if self.artifact and self.network else None

    @property
    def boundary_iou_change(self) -> float | None:
        """The artifact's boundary IoU minus the network's, on the data set; None without labels."""
        return self.artifact.boundary_iou - self.network.boundary_iou if self.artifact and self.network else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, with the summary over all runs."""
        summary = ("agreement", "edge_agreement", "body_agreement", "largest_difference")
        changes = ("miou_change", "boundary_iou_change")
        return {name: getattr(self, name) for name in (*summary, *changes)} | {
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "network": self.network and self.network.to_dict(),
            "artifact": self.artifact and self.artifact.to_dict(),
        }


def verify(
    source: str | Path | Runtime,
    reference: nn.Module | str | Path,
    *,
    input_sizes: Sequence[tuple[int, int]] | None = None,
    batch_sizes: Sequence[int] | None = None,
    data: Any = None,
    fit: Fit = "slide",
    match_classes: bool = True,
) -> VerificationReport:
    """Segment natural images with an artifact and with its network, in float32 on the CPU, and compare the masks.

    Args:
        source: Artifact: a file of `bpkd_sdk.export`, or a runtime.
        reference: Network that the artifact was made from, which is not changed, or a checkpoint of it.
        input_sizes: (height, width) of the parts of the embedded photographs that are segmented. None: the artifact's
            own size; or for an artifact that accepts any size, two sizes with odd sides and other aspect ratios than
            the traced one.
        batch_sizes: Numbers of images per batch, for every size. None: the smallest number that the artifact accepts,
            and two more or the largest number.
        data: Further images, each of which is a run at its own size; with labels, both are also scored on them. A data
            set of any library (see `as_dataset`), whose classes are the network's if it does not state them.
        fit: "slide", "resize" or "pad": rule for images of `data` of a size that the artifact does not accept, by which
            both get them; see `bpkd_sdk.runtime.fit`.
        match_classes: Whether the class names of both are compared with those of the data, and both are scored in the
            data's order; False takes classes by position.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not an artifact, does not accept the images' size, or has other classes than the
            data.
        RuntimeError: If the artifact cannot run.
    """
    check_fit(fit)
    if input_sizes is not None:
        input_sizes = [check_size("input_sizes", size) for size in input_sizes]
    runtime = open_runtime(source)
    network = copy.deepcopy(reference) if isinstance(reference, nn.Module) else load_model(reference)
    network = adapt_network(network).cpu().float().eval()
    spec = get_spec(network)
    if spec.class_names and runtime.spec.class_names:
        runtime = match_runtime(runtime, spec, "the network", match_classes=match_classes)
    order = None
    if data is not None:
        data = as_dataset_of(data, spec.class_names)
        _check_data(network, runtime.accepts, data, fit)
        order = class_order(spec, data, network_name="The network", data_name=data.name, match_classes=match_classes)
    least, most = runtime.accepts.batch_sizes
    batch_sizes = batch_sizes or (least, min(least + 2, most or least + 2))
    runs = []
    reference_runtime = _ReferenceRuntime(network, runtime)
    for batch in map(spec.imitate, _photo_batches(input_sizes or _default_sizes(runtime), batch_sizes)):
        runtime.accepts.check(batch.permute(0, 2, 3, 1), runtime.name, runtime.spec.pixels)
        runs.append(_compare(runtime, reference_runtime, batch, fit)[0])
    if data is None:
        return VerificationReport(tuple(runs))
    counts = [MetricCounts(data.class_names, ignore_index=data.ignore_index) for _ in range(2)]
    for index, (image, label) in enumerate(data):
        image = checked_image(data, index, image)
        run, *masks = _compare(runtime, reference_runtime, image[None], fit)
        runs.append(run)
        if data.has_labels:
            for counter, mask in zip(counts, masks, strict=True):
                counter.update(reorder_masks(mask, order), label[None])
    return VerificationReport(tuple(runs), *(counter.compute() for counter in counts if data.has_labels))


@torch.inference_mode()
def _check_data(network: nn.Module, accepts: AcceptedImages, data: SegmentationDataset, fit: Fit) -> None:
    """Raise ValueError if the data set's classes are wrong, or if their number is not the network's."""
    data.check_classes()
    check_pixels(get_spec(network).pixels, data.pixels, network_name="The network", data_name=data.name)
    if data.has_labels:
        image = data.pixels.canonical(data[0][0])[None]
        fitted = fit_size((image.shape[2], image.shape[3]), accepts, fit)
        part = fit_images(image, fitted, get_spec(network))[..., : fitted.window[0], : fitted.window[1]]
        channels = whole_logits(network, part).shape[1]
        check_class_count(channels, data.num_classes, network_name="The network", data_name=data.name)


def _default_sizes(runtime: Runtime) -> list[tuple[int, int]]:
    """Return the artifact's only size; or two with odd sides, one narrower and one wider than the traced size."""
    accepts = runtime.accepts
    if accepts.fixed_size is not None:
        return [accepts.fixed_size]
    if "input_size" not in runtime.metadata:
        raise ValueError(f"{runtime.name} does not state which images it accepts. Pass `input_sizes`.")
    height, width = runtime.metadata["input_size"]
    sizes = [(height * 5 // 4, width * 3 // 4), (height * 3 // 4, width * 5 // 4)]
    return [(_nearest_odd(tall, accepts.height), _nearest_odd(wide, accepts.width)) for tall, wide in sizes]


def _nearest_odd(side: int, allowed: Range) -> int:
    """Return an odd length near `side` that the artifact accepts and that is not too small."""
    least, most = allowed
    side = max(side, _SMALLEST_SIDE) | 1
    return max(least, side if most is None else min(side, most))


def _photo_batches(sizes: Sequence[tuple[int, int]], batch_sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yield uint8 (N, 3, H, W) for every size and batch size; no image is used twice."""
    index = count()
    for size, batch_size in product(sizes, batch_sizes):
        yield torch.stack([photo(next(index), size) for _ in range(batch_size)])


class _ReferenceRuntime(TorchRuntime):
    """The network in torch, which gets the same images as the artifact, and returns masks or logits as it does.

    Args:
        network: Network in float32 on the CPU.
        artifact: Artifact that was made from it.
    """

    def __init__(self, network: nn.Module, artifact: Runtime) -> None:
        super().__init__(network, "cpu", name=artifact.name)
        self.accepts = artifact.accepts
        self.metadata = {**self.metadata, "argmax": artifact.metadata["argmax"]}

    def infer(self, inputs: Tensor) -> Tensor:
        """Compute logits (N, C, H, W), or masks (N, H, W) if the artifact returns masks."""
        logits = super().infer(inputs)
        return to_mask(logits) if self.metadata["argmax"] else logits


@torch.inference_mode()
def _compare(
    artifact: Runtime, reference: _ReferenceRuntime, images: Tensor, fit: Fit
) -> tuple[VerificationRun, Tensor, Tensor]:
    """Segment one batch, (N, C, H, W); return the agreement, the network's mask and the artifact's mask."""
    outputs, expected = (
        torch.cat([band.cpu() for band in fitted_bands(runtime, images, fit)], dim=-2)
        for runtime in (artifact, reference)
    )
    difference = None
    if not artifact.metadata["argmax"]:
        difference = ((outputs - expected).abs().max() / expected.abs().max()).item()
        outputs, expected = to_mask(outputs), to_mask(expected)
    whole, edge, body = mask_agreement(outputs, expected)
    assert whole is not None  # noqa: S101  (an image has pixels)
    height, width = images.shape[2:]
    return VerificationRun((height, width), len(images), whole, edge, body, difference), expected, outputs


def _without_none(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
