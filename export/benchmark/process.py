"""A subject in a process of its own, so that its memory is measured separately and its crash stops nothing else."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bpkd_sdk.export.benchmark.facts import Facts
from bpkd_sdk.export.benchmark.subject import Description, Subject, Times, WarmUp
from bpkd_sdk.runtime.fit import Fit

_CODE = "from bpkd_sdk.export.benchmark.process import serve; serve()"


class ArtifactError(Exception):
    """The reason why an artifact could not be measured, as the report shows it."""


class RemoteSubject:
    """A proxy of a `Subject` that runs in a new process, with the same methods.

    Every method raises `ArtifactError` with the reason if the subject fails or its process ends.

    Args:
        source: Path or URL of the artifact.
        device: Device to run the artifact on.
        batch_size: Number of images per call.
        fit: Rule for images of a size that the artifact does not accept.
    """

    def __init__(self, source: str | Path, device: str, batch_size: int, fit: Fit = "slide") -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process runs)
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._arguments = (source, device, batch_size, fit)

    def describe(self) -> Description:
        """Open the artifact in the process, and return its description."""
        description: Description = self._call("describe", *self._arguments)
        return description

    def warm_up(self, images: np.ndarray) -> WarmUp:
        """Call `Subject.warm_up`."""
        warm_up: WarmUp = self._call("warm_up", images)
        return warm_up

    def measure_round(self, seconds: float) -> Times:
        """Call `Subject.measure_round`."""
        times: Times = self._call("measure_round", seconds)
        return times

    def segment(self, images: np.ndarray) -> np.ndarray:
        """Call `Subject.segment`."""
        masks: np.ndarray = self._call("segment", images)
        return masks

    def inspect(self) -> tuple[Facts, int | None]:
        """Call `Subject.inspect`."""
        facts: tuple[Facts, int | None] = self._call("inspect")
        return facts

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        process = self._process
        assert process.stdin is not None  # noqa: S101  (opened as a pipe)
        assert process.stdout is not None  # noqa: S101
        try:
            pickle.dump((method, arguments), process.stdin)
            process.stdin.flush()
            result, problem = pickle.load(process.stdout)  # noqa: S301  (written by `serve` below)
        except (EOFError, OSError) as error:
            raise ArtifactError(f"Its process ended with code {process.wait()}. {self._last_line()}".strip()) from error
        if problem is not None:
            raise ArtifactError(problem)
        return result

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"Its last line of output: {lines[-1]}" if lines else ""


def serve() -> None:
    """Execute the method calls that arrive on standard input, until it is closed.

    The first call also carries the arguments of `Subject`.
    """
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of a library must not mix with the results
    subject = None
    while True:
        try:
            method, arguments = pickle.load(calls)  # noqa: S301  (written by the process that started this one)
        except EOFError:
            return
        try:
            if subject is None:
                subject, arguments = Subject(*arguments), ()
            result: tuple[Any, str | None] = (getattr(subject, method)(*arguments), None)
        except Exception as error:  # an artifact may fail in any way, and the report states how
            result = (None, f"{type(error).__name__}: {error}")
        pickle.dump(result, results)
        results.flush()
