"""Forward and backward of every loss, beside a plain re-statement of the algorithm that its authors published.

    python benchmarks/losses.py --output benchmarks/results/losses.json

The re-statements are written from the equations, the way the originals go about it: one-hot tensors, a loop over all
classes, the whole matrix of similarities. Two images, labels of 512x1024, logits and features of 64x128 (stride 8),
128 channels of the student, 512 of the teacher, 19 and 150 classes; on the CPU, and on CUDA if there is any.

Every measurement has a process of its own. Its peak memory is the most that tensors made in one pass held at a time,
inputs not counted: on the CPU added up from the profiler's record of allocations (the resident set would depend on what
the C library keeps), on CUDA as torch's allocator says. Time is the median of up to five passes after a first.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bpkd_sdk.losses import METHODS, BPKDLoss, CanonicalKDLoss, CIRKDLoss, CWDLoss, IFVDLoss, SKDSLoss
from bpkd_sdk.output import SegmentationOutput

VOID = 255
SECONDS, PASSES = 10.0, 5


@dataclass
class Batch:
    """What a loss gets."""

    student: SegmentationOutput
    teacher: SegmentationOutput
    labels: Tensor
    num_classes: int

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.student.logits, self.teacher.logits

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        return self.student.features["neck"], self.teacher.features["neck"]

    @property
    def small_labels(self) -> Tensor:
        stride = self.labels.shape[1] // self.student.logits.shape[2]
        return self.labels[:, ::stride, ::stride].long()


def make_batch(num_classes: int, device: str, *, quick: bool) -> Batch:
    """Blobs as labels; features that are the class's own direction and noise, not negative, as behind a ReLU."""
    generator = torch.Generator().manual_seed(0)
    height, width = (8, 16) if quick else (64, 128)
    coarse = torch.rand(2, num_classes, 8, 16, generator=generator)
    scores = F.interpolate(coarse, (height, width), mode="bilinear")
    labels = scores.argmax(1).repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    labels[:, : height // 4, : width // 4] = VOID
    outputs = []
    for channels, noise in ((128, 1.0), (512, 0.5)):
        logits = 8 * scores + noise * torch.randn(scores.shape, generator=generator)
        mix = torch.randn(channels, num_classes, 1, 1, generator=generator)
        feature = (F.conv2d(logits, mix) / num_classes**0.5).relu()
        outputs.append(SegmentationOutput(logits.to(device), {"neck": feature.to(device)}))
    for tensor in (outputs[0].logits, outputs[0].features["neck"]):
        tensor.requires_grad_()
    return Batch(outputs[0], outputs[1], labels.to(device), num_classes)


# The originals, term by term


def bpkd(batch: Batch) -> Tensor:
    z_student, z_teacher = batch.logits
    known = batch.labels != VOID
    onehot = F.one_hot(batch.labels.long() * known, batch.num_classes).permute(0, 3, 1, 2).float() * known.unsqueeze(1)
    edge = F.max_pool2d(onehot, 7, 1, 3) - (1 - F.max_pool2d(1 - onehot, 7, 1, 3))
    mask = F.adaptive_avg_pool2d(edge * known.unsqueeze(1), z_student.shape[2:])
    p, log_q = (z_teacher * mask).softmax(1), (z_student * mask).log_softmax(1)
    phi = F.kl_div(log_q, p, reduction="none").sum(1, keepdim=True).repeat(1, batch.num_classes, 1, 1)
    edge_term = ((phi * mask).sum((2, 3)) / (mask > 0).sum((2, 3)).clamp(min=1)).sum() * 2 / len(z_student)
    p, log_q = (z_teacher * (1 - mask)).flatten(2).softmax(2), (z_student * (1 - mask)).flatten(2).log_softmax(2)
    body_term = F.kl_div(log_q, p, reduction="sum") / (len(z_student) * batch.num_classes)
    return 50 * edge_term + 20 * body_term


def cwd(batch: Batch) -> Tensor:
    z_student, z_teacher = (z.flatten(2) for z in batch.logits)
    p = z_teacher.softmax(2)
    return (p * (z_teacher.log_softmax(2) - z_student.log_softmax(2))).sum() / p.shape[:2].numel()


def skds_pair(batch: Batch) -> Tensor:
    grams = []
    for feature in batch.features:
        cells = F.max_pool2d(feature, 2, ceil_mode=True).flatten(2)
        cells = cells / cells.norm(dim=1, keepdim=True).clamp(min=1e-8)
        grams.append(torch.einsum("ncm,nck->nmk", cells, cells))
    return (grams[0] - grams[1]).square().mean()


def ifvd(batch: Batch) -> Tensor:
    labels, cosines = batch.small_labels.unsqueeze(1), []
    for feature in batch.features:
        centres = feature.clone()
        for label in range(batch.num_classes):
            member = (labels == label).float()
            mean = (member * feature).sum((2, 3), keepdim=True) / (member.sum((2, 3), keepdim=True) + 1e-6)
            centres = (1 - member) * centres + member * mean
        cosines.append(F.cosine_similarity(feature, centres, dim=1))
    return (cosines[0] - cosines[1]).square().mean()


def cirkd_minibatch(batch: Batch) -> Tensor:
    s, t = (F.normalize(feature.flatten(2), dim=1) for feature in batch.features)
    loss = torch.zeros((), device=s.device)
    for i in range(len(s)):
        for j in range(len(s)):
            log_q, p = (s[i].T @ s[j] / 0.1).log_softmax(1), (t[i].T @ t[j] / 0.1).softmax(1)
            loss = loss + F.kl_div(log_q, p, reduction="batchmean")
    return loss / len(s) ** 2


class CIRKDMemory(nn.Module):
    """Both memory terms; the queues are as long as ours, so that 150 classes fit."""

    def __init__(self, like: CIRKDLoss) -> None:
        super().__init__()
        self.projection, self.num_classes = like.projection, like.num_classes
        self.pixels, self.regions = like.pixels.entries.clone(), like.regions.entries.clone()
        self.ends = [[0] * self.num_classes, [0] * self.num_classes]

    def forward(self, batch: Batch) -> Tensor:
        feature, labels = batch.features[1], batch.small_labels
        t = F.normalize(feature, dim=1)
        s = F.normalize(self.projection(batch.features[0]), dim=1)
        for image, classes in zip(t, labels, strict=True):
            for label in classes.unique().tolist():
                if label != VOID:
                    own = image[:, classes == label]
                    self.push(1, label, F.normalize(own.mean(1), dim=0).unsqueeze(0))
                    self.push(0, label, own[:, torch.randperm(own.shape[1], device=own.device)[:16]].T)
        rows = (labels != VOID).flatten()
        s, t = (x.permute(0, 2, 3, 1).flatten(0, 2)[rows] for x in (s, t))
        loss = torch.zeros((), device=s.device)
        for queue, total in ((self.pixels, 4096), (self.regions, 1024)):
            index = torch.randperm(queue.shape[1], device=queue.device)[: total // self.num_classes + 1]
            memory = queue[:, index].flatten(0, 1)
            loss = loss + F.kl_div(
                (s @ memory.T / 0.1).log_softmax(1), (t @ memory.T / 0.1).softmax(1), reduction="batchmean"
            )
        return loss

    def push(self, which: int, label: int, vectors: Tensor) -> None:
        queue, begin = (self.pixels, self.regions)[which][label], self.ends[which][label]
        if begin + len(vectors) >= len(queue):
            queue[-len(vectors) :], self.ends[which][label] = vectors, 0
        else:
            queue[begin : begin + len(vectors)], self.ends[which][label] = vectors, begin + len(vectors)


def canonical(batch: Batch, projection: nn.Module) -> Tensor:
    p, log_q = batch.logits[1].softmax(1), batch.logits[0].log_softmax(1)
    logit = F.kl_div(log_q, p, reduction="none").sum(1).mean()
    return logit + F.mse_loss(projection(batch.features[0]), batch.features[1])


CIRKD_OFF = {"kd_weight": 0, "minibatch_weight": 0, "pixel_weight": 0, "region_weight": 0}
TERMS = {
    "bpkd": (lambda c: BPKDLoss.paper(c), lambda _: bpkd),
    "cwd": (lambda c: CWDLoss(c, weight=1), lambda _: cwd),
    "skds pair": (lambda c: SKDSLoss(c, pixel_weight=0, pair_weight=1, adversarial_weight=0), lambda _: skds_pair),
    "ifvd": (lambda c: IFVDLoss(c, kd_weight=0, variation_weight=1, adversarial_weight=0), lambda _: ifvd),
    "cirkd mini-batch": (
        lambda c: CIRKDLoss(c, **CIRKD_OFF | {"minibatch_weight": 1}, pool=1),
        lambda _: cirkd_minibatch,
    ),
    "cirkd memory": (lambda c: CIRKDLoss(c, **CIRKD_OFF | {"pixel_weight": 1, "region_weight": 1}), CIRKDMemory),
    "canonical": (
        lambda c: CanonicalKDLoss(c, logit_weight=1, feature_weight=1),
        lambda ours: lambda batch: canonical(batch, ours.projection),
    ),
}
RANDOM = {"cirkd memory"}  # which features are remembered is drawn, so the two have no common value


def measure(side: str, name: str, num_classes: int, device: str, *, quick: bool) -> dict[str, float]:
    """One loss in this process: milliseconds, megabytes and value."""
    torch.manual_seed(0)
    batch = make_batch(num_classes, device, quick=quick)
    ours = (METHODS[name] if side == "method" else TERMS[name][0])(num_classes)
    ours.prepare(batch.student, batch.teacher)
    original = TERMS[name][1](ours) if side == "original" else None

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


def measure_alone(side: str, name: str, num_classes: int, device: str, *, quick: bool) -> dict[str, float]:
    """`measure` in a process of its own; a quick one, whose figures mean nothing, in this one."""
    if quick:
        return measure(side, name, num_classes, device, quick=True)
    arguments = ["--measure", side, name, str(num_classes), device]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, num_classes: int, device: str, *, quick: bool) -> dict[str, object]:
    """A term, both ways."""
    ours, original = (measure_alone(side, name, num_classes, device, quick=quick) for side in ("ours", "original"))
    difference = abs(ours["value"] / original["value"] - 1)
    if name not in RANDOM and difference > 1e-4:
        raise SystemExit(f"{name} at {num_classes} classes: {ours['value']} is not the original's {original['value']}.")
    faster = original["ms"] / ours["ms"]
    memory = f"{ours['peak_mb']:8.0f} MB, original {original['peak_mb']:8.0f} MB"
    times = f"{ours['ms']:9.1f} ms, original {original['ms']:9.1f} ms: {faster:6.1f} times as fast"
    print(f"{device:5} C={num_classes:<4} {name:17} {times}; {memory}", flush=True)
    return {
        "term": name,
        "classes": num_classes,
        "device": device,
        "ours": ours,
        "original": original,
        "faster": faster,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="tiny maps, to see that it runs")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        side, name, num_classes, device = options.measure
        print(json.dumps(measure(side, name, int(num_classes), device, quick=False)))
        return
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    cases = [(device, classes) for device in devices for classes in (19, 150)]
    terms = [compare(name, classes, device, quick=options.quick) for device, classes in cases for name in TERMS]
    methods = []
    for device, classes in cases:
        for name in METHODS:
            row = measure_alone("method", name, classes, device, quick=options.quick)
            print(f"{device:5} C={classes:<4} {name:17} {row['ms']:9.1f} ms, {row['peak_mb']:8.0f} MB", flush=True)
            methods.append({"method": name, "classes": classes, "device": device, **row})
    report = {
        "machine": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quick": options.quick,
        "terms": terms,
        "methods": methods,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
