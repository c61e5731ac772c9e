"""What an artifact is, found by looking into it: its size, its cost, the precision of its layers, where they run."""

from __future__ import annotations

import copy
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpkd_sdk.doctor import query_gpus
from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.models import create_model
from bpkd_sdk.runtime import MatchedRuntime, Runtime, TorchRuntime
from bpkd_sdk.runtime.engine import EngineRuntime
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session, run_session

# The operators that make a network's cost, with the position of the weights among their inputs. Those in the second
# line are what ONNX Runtime makes of the first.
_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
_WEIGHTED |= {"FusedConv": 1, "FusedMatMul": 1, "FusedGemm": 1, "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
_TRANSPARENT = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze")
_SHORT = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
    "uint8": "int8",
    "float": "fp32",
    "double": "fp64",
    "FLOAT": "fp32",
    "HALF": "fp16",
    "INT8": "int8",
    "BF16": "bf16",
    "FP8": "fp8",
}


@dataclass(frozen=True)
class Facts:
    """What does not change from call to call.

    Attributes:
        params: Of the network; None where neither the network nor its weights can be seen.
        macs: Multiply-accumulates for one image, as `bpkd_sdk.profile` counts them; None where the network is
            not known.
        precision: How many layers with weights compute in which type, as found in the file; empty if it does not tell.
        placement: How many nodes ONNX Runtime runs on which provider; empty for other formats.
        executed: How many layers ONNX Runtime runs in which type on this device; empty for other formats.
    """

    params: int | None
    macs: int | None
    precision: Mapping[str, int]
    placement: Mapping[str, int]
    executed: Mapping[str, int]


def find_facts(runtime: Runtime, images: Tensor) -> Facts:
    """Look into an artifact; `images` (N, H, W, 3) uint8 are what it is benchmarked with."""
    params, macs = count_cost(runtime, (images.shape[1], images.shape[2]))
    return Facts(params, macs, precision_found(runtime), *onnx_nodes(runtime, images))


def count_cost(runtime: Runtime, size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Parameters, and MACs for one image of (height, width); None where they cannot be known."""
    if isinstance(runtime, MatchedRuntime):
        runtime = runtime.runtime
    network = _network(runtime)
    if network is None:
        return (_initializers(runtime.path) if isinstance(runtime, OnnxRuntime) else None), None
    params = sum(parameter.numel() for parameter in network.parameters())
    divisor = runtime.spec.size_divisor
    try:
        # On "meta" nothing is computed.
        cost = profile(network.to("meta"), (size[0] + -size[0] % divisor, size[1] + -size[1] % divisor))
    except Exception:  # the network's own code may raise anything where tensors have no values
        return params, None
    return params, cost.macs


def _network(runtime: Runtime) -> nn.Module | None:
    """The network in torch, to be done with as one likes: a copy of its own, or built by the name in its metadata."""
    if isinstance(runtime, TorchRuntime):
        own: nn.Module = getattr(runtime.module, "_orig_mod", runtime.module)  # of what torch.compile returned
        return copy.deepcopy(own)
    spec = runtime.spec
    return create_model(spec.name, spec.num_classes).eval() if spec.name is not None else None


def _initializers(path: Path) -> int:
    import onnx

    tensors = onnx.load(path).graph.initializer
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8)
    return sum(torch.Size(tensor.dims).numel() for tensor in tensors if tensor.data_type in kinds)


def precision_found(runtime: Runtime) -> dict[str, int]:
    """How many layers with weights compute in which type: of a module, an ONNX file or an engine.

    Example:
        >>> precision_found(TorchRuntime(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1).half())))
        {'fp32': 1, 'fp16': 1}
    """
    if isinstance(runtime, TorchRuntime):
        return _counted(_module_types(runtime.module))
    if isinstance(runtime, OnnxRuntime):
        return _counted(_onnx_types(runtime.path))
    if isinstance(runtime, EngineRuntime):
        manifest = runtime.manifest
        parsed = sum((Counter(types) for types in manifest.layers.values()), Counter[str]())
        return _counted(list(Counter(manifest.inspected or parsed).elements()))
    return {}


def _counted(types: list[str]) -> dict[str, int]:
    return dict(Counter(_SHORT.get(type_, type_) for type_ in types).most_common())


def _module_types(module: nn.Module) -> list[str]:
    weights = [getattr(part, "weight", None) for part in module.modules()]
    return [str(w.dtype).removeprefix("torch.") for w in weights if isinstance(w, Tensor) and w.ndim > 1]


def _onnx_types(path: Path) -> list[str]:
    import onnx

    return _GraphTypes(onnx.load(path).graph).found()


class _GraphTypes:
    """Follows the inputs of an ONNX graph's layers back to where their type is decided."""

    def __init__(self, graph: Any) -> None:
        values = {node.output[0]: a.t for node in graph.node for a in node.attribute if a.name == "value"}
        tensors = values | {tensor.name: tensor for tensor in graph.initializer}
        self.constants = {name: _type_name(tensor.data_type) for name, tensor in tensors.items()}
        self.makers = {tensor: node for node in graph.node for tensor in node.output}
        self.layers = [node for node in graph.node if node.op_type in _WEIGHTED]

    def found(self) -> list[str]:
        """The type of every layer; products of two activations are none."""
        return [type_ for layer in self.layers if (type_ := self._layer(layer)) is not None]

    def _layer(self, layer: Any) -> str | None:
        weights = self._origin(layer.input[_WEIGHTED[layer.op_type]])
        type_, scaled = self._type(weights), self._made_by(weights, "DequantizeLinear")
        if type_ is None or scaled is None or self._made_by(self._origin(layer.input[0]), "DequantizeLinear"):
            return type_
        # Integers in the file alone: the layer computes in the type that they are scaled to.
        return self._type(scaled.input[1])

    def _type(self, tensor: str) -> str | None:
        """Of a constant, and of what a cast or a dequantisation makes of one; None for an activation."""
        tensor = self._origin(tensor)
        if tensor in self.constants:
            return self.constants[tensor]
        maker = self.makers.get(tensor)
        if maker is None or maker.op_type not in ("Cast", "DequantizeLinear"):
            return None
        stored = self._type(maker.input[0])
        return _type_name(maker.attribute[0].i) if stored is not None and maker.op_type == "Cast" else stored

    def _origin(self, tensor: str) -> str:
        while (maker := self.makers.get(tensor)) is not None and maker.op_type in _TRANSPARENT:
            tensor = maker.input[0]
        return tensor

    def _made_by(self, tensor: str, operator: str) -> Any:
        maker = self.makers.get(tensor)
        return maker if maker is not None and maker.op_type == operator else None


def _type_name(number: int) -> str:
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(number).name)


def onnx_nodes(runtime: Runtime, images: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """How many nodes ONNX Runtime runs on which provider after its own fusions, and how many layers in which type.

    Its profiler is what tells, in a session of its own that runs once. Both are empty for other formats.
    """
    if not isinstance(runtime, OnnxRuntime):
        return {}, {}
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(runtime.model(), runtime.device, profile=Path(folder) / "nodes")
        run_session(session, runtime.prepare(images))
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = {event["name"]: event["args"] for event in events if event["name"].endswith("_kernel_time")}.values()
    providers_of = Counter(node["provider"].removesuffix("ExecutionProvider") for node in nodes)
    layers = [next(iter(node["input_type_shape"][0])) for node in nodes if node["op_name"] in _WEIGHTED]
    return dict(providers_of.most_common()), _counted(layers)


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
