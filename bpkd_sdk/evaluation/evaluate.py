"""Run a network over a data set and score it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.dataset import default_workers, expect_dataset, ignore_interrupts
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.evaluation.protocol import EvaluationProtocol
from bpkd_sdk.features import eval_mode
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import Runtime, TorchRuntime, match_runtime, open_runtime

Source = nn.Module | Runtime | str | Path


def evaluate(
    source: Source,
    dataset: SegmentationDataset,
    *,
    protocol: EvaluationProtocol = EvaluationProtocol(),  # noqa: B008  (frozen)
    boundary_width: int | float = 3,
    edge_width: int = 7,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    reference: Source | None = None,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    match_classes: bool = True,
) -> Metrics:
    """Score a network on a data set, at the labels' own resolution.

    Args:
        source: Network to score: a module, a path or URL of one of the `bpkd_sdk.runtime.FORMATS`, or a runtime.
        dataset: Images and labels.
        protocol: How images are segmented; by default whole, at their own size.
        boundary_width: Distance for boundary IoU and F1: pixels, or a share of the diagonal if below 1.
        edge_width: Side of the trimap window that separates `edge_accuracy` from `body_accuracy`.
        batch_size: Most images, or windows, at once; only neighbours of one size share a batch.
        device: Where to run; None: where the module is, and "auto" for a file.
        reference: A network whose prediction stands in for the labels, for images without any.
        sum_over_processes: Function that sums an int64 count tensor across processes, for a data set that is split
            between processes. None: this process scores all of the data.
        match_classes: Hold the class names of network and reference against the data's and put them in the data's
            order; False takes them by position.

    Raises:
        ValueError: For sizes or classes that do not fit, or a data set without labels and no `reference`.
    """
    expect_dataset(dataset, "dataset")
    dataset.check_classes()
    if not dataset.has_labels and reference is None:
        raise ValueError(f"{dataset.name} has no labels; pass `reference`, a network to agree with.")
    counts = MetricCounts(
        dataset.class_names,
        ignore_index=dataset.ignore_index,
        boundary_width=boundary_width,
        edge_width=edge_width,
    )
    with ExitStack() as stack:

        def opened(source: Source) -> Runtime:
            runtime = stack.enter_context(_opened(source, device))
            return match_runtime(runtime, dataset, dataset.name, match_classes=match_classes)

        network, guide = opened(source), None if reference is None else opened(reference)
        workers = min(default_workers(), len(dataset)) if network.device.type == "cuda" else 0
        for images, labels in _batches(dataset, batch_size, workers):
            masks = protocol.segment(network, images, batch_size)
            truth = labels if guide is None else protocol.segment(guide, images, batch_size)
            try:
                counts.update(masks, truth.to(masks.device))
            except (ValueError, TypeError) as error:
                first, last = (dataset.sample_name(counts.images + i) for i in (0, len(images) - 1))
                raise ValueError(f"{first if first == last else f'{first} to {last}'}: {error}") from error
    if sum_over_processes is not None:
        counts.add_up(sum_over_processes)
    return counts.compute()


@contextmanager
def _opened(source: Source, device: str | torch.device | None) -> Iterator[Runtime]:
    """A runtime of whatever is given; a module of the caller's then goes back to the mode it came in."""
    if isinstance(source, nn.Module):
        with eval_mode(source):
            yield TorchRuntime(source, device)
    else:
        yield open_runtime(source, device or "auto")


def _batches(dataset: SegmentationDataset, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbours of one size together, read ahead by so many processes; 0: read here, one by one."""
    samples = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=ignore_interrupts)
    waiting: list[tuple[Tensor, Tensor]] = []
    for sample in track(samples, total=len(dataset), description=f"Evaluating {dataset.name}"):
        if waiting and (len(waiting) == batch_size or waiting[0][0].shape != sample[0].shape):
            yield _stack(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _stack(waiting)


def _stack(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)
