"""Peak memory of a piece of work: of the host, of torch's CUDA allocator, and of a whole GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from bpkd_sdk.gpu import GpuContext

if TYPE_CHECKING:
    import torch

RESET_PEAK = "5"  # https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html
SAMPLING_INTERVAL = 0.005  # seconds


class MemoryMeter:
    """A meter of this process's memory, which starts when it is created.

    On a CPU it measures the resident set of the process. The kernel records the peak, so no short peak is missed;
    psutil has no peak that can be reset, which is why Linux's own files are read. On CUDA it measures the memory that
    torch's allocator hands out.

    Args:
        device: Name of the device on which the work runs, or a torch device.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = str(device)
        self.kind = self.device.partition(":")[0]
        self.before: int | None = None
        gc.collect()
        if self.kind == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif self.kind == "cpu" and sys.platform == "linux":
            _return_free_memory()
            with suppress(OSError):  # some containers do not allow it; the peak is then that of the process so far
                Path("/proc/self/clear_refs").write_text(RESET_PEAK)
            self.before = psutil.Process().memory_info().rss

    def peak(self) -> int | None:
        """Return the peak in bytes since the start, minus the memory at the start.

        The result is None on devices other than CPU and CUDA, and for a CPU where the kernel's record of the peak is
        not available, such as on systems other than Linux.
        """
        if self.before is None:
            return None
        if self.kind != "cuda":
            return _peak_resident_set() - self.before
        import torch

        return torch.cuda.max_memory_allocated(self.device) - self.before


def _return_free_memory() -> None:
    """Return freed memory to the system; a later allocation could reuse it without raising the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only the GNU C library has it
    if trim is not None:
        trim(0)


def _peak_resident_set() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


class GpuMemoryMeter:
    """A context manager that samples the used memory of a whole GPU while its block runs.

    It also measures libraries that do not use torch's allocator, such as ONNX Runtime and TensorRT. The memory of all
    processes is counted, because the driver cannot always separate them, so no other process should use the GPU.

    Args:
        device: Name of the device on which the work runs; only CUDA devices are measured.

    Attributes:
        peak: Largest number of bytes in use, less those in use before the block; None without a GPU.
        kept: Number of bytes in use at the end of the block, less those in use before it; None without a GPU.
    """

    def __init__(self, device: str) -> None:
        self._kind, _, self._index = device.partition(":")
        self.peak: int | None = None
        self.kept: int | None = None

    def __enter__(self) -> Self:
        if self._kind == "cuda":
            self._context = GpuContext(int(self._index or 0))  # which is not part of the work
            self._before = self._context.used_memory()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._kind == "cuda":
            self._done.set()
            self._thread.join()

    def _sample(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._done.wait(SAMPLING_INTERVAL)
            self.kept = self._context.used_memory() - self._before
            self.peak = max(self.peak or 0, self.kept)


def combined_peak(first: GpuMemoryMeter, second: GpuMemoryMeter) -> int | None:
    """Return the peak in bytes over two blocks, without the memory that others took between them.

    The result is None without a GPU.
    """
    if first.peak is None or first.kept is None or second.peak is None:
        return None
    return max(first.peak, first.kept + second.peak)
