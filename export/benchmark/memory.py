"""How much memory an artifact needs: of the host, in a process of its own, and of the GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_EVERY = 0.005  # seconds between two looks at the GPU


def host_memory() -> tuple[int, int] | None:
    """Bytes of this process that are resident, now and at their peak; None where the system does not tell."""
    if not _STATUS.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return _bytes(lines["VmRSS"]), _bytes(lines["VmHWM"])


def _bytes(told: str) -> int:
    return 1024 * int(told.split()[0])


class DeviceMemory:
    """How full a GPU is while a block runs.

    All processes count, as the driver cannot always tell them apart, so nothing else should run meanwhile.

    Args:
        device: Where; nothing is watched on others than CUDA's.

    Attributes:
        peak: Most bytes that were in use, beyond those in use before the block; None without a GPU.
        kept: Bytes in use at the block's end, beyond those before; None without a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak: int | None = None
        self.kept: int | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            self._used()  # sets up torch's own context, which is no artifact's cost
            self._before = self._used()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._done.wait(_EVERY)
            self.kept = self._used() - self._before
            self.peak = max(self.peak or 0, self.kept)

    def _used(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def most_used(first: DeviceMemory, then: DeviceMemory) -> int | None:
    """Bytes at the peak of two blocks, whatever others took between them; None without a GPU."""
    if first.peak is None or first.kept is None or then.peak is None:
        return None
    return max(first.peak, first.kept + then.peak)
