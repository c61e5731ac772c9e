"""Compare a step of `bpkd_sdk.train` and `distill` with a minimal loop of the same networks, and time its parts.

    python -m benchmarks.train_step

Each of our ways is a real run: loading, augmentation, loss terms, records and the rest of the loop. After each of its
steps the minimal loop does a step on the same batch: normalisation, forward passes, cross-entropy, backward pass and
SGD, and nothing else. So both are measured in turns, and the ratio is the median over the steps of ours divided by
minimal. The first steps are left out, and the last one, which ends with a checkpoint.

- alone: `train`, against the student alone.
- live: `distill` with the default method, BPKD, and the teacher in the loop, against the student and a forward pass of
  the teacher.
- cached: the same with a teacher's cache, which is written before the first step, against the student alone.

Loading stands apart, because a minimal loop needs it too: the ratio is without loading, and "with loading" adds the
time to load a batch to both. The parts of a step are measured in the same run; they do not overlap, and "rest" is what
is left. On a CPU nothing is transferred. The weights are random, because speed does not depend on training.
Ways that are in train-step.jsonl are not measured again.
"""

import copy
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

import bpkd_sdk
from benchmarks.networks import settled
from benchmarks.records import EMPTY, Records, add_size, make_parser, markdown_table
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import bpkd
from bpkd_sdk.models import get_spec
from bpkd_sdk.training import loop
from bpkd_sdk.training.label_losses import LabelLosses
from bpkd_sdk.training.monitor import LiveView, StepMeter
from bpkd_sdk.training.objective import Objective

CLASSES, BATCH, STEPS, WARM_UP = 19, 4, 24, 3
STUDENT, TEACHER = "pspnet_r18", "pspnet_r101"
REQUIRED = {"alone": 1.03, "live": 1.05, "cached": 1.10}
RATIOS = ("ratio", "ratio_with_loading")
# Each part contains the time of its functions without that of the parts inside them.
PARTS = ("loading", "teacher", "student", "trimap", "loss", "backward", "optimiser", "logging", "rest")


