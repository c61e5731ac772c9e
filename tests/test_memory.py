"""The measured peak is that of the work after the meter starts, and includes all of it."""

# ruff: noqa: N802  (the functions of the driver have their own style)

import subprocess
import sys
import time

import pytest
import torch

from bpkd_sdk import gpu
from bpkd_sdk.memory import GpuMemoryMeter, combined_peak

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# Runs in a new process, because memory that other tests hold or free would change the figures.
WORK = """
import sys

import torch

from bpkd_sdk.memory import MemoryMeter

device, MIB = torch.device(sys.argv[1]), 2**20

def work(mib):
    return torch.ones(mib * MIB, dtype=torch.uint8, device=device)

work(1)
before = MemoryMeter(device)
held = work(100)
meter = MemoryMeter(device)
nothing = meter.peak()
for _ in range(3):
    work(64)
thrice = meter.peak()
again = MemoryMeter(device)
work(32)
print(*(peak / MIB for peak in (nothing, thrice, again.peak(), before.peak())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel records the peak on Linux only")
@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_is_the_memory_that_was_needed_at_the_same_time(device):
    done = subprocess.run([sys.executable, "-c", WORK, device], capture_output=True, text=True, check=True)
    nothing, thrice, again, before = map(float, done.stdout.split())
    assert nothing < 8
    assert 60 < thrice < 80
    assert 28 < again < 48
    assert before > 90


class Driver:
    """Functions of the NVIDIA driver for one GPU of 1000 bytes."""

    used = 300
    contexts = 0

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, gpu, index):
        gpu._obj.value = index
        return 0 if index == 0 else 101

    def cuDevicePrimaryCtxRetain(self, context, gpu):
        context._obj.value = 7
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts += 1
        return 0 if context.value == 7 else 201

    def cuCtxPopCurrent_v2(self, context):
        self.contexts -= 1
        return 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = 1000 - self.used, 1000
        return 0


def test_the_memory_of_a_gpu_is_that_of_the_driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(gpu, "load_driver", lambda: driver)
    with GpuMemoryMeter("cuda:0") as first:
        driver.used = 800
        time.sleep(0.1)
        driver.used = 500
    driver.used = 900  # of other work
    with GpuMemoryMeter("cuda:0") as second:
        driver.used = 950
    assert (first.peak, first.kept, second.peak) == (500, 200, 50)
    assert combined_peak(first, second) == 500
    assert driver.contexts == 0
    with GpuMemoryMeter("cpu") as none:
        pass
    assert combined_peak(first, none) is None
    with pytest.raises(RuntimeError, match="cuDeviceGet with the error 101"), GpuMemoryMeter("cuda:1"):
        pass
