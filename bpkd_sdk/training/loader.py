"""Training batches. The order of the batches depends only on the seed and the step, so a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image, label_problem, unknown_labels
from bpkd_sdk.data.dataset import default_workers, ignore_interrupts
from bpkd_sdk.data.randomness import seeded
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.augmentation import Augmentation, Transform
from bpkd_sdk.training.config import TrainingConfig

Draw = tuple[int, int]  # (number of samples that were drawn before, index of the sample in the data set)


def training_loader(
    dataset: SegmentationDataset,
    config: TrainingConfig,
    crop_size: tuple[int, int],
    *,
    first_step: int,
    on_gpu: bool,
    use_labels: bool = True,
    transform: Transform = "paper",
    network: NetworkSpec = NetworkSpec(None, 0),  # noqa: B008  (frozen)
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Create the loader of the remaining batches, `config.accumulate` of them per step, for all processes together.

    Args:
        dataset: Training data.
        config: Options of the run.
        crop_size: (height, width) of the training crops.
        first_step: Number of steps that were done before.
        on_gpu: Whether batches are copied to a GPU: memory is then pinned, and worker processes load by default.
        use_labels: False returns 0 for every pixel inside the image, for data whose labels the teacher predicts.
        transform: Augmentation, see `bpkd_sdk.train`.
        network: Facts of the student: format and mean of the images.

    Returns:
        A loader of images (N, channels, h, w), uint8 or float32, and labels (N, h, w). Labels are uint8 if both the
        labels of the data set and its void label fit, and int64 otherwise. accelerate gives each process its shard of
        a batch.
    """
    draws = range(first_step * config.batch_size, config.steps * config.batch_size)
    workers = config.workers if config.workers is not None else (default_workers() if on_gpu else 0)
    return DataLoader(
        _AugmentedDataset(
            Augmentation(transform, dataset, config, crop_size, network), config.seed, use_labels=use_labels
        ),
        sampler=_ShuffledDraws(len(dataset), draws, config.seed),
        batch_size=config.batch_size // config.accumulate,
        num_workers=workers,
        pin_memory=on_gpu,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
    )


def mixed_seed(*parts: int) -> int:
    """Derive one 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class _ShuffledDraws(Sampler[Draw]):
    """Sampler of one permutation per epoch, cut at both ends to the remaining draws."""

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


class _AugmentedDataset(Dataset[tuple[Tensor, Tensor]]):
    """Data set with the training transform applied; each draw has its own random stream."""

    def __init__(self, augmentation: Augmentation, seed: int, *, use_labels: bool) -> None:
        self.augmentation = augmentation
        self.dataset = augmentation.dataset
        self.seed = seed
        self.use_labels = use_labels

    def __getitem__(self, item: Draw) -> tuple[Tensor, Tensor]:
        draw, index = item
        with seeded(mixed_seed(self.seed, 1, draw), self.augmentation.generators):
            image, label = self.dataset[index]
            image = checked_image(self.dataset, index, image)
            if problem := label_problem(label):
                raise ValueError(f"{self.dataset.sample_name(index)}: {problem}.")
            try:
                image, label = self.augmentation(image, label if self.use_labels else torch.zeros_like(label))
            except ValueError as error:
                raise ValueError(f"{self.dataset.sample_name(index)}: {error}") from error
        if unknown := unknown_labels(self.dataset, label):
            raise ValueError(f"{self.dataset.sample_name(index)}: labels {unknown[:10]} are outside the classes.")
        return image, label
