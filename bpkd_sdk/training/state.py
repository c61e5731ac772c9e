"""State of an unfinished run: one safetensors file from which the run resumes with the same results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bpkd_sdk.errors import format_list, list_differences
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.files import CHECKPOINT_SUFFIX
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.method import method_arguments
from bpkd_sdk.models import save_model
from bpkd_sdk.models.checkpoint import FORMAT, content_hash, load_state, read_tensors, write_tensors
from bpkd_sdk.training.config import TrainingConfig

STATE_FILE = "resume.safetensors"
BEST = f"best{CHECKPOINT_SUFFIX}"  # the weights of the highest mIoU

# Options that may change when a run resumes.
FREE_OPTIONS = {
    "accumulate",
    "channels_last",
    "check_data",
    "check_teacher",
    "compile",
    "device",
    "log_every",
    "teacher_cache",  # run.json contains the hash of the cache
    "trackers",
    "workers",
}


@dataclass(frozen=True)
class Position:
    """Progress of a run.

    Attributes:
        step: Number of steps that are done.
        seconds: Time spent in these steps.
        best_miou: Highest mIoU of the evaluations so far; -1 before the first one.
    """

    step: int = 0
    seconds: float = 0.0
    best_miou: float = -1.0


def run_settings(
    config: TrainingConfig, method: DistillationLoss | None, protocol: EvaluationProtocol
) -> dict[str, Any]:
    """Collect the settings of a run; all but `FREE_OPTIONS` must be the same when it resumes."""
    return config.to_dict() | {"method": method_arguments(method), "protocol": asdict(protocol)}


def save_state(
    folder: Path,
    position: Position,
    settings: Mapping[str, Any],
    module: nn.Module,
    optimizer: Optimizer,
    scaler: Mapping[str, Any],
) -> None:
    """Write the weights, the optimiser and the position to one file, atomically.

    Args:
        folder: Folder of the run.
        position: Progress of the run.
        settings: Result of `run_settings`.
        module: Student and method, with everything that is trained.
        optimizer: Optimiser of the run.
        scaler: State of the gradient scaler; empty without one.
    """
    state = optimizer.state_dict()
    tensors = {f"module/{key}": value for key, value in module.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    header = {
        "format": FORMAT,
        "position": vars(position),
        "settings": dict(settings),
        "param_groups": state["param_groups"],
        "optimizer_scalars": scalars,
        "scaler": dict(scaler),
    }
    write_tensors(folder / STATE_FILE, tensors, header)


def restore_state(
    folder: Path, settings: Mapping[str, Any], module: nn.Module, optimizer: Optimizer
) -> tuple[Position, dict[str, Any]]:
    """Load the file that `save_state` wrote into a module and an optimiser.

    Returns:
        The position, and the state of the gradient scaler.

    Raises:
        ValueError: If the run was started with other settings or other networks.
    """
    path = folder / STATE_FILE
    header, tensors = read_tensors(path)
    if missing := {"position", "settings", "param_groups", "optimizer_scalars", "scaler"} - header.keys():
        raise ValueError(f"{path} is not the state of a run: it lacks {', '.join(sorted(missing))}. Restore the file.")
    _check_same_settings(path, header["settings"], settings)
    load_state(module, _with_prefix(tensors, "module"), source=str(path))
    slots: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in header["optimizer_scalars"].items()
    }
    for key, value in _with_prefix(tensors, "optimizer").items():
        index, name = key.split("/", 1)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": header["param_groups"]})
    return Position(**header["position"]), header["scaler"]


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def _check_same_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # A run of an earlier version lacks newer options; it had their default values.
    defaults = TrainingConfig().to_dict() | {"protocol": asdict(EvaluationProtocol())}
    plain = (json.loads(json.dumps(facts)) for facts in (defaults | dict(before), now))
    if changed := list_differences(*({key: facts[key] for key in facts.keys() - FREE_OPTIONS} for facts in plain)):
        raise ValueError(
            f"The run in {path.parent} was started with other options, so it cannot be resumed with these:\n"
            f"{format_list(changed)}\nPass the same options, or another output_dir."
        )


def check_checkpoint(network: nn.Module, folder: Path) -> None:
    """Write a checkpoint to the folder of a run, read it back, and delete it.

    Raises:
        ValueError: If the network or its spec cannot be written and read.
        OSError: If the folder is not writable.
    """
    path = folder / f".trial{CHECKPOINT_SUFFIX}"
    try:
        save_model(network, path)
        header, state = read_tensors(path)
        if content_hash(state) != header["sha256"]:
            raise ValueError("the weights that were read differ from those that were written")
    except Exception as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"A checkpoint of {type(network).__name__} cannot be written and read again: {error}. The values in its "
            "spec must be plain numbers and text."
        ) from error
    path.unlink()
