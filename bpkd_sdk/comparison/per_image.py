"""What a network gets right in each image, so that two networks can be compared pair by pair, and significance tested.

Whatever is a ratio over a data set is a sum of these counts first: draw images, add up their counts, divide.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.evaluation import MetricCounts, Metrics
from bpkd_sdk.features import evaluating
from bpkd_sdk.models.checkpoint import FORMAT, write_tensors
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import TorchRuntime


def write_image_counts(path: Path, model: nn.Module, dataset: SegmentationDataset, metrics: Metrics) -> None:
    """Write the counts of each image of a data set, int64, as safetensors.

    ``region`` (N, 3, C): pixels that are right, of the label, of the prediction. ``boundary`` (N, 3, C): pixels of
    both inner boundaries, of the label's, of the prediction's. ``contour`` (N, 4, C): the label's contour pixels
    matched and all, the prediction's matched and all. ``band`` (N, 2, 2): in the edge band and outside, pixels right
    and all.

    Args:
        path: Of the file.
        model: It stays in the mode it is in.
        dataset: Images and labels.
        metrics: The scores over the whole data set, whose widths are used.
    """
    with evaluating(model):
        runtime = TorchRuntime(model)
        images = track(range(len(dataset)), total=len(dataset), description=f"Counting in {dataset.name}")
        each = [_counts(runtime, *dataset[index], dataset, metrics) for index in images]
    tensors = {name: torch.stack([counts[name] for counts in each]) for name in each[0]}
    header = {"format": FORMAT, "data": dataset.name, "classes": dataset.class_names}
    write_tensors(path, tensors, header | {"boundary_width": metrics.boundary_width, "edge_width": metrics.edge_width})


def _counts(
    runtime: TorchRuntime, image: Tensor, label: Tensor, dataset: SegmentationDataset, metrics: Metrics
) -> dict[str, Tensor]:
    counts = MetricCounts(
        dataset.class_names,
        ignore_index=dataset.ignore_index,
        boundary_width=metrics.boundary_width,
        edge_width=metrics.edge_width,
    )
    mask = runtime.segment(image[None])
    counts.update(mask, label[None].to(mask.device))
    confusion = counts.confusion
    region = torch.stack([confusion.diag(), confusion.sum(1), confusion.sum(0)])
    return {"region": region, "boundary": counts.boundary, "contour": counts.contour, "band": counts.band}
