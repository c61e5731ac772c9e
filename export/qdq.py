"""INT8 written into an ONNX graph as explicit Q/DQ: which layers there are, what ranges they see, where the pairs go.

The scheme is the one that TensorRT asks for: int8, symmetric (zero points 0), weights per output channel, activations
per tensor, biases left in float32. A pair stands before each quantised layer, and one behind it, because ONNX Runtime
computes a convolution in int8 only between two pairs (on a CPU 3 times faster than float32; slower than float32 with
none behind). Where ReLU or ReLU6 follows, the pair behind takes the range of *its* output: with zero point 0, rounding
and clipping at zero can change places, so that pair loses nothing, and spends int8 on no value that is dropped.

Sums of two activations are layers too: in float32 they keep the activations of a residual network in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WEIGHTED = ("Conv", "MatMul", "Gemm")

_LIMIT = 127
_INT32_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Layer:
    """A convolution, a product with constant weights, or the sum of two activations.

    Attributes:
        name: Of its weights, which for a file of `to_onnx` is the module's path in the network; of a sum, what it adds:
            layers by their names, other tensors by their own.
        node: The node's name.
        kind: Its operator, one of `WEIGHTED`, or "Add".
        sources: The tensors it reads.
        result: The tensor it makes.
        kept: The tensor whose range decides how the result is quantised: the output of the ReLU that follows, if one
            does, otherwise the result itself.
    """

    name: str
    node: str
    kind: str
    sources: tuple[str, ...]
    result: str
    kept: str

    @property
    def weighted(self) -> bool:
        """Whether it has weights."""
        return self.kind in WEIGHTED


def find_layers(proto: Any) -> list[Layer]:
    """The layers of a graph that int8 makes faster, in the order of computation."""
    constants = _constants(proto)
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    found: dict[str, Layer] = {}  # by the tensors that they make
    for node in proto.graph.node:
        if node.op_type in WEIGHTED and node.input[0] not in constants and _is_weight(node, constants):
            name, sources = node.input[1].removeprefix("network.").removesuffix(".weight"), node.input[:1]
        elif node.op_type == "Add" and found.keys() & node.input and not constants.keys() & node.input:
            name, sources = " + ".join(_layer_name(tensor, found) for tensor in node.input), node.input
        else:
            continue
        result = node.output[0]
        kept = _activated(readers.get(result, []), constants) or result
        found[result] = found[kept] = Layer(name, node.name, node.op_type, tuple(sources), result, kept)
    return list(dict.fromkeys(found.values()))


def _layer_name(tensor: str, found: Mapping[str, Layer]) -> str:
    """Of what a sum adds; a sum of sums names only the last, or names would grow without end."""
    layer = found.get(tensor)
    return layer.name if layer is not None and layer.weighted else tensor


def without_ends(layers: Sequence[Layer]) -> list[Layer]:
    """The layers between the first and the last that have weights."""
    weighted = [index for index, layer in enumerate(layers) if layer.weighted]
    return list(layers[weighted[0] + 1 : weighted[-1]])


def _is_weight(node: Any, constants: Mapping[str, Any]) -> bool:
    """Whether a node's second input is constant, and not one of the averaging matrices that stand for pooling."""
    from onnx import numpy_helper

    if node.input[1] not in constants:
        return False
    if node.op_type != "MatMul":
        return True
    weights = numpy_helper.to_array(constants[node.input[1]])
    return weights.ndim == 2 and not (np.all(weights >= 0) and np.allclose(weights.sum(0), 1))


