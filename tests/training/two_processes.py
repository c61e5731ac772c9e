"""The runs that `test_processes.py` compares: `accelerate launch ... two_processes.py FOLDER` does them in two processes.

No network here has batch norm: its statistics would be those of each process's share.
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
from bpkd_sdk.losses import CanonicalKDLoss
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


class Network(nn.Module):
    """Without batch norm, and with a weight that is never used."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        self.body = tiny(9, width=width, seed=seed)
        self.body[1] = nn.Identity()
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.body(images)


def distilled(folder: Path, **options) -> TrainingResult:
    seed = options.pop("student_seed", 0)
    return bpkd_sdk.distill(
        Network(width=12, seed=1).eval(),
        Network(width=8, seed=seed),
        (TRAIN, VAL),
        output_dir=folder,
        **{"method": METHOD} | OPTIONS | options,
    )


class Interrupted(CanonicalKDLoss):
    """Gets a Ctrl-C in its third step, in the process of this rank."""

    rank = 0
    calls = 0

    def forward(self, *inputs):
        self.calls += 1
        if self.calls == 3 and int(os.environ.get("RANK", 0)) == self.rank:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(*inputs)


def interrupted(folder: Path, rank: int) -> None:
    """The first steps of a run of the canonical method."""
    method = Interrupted(9)
    method.rank = rank
    try:
        distilled(folder, method=method)
    except KeyboardInterrupt:
        return
    raise AssertionError("was not interrupted")


def main(folder: Path) -> None:
    """All that takes two processes."""
    rank, written = int(os.environ["RANK"]), []

    def note_writes(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if arguments else ""
        wrote = event in ("os.mkdir", "os.rename", "os.remove") or (
            event == "open" and str(arguments[1]).strip("rb") != ""
        )
        if wrote and path.startswith(str(folder)):
            written.append(f"{event} {path}")

    sys.addaudithook(note_writes)
    # The second process begins with other weights, and must end with the same.
    results = {"two": distilled(folder / "two", student_seed=rank, accumulate=2)}
    interrupted(folder / "two_then_one", rank=1)
    results["one_then_two"] = distilled(folder / "one_then_two", method="canonical", resume=True)
    for method in ("cirkd", "skds"):
        results[method] = distilled(folder / method, method=method, steps=3, accumulate=2)
    written = list(written)
    facts = {
        name: {"weights": sum(p.double().sum().item() for p in result.model.parameters()), "miou": result.metrics.miou}
        for name, result in results.items()
    }
    (folder / f"rank{rank}.json").write_text(json.dumps({"written": written, "results": facts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
