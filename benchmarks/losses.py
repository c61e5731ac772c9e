"""Forward and backward of every loss, beside a plain re-statement of the algorithm that its authors published.

    python -m benchmarks.losses

Two images, labels of 512x1024, logits and features of 64x128 (stride 8), 128 channels of the student, 512 of the
teacher, 19 and 150 classes; on the CPU, and on CUDA if there is any. Each device has a JSON file of its own, written
after every measurement; what is in it is not measured again. The table made from it lies beside it.

On the CPU every measurement has a process of its own. Its peak memory is the most that tensors made in one pass held at
a time, inputs not counted: on the CPU added up from the profiler's record of allocations (the resident set would depend
on what the C library keeps), on CUDA as torch's allocator says. Time is the median of up to five passes after a first.
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
from bpkd_sdk.errors import differences, listed
from bpkd_sdk.files import write_atomically, write_json
from bpkd_sdk.losses import METHODS, BPKDLoss, CanonicalKDLoss, CIRKDLoss, CWDLoss, IFVDLoss, SKDSLoss

ROOT = Path(__file__).parents[1]
CLASSES = (19, 150)
SECONDS, PASSES = 10.0, 5
LOGIT_MB = 2 * 2 * 64 * 128 * 4 / 1e6  # of one class, both networks
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
}
RANDOM = {"cirkd memory"}  # which features are remembered is drawn, so the two have no common value


class Case(NamedTuple):
    """One measurement: our or the original way to a term of `TERMS`, or a method with its defaults."""

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
    """One loss in this process: milliseconds, megabytes and value."""
    torch.manual_seed(0)
    batch = originals.make_batch(case.classes, device, quick=quick)
    ours = (METHODS[case.name] if case.side == "method" else TERMS[case.name][0])(case.classes)
    ours.prepare(batch.student, batch.teacher)
    original = TERMS[case.name][1](ours) if case.side == "original" else None

    def once() -> float:
        if original is None:
            loss = torch.stack(list(ours(batch.student, batch.teacher, batch.labels).values())).sum()
        else:
            loss = original(batch)
        loss.backward()
        return loss.item()  # waits for the device

    value = once()
    return {"value": value, "peak_mb": peak_memory(once, device) / 1e6, "ms": 1000 * median_seconds(once)}


def median_seconds(once: Callable[[], float]) -> float:
    times: list[float] = []
    while len(times) < PASSES and sum(times) < SECONDS:
        begin = time.perf_counter()
        once()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_memory(once: Callable[[], float], device: str) -> int:
    """Bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        once()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measure_alone(case: Case, device: str, *, quick: bool) -> dict[str, float]:
    """`measure` in a process of its own on the CPU; a quick one, whose figures mean nothing, in this one."""
    if quick or device == "cuda":
        return measure(case, device, quick=quick)
    command = [sys.executable, "-m", "benchmarks.losses", "--measure", case.side, case.name, str(case.classes), device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def run(device: str, cases: list[Case], folder: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """Measure what is not in the device's file yet; all results by key.

    Stops where that file is of another machine or other versions.
    """
    path = folder / f"losses-{device}.json"
    setting = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quick": quick,
    }
    content = json.loads(path.read_text()) if path.is_file() else setting | {"cases": {}}
    done = content.pop("cases")
    if changed := differences(content, setting):
        raise SystemExit(f"{path} is of another setting; delete it to measure anew:\n{listed(changed)}")
    content["cases"] = done
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if case.key not in done:
            done[case.key] = measure_alone(case, device, quick=quick)
            write_json(path, content)
            row = done[case.key]
            print(f"{device:5} {case.key:30} {row['ms']:10.1f} ms {row['peak_mb']:8.0f} MB", flush=True)
        check(case, done)
    write_atomically(path.with_suffix(".md"), table(done).encode())
    return done


def check(case: Case, done: dict[str, dict[str, float]]) -> None:
    """Stop where ours and the original have not the same value."""
    pair = [done.get(case._replace(side=side).key) for side in ("ours", "original")]
    if case.side == "method" or case.name in RANDOM or None in pair:
        return
    ours, original = (row["value"] for row in pair)
    if abs(ours / original - 1) > 1e-4:
        raise SystemExit(f"{case.name} at {case.classes} classes: {ours} is not the original's {original}.")


def table(done: dict[str, dict[str, float]]) -> str:
    """Markdown: every term against its original, then every method with its defaults."""
    lines = [
        "| term | classes | ms, ours | ms, original | times as fast | MB, ours | MB, original |",
        "|---|---|---|---|---|---|---|",
    ]
    for classes, name in itertools.product(CLASSES, TERMS):
        ours, original = (done.get(Case(side, name, classes).key) for side in ("ours", "original"))
        if ours and original:
            times = f"{ours['ms']:.1f} | {original['ms']:.1f} | {original['ms'] / ours['ms']:.1f}"
            lines.append(f"| {name} | {classes} | {times} | {ours['peak_mb']:.0f} | {original['peak_mb']:.0f} |")
    few, many = CLASSES
    lines += [
        "",
        f"| method, defaults | ms, C={few} | ms, C={many} | MB, C={few} | MB, C={many} | growth in times the logits' |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        rows = [done.get(Case("method", name, classes).key) for classes in CLASSES]
        if None not in rows:
            growth = (rows[1]["peak_mb"] - rows[0]["peak_mb"]) / (LOGIT_MB * (many - few))
            figures = [f"{row['ms']:.1f}" for row in rows] + [f"{row['peak_mb']:.0f}" for row in rows]
            lines.append(f"| {name} | {' | '.join(figures)} | {growth:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files")
    parser.add_argument("--only", nargs="+", choices=[*TERMS, *METHODS], help="these terms and methods alone")
    parser.add_argument("--classes", nargs="+", type=int, choices=CLASSES, default=CLASSES)
    parser.add_argument("--quick", action="store_true", help="tiny maps, to see that it runs")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        side, name, classes, device = options.measure
        print(json.dumps(measure(Case(side, name, int(classes)), device, quick=False)))
        return
    cases = [case for case in all_cases(options.classes) if options.only is None or case.name in options.only]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        print(table(run(device, cases, options.output, quick=options.quick)))


if __name__ == "__main__":
    main()
