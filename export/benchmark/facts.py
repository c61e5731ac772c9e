"""Facts found by inspection of an artifact: parameters, MACs, the precision of its layers, their placement."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.models.library import build_from_spec
from bpkd_sdk.runtime import MatchedRuntime, Runtime, TorchRuntime
from bpkd_sdk.runtime.engine import EngineRuntime
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session, run_session

# Operators that make up the cost of a network, with the position of the weights among their inputs. ONNX Runtime's
# fusions turn the operators of the first line into those of the second line.
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
    """Facts of an artifact that are the same for every call.

    Attributes:
        params: Number of parameters of the network; None if neither the network nor its weights are available.
        macs: Number of multiply-accumulates for one image, as `bpkd_sdk.profile` counts them; None if the network is
            not available.
        precision: Number of layers with weights by the type that they compute in according to the file; empty if the
            file does not state it.
        placement: Number of nodes by the execution provider of ONNX Runtime; empty for other formats.
        executed: Number of layers by the type in which ONNX Runtime runs them on this device; empty for other formats.
    """

    params: int | None
    macs: int | None
    precision: Mapping[str, int]
    placement: Mapping[str, int]
    executed: Mapping[str, int]


def find_facts(runtime: Runtime, images: Tensor, windows: int = 1) -> Facts:
    """Inspect an artifact.

    Args:
        runtime: Opened artifact.
        images: Images of the benchmark of a size that the artifact accepts, or windows of them, (N, H, W, channels).
        windows: Number of windows for one image.
    """
    params, macs = count_cost(runtime, (images.shape[1], images.shape[2]))
    facts = layer_precisions(runtime), *profile_onnx_nodes(runtime, images)
    return Facts(params, macs and windows * macs, *facts)


def count_cost(runtime: Runtime, input_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Return the number of parameters, and of MACs for one image of (height, width); None for each that is unknown."""
    if isinstance(runtime, MatchedRuntime):
        runtime = runtime.runtime
    network = _network(runtime)
    if network is None:
        return (_initializers(runtime.path) if isinstance(runtime, OnnxRuntime) else None), None
    params = sum(parameter.numel() for parameter in network.parameters())
    (height, width), divisor = input_size, runtime.spec.size_divisor
    try:
        # On the "meta" device only shapes are computed.
        cost = profile(network.to("meta"), (height + -height % divisor, width + -width % divisor))
    except Exception:  # the network's own code may raise any error when tensors have no values
        return params, None
    return params, cost.macs


def _network(runtime: Runtime) -> nn.Module | None:
    """Return a copy of the network in torch, or a new one of its spec, to be changed; None if it cannot be built."""
    if isinstance(runtime, TorchRuntime):
        module: nn.Module = getattr(runtime.module, "_orig_mod", runtime.module)  # torch.compile wraps the network
        return copy.deepcopy(module)
    try:
        network = build_from_spec(runtime.spec)
    except (ImportError, ValueError):  # its library is not installed, or in another version
        return None
    return None if network is None else network.eval()


def _initializers(path: Path) -> int:
    import onnx

    tensors = onnx.load(path).graph.initializer
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8)
    return sum(torch.Size(tensor.dims).numel() for tensor in tensors if tensor.data_type in kinds)


def layer_precisions(runtime: Runtime) -> dict[str, int]:
    """Count the layers with weights of a module, an ONNX file or an engine by the type that they compute in.

    Example:
        >>> layer_precisions(TorchRuntime(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1).half())))
        {'fp32': 1, 'fp16': 1}
    """
    if isinstance(runtime, TorchRuntime):
        return _count_types(_module_types(runtime.module))
    if isinstance(runtime, OnnxRuntime):
        return _count_types(_onnx_types(runtime.path))
    if isinstance(runtime, EngineRuntime):
        manifest = runtime.manifest
        parsed = sum((Counter(types) for types in manifest.layers.values()), Counter[str]())
        return _count_types(list(Counter(manifest.inspected or parsed).elements()))
    return {}


def _count_types(types: list[str]) -> dict[str, int]:
    return dict(Counter(_SHORT.get(type_, type_) for type_ in types).most_common())


def _module_types(module: nn.Module) -> list[str]:
    weights = [getattr(part, "weight", None) for part in module.modules()]
    return [str(w.dtype).removeprefix("torch.") for w in weights if isinstance(w, Tensor) and w.ndim > 1]


def _onnx_types(path: Path) -> list[str]:
    import onnx

    return _GraphTypes(onnx.load(path).graph).layer_types()


class _GraphTypes:
    """A search in an ONNX graph for the type of each layer, from its inputs back to the node that sets the type."""

    def __init__(self, graph: Any) -> None:
        values = {node.output[0]: a.t for node in graph.node for a in node.attribute if a.name == "value"}
        tensors = values | {tensor.name: tensor for tensor in graph.initializer}
        self.constants = {name: _type_name(tensor.data_type) for name, tensor in tensors.items()}
        self.makers = {tensor: node for node in graph.node for tensor in node.output}
        self.layers = [node for node in graph.node if node.op_type in _WEIGHTED]

    def layer_types(self) -> list[str]:
        """Return the type of every layer; a product of two activations is not a layer."""
        return [type_ for layer in self.layers if (type_ := self._layer_type(layer)) is not None]

    def _layer_type(self, layer: Any) -> str | None:
        weights = self._origin(layer.input[_WEIGHTED[layer.op_type]])
        type_, scaled = self._type(weights), self._made_by(weights, "DequantizeLinear")
        if type_ is None or scaled is None or self._made_by(self._origin(layer.input[0]), "DequantizeLinear"):
            return type_
        # The weights are stored as integers, but the layer computes in the type that they are scaled to.
        return self._type(scaled.input[1])

    def _type(self, tensor: str) -> str | None:
        """Return the type of a constant, also behind a cast or a dequantisation; None for an activation."""
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


def profile_onnx_nodes(runtime: Runtime, images: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Run ONNX Runtime's profiler for one call, and count the nodes after its fusions.

    Returns:
        Number of nodes by execution provider, and number of layers with weights by type; both are empty for other
        formats.
    """
    if not isinstance(runtime, OnnxRuntime):
        return {}, {}
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(runtime.model(), runtime.device, profile=Path(folder) / "nodes")
        run_session(session, runtime.prepare(images))
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = {event["name"]: event["args"] for event in events if event["name"].endswith("_kernel_time")}.values()
    providers = Counter(node["provider"].removesuffix("ExecutionProvider") for node in nodes)
    layers = [next(iter(node["input_type_shape"][0])) for node in nodes if node["op_name"] in _WEIGHTED]
    return dict(providers.most_common()), _count_types(layers)
