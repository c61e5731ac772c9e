"""One artifact under the clock: opened, warmed up until its times settle, timed in rounds, then looked into."""

from __future__ import annotations

import gc
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from bpkd_sdk.export.benchmark.facts import Facts, find_facts
from bpkd_sdk.export.benchmark.memory import DeviceMemory, host_memory, most_used
from bpkd_sdk.models import NetworkSpec
from bpkd_sdk.runtime import Accepts, Runtime, TorchRuntime, open_runtime
from bpkd_sdk.runtime.base import choose_device


class ArtifactError(Exception):
    """Why an artifact could not be measured, as a table tells it."""


_CODE = "from bpkd_sdk.export.benchmark.subject import serve; serve()"


class RemoteSubject:
    """What stands for the subject in this process; its methods do what the subject's of that name do.

    They raise `ArtifactError` with the reason where the subject fails, or its process ends.

    Args:
        source: Path or URL of the artifact.
        device: Where it shall run.
        batch: Images at a time.
    """

    def __init__(self, source: str | Path, device: str, batch: int) -> None:
        self._told = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._arguments = (source, device, batch)

    def opened(self) -> Opened:
        """Open it, in the process."""
        opened: Opened = self._ask("opened", *self._arguments)
        return opened

    def warm_up(self, images: np.ndarray) -> WarmUp:
        """As `Subject.warm_up`."""
        warm_up: WarmUp = self._ask("warm_up", images)
        return warm_up

    def round(self, seconds: float) -> Times:
        """As `Subject.round`."""
        times: Times = self._ask("round", seconds)
        return times

    def segment(self, images: np.ndarray) -> np.ndarray:
        """As `Subject.segment`."""
        masks: np.ndarray = self._ask("segment", images)
        return masks

    def inspect(self) -> tuple[Facts, int | None]:
        """As `Subject.inspect`."""
        found: tuple[Facts, int | None] = self._ask("inspect")
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._told.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        process = self._process
        assert process.stdin is not None  # noqa: S101  (pipes were asked for)
        assert process.stdout is not None  # noqa: S101
        try:
            pickle.dump((method, arguments), process.stdin)
            process.stdin.flush()
            result, problem = pickle.load(process.stdout)  # noqa: S301  (written by a process of our own)
        except (EOFError, OSError) as error:
            raise ArtifactError(
                f"Its process ended with code {process.wait()}. {self._last_words()}".strip()
            ) from error
        if problem is not None:
            raise ArtifactError(problem)
        return result

    def _last_words(self) -> str:
        self._told.seek(0)
        lines = self._told.read().decode(errors="replace").strip().splitlines()
        return f"Its last words: {lines[-1]}" if lines else ""


