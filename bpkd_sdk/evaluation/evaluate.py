"""Run a network over a data set and score it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.errors import check_choice
from bpkd_sdk.evaluation.inference import ModuleSegmenter, Segmenter
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import open_artifact

Mode = Literal["whole", "slide"]


def evaluate(
    model: nn.Module | Segmenter | str | Path,
    dataset: SegmentationDataset,
    *,
    mode: Mode = "whole",
    crop_size: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    boundary_width: int | float = 3,
    edge_width: int = 7,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    reference: nn.Module | Segmenter | None = None,
) -> Metrics:
    """Score a network on a data set, at the labels' own resolution.

    Args:
        model: A module, a checkpoint of ours, an ONNX file that `to_onnx` wrote, or any object that can `segment`.
        dataset: Images and labels.
        mode: "whole" images, or "slide" a window over them and average the logits.
        crop_size: (height, width) of the window.
        stride: (vertical, horizontal) step of the window; None: two thirds of the window.
        boundary_width: Distance for boundary IoU and F1: pixels, or a share of the diagonal if below 1.
        edge_width: Side of the trimap window that separates `edge_accuracy` from `body_accuracy`.
        batch_size: Most images at once; only neighbours of one size share a batch.
        device: Where to run; None: where the module is.
        reference: A network whose prediction stands in for the labels, for images without any.

    Raises:
        ValueError: For sizes or classes that do not fit, or a data set without labels and no `reference`.
    """
    check_choice("mode", mode, get_args(Mode))
    if mode == "slide" and crop_size is None:
        raise ValueError("mode='slide' needs `crop_size`, the (height, width) of the window.")
    if not dataset.has_labels and reference is None:
        raise ValueError(f"{dataset.name} has no labels; pass `reference`, a network to agree with.")
    window = crop_size if mode == "slide" else None
    counts = MetricCounts(
        dataset.class_names,
        ignore_index=dataset.ignore_index,
        boundary_width=boundary_width,
        edge_width=edge_width,
    )
    with _segmenter(model, device, window, stride) as network, _segmenter(reference, device, window, stride) as guide:
        for images, labels in _batches(dataset, batch_size):
            masks = network.segment(images)
            counts.update(masks, (labels if reference is None else guide.segment(images)).to(masks.device))
    return counts.compute()


@contextmanager
def _segmenter(
    model: nn.Module | Segmenter | str | Path | None,
    device: str | torch.device | None,
    crop_size: tuple[int, int] | None,
    stride: tuple[int, int] | None,
) -> Iterator[Segmenter]:
    """Open a model for inference; a module of the caller's is given back in the mode it came in."""
    opened = open_artifact(model) if isinstance(model, (str, Path)) else model
    if not isinstance(opened, nn.Module):
        yield opened  # type: ignore[misc]
        return
    where = torch.device(device) if device is not None else _device_of(opened)
    was_training = opened.training
    try:
        yield ModuleSegmenter(opened.to(where).eval(), where, crop_size, stride)
    finally:
        opened.train(was_training)


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _batches(dataset: SegmentationDataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    waiting: list[tuple[Tensor, Tensor]] = []
    for index in track(range(len(dataset)), total=len(dataset), description=f"Evaluating {dataset.name}"):
        sample = dataset[index]
        if waiting and (len(waiting) == batch_size or waiting[0][0].shape != sample[0].shape):
            yield _stack(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _stack(waiting)


def _stack(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)
