"""Training batches. The order of the batches depends only on the seed and the step, so a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image, label_problem, unknown_labels
from bpkd_sdk.data.dataset import default_workers, ignore_interrupts
from bpkd_sdk.data.randomness import mixed_seed, seeded
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.augmentation import Augmentation, Transform
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.teacher_cache import TeacherCache

# Images (N, channels, h, w), uint8 or float32; labels (N, h, w); and with a teacher's cache its arrays by name.
Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]
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
    cache: TeacherCache | None = None,
    with_features: bool = False,
) -> DataLoader[Batch]:
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
        cache: The teacher's outputs, whose views are then the crops; None for crops that are drawn anew.
        with_features: Whether the feature maps are read from the cache too.

    Returns:
        A loader of batches. Labels are uint8 if both the labels of the data set and its void label fit, and int64
        otherwise. accelerate gives each process its shard of a batch.
    """
    draws = range(first_step * config.batch_size, config.steps * config.batch_size)
    workers = config.workers if config.workers is not None else (default_workers() if on_gpu else 0)
    augmentation = Augmentation(transform, dataset, config, crop_size, network)
    return DataLoader(
        _AugmentedDataset(augmentation, config.seed, cache, use_labels=use_labels, with_features=with_features),
        sampler=_ShuffledDraws(len(dataset), draws, config.seed),
        batch_size=config.batch_size // config.accumulate,
        num_workers=workers,
        pin_memory=on_gpu,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
    )


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


class _AugmentedDataset(Dataset[Batch]):
    """Data set with the training transform applied; each draw has its own random stream."""

    def __init__(
        self,
        augmentation: Augmentation,
        seed: int,
        cache: TeacherCache | None,
        *,
        use_labels: bool,
        with_features: bool,
    ) -> None:
        self.augmentation = augmentation
        self.dataset = augmentation.dataset
        self.seed = seed
        self.cache = cache
        self.use_labels = use_labels
        self.with_features = with_features

    def __getitem__(self, item: Draw) -> Batch:
        """Cut a crop, and change its colours with the draw's own random numbers.

        The crop is drawn with the same random numbers, or with those of one of the cached views.
        """
        draw, index = item
        augmentation, cache = self.augmentation, self.cache
        seed = mixed_seed(self.seed, 1, draw)
        if cache is None:
            with seeded(seed, augmentation.generators):
                image, label = self._crop(index)
                return self._finish(index, image, label)
        view = cache.choose_view(draw, index, self.seed)
        with seeded(cache.view_seed(index, view), augmentation.generators):
            image, label = self._crop(index)
        with self._naming_sample(index):
            kept = cache.read(index, view, image, with_features=self.with_features)
        with seeded(seed):
            return *self._finish(index, image, label), kept

    def _crop(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.dataset[index]
        image = checked_image(self.dataset, index, image)
        with self._naming_sample(index):
            if problem := label_problem(label):
                raise ValueError(f"{problem}.")
            return self.augmentation.crop(image, label if self.use_labels else torch.zeros_like(label))

    def _finish(self, index: int, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        image, label = self.augmentation.finish(image, label)
        if unknown := unknown_labels(self.dataset, label):
            raise ValueError(f"{self.dataset.sample_name(index)}: labels {unknown[:10]} are outside the classes.")
        return image, label

    @contextmanager
    def _naming_sample(self, index: int) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.dataset.sample_name(index)}: {error}") from error
