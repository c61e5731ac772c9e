"""What each process reads: training batches, and its share of the validation images.

The order of the batches depends on the seed and the step alone, so that a run can be resumed anywhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.transforms import augment, training_transform
from bpkd_sdk.training.config import TrainingConfig

Draw = tuple[int, int]  # (how many samples were drawn before, index into the data set)


def training_loader(
    dataset: SegmentationDataset, config: TrainingConfig, crop_size: tuple[int, int], *, first_step: int, on_gpu: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches for the steps that are left, `accumulate` of them a step, of all processes together.

    Returns:
        A loader of uint8 images (N, 3, h, w) and int64 labels (N, h, w); accelerate gives each process its share.
    """
    draws = range(first_step * config.batch_size, config.steps * config.batch_size)
    workers = config.workers if config.workers is not None else (_spare_cores() if on_gpu else 0)
    return DataLoader(
        _Augmented(dataset, config, crop_size),
        sampler=_ShuffledDraws(len(dataset), draws, config.seed),
        batch_size=config.batch_size // config.accumulate,
        num_workers=workers,
        pin_memory=on_gpu,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts_to_the_main_process,
    )


def _spare_cores() -> int:
    """Up to 8 of the cores that fall to this process; the launcher says how many processes share the machine."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def mixed_seed(*parts: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Share(SegmentationDataset):
    """This process's images of a data set: each image belongs to one process.

    Args:
        dataset: The whole.
        accelerator: Knows the processes.
    """

    def __init__(self, dataset: SegmentationDataset, accelerator: Accelerator) -> None:
        self.dataset = dataset
        self.indices = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        self.name = dataset.name
        self.class_names = dataset.class_names
        self.palette = dataset.palette
        self.ignore_index = dataset.ignore_index
        self.has_labels = dataset.has_labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset[self.indices[index]]


class _ShuffledDraws(Sampler[Draw]):
    """Epoch after epoch, each a permutation of its own, cut at both ends to the draws that are left."""

    def __init__(self, size: int, draws: range, seed: int) -> None:
        self.size = size
        self.draws = draws
        self.seed = seed

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[Draw]:
        permutation: list[int] = []
        for draw in self.draws:
            epoch, position = divmod(draw, self.size)
            if position == 0 or not permutation:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
                permutation = torch.randperm(self.size, generator=generator).tolist()
            yield draw, permutation[position]


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    """A data set behind the training transform; each draw has a random stream of its own."""

    def __init__(self, dataset: SegmentationDataset, config: TrainingConfig, crop_size: tuple[int, int]) -> None:
        self.dataset = dataset
        self.seed = config.seed
        self.blank = config.labels == "teacher"
        self.transform: v2.Transform = training_transform(
            crop_size,
            ignore_index=dataset.ignore_index,
            scale=config.scale,
            base_size=config.base_size,
            max_class_share=config.max_class_share,
        )

    def __getitem__(self, item: Draw) -> tuple[Tensor, Tensor]:
        draw, index = item
        image, label = self.dataset[index]
        if self.dataset.ignore_index not in range(256):
            label = label.long()  # crops are padded with the void label, which uint8 could not hold
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mixed_seed(self.seed, 1, draw))
            return augment(self.transform, image, torch.zeros_like(label) if self.blank else label)


def _leave_interrupts_to_the_main_process(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
