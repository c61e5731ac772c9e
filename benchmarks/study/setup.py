"""The two worlds of the study: their data, networks, folders and records."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor, nn

import bpkd_sdk
from benchmarks.records import Records
from benchmarks.study.networks import DenseNet, quiet_lite0_network, teacher_network
from bpkd_sdk.comparison.setup import StudentSource
from bpkd_sdk.data import SegmentationDataset, ShapesDataset
from bpkd_sdk.data.dataset import DatasetSubset
from bpkd_sdk.data.public import CAMVID_CLASSES

HELD_OUT = 72  # CamVid's training images that tuning is scored on: the last in order, the end of a drive
SHAPES_IMAGES = {"train": 1200, "tuning": 100, "val": 200}


@dataclass(frozen=True)
class World:
    """Facts of a world.

    Attributes:
        batch_size: Images per step.
        crop_size: (height, width) of the training crops.
        scale: Random scale of the images. Scenes of shapes keep their size, so that their edges stay exact.
        transform: Augmentation. In shapes the hue belongs to the class, so colours do not vary.
        views: Crops of each image in the teacher's cache. Without scale and crop, views differ by mirroring only.
        tuning_views: The same for the cache of the tuning's training images, if it is another one.
        seeds: Seeds of the factorial, and of the methods that primary questions compare.
    """

    batch_size: int
    crop_size: tuple[int, int]
    scale: tuple[float, float]
    transform: str
    views: int
    tuning_views: int | None
    seeds: int


WORLDS = {
    "camvid": World(4, (192, 256), (0.75, 1.5), "paper", views=12, tuning_views=4, seeds=4),
    "shapes": World(4, (128, 128), (1.0, 1.0), "light", views=4, tuning_views=None, seeds=8),
}


class DecodedDataset(DatasetSubset):
    """A selection of the samples of a data set, decoded once and kept in memory."""

    def __init__(self, dataset: SegmentationDataset, indices: range) -> None:
        super().__init__(dataset, indices)
        self.samples = [dataset[index] for index in indices]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


Splits = tuple[SegmentationDataset, SegmentationDataset]


class Study:
    """One world of the study.

    Args:
        name: Name of the world.
        data: Folder of CamVid; None for shapes.
        weights: ImageNet weights of EfficientNet-lite2 and -lite0, for CamVid's teacher and the second student.
        runs: Folder of the training runs, which both worlds share.
        output: Folder of the results.
        fraction: Share of steps, seconds and images, for trials of this program.
    """

    def __init__(
        self, name: str, data: Path | None, weights: tuple[Path, Path] | None, runs: Path, output: Path, fraction: float
    ) -> None:
        self.name, self.world = name, WORLDS[name]
        self.data, self.weights, self.fraction = data, weights, fraction
        self.runs, self.output = runs, output
        self._decoded: dict[str, Splits] = {}

    def share(self, amount: int, least: int = 10) -> int:
        """Return an amount, or the fraction of it in a trial."""
        return max(least, round(amount * self.fraction))

    def open_data(self, *, tuning: bool = False) -> Splits:
        """Return training and validation images, or those of the tuning, in memory."""
        key = "tuning" if tuning else "all"
        if key not in self._decoded:
            self._decoded[key] = self._decode(tuning)
        return self._decoded[key]

    def _decode(self, tuning: bool) -> Splits:
        if self.name == "shapes":
            splits = ("train", "tuning" if tuning else "val")
            train, val = (ShapesDataset(split, length=SHAPES_IMAGES[split]) for split in splits)
        else:
            train, val = self.open_files()
            if tuning:
                last = len(train) - HELD_OUT
                return self._keep(train, range(last)), self._keep(train, range(last, len(train)))
        return self._keep(train, range(len(train))), self._keep(val, range(len(val)))

    def _keep(self, dataset: SegmentationDataset, indices: range) -> DecodedDataset:
        return DecodedDataset(dataset, indices[: self.share(len(indices))])

    def open_files(self) -> Splits:
        """Return the training and validation images of CamVid as files, which the teacher is trained on."""
        if self.data is None or self.weights is None:
            raise SystemExit("The world camvid needs --data and --weights.")
        train, val = (bpkd_sdk.open_dataset("camvid", root=self.data, split=split) for split in ("train", "val"))
        return train, val

    @property
    def teacher_folder(self) -> Path:
        return self.runs / "teacher"

    def new_teacher(self) -> nn.Module:
        assert self.weights is not None  # noqa: S101  (open_files raises an error before)
        return teacher_network(self.weights[0], len(CAMVID_CLASSES))

    def load_teacher(self) -> nn.Module:
        """Return the teacher, which the part "teacher" has finished."""
        self.record("teacher")
        if self.name == "shapes":
            return bpkd_sdk.load_model("shapes-teacher").float()
        self.open_files()
        return bpkd_sdk.load_model(self.teacher_folder / "last.safetensors", model=self.new_teacher())

    def cache(self, *, tuning: bool) -> Path:
        """Return the folder of the teacher's cache for the training images."""
        is_own = tuning and self.world.tuning_views is not None
        return self.runs / self.name / ("cache-tuning" if is_own else "cache")

    def student(self, name: str) -> StudentSource:
        """Return the function that creates a student."""
        if name == "dense":
            return DenseNet
        self.open_files()
        assert self.weights is not None  # noqa: S101
        return partial(quiet_lite0_network, self.weights[1])

    def records(self) -> dict[str, dict[str, Any]]:
        """Return all records of both worlds by key."""
        return Records(self.output / "study.jsonl").runs

    def record(self, part: str) -> dict[str, Any]:
        """Return the result of a part that others need."""
        records = self.records()
        if f"{self.name}/{part}" not in records:
            raise SystemExit(f"Run the part {part!r} of the world {self.name!r} first.")
        return records[f"{self.name}/{part}"]

    def save(self, records: dict[str, dict[str, Any]]) -> None:
        """Add or replace records of this world; several processes may call it at the same time."""
        self.runs.mkdir(parents=True, exist_ok=True)
        with FileLock(self.runs / "records.lock"):
            Records(self.output / "study.jsonl").update(
                {f"{self.name}/{key}": record for key, record in records.items()}
            )
