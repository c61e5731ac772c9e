"""Description of the machine that a benchmark ran on: processor, GPUs, versions, load."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from bpkd_sdk.doctor import find_torch, query_gpus
from bpkd_sdk.gpu import gpu_names

# Above this load per core, other processes disturb the measurement.
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
    """The state of a machine at one moment. A value that cannot be read is None.

    Attributes:
        system: Name of the operating system and of the processor architecture.
        cpu: Name of the processor.
        cores: Number of cores that this process may use.
        threads: Number of threads that torch uses for one operation; None without torch.
        governor: Linux policy that sets the clock of the processor, such as "powersave".
        clock_mhz: Current clock of the processor, mean over its cores, in MHz.
        highest_clock_mhz: Highest clock of the processor, in MHz.
        load: Mean number of processes that ran or waited for a core during the last minute.
        gpus: Name, driver, clocks, temperature and power of each NVIDIA GPU.
        cuda: CUDA version that torch is built for; None if torch finds no GPU.
        versions: Versions of Python and of the packages that affect a measurement.
        variables: Environment variables that affect a measurement (OMP_*, KMP_*, ORT_*).
    """

    system: str
    cpu: str
    cores: int
    threads: int | None
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
        """Describe this machine as it is now."""
        torch = find_torch()
        clock_mhz, highest_clock_mhz = _clocks()
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads() if torch else None,
            governor=_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
            clock_mhz=clock_mhz,
            highest_clock_mhz=highest_clock_mhz,
            load=psutil.getloadavg()[0],
            gpus=tuple(list_gpus()),
            cuda=torch.version.cuda if torch and torch.cuda.is_available() else None,
            versions=_versions(),
            variables={name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_", "ORT_"))},
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons why figures from this machine may be inaccurate."""
        found = []
        if self.load is not None and self.load > BUSY * self.cores:
            found.append(
                f"The machine was busy: a load of {self.load:.1f} on {self.cores} cores before the first call."
            )
        if self.governor == "powersave":
            found.append("The processor's governor is 'powersave': its clock follows the load.")
        return tuple(found)


def describe_machine(environment: Environment) -> str:
    """Return an environment as one or two sentences."""
    torch = "" if environment.threads is None else f", torch on {environment.threads} thread(s)"
    cpu = f"{environment.cpu}, {environment.cores} cores{torch}"
    governor = f", governor {environment.governor}" if environment.governor else ""
    gpus = [f"{gpu['name']}, driver {gpu.get('driver', 'unknown')}" for gpu in environment.gpus]
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    return f"{'; '.join([cpu + governor, *gpus])}. {environment.system}. {versions}."


def list_gpus() -> list[dict[str, str]]:
    """Return the facts that nvidia-smi states for each GPU; without nvidia-smi, the names that the driver states."""
    if gpus := query_gpus(*_GPU_FACTS.values()):
        return [dict(zip(_GPU_FACTS, facts, strict=False)) for facts in gpus]
    return [{"name": name} for name in gpu_names()]


def _clocks() -> tuple[float | None, float | None]:
    """Return the current and the highest clock of the processor in MHz, None for each that is unknown."""
    try:
        clocks = psutil.cpu_freq()
    except (NotImplementedError, OSError):
        return None, None
    return (clocks.current or None, clocks.max or None) if clocks is not None else (None, None)


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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
