"""The runs that `test_processes.py` compares; `accelerate launch ... two_processes.py FOLDER` does them in two processes.

Batch norm is frozen where one process must give the same weights, because its statistics would differ between shards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import CanonicalKDLoss, create_method
from bpkd_sdk.training.loop import TrainingResult
from tests.networks import tiny

TRAIN, VAL = ShapesDataset("train", length=10, size=(48, 48)), ShapesDataset("val", length=5, size=(48, 40))
METHOD = ["canonical", "bpkd"]
OPTIONS = {
    "steps": 6,
    "batch_size": 4,
    "crop_size": (32, 32),
    "evaluate_every": 3,
    "log_every": 2,
    "gradient_clip": 1.0,
    "device": "cpu",
}


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm with trained scale and shift and fixed statistics."""

    def __init__(self, width: int):
        super().__init__(width)
        nn.init.normal_(self.running_mean, std=0.2)
        nn.init.uniform_(self.running_var, 0.5, 2)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class Network(nn.Module):
    """A network with a weight that no forward pass uses."""

    def __init__(self, width: int, seed: int, norm: type[nn.Module] = FrozenNorm):
        super().__init__()
        self.body = tiny(9, width=width, seed=seed)
        self.body[1] = norm(width)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.body(images)


class Encoded(nn.Module):
    """A network with an encoder."""

    def __init__(self):
        super().__init__()
        layers = Network(width=8, seed=0).body
        self.encoder, self.head = layers[:5], layers[5:]

    def forward(self, images):
        return self.head(self.encoder(images))


# Each process of two has the images of one of two micro-batches.
LABEL_LOSSES = {
    "losses": ("ce", "focal:2", "dice", "lovasz:0.5"),
    "class_weights": "balanced",
    "freeze_encoder_steps": 2,
    "steps": 4,
}


def distilled(folder: Path, student: nn.Module | None = None, **options) -> TrainingResult:
    if student is None:
        student = Network(width=8, seed=options.pop("student_seed", 0), norm=options.pop("norm", FrozenNorm))
    return bpkd_sdk.distill(
        Network(width=12, seed=1).eval(),
        student,
        (TRAIN, VAL),
        output_dir=folder,
        **{"method": METHOD} | OPTIONS | options,
    )


class Interrupted(CanonicalKDLoss):
    """Sends SIGINT to the process of one rank in its third step. Attributes with an underscore are no arguments."""

    _rank = -1
    _calls = 0

    def forward(self, *inputs):
        self._calls += 1
        if self._calls == 3 and int(os.environ.get("RANK", 0)) == self._rank:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(*inputs)


def interrupted(folder: Path, rank: int) -> None:
    """Do the first steps of a run of the canonical method."""
    method = Interrupted(9)
    method._rank = rank
    try:
        distilled(folder, method=method)
    except KeyboardInterrupt:
        return
    raise AssertionError("was not interrupted")


def digest(module: nn.Module) -> dict[str, float]:
    """Return the sum of each weight and buffer, by name."""
    return {name: value.double().sum().item() for name, value in module.state_dict().items()}


def main(folder: Path) -> None:
    """Do all runs that need two processes."""
    rank, written = int(os.environ["RANK"]), []

    def note_writes(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if arguments else ""
        wrote = event in ("os.mkdir", "os.rename", "os.remove") or (
            event == "open" and str(arguments[1]).strip("rb") != ""
        )
        if wrote and path.startswith(str(folder)):
            written.append(f"{event} {path}")

    sys.addaudithook(note_writes)
    # The second process starts with other weights; both must end with the same.
    results = {"two": distilled(folder / "two", student_seed=rank, accumulate=2)}
    interrupted(folder / "two_then_one", rank=1)
    results["one_then_two"] = distilled(folder / "one_then_two", method=Interrupted(9), resume=True)
    results["trained_norm"] = distilled(folder / "trained_norm", norm=nn.BatchNorm2d, steps=3)
    results["label_losses"] = distilled(folder / "label_losses", Encoded(), **LABEL_LOSSES)
    methods = {name: create_method(name, 9) for name in ("cirkd", "skds", "ifvd")}
    for name, method in methods.items():
        results[name] = distilled(folder / name, method=method, steps=3, accumulate=2)
    written = list(written)
    facts = {name: {"student": digest(result.model), "miou": result.metrics.miou} for name, result in results.items()}
    for name, method in methods.items():
        facts[name]["method"] = digest(method)
    (folder / f"rank{rank}.json").write_text(json.dumps({"written": written, "results": facts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
