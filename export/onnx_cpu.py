"""Edits of an ONNX graph that keep its values and make it faster in ONNX Runtime on a CPU.

Export applies them once, and writes the result into the file as a patch, see `bpkd_sdk.runtime.onnx_file`.

`use_uint8`: files contain symmetric int8, the only kind that TensorRT accepts, but the integer kernels of ONNX Runtime
for x86 are for uint8. ONNX Runtime converts int8 pairs (QuantizeLinear, DequantizeLinear) that have one reader by
itself. It computes layers between other pairs, and a ReLU between two pairs, in float32.

`put_classes_last`: argmax is slow over the second of four axes, and fast over the last.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np

from bpkd_sdk.export.graph import Graph, attributes_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_LARGEST_CODE = 127
# `insert_qdq` of bpkd_sdk.export.qdq gives equal pairs scales that differ by single steps of float32.
_SAME_SCALE = 1e-5

_ORDER = [0, 2, 3, 1]  # (N, C, H, W) -> (N, H, W, C)


def serialize_for_cpu(model: ModelProto) -> bytes:
    """Return the bytes of the faster model for a CPU; the model itself is not changed."""
    changed = copy.deepcopy(model)
    optimize_for_cpu(changed)
    content: bytes = changed.SerializeToString()
    return content


def optimize_for_cpu(model: ModelProto) -> None:
    """Apply all edits of this file that fit a model, in place."""
    if _has_symmetric_int8(Graph(model)):
        use_uint8(model)
    put_classes_last(model)


def _has_symmetric_int8(graph: Graph) -> bool:
    """Return whether a graph has quantised activations, all of them int8 with the zero point 0 for the whole tensor."""
    zeros = [
        graph.value(node.input[2]) if len(node.input) > 2 else None
        for node in graph.model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in graph.constants
    ]
    return bool(zeros) and all(
        zero is not None and zero.dtype == np.int8 and zero.size == 1 and not zero.any() for zero in zeros
    )


def use_uint8(model: ModelProto) -> None:
    """Turn the int8 activations of a graph of `bpkd_sdk.export.quantize` into uint8, in place.

    Codes are moved by 128, so every code keeps its value. Then:

    - A ReLU or ReLU6 of dequantised codes becomes a `Clip` of the codes.
    - A pair is removed if it rounds a tensor to the steps to which the tensor is rounded already.
    - A max pooling of the output of a float32 ReLU is done before that ReLU, in float32, which is far faster than in
      uint8. The maximum of the positive parts is the positive part of the maximum.
    """
    graph = Graph(model)
    codes_of: dict[str, tuple[str, str]] = {}  # codes and scale of each float32 tensor that was dequantised from codes
    rounded_to: dict[str, tuple[str, str]] = {}  # codes and scale of each float32 tensor that was quantised
    relus: dict[str, NodeProto] = {}  # float32 ReLUs by their output
    for node in graph.take_nodes():
        source, result = next(iter(node.input), ""), node.output[0]
        if node.op_type == "QuantizeLinear":
            known = [pairs[source] for pairs in (codes_of, rounded_to) if source in pairs]
            codes = next((codes for codes, scale in known if _is_same_scale(graph, scale, node.input[1])), None)
            if codes is not None:
                graph.replace(result, codes)
                continue
            node.input[2] = _zero(graph)
            rounded_to[source] = result, node.input[1]
        elif node.op_type == "DequantizeLinear" and source not in graph.constants:
            node.input[2] = _zero(graph)
            codes_of[result] = source, node.input[1]
        elif source in codes_of and _is_relu_of_codes(graph, node, codes_of[source][1]):
            codes, scale = codes_of[source]
            codes = graph.add("Clip", [codes, _zero(graph)], f"{result}/codes")
            graph.add("DequantizeLinear", [codes, scale, _zero(graph)], result)
            codes_of[result] = codes, scale
            continue
        elif node.op_type == "MaxPool" and source in relus:
            node.input[0], node.output[0] = relus[source].input[0], f"{result}/before_relu"
            graph.keep(node)
            graph.add("Relu", [node.output[0]], result)
            continue
        elif node.op_type == "Relu":
            relus[result] = node
        graph.keep(node)
    graph.finish()


def _zero(graph: Graph) -> str:
    """Return the name of the zero point of all uint8 codes."""
    return graph.constant("uint8/zero", np.uint8(128))


def _is_same_scale(graph: Graph, scale: str, other: str) -> bool:
    return math.isclose(graph.value(scale).item(), graph.value(other).item(), rel_tol=_SAME_SCALE)


def _is_relu_of_codes(graph: Graph, node: NodeProto, scale: str) -> bool:
    """Return whether a node that reads codes only clips at 0: a ReLU, or a ReLU6 of codes that end at 6 or before."""
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    bounds = [graph.value(bound) for bound in node.input[1:]]
    if not bounds or any(bound is None for bound in bounds):
        return False
    least, *most = (bound.item() for bound in bounds)
    largest = _LARGEST_CODE * graph.value(scale).item()
    return least == 0 and (not most or most[0] >= largest * (1 - _SAME_SCALE))


def put_classes_last(model: ModelProto) -> None:
    """Move the classes to the last axis for each argmax over classes of a bilinear resize, in place.

    The resize and the argmax then work on (N, H, W, C). A graph without these two nodes in sequence is not changed.
    """
    graph = Graph(model)
    pairs = {node.output[0]: node for node in model.graph.node if _is_resize_to_argmax(graph, node)}
    if not pairs:
        return
    for node in graph.take_nodes():
        if node.output[0] in pairs:
            _keep_over_last_axis(graph, node)
        else:
            if next(iter(node.input), "") in pairs:
                next(attribute for attribute in node.attribute if attribute.name == "axis").i = 3
            graph.keep(node)
    graph.finish()


def _is_resize_to_argmax(graph: Graph, node: NodeProto) -> bool:
    """Return whether a node is a bilinear resize that an argmax over the classes reads, and nothing else."""
    if node.op_type != "Resize" or node.output[0] in graph.outputs or len(graph.readers[node.output[0]]) != 1:
        return False
    (reader,), attributes = graph.readers[node.output[0]], attributes_of(node)
    is_argmax = reader.op_type == "ArgMax" and attributes_of(reader).items() >= {"axis": 1, "keepdims": 0}.items()
    return is_argmax and attributes.get("mode") == b"linear" and "axes" not in attributes


def _keep_over_last_axis(graph: Graph, resize: NodeProto) -> None:
    """Keep a resize, with its input and its scales or sizes in the order (N, H, W, C)."""
    result = resize.output[0]
    resize.input[0] = graph.add("Transpose", [resize.input[0]], f"{result}/classes_last", perm=_ORDER)
    order = graph.constant("classes_last/order", _ORDER)
    for index, name in ((2, "scales"), (3, "sizes")):
        if index < len(resize.input) and resize.input[index]:
            resize.input[index] = graph.add("Gather", [resize.input[index], order], f"{result}/{name}")
    graph.keep(resize)