class StepClock:
    """Times of the parts of a step, without the time of the parts inside them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # time of the parts inside each open part

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, whose calls add their time to a part."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - began
                self.seconds[part] += elapsed - self.inner.pop()
                self.inner[-1] += elapsed

        return call

    def take(self, total: float) -> dict[str, float]:
        """Return the seconds of each part of a step that took `total` seconds, and start again."""
        parts = {part: self.seconds[part] for part in PARTS[:-1]}
        self.seconds.clear()
        return parts | {"rest": total - sum(parts.values())}


class MinimalLoop:
    """A training loop without anything that a step can do without."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None) -> None:
        student, teacher = copy.deepcopy(student).train(), copy.deepcopy(teacher)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        spec = get_spec(student)
        self.mean, self.std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
        self.clock = StepClock()
        self.student = self.clock.timed("student", student)
        self.teacher = None if teacher is None else self.clock.timed("teacher", torch.inference_mode()(teacher))
        self.loss = self.clock.timed("loss", cross_entropy)
        self.backward = self.clock.timed("backward", Tensor.backward)
        self.zero_grad = self.clock.timed("optimiser", optimizer.zero_grad)
        self.update = self.clock.timed("optimiser", optimizer.step)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Do one step, and return the seconds of its parts."""
        began = time.perf_counter()
        self.zero_grad()
        inputs = (images - self.mean) / self.std
        if self.teacher is not None:
            self.teacher(inputs)
        self.backward(self.loss(self.student(inputs), labels))
        self.update()
        return self.clock.take(time.perf_counter() - began)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    resized = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    return F.cross_entropy(resized, labels.long(), ignore_index=255)


Parts = dict[str, float]  # seconds by part


def instrument(minimal: MinimalLoop, steps: list[tuple[Parts, Parts]]) -> ExitStack:
    """Time the steps of runs within the context; after each of them the minimal loop does one.

    Args:
        minimal: Minimal loop, which gets the same batches.
        steps: List that the parts of our step and of the minimal one are added to.
    """
    batches, clock = loop._Trainer._batches, StepClock()

    def paired(trainer: loop._Trainer) -> Iterator[list[loop.Batch]]:
        load = clock.timed("loading", partial(next, batches(trainer), None))
        if trainer.teacher is not None:
            trainer.teacher = clock.timed("teacher", trainer.teacher)  # type: ignore[assignment]
        began = time.perf_counter()
        while (batch := load()) is not None:
            yield batch
            steps.append((clock.take(time.perf_counter() - began), minimal.step(*batch[0][:2])))
            began = time.perf_counter()

    context = ExitStack()
    context.enter_context(mock.patch.object(loop._Trainer, "_batches", paired))
    for owner, name, part in (
        (Accelerator, "backward", "backward"),
        (AcceleratedOptimizer, "zero_grad", "optimiser"),
        (AcceleratedOptimizer, "step", "optimiser"),
        (loop._Trainer, "_log", "logging"),
        (LiveView, "step", "logging"),
        (StepMeter, "add", "logging"),
        (Objective, "_run_student", "student"),
        (LabelLosses, "forward", "loss"),
        (bpkd.BPKDLoss, "forward", "loss"),
        (bpkd, "edge_masks", "trimap"),
    ):
        context.enter_context(mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))))
    return context


def measure(way: str, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """Run one of our ways, and return the milliseconds of each part, and the ratios."""
    student = settled(STUDENT, CLASSES, size)
    teacher = None if way == "alone" else settled(TEACHER, CLASSES, size)
    scenes = ShapesDataset("train", length=4 * BATCH, size=(2 * size[0], 2 * size[1]))
    # The scenes have nine classes; every image uses other ids, so that all classes occur.
    samples = [
        (image, torch.where(label == 255, 255, (label + 2 * i) % CLASSES)) for i, (image, label) in enumerate(scenes)
    ]
    data = bpkd_sdk.as_dataset(samples, class_names=[f"class {index}" for index in range(CLASSES)])
    options: dict[str, Any] = {
        "steps": steps,
        "batch_size": BATCH,
        "crop_size": size,
        "evaluate_every": steps,
        "device": "cpu",
        "check_data": False,
    }
    measured: list[tuple[Parts, Parts]] = []
    minimal = MinimalLoop(student, teacher if way == "live" else None)
    with tempfile.TemporaryDirectory() as folder, instrument(minimal, measured):
        if teacher is None:
            bpkd_sdk.train(student, (data, None), output_dir=folder, **options)
        else:
            if way == "cached":
                options |= {"teacher_cache": f"{folder}/cache", "views": 1}
            options |= {"output_dir": f"{folder}/run", "check_teacher": False}
            bpkd_sdk.distill(teacher, student, (data, None), **options)
    kept = measured[WARM_UP:-1]
    ratios, with_loading = [], []
    for ours, theirs in kept:
        loading, others = ours["loading"], sum(theirs.values())
        ratios.append((sum(ours.values()) - loading) / others)
        with_loading.append(sum(ours.values()) / (others + loading))
    run: dict[str, Any] = {"size": list(size), "steps": len(kept)}
    run |= {"ratio": summary(ratios), "ratio_with_loading": summary(with_loading)}
    for index, side in enumerate(("ours", "minimal")):
        run[side] = {part: 1000 * statistics.median(step[index][part] for step in kept) for part in PARTS}
    return run


def summary(values: list[float]) -> dict[str, float]:
    """Return the median, and the quarter of the values below and above."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def table(runs: dict[str, dict[str, Any]]) -> str:
    ratios, parts = [], []
    for way, run in runs.items():
        cells = [f"{run[name]['median']:.3f} ({run[name]['low']:.3f}–{run[name]['high']:.3f})" for name in RATIOS]
        ratios.append((way, *cells, f"{REQUIRED[way]:.2f}"))
        parts += [
            (f"{way}, {side}", *(f"{ms:.1f}" if (ms := run[side][part]) else EMPTY for part in PARTS))
            for side in ("ours", "minimal")
        ]
    return (
        markdown_table(("way", "ratio (quartiles)", "with loading", "at most"), ratios)
        + "\nMilliseconds of the parts of a step, medians over the steps:\n\n"
        + markdown_table(("way", *PARTS), parts)
    )


def main() -> None:
    parser = make_parser(__doc__)
    add_size(parser, 128, 256)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=REQUIRED, default=list(REQUIRED))
    options = parser.parse_args()
    setting = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "networks": [STUDENT, TEACHER],
        "classes": CLASSES,
        "batch": BATCH,
        "size": options.size,
        "steps": options.steps,
    }
    records = Records(options.output / "train-step.jsonl", setting)
    for way in options.only:
        if way not in records.runs:
            records.add(way, measure(way, tuple(options.size), options.steps))
    records.write_table(table(records.runs))


if __name__ == "__main__":
    main()
