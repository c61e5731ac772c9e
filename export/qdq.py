"""Writes INT8 into an ONNX graph as Q/DQ pairs: finds the layers, measures their ranges, inserts the pairs.

The scheme is the one that TensorRT requires: symmetric int8 (zero points are 0), one scale per output channel for
weights, one scale per tensor for activations, biases in float32. A pair (QuantizeLinear, DequantizeLinear) stands
before each quantised layer and one behind it, because ONNX Runtime computes a convolution in int8 only between two
pairs: on a CPU 3 times faster than in float32, but slower than in float32 without the pair behind. If a ReLU or ReLU6
follows, the pair behind the layer has the range of the activation's output. This is exact, since rounding and clipping
at zero commute when the zero point is 0, and no code is spent on values that the activation drops.

Sums of two activations count as layers too; otherwise the activations of a residual network would stay in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bpkd_sdk.export.graph import Graph, attributes_of
from bpkd_sdk.export.onnx_cpu import optimize_for_cpu

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

WEIGHTED = ("Conv", "MatMul", "Gemm")
SWITCH = "int8/layer"  # input of `with_switches`

_LIMIT = 127
_INT32_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Layer:
    """A convolution, a product with constant weights, or the sum of two activations.

    Attributes:
        name: Name of the weights, which is the module's path in the network for files of `to_onnx`; for a sum the names
            of both addends: names of layers, or of tensors that no layer makes.
        node: Name of the node.
        kind: Operator: one of `WEIGHTED`, or "Add".
        sources: Names of the activations that the layer reads.
        result: Name of the tensor that the layer makes.
        kept: Name of the tensor whose range is used to quantise the result: the output of the ReLU that follows, or the
            result itself if no ReLU follows.
    """

    name: str
    node: str
    kind: str
    sources: tuple[str, ...]
    result: str
    kept: str

    @property
    def weighted(self) -> bool:
        """Whether the layer has weights."""
        return self.kind in WEIGHTED


def find_layers(model: ModelProto) -> list[Layer]:
    """Return the layers that int8 makes faster, in the order of computation."""
    graph = Graph(model)
    found: dict[str, Layer] = {}  # by the tensors that they make
    for node in model.graph.node:
        if node.op_type in WEIGHTED and node.input[0] not in graph.constants and _has_weights(graph, node):
            name, sources = node.input[1].removeprefix("network.").removesuffix(".weight"), node.input[:1]
        elif node.op_type == "Add" and found.keys() & node.input and not graph.constants.keys() & node.input:
            name, sources = " + ".join(_addend_name(tensor, found) for tensor in node.input), node.input
        else:
            continue
        result = node.output[0]
        kept = _activation_of(graph, result) or result
        found[result] = found[kept] = Layer(name, node.name, node.op_type, tuple(sources), result, kept)
    return list(dict.fromkeys(found.values()))


def _has_weights(graph: Graph, node: NodeProto) -> bool:
    """Return whether a node's second input is constant, and not an averaging matrix of `average_over_cells`."""
    weights = graph.value(node.input[1])
    if weights is None or node.op_type != "MatMul":
        return weights is not None
    return weights.ndim == 2 and not (np.all(weights >= 0) and np.allclose(weights.sum(0), 1))


def _addend_name(tensor: str, found: Mapping[str, Layer]) -> str:
    """Return the name of the layer that computes a tensor.

    For a sum the name of the tensor is returned, because the names of nested sums would grow without limit.
    """
    layer = found.get(tensor)
    return layer.name if layer is not None and layer.weighted else tensor


def _activation_of(graph: Graph, tensor: str) -> str | None:
    """Return the output of a ReLU or ReLU6 that is the only reader of a tensor; None if there is no such reader."""
    if len(graph.readers[tensor]) != 1:
        return None
    (node,) = graph.readers[tensor]
    is_clip_at_zero = node.op_type == "Clip" and len(node.input) > 1 and graph.value(node.input[1]) == 0
    return str(node.output[0]) if node.op_type == "Relu" or is_clip_at_zero else None


def inner_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers between the first and the last layer that have weights, both excluded."""
    weighted = [index for index, layer in enumerate(layers) if layer.weighted]
    return list(layers[weighted[0] + 1 : weighted[-1]])


def range_tensors(layers: Iterable[Layer]) -> list[str]:
    """Return the names of the tensors whose ranges `insert_qdq` needs to quantise these layers."""
    return sorted({tensor for layer in layers for tensor in (*layer.sources, layer.kept)})


def with_range_outputs(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of a model whose outputs are the largest absolute values of these tensors, and nothing else.

    The model itself takes the maximum, so a run needs no more memory for activations than a normal run.
    """
    from onnx import TensorProto, helper

    changed = copy.deepcopy(model)
    del changed.graph.output[:]
    for index, tensor in enumerate(tensors):
        changed.graph.node.append(helper.make_node("Abs", [tensor], [f"abs_{index}"]))
        changed.graph.node.append(helper.make_node("ReduceMax", [f"abs_{index}"], [f"range_{index}"], keepdims=0))
        changed.graph.output.append(helper.make_tensor_value_info(f"range_{index}", TensorProto.FLOAT, []))
    return changed