def serve() -> None:
    """Answer the requests that come in on standard input, until it is closed."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    subject = None
    while True:
        try:
            method, arguments = pickle.load(requests)  # noqa: S301  (written by the process that started this one)
        except EOFError:
            return
        try:
            if subject is None:
                subject, arguments = Subject(*arguments), ()
            answer: tuple[Any, str | None] = (getattr(subject, method)(*arguments), None)
        except Exception as error:  # an artifact may fail in any way, and this process's task is to say how
            answer = (None, f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


T = TypeVar("T")

# Warm enough: the medians of the last calls and of as many before them differ by no more than this share.
WINDOW, TOLERANCE = 3, 0.05
LONGEST_WARM_UP = 20.0  # seconds after the first call, which may compile

# Of the time of a round, for calls as a whole; the rest is for calls in stages.
SHARE_OF_WHOLE = 2 / 3


@dataclass(frozen=True)
class Opened:
    """What an artifact says of itself.

    Attributes:
        name: A path or URL, or a module's network.
        spec: The network's facts.
        accepts: The images that it takes.
        device: Where it runs.
        size: (height, width) of the images that it takes, or was traced with; None if it does not say.
        claim: The precision in its metadata; None for a module, which has none.
        warnings: What it was opened with.
    """

    name: str
    spec: NetworkSpec
    accepts: Accepts
    device: str
    size: tuple[int, int] | None
    claim: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class WarmUp:
    """How the first calls went.

    Attributes:
        calls: Until the times had settled.
        stable: Whether they had, in the time allowed.
        masks: uint8 (N, H, W), of all the images.
        device_memory: Bytes of the GPU at the peak, of opening and warming up, if nothing else ran on it meanwhile;
            None without one.
    """

    calls: int
    stable: bool
    masks: np.ndarray
    device_memory: int | None


@dataclass(frozen=True)
class Times:
    """Seconds of each call: of calls from host to host, and of others that were stopped after each stage."""

    whole: list[float] = field(default_factory=list)
    pre: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    post: list[float] = field(default_factory=list)


class Subject:
    """An artifact, opened.

    Args:
        source: What `bpkd_sdk.runtime.open_runtime` opens.
        device: Where it shall run.
        batch: Images at a time.
    """

    def __init__(self, source: str | Path | torch.nn.Module | Runtime, device: str, batch: int) -> None:
        self.batch = batch
        self._host = host_memory()
        where = source.device if isinstance(source, Runtime) else choose_device(device)
        with DeviceMemory(where) as self._opening, warnings.catch_warnings(record=True) as self._warnings:
            warnings.simplefilter("always")
            self.runtime = open_runtime(source, device)

    def opened(self) -> Opened:
        """What it says of itself."""
        facts, runtime = self.runtime.metadata, self.runtime
        size = runtime.accepts.fixed_size or facts.get("input_size")
        claim = None if isinstance(runtime, TorchRuntime) else facts.get("precision")
        told = tuple(str(warning.message) for warning in self._warnings if warning.category is UserWarning)
        size = size and (int(size[0]), int(size[1]))
        return Opened(runtime.name, runtime.spec, runtime.accepts, str(runtime.device), size, claim, told)

    def warm_up(self, images: np.ndarray) -> WarmUp:
        """Segment all images (N, H, W, 3), then go on until the times settle."""
        self.images = images
        batches = np.split(images, len(images) // self.batch)
        self._batches = cycle(batches)
        with DeviceMemory(self.runtime.device) as warming:
            masks = np.concatenate([self.runtime(batch) for batch in batches])
            calls, stable = settle(self._whole)
        gc.collect()
        return WarmUp(len(batches) + calls, stable, masks, most_used(self._opening, warming))

    def round(self, seconds: float) -> Times:
        """Time calls for so long, but two as a whole and one in stages at least."""
        times = Times()
        gc.disable()
        try:
            times.whole.extend(repeat(lambda: timed(self._whole), seconds * SHARE_OF_WHOLE, 2))
            staged = repeat(self._in_stages, seconds * (1 - SHARE_OF_WHOLE), 1)
        finally:
            gc.enable()
        for stage, values in zip((times.pre, times.inference, times.post), zip(*staged, strict=True), strict=True):
            stage.extend(values)
        return times

    def segment(self, images: np.ndarray) -> np.ndarray:
        """Masks (N, H, W) of images (N, H, W, 3)."""
        return self.runtime(images)

    def inspect(self) -> tuple[Facts, int | None]:
        """What it is, and the bytes of host memory at the peak beyond those before it was opened (None: not known)."""
        now = host_memory()
        # The images came in later.
        grown = now[1] - self._host[0] - self.images.nbytes if now and self._host else None
        return find_facts(self.runtime, torch.from_numpy(self.images[: self.batch])), grown

    def _whole(self) -> None:
        self.runtime(next(self._batches))

    def _in_stages(self) -> tuple[float, float, float]:
        runtime, images = self.runtime, torch.from_numpy(next(self._batches))
        start = time.perf_counter()
        inputs = runtime.prepare(images)
        runtime.synchronize()
        prepared = time.perf_counter()
        outputs = runtime.infer(inputs)
        runtime.synchronize()
        inferred = time.perf_counter()
        runtime.masks(outputs).cpu()
        return prepared - start, inferred - prepared, time.perf_counter() - inferred


def settle(call: Callable[[], object]) -> tuple[int, bool]:
    """Call until the times settle: how many calls that took, and whether they did in `LONGEST_WARM_UP`."""
    times = [timed(call)]
    end = time.perf_counter() + LONGEST_WARM_UP
    while True:
        times.append(timed(call))
        if len(times) < 2 * WINDOW:
            continue
        before, last = statistics.median(times[-2 * WINDOW : -WINDOW]), statistics.median(times[-WINDOW:])
        if abs(last - before) <= TOLERANCE * before:
            return len(times), True
        if time.perf_counter() > end:
            return len(times), False


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeat(call: Callable[[], T], seconds: float, least: int) -> list[T]:
    """Call for so long, but so many times at least."""
    end = time.perf_counter() + seconds
    results = [call() for _ in range(least)]
    while time.perf_counter() < end:
        results.append(call())
    return results
