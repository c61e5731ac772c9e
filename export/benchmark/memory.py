"""How much memory an artifact needs: of the host, in a process of its own, and of the GPU."""

from __future__ import annotations

import threading
from pathlib import Path

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
    """From when it is made until it is stopped, watches how full a GPU is.

    All processes count, as the driver cannot always tell them apart.

    Args:
        device: Where; nothing is watched on others than CUDA's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak: int | None = None
        if device.type == "cuda":
            self._used()  # sets up torch's own context, which is no artifact's cost
            self._before = self._used()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self) -> int | None:
        """Most bytes that were in use, less those in use at the start; None without a GPU."""
        if self._device.type == "cuda":
            self._done.set()
            self._thread.join()
        return self._peak

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._done.wait(_EVERY)
            self._peak = max(self._peak or 0, self._used() - self._before)

    def _used(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free
