"""Does an artifact segment as the network it was made from does? Asked at sizes and batches that were not traced."""

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
from bpkd_sdk.data.photos import photo
from bpkd_sdk.evaluation.agreement import mask_agreement
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.models import get_spec, load_model
from bpkd_sdk.runtime import Runtime, match_runtime, open_runtime
from bpkd_sdk.runtime.base import Range
from bpkd_sdk.runtime.inference import to_mask, whole_logits

_SMALLEST = 33


@dataclass(frozen=True)
class Agreement:
    """How far artifact and network agree on one batch; shares of pixels are 0..1.

    Attributes:
        size: (height, width) of the images.
        batch: Number of images.
        whole: Share of all pixels with the same class.
        edge: The same within the 7x7 edge band of the network's mask; None where that has no edge.
        body: The same outside the band; None where the band covers all.
        largest_difference: Between both logits, over the largest logit; None where the artifact returns masks.
    """

    size: tuple[int, int]
    batch: int
    whole: float
    edge: float | None
    body: float | None
    largest_difference: float | None


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found.

    Attributes:
        runs: One per batch: of the embedded photographs, then the images of the data set.
        network: The network's scores on the data set; None without labels.
        artifact: The artifact's scores on the data set; None without labels.
    """

    runs: tuple[Agreement, ...]
    network: Metrics | None = None
    artifact: Metrics | None = None

    @property
    def agreement(self) -> float:
        """Share of pixels with the same class, in the worst run."""
        return self.worst.whole

    @property
    def worst(self) -> Agreement:
        """The run with the lowest agreement."""
        return min(self.runs, key=lambda run: run.whole)

    @property
    def edge_agreement(self) -> float | None:
        """Within the edge band, in the worst run."""
        return min(_known(run.edge for run in self.runs), default=None)

    @property
    def body_agreement(self) -> float | None:
        """Outside the edge band, in the worst run."""
        return min(_known(run.body for run in self.runs), default=None)

    @property
    def largest_difference(self) -> float | None:
        """Between logits over the largest logit, in the worst run."""
        return max(_known(run.largest_difference for run in self.runs), default=None)

    @property
    def miou_change(self) -> float | None:
        """The artifact's mIoU less the network's, on the data set."""
        return self.artifact.miou - self.network.miou if self.artifact and self.network else None

    @property
    def boundary_iou_change(self) -> float | None:
        """The artifact's boundary IoU less the network's, on the data set."""
        return self.artifact.boundary_iou - self.network.boundary_iou if self.artifact and self.network else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with the summary over all runs."""
        summary = ("agreement", "edge_agreement", "body_agreement", "largest_difference")
        changes = ("miou_change", "boundary_iou_change")
        return {name: getattr(self, name) for name in (*summary, *changes)} | {
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "network": self.network and self.network.to_dict(),
            "artifact": self.artifact and self.artifact.to_dict(),
        }


def verify(
    artifact: str | Path | Runtime,
    model: nn.Module | str | Path,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    data: SegmentationDataset | None = None,
    match_classes: bool = True,
) -> VerificationReport:
    """Segment natural images with both, the network in float32 on the CPU, and compare.

    Args:
        artifact: A file of `bpkd_sdk.export`, or a runtime.
        model: The network, or a checkpoint of it; a module is not changed.
        sizes: (H, W) of the parts of the embedded photographs that both see. None: for an artifact of any size two of
            other aspects than it was traced with, with odd sides; otherwise its own.
        batches: How many images at once, for every size. None: as few as it takes, and two more or as many as it takes.
        data: More images, each a run of its own at its own size; with labels, both are also scored on them.
        match_classes: Hold the class names of both against the data's, and score them in the data's order; False takes
            them by position.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that is no artifact, images of a size that it does not take, or classes that are not the
            data's.
        RuntimeError: If the artifact cannot be run.
    """
    runtime = open_runtime(artifact)
    network = copy.deepcopy(model) if isinstance(model, nn.Module) else load_model(model)
    network = network.cpu().float().eval()
    spec = get_spec(network)
    if spec.class_names and runtime.spec.class_names:
        runtime = match_runtime(runtime, spec, "the network", match_classes=match_classes)
    order = None
    if data is not None:
        data.check_classes()
        if data.has_labels:
            with torch.inference_mode():
                channels = whole_logits(network, data[0][0][None]).shape[1]
            check_class_count(channels, data.num_classes, network_name="The network", data_name=data.name)
        order = class_order(spec, data, network_name="The network", data_name=data.name, match_classes=match_classes)
    sizes = sizes or _sizes(runtime)
    least, most = runtime.accepts.batch
    batches = batches or (least, min(least + 2, most or least + 2))
    runs = [_compare(runtime, network, images)[0] for images in _photos(sizes, batches)]
    if data is None:
        return VerificationReport(tuple(runs))
    counts = [MetricCounts(data.class_names, ignore_index=data.ignore_index) for _ in range(2)]
    for image, label in data:
        run, *masks = _compare(runtime, network, image[None])
        runs.append(run)
        if data.has_labels:
            for count_of, mask in zip(counts, masks, strict=True):
                count_of.update(reorder_masks(mask, order), label[None])
    return VerificationReport(tuple(runs), *(part.compute() for part in counts if data.has_labels))


def _sizes(runtime: Runtime) -> list[tuple[int, int]]:
    """The one size that it takes; or one taller and narrower than the traced one, one flatter and wider, all odd."""
    accepts = runtime.accepts
    if accepts.fixed_size is not None:
        return [accepts.fixed_size]
    if "input_size" not in runtime.metadata:
        raise ValueError(f"{runtime.name} does not say which images it takes. Pass `sizes`.")
    height, width = runtime.metadata["input_size"]
    others = [(height * 5 // 4, width * 3 // 4), (height * 3 // 4, width * 5 // 4)]
    return [(_within(tall, accepts.height), _within(wide, accepts.width)) for tall, wide in others]


def _within(side: int, allowed: Range) -> int:
    """The odd side nearest to this one that is taken, and not tiny."""
    least, most = allowed
    side = max(side, _SMALLEST) | 1
    return max(least, side if most is None else min(side, most))


def _photos(sizes: Sequence[tuple[int, int]], batches: Sequence[int]) -> Iterator[Tensor]:
    """uint8 (N, 3, H, W) for every size and batch; no image twice."""
    index = count()
    for size, batch in product(sizes, batches):
        yield torch.stack([photo(next(index), size) for _ in range(batch)])


@torch.inference_mode()
def _compare(artifact: Runtime, network: nn.Module, images: Tensor) -> tuple[Agreement, Tensor, Tensor]:
    """Both on one batch, uint8 (N, 3, H, W): how far they agree, the network's mask, the artifact's mask."""
    logits = whole_logits(network, images)
    reference = to_mask(logits)
    output = artifact.infer(artifact.prepare(images.permute(0, 2, 3, 1))).cpu()
    difference = None
    if not artifact.metadata["argmax"]:
        difference = ((output - logits).abs().max() / logits.abs().max()).item()
        output = to_mask(output)
    whole, edge, body = mask_agreement(output, reference)
    assert whole is not None  # noqa: S101  (an image has pixels)
    height, width = images.shape[2:]
    agreement = Agreement((height, width), len(images), whole, edge, body, difference)
    return agreement, reference, output


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
