"""The state of an unfinished run: one safetensors file from which the run goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bpkd_sdk.errors import differences, listed
from bpkd_sdk.evaluation import Protocol
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.arguments import describe
from bpkd_sdk.models import save_model
from bpkd_sdk.models.checkpoint import (
    FORMAT,
    SUFFIX,
    content_hash,
    load_state,
    read_tensors,
    write_atomically,
    write_tensors,
)
from bpkd_sdk.training.config import TrainingConfig

RESUME_FILE = "resume.safetensors"
HISTORY_FILE = "history.jsonl"

# These may change between the parts of one run.
FREE_OPTIONS = {
    "accumulate",
    "channels_last",
    "check_data",
    "check_teacher",
    "compile",
    "device",
    "log_every",
    "trackers",
    "workers",
}


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        step: Steps done.
        seconds: Time spent in them.
        best_miou: Of the evaluations so far; -1 before the first.
    """

    step: int = 0
    seconds: float = 0.0
    best_miou: float = -1.0


def run_settings(config: TrainingConfig, method: DistillationLoss | None, protocol: Protocol) -> dict[str, Any]:
    """What the parts of one run must agree in, but for `FREE_OPTIONS`."""
    return config.to_dict() | {"method": describe(method), "protocol": asdict(protocol)}


def save_state(
    folder: Path,
    position: Position,
    settings: Mapping[str, Any],
    module: nn.Module,
    optimizer: Optimizer,
    scaler: Mapping[str, Any],
) -> None:
    """Write weights, optimiser and position to one file; a crash leaves the previous one."""
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
    write_tensors(folder / RESUME_FILE, tensors, header)


def try_checkpoint(network: nn.Module, folder: Path) -> None:
    """Write a checkpoint to the folder of a run and read it back, and remove it.

    Raises:
        ValueError: If the network, or what its spec says, cannot be written and read.
        OSError: If the folder cannot be written to.
    """
    path = folder / f".trial{SUFFIX}"
    try:
        save_model(network, path)
        header, state = read_tensors(path)
        if content_hash(state) != header["sha256"]:
            raise ValueError("what was read differs from what was written")
    except Exception as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"A checkpoint of {type(network).__name__} cannot be written and read again: {error}. The facts in its "
            "spec must be plain numbers and text."
        ) from error
    path.unlink()


def restore_state(
    folder: Path, settings: Mapping[str, Any], module: nn.Module, optimizer: Optimizer
) -> tuple[Position, dict[str, Any]]:
    """Load what `save_state` wrote.

    Returns:
        The position, and the state of the gradient scaler.

    Raises:
        ValueError: If the run was started with other settings, or with other networks.
    """
    path = folder / RESUME_FILE
    header, tensors = read_tensors(path)
    if missing := {"position", "settings", "param_groups", "optimizer_scalars", "scaler"} - header.keys():
        raise ValueError(f"{path} holds no state of a run: it lacks {', '.join(sorted(missing))}. Restore the file.")
    _check_same_run(path, header["settings"], settings)
    load_state(module, _below(tensors, "module"), source=str(path))
    slots: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in header["optimizer_scalars"].items()
    }
    for key, value in _below(tensors, "optimizer").items():
        index, name = key.split("/", 1)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": header["param_groups"]})
    return Position(**header["position"]), header["scaler"]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def _check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    defaults = TrainingConfig().to_dict() | {"protocol": asdict(Protocol())}  # of what is newer than the run
    plain = (json.loads(json.dumps(facts)) for facts in (defaults | dict(before), now))
    if changed := differences(*({key: facts[key] for key in facts.keys() - FREE_OPTIONS} for facts in plain)):
        raise ValueError(
            f"The run in {path.parent} was started with other options, so it cannot be resumed with these:\n"
            f"{listed(changed)}\nPass the same options, or another output_dir."
        )


def append_history(folder: Path, record: Mapping[str, Any]) -> None:
    """Add one record to history.jsonl."""
    with (folder / HISTORY_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_history(folder: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records up to and including `last_step`; a line cut short by a crash is left out."""
    path = folder / HISTORY_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [record for record in records if last_step is None or record["step"] <= last_step]


def truncate_history(folder: Path, last_step: int) -> None:
    """Drop the records of steps that will be done again."""
    kept = read_history(folder, last_step)
    write_atomically(folder / HISTORY_FILE, "".join(json.dumps(record) + "\n" for record in kept).encode())
