"""Compare every loss with a plain re-statement of the published algorithm: time and memory, forward and backward.

    python -m benchmarks.losses

The setting is 2 images, labels of 512x1024, logits and features of 64x128 (stride 8), 128 feature channels of the
student, 512 of the teacher, 19 and 150 classes; on the CPU, and on CUDA if torch finds a GPU. Each device has its own
file, losses-cpu.jsonl or losses-cuda.jsonl, which is written after every measurement. Runs in it are not repeated.

On the CPU every measurement runs in a new process. The peak memory is the largest total size of the tensors that exist
at the same time during one pass, without the inputs. On the CPU it is computed from the allocations in the profiler's
record, because the resident set depends on the C library; on CUDA torch's allocator states it. The time is the median
of up to five passes after a first one.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import losses_originals as originals
from benchmarks.records import Records, make_parser, markdown_table
from bpkd_sdk.losses import METHODS, BPKDLoss, CanonicalKDLoss, CIRKDLoss, CWDLoss, DISTLoss, IFVDLoss, SKDSLoss
from bpkd_sdk.memory import MemoryMeter

ROOT = Path(__file__).parents[1]
CLASSES = (19, 150)
SECONDS, PASSES = 10.0, 5
LOGIT_MB = 2 * 2 * 64 * 128 * 4 / 1e6  # logits of one class, of both networks
CIRKD_OFF = {"kd_weight": 0, "minibatch_weight": 0, "pixel_weight": 0, "region_weight": 0}
TERMS = {
    "bpkd": (lambda c: BPKDLoss.paper(c), lambda _: originals.bpkd),
    "cwd": (lambda c: CWDLoss(c, weight=1), lambda _: originals.cwd),
    "skds pair": (
        lambda c: SKDSLoss(c, pixel_weight=0, pair_weight=1, adversarial_weight=0),
        lambda _: originals.skds_pair,
    ),
    "ifvd": (lambda c: IFVDLoss(c, kd_weight=0, variation_weight=1, adversarial_weight=0), lambda _: originals.ifvd),
    "cirkd mini-batch": (
        lambda c: CIRKDLoss(c, **CIRKD_OFF | {"minibatch_weight": 1}, pool=1),
        lambda _: originals.cirkd_minibatch,
    ),
    "cirkd memory": (
        lambda c: CIRKDLoss(c, **CIRKD_OFF | {"pixel_weight": 1, "region_weight": 1}),
        originals.CIRKDMemory,
    ),
    "canonical": (
        lambda c: CanonicalKDLoss(c, logit_weight=1, feature_weight=1),
        lambda ours: lambda batch: originals.canonical(batch, ours.projection),
    ),
    "dist": (lambda c: DISTLoss(c), lambda _: originals.dist),
}
RANDOM = {"cirkd memory"}  # the stored features are chosen at random, so the values differ


class Case(NamedTuple):
    """One measurement: our version or the original of a term in `TERMS`, or a method with its defaults."""

    side: str  # "ours", "original" or "method"
    name: str
    classes: int

    @property
    def key(self) -> str:
        return f"{self.side}/{self.name}/{self.classes}"


def all_cases(classes: list[int]) -> Iterator[Case]:
    for count in classes:
        yield from (Case(side, name, count) for name in TERMS for side in ("ours", "original"))
        yield from (Case("method", name, count) for name in METHODS)


def measure(case: Case, device: str, *, quick: bool) -> dict[str, float]:
    """Measure one loss in this process: milliseconds, megabytes and value."""
    torch.manual_seed(0)
    batch = originals.make_batch(case.classes, device, quick=quick)
    ours = (METHODS[case.name] if case.side == "method" else TERMS[case.name][0])(case.classes)
    ours.prepare(batch.student, batch.teacher)
    original = TERMS[case.name][1](ours) if case.side == "original" else None

    def run_pass() -> float:
        if original is None:
            loss = torch.stack(list(ours(batch.student, batch.teacher, batch.labels).values())).sum()
        else:
            loss = original(batch)
        loss.backward()
        return loss.item()  # waits for the device

    value = run_pass()
    return {"value": value, "peak_mb": peak_memory(run_pass, device) / 1e6, "ms": 1000 * median_seconds(run_pass)}


def median_seconds(run_pass: Callable[[], float]) -> float:
    times: list[float] = []
    while len(times) < PASSES and sum(times) < SECONDS:
        begin = time.perf_counter()
        run_pass()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_memory(run_pass: Callable[[], float], device: str) -> int:
    """Return the peak memory of one pass in bytes."""
    if device == "cuda":
        meter = MemoryMeter(torch.device(device))
        run_pass()
        return meter.peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run_pass()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measure_alone(case: Case, device: str, *, quick: bool) -> dict[str, float]:
    """Call `measure` in a new process on the CPU. A quick run, whose figures mean nothing, stays in this process."""
    if quick or device == "cuda":
        return measure(case, device, quick=quick)
    command = [sys.executable, "-m", "benchmarks.losses", "--measure", case.side, case.name, str(case.classes), device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def run(device: str, cases: list[Case], folder: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """Measure the cases that are not in the device's file yet, and return all runs by key."""
    setting = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quick": quick,
    }
    records = Records(folder / f"losses-{device}.jsonl", setting)
    for case in cases:
        if case.key not in records.runs:
            records.add(case.key, measure_alone(case, device, quick=quick))
            row = records.runs[case.key]
            print(f"{device:5} {case.key:30} {row['ms']:10.1f} ms {row['peak_mb']:8.0f} MB", flush=True)
        check(case, records.runs)
    records.write_table(table(records.runs))
    return records.runs


