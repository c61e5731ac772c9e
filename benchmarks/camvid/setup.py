"""Data, networks, folders and records of the CamVid study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

import bpkd_sdk
from benchmarks.records import Records
from benchmarks.study.networks import create_fpn, lite0_network
from bpkd_sdk.comparison.run import RESULT_FILE
from bpkd_sdk.data import FileDataset
from bpkd_sdk.data.public import CAMVID_CLASSES

HELD_OUT = 72  # number of training images that tuning is scored on: the last in order, the end of a drive


@dataclass(frozen=True)
class Study:
    """Paths of the study, and what is read from them.

    Attributes:
        data: Folder of CamVid.
        teacher_weights: ImageNet weights of the teacher's encoder.
        student_weights: ImageNet weights of the student's encoder.
        runs: Folder of the training runs.
        output: Folder of the results.
    """

    data: Path
    teacher_weights: Path
    student_weights: Path
    runs: Path
    output: Path

    def open_data(self) -> tuple[FileDataset, FileDataset]:
        """Return the training and the validation images."""
        train, val = (bpkd_sdk.open_dataset("camvid", root=self.data, split=split) for split in ("train", "val"))
        return train, val

    def open_tuning_data(self) -> tuple[FileDataset, FileDataset]:
        """Return the training images without the last ones, and the last ones."""
        train, _ = self.open_data()
        fitted, held_out = (
            FileDataset(name, pairs, train.class_names, train.palette, train.ignore_index)
            for name, pairs in (
                ("camvid/fitted", train.pairs[:-HELD_OUT]),
                ("camvid/held out", train.pairs[-HELD_OUT:]),
            )
        )
        return fitted, held_out

    def new_teacher(self, num_classes: int = len(CAMVID_CLASSES)) -> nn.Module:
        """Return an FPN with EfficientNet-lite2 and a wide pyramid."""
        return create_fpn(
            "timm-tf_efficientnet_lite2", self.teacher_weights, num_classes, pyramid=320, segmentation=128
        )

    def new_student(self, num_classes: int = len(CAMVID_CLASSES)) -> nn.Module:
        """Return an FPN with EfficientNet-lite0 and a narrow decoder, with a fifth of the teacher's MACs."""
        return lite0_network(self.student_weights, num_classes)

    def load_teacher(self) -> nn.Module:
        return bpkd_sdk.load_model(self.runs / "teacher" / "last.safetensors", model=self.new_teacher())

    def load_student(self, folder: Path) -> nn.Module:
        """Return the student of a run."""
        return bpkd_sdk.load_model(folder / "last.safetensors", model=self.new_student())

    def finished_runs(self, part: str) -> dict[str, list[Path]]:
        """Return the folders of the finished runs of a part by method, in the order of the seeds."""
        keys = [key.split("/") for key in self.records() if key.startswith(f"{part}/")]
        methods = dict.fromkeys(parts[1] for parts in keys if len(parts) == 3)
        folders = {
            name: sorted(path.parent for path in (self.runs / part / name).glob(f"seed*/{RESULT_FILE}"))
            for name in methods
        }
        return {name: found for name, found in folders.items() if found}

    def records(self) -> dict[str, dict[str, Any]]:
        """Return all records of the study by key."""
        return Records(self.output / "camvid.jsonl").runs

    def save(self, records: dict[str, dict[str, Any]]) -> None:
        """Add or replace records; several processes may call it at the same time."""
        self.runs.mkdir(parents=True, exist_ok=True)
        with FileLock(self.runs / "records.lock"):
            Records(self.output / "camvid.jsonl").update(records)