def insert_qdq(model: ModelProto, layers: Sequence[Layer], ranges: Mapping[str, float]) -> ModelProto:
    """Return a copy of a model in which some layers compute in int8.

    Args:
        model: Model in float32; it is not changed.
        layers: Layers of `find_layers` to put into int8.
        ranges: Largest absolute value of each of `range_tensors(layers)`, by the tensor's name.
    """
    graph = _QuantizedGraph(copy.deepcopy(model), layers, ranges)
    chosen = {layer.node: layer for layer in layers}
    for node in graph.take_nodes():
        if node.name in chosen:
            graph.keep_quantized(node, chosen[node.name])
        else:
            graph.keep(node)
    graph.finish()
    return graph.model


def split_at_layers(
    model: ModelProto, layers: Sequence[Layer], parts: int
) -> Iterator[tuple[list[str], Sequence[Layer]]]:
    """Divide the layers of a model into parts of equal numbers, in the order of computation.

    Yields:
        Names of the tensors from which the model can be computed from the part's first layer on, and the part's layers.
    """
    position = {node.name: index for index, node in enumerate(model.graph.node)}
    size = math.ceil(len(layers) / parts)
    for start in range(0, len(layers), size):
        part = layers[start : start + size]
        first = position[part[0].node]
        made = {value.name for value in model.graph.input}
        made.update(tensor for node in model.graph.node[:first] for tensor in node.output)
        read = {tensor for node in model.graph.node[first:] for tensor in node.input}
        yield sorted(made & read), part


def with_switches(model: ModelProto, layers: Sequence[Layer], ranges: Mapping[str, float]) -> ModelProto:
    """Return a copy of a model whose input `SWITCH` is the index of the one layer that computes in int8.

    Each layer becomes an ``If``, of which ONNX Runtime computes one side only. One session thus computes what otherwise
    needs a session for each layer, with the same kernels.

    Args:
        model: Model in float32; it is not changed.
        layers: Layers of `find_layers` that can be switched.
        ranges: Largest absolute value of each of `range_tensors(layers)`, by the tensor's name.
    """
    from onnx import TensorProto, helper

    graph = Graph(copy.deepcopy(model))
    graph.model.graph.input.append(helper.make_tensor_value_info(SWITCH, TensorProto.INT64, []))
    indices = {layer.node: index for index, layer in enumerate(layers)}
    for node in graph.take_nodes():
        if node.name not in indices:
            graph.keep(node)
            continue
        index = indices[node.name]
        number = graph.constant(f"{SWITCH}/{index}", np.int64(index))
        in_float = _layer_model(graph, node)
        in_int8 = insert_qdq(in_float, [replace(layers[index], result=in_float.graph.node[0].output[0])], ranges)
        optimize_for_cpu(in_int8)
        del in_float.graph.initializer[:]  # the graph around it has them
        branches = {"then_branch": in_int8.graph, "else_branch": in_float.graph}
        graph.add("If", [graph.add("Equal", [SWITCH, number], f"{number}/equal")], node.output[0], **branches)
    graph.finish()
    return graph.model


def _layer_model(graph: Graph, node: NodeProto) -> ModelProto:
    """Return a model of one layer's node, which reads the tensors of the graph around it by their names."""
    from onnx import TensorProto, helper

    result = f"{node.output[0]}/switched"
    layer = copy.deepcopy(node)
    layer.output[0] = f"{result}/layer"
    body = helper.make_graph(
        [layer, helper.make_node("Identity", [layer.output[0]], [result])],  # `insert_qdq` needs a reader of the layer
        result,
        [],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        [graph.constants[tensor] for tensor in node.input if tensor in graph.constants],
    )
    return helper.make_model(body, opset_imports=graph.model.opset_import)