def _constants(proto: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def _activated(readers: Sequence[Any], constants: Mapping[str, Any]) -> str | None:
    """The output of a ReLU or ReLU6 that is all that follows."""
    if len(readers) != 1:
        return None
    (node,) = readers
    if node.op_type == "Relu" or (node.op_type == "Clip" and _value(node, 1, constants) == 0):
        return str(node.output[0])
    return None


def _value(node: Any, position: int, constants: Mapping[str, Any]) -> float | None:
    from onnx import numpy_helper

    name = node.input[position] if len(node.input) > position else ""
    return float(numpy_helper.to_array(constants[name])) if name in constants else None


def measured_ranges(layers: Iterable[Layer]) -> list[str]:
    """The tensors whose range `with_ranges` has to measure."""
    return sorted({tensor for layer in layers for tensor in (*layer.sources, layer.kept)})


def with_ranges(proto: Any, tensors: Sequence[str]) -> Any:
    """A copy of a graph that returns the largest absolute value of each of the tensors, and nothing else.

    The maximum is taken inside, so that no more activations are alive at once than in a normal run.
    """
    from onnx import TensorProto, helper

    copy = _copy(proto)
    del copy.graph.output[:]
    for index, tensor in enumerate(tensors):
        copy.graph.node.append(helper.make_node("Abs", [tensor], [f"abs_{index}"]))
        copy.graph.node.append(helper.make_node("ReduceMax", [f"abs_{index}"], [f"range_{index}"], keepdims=0))
        copy.graph.output.append(helper.make_tensor_value_info(f"range_{index}", TensorProto.FLOAT, []))
    return copy


def quantized(proto: Any, layers: Sequence[Layer], ranges: Mapping[str, float]) -> Any:
    """A copy of a graph in which some layers compute in int8.

    Args:
        proto: The graph, in float32; it is not changed.
        layers: Of `find_layers`.
        ranges: Largest absolute value of each of `measured_ranges(layers)`.
    """
    outputs = {output.name for output in proto.graph.output}
    behind = {layer.result: layer.kept for layer in layers if layer.result not in outputs}
    writer = _Writer(proto, ranges, behind)
    chosen = {layer.node: layer for layer in layers}
    for node in proto.graph.node:
        if node.name in chosen:
            writer.layer(node, chosen[node.name])
        else:
            writer.node(node)
    return writer.finish()


class _Writer:
    """Writes a graph's nodes anew, with pairs between them."""

    def __init__(self, proto: Any, ranges: Mapping[str, float], behind: Mapping[str, str]) -> None:
        self.proto = _copy(proto)
        self.ranges = ranges
        self.behind = behind
        self.constants = _constants(proto)
        self.readers = Counter(tensor for node in proto.graph.node for tensor in node.input)
        self.scales: dict[str, np.float32] = {}
        self.nodes: list[Any] = []
        self.written: set[str] = set()

    def node(self, node: Any) -> Any:
        """Write a node that stays as it is, but reads results of layers behind their pairs."""
        copy = _copy(node)
        copy.input[:] = [self._read(tensor) for tensor in node.input]
        self.nodes.append(copy)
        return copy

    def layer(self, node: Any, layer: Layer) -> None:
        """Write a layer between pairs."""
        inputs = [self._source(layer, source) for source in layer.sources]
        if layer.weighted:
            inputs.append(self._weights(node))
        copy = self.node(node)
        copy.input[: len(inputs)] = inputs
        if layer.result in self.behind:
            self._pair(layer.result, layer.result, layer.kept)

    def _read(self, tensor: str) -> str:
        return _dequantized(tensor) if tensor in self.behind else tensor

    def _source(self, layer: Layer, source: str) -> str:
        """The pair before a layer: the one behind the layer before, or one of its own."""
        if source in self.behind and self.readers[source] == 1:
            return _dequantized(source)
        name = f"{layer.node}/{source}"
        if _dequantized(name) not in self.written:  # a tensor that is added to itself
            self._pair(self._read(source), name, source)
        return _dequantized(name)

    def _pair(self, tensor: str, name: str, measured: str) -> None:
        """Write a pair that reads `tensor`, with the range of the tensor `measured`."""
        from onnx import helper

        parameters = [self._constant(f"{name}/scale", self._scale(measured)), self._constant("int8/zero", np.int8(0))]
        inner = f"{name}/quantized"
        self.written.add(_dequantized(name))
        self.nodes.append(helper.make_node("QuantizeLinear", [tensor, *parameters], [inner], name=f"{name}/Q"))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [inner, *parameters], [_dequantized(name)], name=f"{name}/DQ")
        )

    def _scale(self, measured: str) -> np.float32:
        """The scale of a pair, for each pair of one tensor another by the smallest possible step.

        ONNX Runtime turns int8 activations into uint8 where that is faster, but only in pairs with one reader, and a
        layer between an int8 and a uint8 pair stays in float32. So layers share no pair; and equal pairs it would merge
        into a shared one. The step changes no rounded value.
        """
        # A tensor that is always zero has no range; any scale will do.
        scale = self.scales.get(measured, np.float32(self.ranges[measured] / _LIMIT or 1))
        self.scales[measured] = np.nextafter(scale, np.float32(np.inf))
        return scale

    def _weights(self, node: Any) -> str:
        """int8 weights and their dequantisation, once for all layers that share them."""
        from onnx import helper, numpy_helper

        name = node.input[1]
        if _dequantized(name) in self.written:
            return _dequantized(name)
        self.written.add(_dequantized(name))
        weights = numpy_helper.to_array(self.constants[name])
        axis = _channel_axis(node)
        has_bias = len(node.input) > 2 and node.input[2] in self.constants
        bias = numpy_helper.to_array(self.constants[node.input[2]]) if has_bias else np.zeros(1, np.float32)
        scale = _weight_scale(weights, axis, bias, self.ranges[node.input[0]] / _LIMIT or 1)
        shape = [-1 if dimension == axis else 1 for dimension in range(weights.ndim)]
        rounded = np.clip(np.rint(weights / scale.reshape(shape)), -_LIMIT, _LIMIT).astype(np.int8)
        inputs = [
            self._constant(f"{name}/quantized", rounded),
            self._constant(f"{name}/scale", scale),
            self._constant(f"{name}/zero", np.zeros(scale.shape, np.int8)),
        ]
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [_dequantized(name)], name=f"{name}/DQ", axis=axis)
        )
        return _dequantized(name)

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        if name not in self.written:
            self.written.add(name)
            self.proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def finish(self) -> Any:
        """The graph, without the weights that nothing reads any more."""
        graph = self.proto.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        read = {tensor for node in graph.node for tensor in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return self.proto


def _channel_axis(node: Any) -> int:
    """The axis of the weights that runs over output channels."""
    if node.op_type == "Conv":
        return 0
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else 1


def _weight_scale(
    weights: NDArray[np.float32], axis: int, bias: NDArray[np.float32], source_scale: float
) -> NDArray[np.float32]:
    """One scale per output channel (C,)."""
    others = tuple(dimension for dimension in range(weights.ndim) if dimension != axis)
    scale = np.abs(weights).max(others) / _LIMIT
    # ONNX Runtime keeps the bias as int32 in steps of source_scale * scale; a channel with next to no weights would
    # make it overflow, and such a channel can as well be rounded to nothing.
    least = 2 * np.abs(bias) / (source_scale * _INT32_LIMIT)
    result: NDArray[np.float32] = np.maximum(np.maximum(scale, least), np.finfo(np.float32).tiny).astype(np.float32)
    return result


def _dequantized(tensor: str) -> str:
    return f"{tensor}/dequantized"


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
