"""The measured peak is that of the work after the meter starts, and includes all of it."""

import subprocess
import sys

import pytest
import torch

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
