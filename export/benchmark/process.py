"""A `Subject` in a process of its own: its memory is its own, and what makes it crash takes nobody along.

The two ends talk through the process's standard input and output, in pickled messages.
"""

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
from bpkd_sdk.export.benchmark.subject import Opened, Subject, Times, WarmUp


class ArtifactError(Exception):
    """Why an artifact could not be measured, as a table tells it."""


_CODE = "from bpkd_sdk.export.benchmark.process import serve; serve()"


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

    def look(self) -> tuple[Facts, int | None]:
        """As `Subject.look`."""
        found: tuple[Facts, int | None] = self._ask("look")
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
