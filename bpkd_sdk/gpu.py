"""The GPUs of this machine and their memory, through the NVIDIA driver alone."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def gpu_names() -> list[str]:
    """Return the names of the GPUs that the NVIDIA driver lets this process use, in CUDA's order."""
    driver, count, name = load_driver(), ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    names = []
    for index in range(count.value):
        gpu = ctypes.c_int(0)
        is_known = driver.cuDeviceGet(ctypes.byref(gpu), index) == 0 and driver.cuDeviceGetName(name, 256, gpu) == 0
        names.append(name.value.decode() if is_known else "GPU")
    return names


def load_driver() -> ctypes.CDLL | None:
    """Return the library of the NVIDIA driver, whose functions need no package; None if there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


class GpuContext:
    """The CUDA context of a GPU that all libraries of this process share.

    Args:
        index: Number of the GPU.

    Raises:
        RuntimeError: If the driver does not see the GPU, or fails.
    """

    def __init__(self, index: int) -> None:
        self._driver, self._gpu, self._context = load_driver(), ctypes.c_int(), ctypes.c_void_p()
        if self._driver is None:
            raise RuntimeError("The NVIDIA driver was not found. Run `bpkd doctor`.")
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._gpu), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._gpu)

    def used_memory(self) -> int:
        """Return the number of bytes of the GPU that are in use, by all processes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        return total.value - free.value

    def _call(self, function: str, *arguments: Any) -> None:
        if (code := getattr(self._driver, function)(*arguments)) != 0:
            raise RuntimeError(f"The NVIDIA driver failed in {function} with the error {code}. Run `bpkd doctor`.")
