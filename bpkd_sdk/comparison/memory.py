"""How much memory a piece of work needs at its peak, beyond what the process held before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

RESET_PEAK = "5"  # man 5 proc, /proc/pid/clear_refs


class MemoryMeter:
    """Starts to measure when made.

    On a GPU it counts what torch allocates there; on a CPU under Linux the resident set of the process, whose peak the
    kernel records. Elsewhere nothing is known.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif device.type == "cpu" and sys.platform == "linux":
            _give_back_free_memory()
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
            self.before = _resident("VmRSS")

    def peak(self) -> int | None:
        """Bytes at the highest point so far, less those at the start; None where they cannot be had."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        if self.device.type == "cpu" and sys.platform == "linux":
            return _resident("VmHWM") - self.before
        return None


def _give_back_free_memory() -> None:
    """Without this, what an earlier run has freed would be used again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library alone
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
