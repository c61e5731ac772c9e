"""Runs a network over a data set and scores its masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bpkd_sdk.class_map import ClassMap, class_map_advice
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.adapt import as_dataset, as_dataset_of
from bpkd_sdk.data.checks import checked_image
from bpkd_sdk.data.dataset import default_workers, ignore_interrupts
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.evaluation.protocol import EvaluationProtocol
from bpkd_sdk.features import eval_mode
from bpkd_sdk.pixels import check_pixels
from bpkd_sdk.progress import track
from bpkd_sdk.runtime import Runtime, TorchRuntime, match_runtime, open_runtime
from bpkd_sdk.runtime.fit import MAX_PIXELS
from bpkd_sdk.sizes import Size

# A network to score: a module, a runtime, or a path or URL of one of `bpkd_sdk.runtime.FORMATS`.
Source = nn.Module | Runtime | str | Path

MAX_WAITING = 4 * MAX_PIXELS  # pixels of the samples that wait for others of their size


def evaluate(
    source: Source,
    dataset: Any,
    *,
    protocol: EvaluationProtocol = EvaluationProtocol(),  # noqa: B008  (frozen)
    boundary_width: int | float = 3,
    edge_width: int = 7,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    reference: Source | None = None,
    sum_across_processes: Callable[[Tensor], Tensor] | None = None,
    match_classes: bool = True,
    class_map: ClassMap | None = None,
    class_names: Sequence[str] | None = None,
) -> Metrics:
    """Score a network on a data set; masks are compared with labels at the size of the labels.

    Args:
        source: Network to score: a module, a runtime, or a path or URL of one of the `bpkd_sdk.runtime.FORMATS`.
        dataset: Data set of images and labels, of any library (see `as_dataset`). If it does not state its classes,
            they are those of `source`.
        protocol: Evaluation protocol, which turns images into masks. The default is whole images at their own size.
        boundary_width: Distance of boundary IoU and boundary F1: pixels, or a share of the image diagonal if below 1.
        edge_width: Side in pixels of the trimap window that separates `edge_accuracy` from `body_accuracy`, odd.
        batch_size: Largest number of images, or windows, per forward pass; images of the same size share a batch. None:
            1 on a CPU, where larger batches are not faster, and on other devices as many as
            `EvaluationProtocol.largest_batch` states.
        device: Device to run on. None: the device of a module, and "auto" for a file.
        reference: Network whose masks replace the labels, for data without labels.
        sum_across_processes: Function that sums an int64 count tensor across processes, if each process scores a part
            of the data. None: this process scores all of the data.
        match_classes: Whether to match the class names of `source` and `reference` with those of the data, and to put
            the classes in the order of the data. False takes classes by position.
        class_map: Names or ids of the network's classes for each class of the data, see `bpkd_sdk.class_map`, for a
            network with other classes: `reference` or, without one, `source`. Pixels where the reference finds classes
            that the map leaves out are not scored; a source chooses among the classes that the map contains.
        class_names: Class names of data that do not state them; None: those of `source`.

    Returns:
        Scores over all images.

    Raises:
        ValueError: If sizes or classes do not fit together, or if the data have no labels and there is no `reference`.
    """
    with ExitStack() as stack:
        runtime = stack.enter_context(_runtime(source, device))
        if class_names is None:
            dataset = as_dataset_of(dataset, runtime.spec.class_names)
        else:
            dataset = as_dataset(dataset, class_names=class_names)
        dataset.check_classes()
        if class_map is None:
            advice = "`evaluate` scores a network of other classes with"
            stack.enter_context(class_map_advice(advice, runtime.spec, dataset))
        if not dataset.has_labels and reference is None:
            raise ValueError(f"{dataset.name} has no labels; pass `reference`, a network to compare with.")
        counts = MetricCounts(
            dataset.class_names,
            ignore_index=dataset.ignore_index,
            boundary_width=boundary_width,
            edge_width=edge_width,
        )

        def match(runtime: Runtime, class_map: ClassMap | None, *, others: bool = False) -> Runtime:
            check_pixels(runtime.spec.pixels, dataset.pixels, network_name=runtime.name, data_name=dataset.name)
            return match_runtime(
                runtime, dataset, dataset.name, match_classes=match_classes, class_map=class_map, others=others
            )

        network = match(runtime, class_map if reference is None else None)
        reference_network = None
        if reference is not None:
            reference_network = match(stack.enter_context(_runtime(reference, device)), class_map, others=True)
        if batch_size is None and network.device.type == "cpu":
            batch_size = network.accepts.batch_sizes[0]
        workers = min(default_workers(), len(dataset)) if network.device.type == "cuda" else 0

        def largest_batch(size: Size) -> int:
            return batch_size or protocol.largest_batch(network, size)

        for indices, images, labels in _batches(dataset, largest_batch, workers):
            masks = protocol.segment(network, images, batch_size)
            if reference_network is not None:
                labels = protocol.segment(reference_network, images, batch_size)
                if class_map is not None:  # the id after the last class is that of the classes that are left out
                    labels = labels.long().where(labels != dataset.num_classes, dataset.ignore_index)
            try:
                counts.update(masks, labels.to(masks.device))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{', '.join(map(dataset.sample_name, indices))}: {error}") from error
    if (sum_tensor := sum_across_processes) is not None:
        counts.sum_across_processes(lambda array: sum_tensor(torch.from_numpy(array)).numpy())
    return counts.compute()


@contextmanager
def _runtime(source: Source, device: str | torch.device | None) -> Iterator[Runtime]:
    """Open a source as a runtime. A module is in eval mode meanwhile, and returns to its mode afterwards."""
    if isinstance(source, nn.Module):
        with eval_mode(source):
            yield TorchRuntime(source, device)
    else:
        yield open_runtime(source, device or "auto")


def _batches(
    dataset: SegmentationDataset, largest_batch: Callable[[Size], int], workers: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield batches of samples of the same size: their indices, images and labels.

    A group of samples of one size is yielded when it is a full batch. If all groups together have more than
    `MAX_WAITING` pixels, the oldest group is yielded.

    Args:
        dataset: Data set to read.
        largest_batch: Function from the (height, width) of images to the largest number of them in a batch.
        workers: Number of processes that read ahead; 0 reads in this process.
    """
    samples = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=ignore_interrupts)
    waiting: dict[tuple[torch.Size, torch.Size], list[tuple[int, Tensor, Tensor]]] = {}
    progress = track(samples, total=len(dataset), description=f"Evaluating {dataset.name}")
    for index, (image, label) in enumerate(progress):
        image = checked_image(dataset, index, image)
        key = image.shape, label.shape
        waiting.setdefault(key, []).append((index, image, label))
        if len(waiting[key]) >= largest_batch((image.shape[1], image.shape[2])):
            yield _stack(waiting.pop(key))
        elif sum(len(group) * label_size.numel() for (_, label_size), group in waiting.items()) >= MAX_WAITING:
            yield _stack(waiting.pop(next(iter(waiting))))
    yield from map(_stack, waiting.values())


def _stack(samples: list[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, Tensor]:
    indices, images, labels = zip(*samples, strict=True)
    return list(indices), torch.stack(images), torch.stack(labels)
