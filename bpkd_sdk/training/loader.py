"""Training batches.

The order of the batches depends on the seed and the step alone, so that a run can be resumed anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.dataset import image_problem, label_problem, leave_interrupts_to_the_main_process, spare_cores
from bpkd_sdk.data.transforms import augment, training_transform
from bpkd_sdk.training.config import TrainingConfig

Draw = tuple[int, int]  # (how many samples were drawn before, index into the data set)


def training_loader(
    dataset: SegmentationDataset, config: TrainingConfig, crop_size: tuple[int, int], *, first_step: int, on_gpu: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches for the steps that are left, `accumulate` of them a step, of all processes together.

    Returns:
        A loader of uint8 images (N, 3, h, w) and labels (N, h, w), uint8 if the data set's are and the void label is
        one; accelerate gives each process its share.
    """
    draws = range(first_step * config.batch_size, config.steps * config.batch_size)
    workers = config.workers if config.workers is not None else (spare_cores() if on_gpu else 0)
    return DataLoader(
        _Augmented(dataset, config, crop_size),
        sampler=_ShuffledDraws(len(dataset), draws, config.seed),
        batch_size=config.batch_size // config.accumulate,
        num_workers=workers,
        pin_memory=on_gpu,
        persistent_workers=workers > 0,
        worker_init_fn=leave_interrupts_to_the_main_process,
    )


def mixed_seed(*parts: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


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
        if problem := image_problem(image) or label_problem(label):
            raise ValueError(f"{self.dataset.sample_name(index)}: {problem}.")
        if self.dataset.ignore_index not in range(256):
            label = label.long()  # crops are padded with the void label, which uint8 could not hold
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mixed_seed(self.seed, 1, draw))
            image, label = augment(self.transform, image, torch.zeros_like(label) if self.blank else label)
        if wrong := self.dataset.unknown_labels(label):
            raise ValueError(f"{self.dataset.sample_name(index)}: labels {wrong[:10]} are outside the classes.")
        return image, label
