"""What a measurement was made on: the machine, its clocks, its versions, and whether it had other work to do."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bpkd_sdk.doctor import query_gpus

# Above this load per core, somebody else's work would be measured as well.
BUSY = 0.3

_PACKAGES = (
    *("bpkd-sdk", "torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tritonclient"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu13"),
)
_GPU_FACTS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mb": "memory.total",
    "state": "pstate",
    "clock_mhz": "clocks.sm",
    "highest_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
}


@dataclass(frozen=True)
class Environment:
    """The machine at one moment; None for what cannot be read.

    Attributes:
        system: Operating system and its version.
        cpu: Name of the processor.
        cores: That this process may use.
        threads: Of torch.
        governor: How the kernel chooses the processor's clock.
        clock_mhz: Of the first core.
        highest_clock_mhz: The same, at most.
        load: Mean number of processes that wanted a core during the last minute.
        gpus: For each NVIDIA GPU its name, driver, clocks, temperature and power.
        cuda: That torch is built for.
        versions: Of Python and packages.
        variables: Environment variables that change what is measured.
    """

    system: str
    cpu: str
    cores: int
    threads: int
    governor: str | None
    clock_mhz: float | None
    highest_clock_mhz: float | None
    load: float | None
    gpus: tuple[dict[str, str], ...]
    cuda: str | None
    versions: dict[str, str]
    variables: dict[str, str]

    @classmethod
    def here(cls) -> Environment:
        """Of this machine, now."""
        clock = Path("/sys/devices/system/cpu/cpu0/cpufreq")
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            governor=_read(clock / "scaling_governor"),
            clock_mhz=_mhz(clock / "scaling_cur_freq"),
            highest_clock_mhz=_mhz(clock / "cpuinfo_max_freq"),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            gpus=tuple(gpus()),
            cuda=torch.version.cuda if torch.cuda.is_available() else None,
            versions=_versions(),
            variables={name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_", "ORT_"))},
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why figures from this machine may be worth less than they look."""
        found = []
        if self.load is not None and self.load > BUSY * self.cores:
            found.append(
                f"The machine was busy: a load of {self.load:.1f} on {self.cores} cores before the first call."
            )
        if self.governor == "powersave":
            found.append("The processor's governor is 'powersave': its clock follows the load.")
        return tuple(found)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Environment:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        return cls(**{**values, "gpus": tuple(values["gpus"])})


def _cpu_name() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _mhz(path: Path) -> float | None:
    kilohertz = _read(path)
    return int(kilohertz) / 1000 if kilohertz else None


def gpus() -> list[dict[str, str]]:
    """As nvidia-smi tells them; without it, what torch knows."""
    if told := query_gpus(*_GPU_FACTS.values()):
        return [dict(zip(_GPU_FACTS, facts, strict=False)) for facts in told]
    return [{"name": torch.cuda.get_device_name(index)} for index in range(torch.cuda.device_count())]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
