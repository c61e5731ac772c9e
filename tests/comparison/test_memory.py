"""The peak is of what happens after the meter starts, and all of it."""

import sys

import pytest
import torch

from bpkd_sdk.comparison.memory import MemoryMeter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's record of the peak is Linux's")
@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_is_what_was_needed_at_once(device):
    def work(mib):
        return torch.ones(mib * MIB, dtype=torch.uint8, device=device)

    before = MemoryMeter(torch.device(device))
    held = work(100)
    meter = MemoryMeter(torch.device(device))
    assert meter.peak() < 8 * MIB
    for _ in range(3):
        work(64)
    assert 60 * MIB < meter.peak() < 80 * MIB
    again = MemoryMeter(torch.device(device))
    work(32)
    assert 28 * MIB < again.peak() < 48 * MIB
    assert before.peak() > 90 * MIB
    assert held.numel() == 100 * MIB
