"""Measure how time and memory grow with image size, classes, batch size and number of images, on one core.

    OMP_NUM_THREADS=1 python -m benchmarks.growth

One quantity grows, the others keep the values of `START`. The parts of the work are:

- step: forward and backward pass of a small student (PAN on a narrow ResNet), with the cross-entropy;
- loss: BPKD's terms, forward and backward, on logits of a quarter of the image size;
- scores: the counts of one batch of masks, with boundary scores;
- crop: reading one image from memory, and augmenting it to a crop of its own size, with the preset "paper";
- check: reading and checking all images of a folder before the first step, PNG files of 64x64.

Every value is a record in growth.jsonl with the median time of several passes, and the largest increase of the
process's memory. The table states the growth between neighbouring values as an exponent: 1 is in proportion. For image
sizes the exponent refers to the number of pixels.
"""

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import bpkd_sdk
from benchmarks.records import EMPTY, Records, make_parser, markdown_table
from bpkd_sdk.data.checks import check_for_training
from bpkd_sdk.data.transforms import augment, training_transform
from bpkd_sdk.evaluation import MetricCounts
from bpkd_sdk.memory import MemoryMeter

START = {"side": 512, "classes": 19, "batch": 2}
AXES = {
    "side": (256, 512, 1024, 2048),
    "classes": (2, 8, 32, 128, 255),
    "batch": (2, 4, 8),
    "images": (100, 400, 1600),
}
LABELS = {"side": "image side (pixels)", "classes": "classes", "batch": "images per batch", "images": "images on disk"}
SECONDS, PASSES = 4.0, 7


def blobs(side: int, classes: int, seed: int) -> torch.Tensor:
    """Return a label map with regions of about a sixteenth of the side, int64 (side, side)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, classes, 17, 17, generator=generator)
    return F.interpolate(coarse, (side, side), mode="bicubic").argmax(1)[0]


def step(side: int, classes: int, batch: int) -> Callable[[], None]:
    network = bpkd_sdk.create_model("smp/PAN/tu-test_resnet", classes, backbone_weights="none").train()
    images = torch.rand(batch, 3, side, side)
    labels = torch.stack([blobs(side, classes, index) for index in range(batch)])

    def run() -> None:
        logits = F.interpolate(network(images), labels.shape[1:], mode="bilinear")
        F.cross_entropy(logits, labels).backward()

    return run


def loss(side: int, classes: int, batch: int) -> Callable[[], None]:
    method = bpkd_sdk.BPKDLoss(classes)
    student = torch.randn(batch, classes, side // 4, side // 4, requires_grad=True)
    teacher = torch.randn(batch, classes, side // 4, side // 4)
    labels = torch.stack([blobs(side, classes, index) for index in range(batch)])
    outputs = bpkd_sdk.SegmentationOutput(student), bpkd_sdk.SegmentationOutput(teacher)
    method.prepare(*outputs)

    def run() -> None:
        torch.stack(list(method(*outputs, labels).values())).sum().backward()

    return run


def scores(side: int, classes: int, batch: int) -> Callable[[], None]:
    labels = torch.stack([blobs(side, classes, index) for index in range(batch)]).byte()
    masks = labels.roll(2, 1)
    counts = MetricCounts(tuple(map(str, range(classes))))
    return lambda: counts.update(masks, labels)


def crop(side: int, classes: int, batch: int) -> Callable[[], None]:
    del batch
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    label, transform = blobs(side, classes, 0).byte(), training_transform((side, side), ignore_index=255)
    return lambda: [augment(transform, image, label) for _ in range(5)] and None


def check(images: int) -> Callable[[], None]:
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    for part in ("images", "labels"):
        (folder / part / "train").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for index in range(images):
        Image.fromarray(noise).save(folder / "images" / "train" / f"{index}.png")
        Image.fromarray(blobs(64, 19, index).byte().numpy()).save(folder / "labels" / "train" / f"{index}.png")
    (folder / "classes.json").write_text(str([f"class {index}" for index in range(19)]).replace("'", '"'))

    def run() -> None:
        check_for_training(bpkd_sdk.open_dataset(temporary.name, split="train"))

    return run


WORK: dict[str, tuple[str, ...]] = {
    "side": ("step", "loss", "scores", "crop"),
    "classes": ("step", "loss", "scores"),
    "batch": ("step", "loss", "scores"),
    "images": ("check",),
}
PARTS: dict[str, Callable[..., Callable[[], None]]] = {
    "step": step, "loss": loss, "scores": scores, "crop": crop, "check": check,
}  # fmt: skip


def measure(run: Callable[[], None]) -> dict[str, float]:
    run()
    meter = MemoryMeter()
    times: list[float] = []
    while len(times) < 3 or (len(times) < PASSES and sum(times) < SECONDS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"ms": 1000 * statistics.median(times), "peak_mb": (meter.peak() or math.nan) / 1e6}


def exponent(before: tuple[float, float], after: tuple[float, float], dimensions: int) -> float:
    """Return the exponent of the growth from one (value, cost) to the next."""
    return math.log(after[1] / before[1]) / math.log(after[0] / before[0]) / dimensions


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return one table per axis, with milliseconds, megabytes and the exponent of the time."""
    parts = []
    for axis, values in AXES.items():
        rows = []
        for work in WORK[axis]:
            found = [(value, runs[f"{axis}/{value}/{work}"]) for value in values]
            times = [(value, run["ms"]) for value, run in found]
            growth = [
                f"{exponent(a, b, 2 if axis == 'side' else 1):.2f}" for a, b in itertools.pairwise(times)
            ]  # fmt: skip
            rows.append((work, "ms", *(f"{ms:.3g}" for _, ms in times)))
            rows.append(("", "MB", *(f"{run['peak_mb']:.3g}" if run["peak_mb"] >= 1 else "< 1" for _, run in found)))
            rows.append(("", "exponent", EMPTY, *growth))
        headings = (LABELS[axis], "", *map(str, values))
        parts.append(markdown_table(headings, rows, text_columns=(0, 1)))
    return "\n".join(parts)


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the time over each quantity, on logarithmic axes, with a line in proportion."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (axis, values) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
        for work in WORK[axis]:
            axes.loglog(values, [runs[f"{axis}/{value}/{work}"]["ms"] for value in values], "o-", label=work)
        power = 2 if axis == "side" else 1
        low = min(runs[f"{axis}/{values[0]}/{work}"]["ms"] for work in WORK[axis])
        axes.loglog(values, [low * (value / values[0]) ** power for value in values], "k:", label="in proportion")
        axes.set(xlabel=LABELS[axis], xticks=values, xticklabels=values)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("milliseconds")
    figure.savefig(path, dpi=110)


def main() -> None:
    options = make_parser(__doc__).parse_args()
    setting = {"start": START, "threads": torch.get_num_threads(), "torch": torch.__version__}
    records = Records(options.output / "growth.jsonl", setting)
    for axis, values in AXES.items():
        for value, work in itertools.product(values, WORK[axis]):
            key = f"{axis}/{value}/{work}"
            if key not in records.runs:
                torch.manual_seed(0)
                setup = {"images": value} if axis == "images" else START | {axis: value}
                records.add(key, measure(PARTS[work](**setup)))
    records.write_table(table(records.runs))
    plot(records.runs, options.output / "growth.png")


if __name__ == "__main__":
    main()
