"""Does an artifact segment as the network it was made from does? Asked at sizes and batches that were not traced."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.boundary import edge_band
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.shapes import render
from bpkd_sdk.evaluation.inference import Segmenter, to_mask, whole_logits
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.models import open_checkpoint
from bpkd_sdk.runtime import OnnxSegmenter, open_artifact

EDGE_WIDTH = 7
_SMALLEST = 33  # one more than a scene needs: an odd size


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
        runs: One per batch: the scenes, then the images of the data set.
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
    artifact: str | Path | Segmenter,
    model: nn.Module | str | Path,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    data: SegmentationDataset | None = None,
) -> VerificationReport:
    """Segment natural images with both, the network in float32 on the CPU, and compare.

    Args:
        artifact: A file of `bpkd_sdk.export`, or any object that can `segment`.
        model: The network, or a checkpoint of it; a module is not changed.
        sizes: (H, W) of the embedded scenes that both see. None: for an artifact of any size two of other aspects
            than it was traced with, with odd sides; otherwise its own.
        batches: How many scenes at once, for every size. None: 1 and 3 for an artifact of any batch; otherwise 1, 1.
        data: More images, each a run of its own at its own size; with labels, both are also scored on them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that is no artifact, or images of a size that it does not take.
        RuntimeError: If the artifact cannot be run.
    """
    segmenter = cast(Segmenter, open_artifact(artifact)) if isinstance(artifact, (str, Path)) else artifact
    network = copy.deepcopy(model) if isinstance(model, nn.Module) else open_checkpoint(model)
    network = network.cpu().float().eval()
    facts = getattr(segmenter, "metadata", {})
    if sizes is None:
        if "input_size" not in facts:
            raise ValueError(f"{type(segmenter).__name__} does not say which images it takes. Pass `sizes`.")
        size = (int(facts["input_size"][0]), int(facts["input_size"][1]))
        sizes = _other_sizes(*size) if facts.get("dynamic_size", False) else [size]
    if batches is None:
        batches = (1, 3) if facts.get("dynamic_batch", False) else (1, 1)
    runs = [_compare(segmenter, network, images)[0] for images in _scenes(sizes, batches)]
    if data is None:
        return VerificationReport(tuple(runs))
    counts = [MetricCounts(data.class_names, ignore_index=data.ignore_index) for _ in range(2)]
    for image, label in data:
        run, *masks = _compare(segmenter, network, image[None])
        runs.append(run)
        if data.has_labels:
            for count_of, mask in zip(counts, masks, strict=True):
                count_of.update(mask, label[None])
    return VerificationReport(tuple(runs), *(part.compute() for part in counts if data.has_labels))


def _other_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """One taller and narrower, one flatter and wider; all sides odd."""
    return [
        (height * 5 // 4 | 1, max(width * 3 // 4, _SMALLEST) | 1),
        (max(height * 3 // 4, _SMALLEST) | 1, width * 5 // 4 | 1),
    ]


def _scenes(sizes: Sequence[tuple[int, int]], batches: Sequence[int]) -> Iterator[Tensor]:
    """uint8 (N, 3, H, W) for every size and batch; no scene twice."""
    index = count()
    for size, batch in product(sizes, batches):
        images = np.stack([render(0, "verify", next(index), size)[0] for _ in range(batch)])
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


@torch.inference_mode()
def _compare(artifact: Segmenter, network: nn.Module, images: Tensor) -> tuple[Agreement, Tensor, Tensor]:
    """Both on one batch, uint8 (N, 3, H, W): how far they agree, the network's mask, the artifact's mask."""
    logits = whole_logits(network, images)
    reference = to_mask(logits)
    output = _output(artifact, images)
    difference = None
    if output.ndim == 4:
        difference = ((output - logits).abs().max() / logits.abs().max()).item()
        output = to_mask(output)
    same, edge = output == reference, edge_band(reference, EDGE_WIDTH, ignore_index=-1)
    height, width = images.shape[2:]
    agreement = Agreement(
        size=(height, width),
        batch=len(images),
        whole=same.double().mean().item(),
        edge=_share(same[edge]),
        body=_share(same[~edge]),
        largest_difference=difference,
    )
    return agreement, reference, output


def _output(artifact: Segmenter, images: Tensor) -> Tensor:
    """Class ids (N, H, W), or logits (N, C, H, W) from a file that returns them; on the CPU."""
    if isinstance(artifact, OnnxSegmenter):
        return torch.from_numpy(artifact.run(images.permute(0, 2, 3, 1).contiguous().numpy()))
    return artifact.segment(images).cpu()


def _share(flags: Tensor) -> float | None:
    return flags.double().mean().item() if flags.numel() else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
