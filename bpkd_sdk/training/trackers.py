"""Experiment trackers, by accelerate: TensorBoard, Weights & Biases and whichever others it knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

from bpkd_sdk.errors import check_choice, flattened
from bpkd_sdk.training.config import TrainingConfig

PROJECT = "bpkd-sdk"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError for a tracker that accelerate does not know, ImportError for one that is not installed."""
    for name in names:
        check_choice("trackers", name, sorted(LOGGER_TYPE_TO_CLASS))
        if not filter_trackers([name], logging_dir="."):
            raise ImportError(f"trackers={names!r} needs the package {name!r}. Install it with: pip install {name}")


class Trackers:
    """All trackers of a run, started and finished with a ``with`` block; what they keep in files goes into its folder.

    Args:
        accelerator: Knows the processes.
        config: Names the trackers, and is shown by them.
        folder: Of the run.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, folder: Path) -> None:
        self.accelerator = accelerator
        if config.trackers:
            accelerator.project_configuration.set_directories(str(folder))
            accelerator.log_with = filter_trackers(list(config.trackers), accelerator.logging_dir)
            facts = {key: _plain(value) for key, value in config.to_dict().items()}
            accelerator.init_trackers(PROJECT, config=facts)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record of history.jsonl; nested values get names like "terms/edge"."""
        values = {key: value for key, value in flattened(record, "/").items() if isinstance(value, (int, float))}
        self.accelerator.log(values, step=values.pop("step"))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _plain(value: object) -> object:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