class _QuantizedGraph(Graph):
    """A graph that gets Q/DQ pairs.

    Args:
        model: Model in float32; it is changed.
        layers: Layers that are put into int8.
        ranges: Largest absolute value of each tensor of `range_tensors(layers)`.
    """

    def __init__(self, model: ModelProto, layers: Sequence[Layer], ranges: Mapping[str, float]) -> None:
        super().__init__(model)
        self._ranges = ranges
        self._paired_results = {layer.result for layer in layers} - self.outputs
        self._scales: dict[str, np.float32] = {}
        self._dequantized_weights: dict[str, str] = {}

    def keep_quantized(self, node: NodeProto, layer: Layer) -> None:
        """Keep a layer's node, with pairs before and behind it and with int8 weights."""
        pairs = {source: self._pair_before(layer, source) for source in dict.fromkeys(layer.sources)}
        inputs = [pairs[source] for source in layer.sources]
        if layer.weighted:
            inputs.append(self._dequantize_weights(node, layer))
        node.input[: len(inputs)] = inputs
        self.keep(node)
        if layer.result in self._paired_results:
            self.replace(layer.result, self._add_pair(layer.result, layer.result, layer.kept))

    def _pair_before(self, layer: Layer, source: str) -> str:
        """Return the output of the pair that a layer reads: the one behind the layer before, or a new one."""
        behind = f"{source}/dequantized"
        if source not in self._paired_results:
            return self._add_pair(source, f"{layer.node}/{source}", source)
        if len(self.readers[source]) > 1:
            return self._add_pair(behind, f"{layer.node}/{source}", source)
        return behind

    def _add_pair(self, tensor: str, name: str, measured: str) -> str:
        """Add a pair that reads `tensor`, with the range of the tensor `measured`, and return its output."""
        from onnx import helper

        parameters = [self.constant(f"{name}/scale", self._scale(measured)), self.constant("int8/zero", np.int8(0))]
        codes, result = f"{name}/quantized", f"{name}/dequantized"
        self.keep(helper.make_node("QuantizeLinear", [tensor, *parameters], [codes], name=f"{name}/Q"))
        self.keep(helper.make_node("DequantizeLinear", [codes, *parameters], [result], name=f"{name}/DQ"))
        return result

    def _scale(self, measured: str) -> np.float32:
        """Return the scale of a new pair; each pair of one tensor has a scale larger by the smallest possible step.

        ONNX Runtime turns int8 activations into uint8 where that is faster, but only in pairs with one reader, and it
        computes a layer between an int8 and a uint8 pair in float32. So layers share no pair, and different scales keep
        ONNX Runtime from merging equal pairs into a shared one. The step changes no rounded value.
        """
        # A tensor that is always zero has no range; any scale is correct.
        scale = self._scales.get(measured, np.float32(self._ranges[measured] / _LIMIT or 1))
        self._scales[measured] = np.nextafter(scale, np.float32(np.inf))
        return scale

    def _dequantize_weights(self, node: NodeProto, layer: Layer) -> str:
        """Add int8 weights and their dequantisation, once for all layers that share them; return the output."""
        from onnx import helper

        name = node.input[1]
        if name in self._dequantized_weights:
            return self._dequantized_weights[name]
        weights, axis = self.value(name), _channel_axis(node)
        bias = self.value(node.input[2]) if len(node.input) > 2 else None
        scale = _weight_scale(weights, axis, bias, self._ranges[layer.sources[0]] / _LIMIT or 1)
        shape = [-1 if dimension == axis else 1 for dimension in range(weights.ndim)]
        codes = np.clip(np.rint(weights / scale.reshape(shape)), -_LIMIT, _LIMIT).astype(np.int8)
        inputs = [
            self.constant(f"{name}/quantized", codes),
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero", np.zeros(scale.shape, np.int8)),
        ]
        result = self._dequantized_weights[name] = f"{name}/dequantized"
        self.keep(helper.make_node("DequantizeLinear", inputs, [result], name=f"{name}/DQ", axis=axis))
        return result


def _channel_axis(node: NodeProto) -> int:
    """Return the axis of a layer's weights that counts output channels."""
    return 0 if node.op_type == "Conv" or attributes_of(node).get("transB") else 1


def _weight_scale(
    weights: NDArray[np.float32], axis: int, bias: NDArray[np.float32] | None, source_scale: float
) -> NDArray[np.float32]:
    """Return one scale per output channel, (C,) float32."""
    others = tuple(dimension for dimension in range(weights.ndim) if dimension != axis)
    scale = np.abs(weights).max(others) / _LIMIT
    # ONNX Runtime keeps the bias as int32 in steps of source_scale * scale. A channel with very small weights would
    # make it overflow, and may be rounded to zero as well.
    least = 2 * np.abs(0 if bias is None else bias) / (source_scale * _INT32_LIMIT)
    result: NDArray[np.float32] = np.maximum(np.maximum(scale, least), np.finfo(np.float32).tiny).astype(np.float32)
    return result