def check(case: Case, runs: dict[str, dict[str, float]]) -> None:
    """Exit with an error if our version and the original have different values."""
    pair = [runs.get(case._replace(side=side).key) for side in ("ours", "original")]
    if case.side == "method" or case.name in RANDOM or None in pair:
        return
    ours, original = (row["value"] for row in pair)
    if abs(ours / original - 1) > 1e-4:
        raise SystemExit(f"{case.name} at {case.classes} classes: {ours} is not the original's {original}.")


def table(runs: dict[str, dict[str, float]]) -> str:
    """Return two Markdown tables: every term against its original, and every method with its defaults."""
    terms = []
    for classes, name in itertools.product(CLASSES, TERMS):
        ours, original = (runs.get(Case(side, name, classes).key) for side in ("ours", "original"))
        if ours and original:
            times = f"{ours['ms']:.1f}", f"{original['ms']:.1f}", f"{original['ms'] / ours['ms']:.1f}"
            terms.append((name, str(classes), *times, f"{ours['peak_mb']:.0f}", f"{original['peak_mb']:.0f}"))
    few, many = CLASSES
    methods = []
    for name in METHODS:
        rows = [runs.get(Case("method", name, classes).key) for classes in CLASSES]
        if None not in rows:
            growth = (rows[1]["peak_mb"] - rows[0]["peak_mb"]) / (LOGIT_MB * (many - few))
            figures = [f"{row['ms']:.1f}" for row in rows] + [f"{row['peak_mb']:.0f}" for row in rows]
            methods.append((name, *figures, f"{growth:.1f}"))
    return "\n".join(
        [
            markdown_table(
                ("term", "classes", "ms, ours", "ms, original", "speed-up", "MB, ours", "MB, original"), terms
            ),
            markdown_table(
                (
                    "method, defaults",
                    *(f"{unit}, C={classes}" for unit in ("ms", "MB") for classes in CLASSES),
                    "growth in MB / growth of the logits",
                ),
                methods,
            ),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=[*TERMS, *METHODS], help="names of the terms and methods to run")
    parser.add_argument("--classes", nargs="+", type=int, choices=CLASSES, default=CLASSES)
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="by default all that torch finds")
    parser.add_argument("--quick", action="store_true", help="use tiny maps, to test the script")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        side, name, classes, device = options.measure
        print(json.dumps(measure(Case(side, name, int(classes)), device, quick=False)))
        return
    cases = [case for case in all_cases(options.classes) if options.only is None or case.name in options.only]
    for device in options.devices or ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        run(device, cases, options.output, quick=options.quick)


if __name__ == "__main__":
    main()
