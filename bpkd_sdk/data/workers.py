"""Processes that read data beside the one that computes."""

from __future__ import annotations

import os
import signal


def spare_cores() -> int:
    """Up to 8 of the cores that fall to this process; the launcher says how many processes share the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def leave_interrupts_to_the_main_process(_worker: int) -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
