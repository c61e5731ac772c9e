"""Facts found by inspection of an artifact: parameters, MACs, the precision of its layers, their placement."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bpkd_sdk.runtime import MatchedRuntime, Runtime
from bpkd_sdk.runtime.manifest import EngineManifest
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session, run_session
from bpkd_sdk.runtime.onnx_file import Field, read_fields, read_onnx, read_varint

if TYPE_CHECKING:
    from torch import nn

# Operators that make up the cost of a network, with the position of the weights among their inputs. ONNX Runtime's
# fusions turn the operators of the first line into those of the second line.
_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
_WEIGHTED |= {"FusedConv": 1, "FusedMatMul": 1, "FusedGemm": 1, "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
# Types of tensors by their numbers in onnx.proto.
_TENSOR_TYPES = {1: "float32", 2: "uint8", 3: "int8", 10: "float16", 11: "float64", 16: "bfloat16"}
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
        params: Number of parameters of the network; None if the artifact does not state it
            and the network is not available.
        macs: Number of multiply-accumulates for one image, as `bpkd_sdk.profile` counts them; None if the artifact
            does not state it for this size and the network is not available.
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


def find_facts(runtime: Runtime, images: np.ndarray, windows: int = 1) -> Facts:
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
    """Return the number of parameters, and of MACs for one image of (height, width); None for each that is unknown.

    Exported artifacts state both in their metadata, the MACs for the size of the export. For other sizes, and for files
    of older versions, the network is built again, which requires torch and the network's library.
    """
    if isinstance(runtime, MatchedRuntime):
        runtime = runtime.runtime
    cost, divisor = runtime.metadata.get("cost", {}), runtime.spec.size_divisor
    params, macs = cost.get("params"), None
    if cost and _padded(input_size, divisor) == _padded(runtime.metadata["input_size"], divisor):
        macs = cost["macs"]
    if (params is None or macs is None) and (network := _network(runtime)) is not None:
        from bpkd_sdk.evaluation.profile import count_macs

        params = sum(parameter.numel() for parameter in network.parameters())
        macs = count_macs(network, input_size, divisor)
    return params, macs


def _padded(size: Sequence[int], divisor: int) -> list[int]:
    return [side + -side % divisor for side in size]


def _network(runtime: Runtime) -> nn.Module | None:
    """Return the network of a runtime in torch, or a new one of its spec; None if it cannot be built."""
    if (module := _module(runtime)) is not None:
        original: nn.Module = getattr(module, "_orig_mod", module)  # torch.compile wraps the network
        return original
    try:
        from bpkd_sdk.models.library import build_from_spec

        network = build_from_spec(runtime.spec)
    except (ImportError, ValueError):  # torch or its library is not installed, or in another version
        return None
    return None if network is None else network.eval()


def _module(runtime: Runtime) -> nn.Module | None:
    """Return the module that torch runs; None for a runtime of another kind."""
    return getattr(runtime, "module", None) if runtime.is_module else None


def layer_precisions(runtime: Runtime) -> dict[str, int]:
    """Count the layers with weights of a module, an ONNX file or an engine by the type that they compute in.

    Examples:
        >>> from torch import nn
        >>> from bpkd_sdk.runtime import TorchRuntime
        >>> layer_precisions(TorchRuntime(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1).half())))
        {'fp32': 1, 'fp16': 1}
    """
    if (module := _module(runtime)) is not None:
        return count_types(_module_types(module))
    if isinstance(runtime, OnnxRuntime):
        return count_types(_GraphTypes(read_onnx(runtime.path)[0]).layer_types())
    if isinstance(manifest := getattr(runtime, "manifest", None), EngineManifest):
        parsed = sum((Counter(types) for types in manifest.layers.values()), Counter[str]())
        return count_types(list(Counter(manifest.inspected or parsed).elements()))
    return {}


def count_types(types: Iterable[str]) -> dict[str, int]:
    """Count types, which have one name whatever library states them, from the most frequent on."""
    return dict(Counter(_SHORT.get(type_, type_) for type_ in types).most_common())


def _module_types(module: nn.Module) -> list[str]:
    weights = (getattr(part, "weight", None) for part in module.modules())
    return [str(w.dtype).removeprefix("torch.") for w in weights if w is not None and w.ndim > 1]


class _Message:
    """A message of protobuf in the content of an ONNX file; fields are accessed by their numbers in onnx.proto."""

    def __init__(self, content: bytes, start: int = 0, end: int | None = None) -> None:
        self.content = content
        self.fields: dict[int, list[Field]] = defaultdict(list)
        for field in read_fields(content, start, end):
            self.fields[field.number].append(field)

    def messages(self, number: int) -> list[_Message]:
        return [_Message(self.content, field.value_start, field.end) for field in self.fields[number]]

    def texts(self, number: int) -> list[str]:
        return [field.value(self.content).decode() for field in self.fields[number]]

    def text(self, number: int) -> str:
        return next(iter(self.texts(number)), "")

    def integer(self, number: int) -> int:
        fields = self.fields[number]
        return read_varint(self.content, fields[-1].value_start, fields[-1].end)[0] if fields else 0


class _Node:
    """A node of an ONNX graph: its operator, and the names of its inputs and outputs.

    Attributes:
        constant: Type of the tensor that the node contains as its value; None without one.
        cast_to: Type that a Cast casts to.
    """

    def __init__(self, node: _Message) -> None:
        self.input, self.output, self.op_type = node.texts(1), node.texts(2), node.text(4)
        attributes = {attribute.text(1): attribute for attribute in node.messages(5)}
        values = attributes["value"].messages(5) if "value" in attributes else []
        self.constant = _tensor_type(values[0].integer(2)) if values else None
        self.cast_to = _tensor_type(attributes["to"].integer(3)) if "to" in attributes else None


class _GraphTypes:
    """A search in an ONNX graph for the type of each layer, from its inputs back to the node that sets the type."""

    def __init__(self, content: bytes) -> None:
        (graph,) = _Message(content).messages(7)
        nodes = [_Node(node) for node in graph.messages(1)]
        self.constants = {node.output[0]: node.constant for node in nodes if node.constant is not None}
        self.constants |= {tensor.text(8): _tensor_type(tensor.integer(2)) for tensor in graph.messages(5)}
        self.makers = {tensor: node for node in nodes for tensor in node.output}
        self.layers = [node for node in nodes if node.op_type in _WEIGHTED]

    def layer_types(self) -> list[str]:
        """Return the type of every layer; a product of two activations is not a layer."""
        return [type_ for layer in self.layers if (type_ := self._layer_type(layer)) is not None]

    def _layer_type(self, layer: _Node) -> str | None:
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
        return maker.cast_to if stored is not None and maker.op_type == "Cast" else stored

    def _origin(self, tensor: str) -> str:
        while (maker := self.makers.get(tensor)) is not None and maker.op_type in _TRANSPARENT:
            tensor = maker.input[0]
        return tensor

    def _made_by(self, tensor: str, operator: str) -> _Node | None:
        maker = self.makers.get(tensor)
        return maker if maker is not None and maker.op_type == operator else None


def _tensor_type(number: int) -> str:
    return _TENSOR_TYPES.get(number, f"type {number}")


def profile_onnx_nodes(runtime: Runtime, images: np.ndarray) -> tuple[dict[str, int], dict[str, int]]:
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
    return dict(providers.most_common()), count_types(layers)
