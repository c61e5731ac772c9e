"""An int8 graph with the same values as uint8, of which ONNX Runtime computes far more in integers on a CPU.

Files hold symmetric int8, which is all that TensorRT takes. ONNX Runtime's integer kernels for x86 take uint8. It
changes the int8 pairs that have one reader, and leaves layers between other pairs in float32; and a ReLU stays in
float32 between two pairs. Moved by 128, every code keeps its value, and a ReLU is a `Clip` of codes. A max pooling of
what a ReLU returns comes before it, where it stays in float32, which is far faster than that of uint8.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


_ZERO = np.uint8(128)
_ZERO_NAME = "uint8/zero"
_LARGEST_CODE = 127
# `quantized` of bpkd_sdk.export.qdq gives equal pairs scales that differ by single steps of float32.
_SAME_SCALE = 1e-5


def as_uint8(proto: ModelProto) -> ModelProto:
    """A copy of a graph of `bpkd_sdk.export.quantize` whose activations are uint8, with the same values.

    Pairs that round a tensor to the steps to which it is rounded already are left out.
    """
    from onnx import numpy_helper

    copy = type(proto)()
    copy.CopyFrom(proto)
    graph = copy.graph
    del graph.node[:]
    graph.node.extend(_Rewriter(proto).nodes())
    graph.initializer.append(numpy_helper.from_array(np.asarray(_ZERO), _ZERO_NAME))
    read = {tensor for node in graph.node for tensor in node.input}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]
    return copy


class _Rewriter:
    """Writes a graph's nodes anew, in their order."""

    def __init__(self, proto: ModelProto) -> None:
        self.graph = proto.graph
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.written: list[NodeProto] = []
        self.renamed: dict[str, str] = {}
        # The codes of a tensor in float32, and their scale: of one that was made of them, and of one that was rounded.
        self.made_of: dict[str, tuple[str, str]] = {}
        self.rounded_to: dict[str, tuple[str, str]] = {}
        self.relus: dict[str, NodeProto] = {}

    def nodes(self) -> list[NodeProto]:
        """All that the graph's outputs need."""
        for node in self.graph.node:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.input[:] = [self.renamed.get(tensor, tensor) for tensor in node.input]
            self._write(copy)
        needed = {output.name for output in self.graph.output}
        kept = []
        for node in reversed(self.written):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        return kept[::-1]

    def _write(self, node: NodeProto) -> None:
        if node.op_type == "QuantizeLinear":
            self._quantize(node)
        elif node.op_type == "DequantizeLinear" and node.input[0] not in self.constants:
            self._dequantize(node.input[0], node.input[1], node.output[0])
        elif node.op_type in ("Relu", "Clip") and node.input[0] in self.made_of and self._is_relu(node):
            self._relu(*self.made_of[node.input[0]], node.output[0])
        elif node.op_type == "MaxPool" and node.input[0] in self.relus:
            self._pool(node, self.relus[node.input[0]])
        else:
            self.written.append(node)
            if node.op_type == "Relu":
                self.relus[node.output[0]] = node

    def _quantize(self, node: NodeProto) -> None:
        source, scale, result = node.input[0], node.input[1], node.output[0]
        for codes, known in (found[source] for found in (self.made_of, self.rounded_to) if source in found):
            if math.isclose(self._value(known), self._value(scale), rel_tol=_SAME_SCALE):
                self.renamed[result] = codes
                return
        node.input[2] = _ZERO_NAME
        self.written.append(node)
        self.rounded_to[source] = result, scale

    def _dequantize(self, codes: str, scale: str, result: str) -> None:
        from onnx import helper

        self.written.append(helper.make_node("DequantizeLinear", [codes, scale, _ZERO_NAME], [result], name=result))
        self.made_of[result] = codes, scale

    def _relu(self, codes: str, scale: str, result: str) -> None:
        from onnx import helper

        clipped = f"{result}/codes"
        self.written.append(helper.make_node("Clip", [codes, _ZERO_NAME], [clipped], name=clipped))
        self._dequantize(clipped, scale, result)

    def _pool(self, pool: NodeProto, relu: NodeProto) -> None:
        """The ReLU after the pooling: the largest of the positive parts is the positive part of the largest."""
        from onnx import helper

        result, pooled = pool.output[0], f"{pool.output[0]}/before_relu"
        pool.input[0], pool.output[0] = relu.input[0], pooled
        self.written += [pool, helper.make_node("Relu", [pooled], [result], name=result)]

    def _is_relu(self, node: NodeProto) -> bool:
        """Whether a node that reads codes only clips at 0: a ReLU, or a ReLU6 if the codes end at 6 or before."""
        if node.op_type == "Relu":
            return True
        bounds = node.input[1:]
        if not bounds or any(bound not in self.constants for bound in bounds):
            return False
        least, *most = map(self._value, bounds)
        largest = _LARGEST_CODE * self._value(self.made_of[node.input[0]][1])
        return least == 0 and (not most or most[0] >= largest * (1 - _SAME_SCALE))

    def _value(self, constant: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[constant]).item()


_ORDER = [0, 2, 3, 1]  # (N, C, H, W) -> (N, H, W, C)
_ORDER_NAME = "classes_last/order"


def put_classes_last(proto: ModelProto) -> None:
    """Let every argmax over the classes of a bilinear resize, and that resize, see (N, H, W, C); in place.

    The values stay what they are. A graph without such a pair stays as it is.
    """
    from onnx import numpy_helper

    nodes = list(proto.graph.node)
    makers = {tensor: node for node in nodes for tensor in node.output}
    readers = [tensor for node in nodes for tensor in node.input] + [output.name for output in proto.graph.output]
    written: list[NodeProto] = []
    for node in nodes:
        resize = makers.get(node.input[0]) if _is_argmax_of_classes(node) else None
        if resize is not None and _is_bilinear(resize) and readers.count(resize.output[0]) == 1:
            written.remove(resize)
            written += _over_last_axis(resize, node)
        else:
            written.append(node)
    if len(written) > len(nodes):
        del proto.graph.node[:]
        proto.graph.node.extend(written)
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(_ORDER), _ORDER_NAME))


def _is_argmax_of_classes(node: NodeProto) -> bool:
    return node.op_type == "ArgMax" and _attributes(node).items() >= {"axis": 1, "keepdims": 0}.items()


def _is_bilinear(node: NodeProto) -> bool:
    attributes = _attributes(node)
    return node.op_type == "Resize" and attributes.get("mode") == b"linear" and "axes" not in attributes


def _attributes(node: NodeProto) -> dict[str, object]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _over_last_axis(resize: NodeProto, argmax: NodeProto) -> list[NodeProto]:
    """The nodes in place of a resize to (N, C, H, W) and the argmax over its second axis."""
    from onnx import helper

    source, resized = resize.input[0], resize.output[0]
    transposed = f"{resized}/classes_last"
    nodes = [helper.make_node("Transpose", [source], [transposed], name=transposed, perm=_ORDER)]
    changed = type(resize)()
    changed.CopyFrom(resize)
    changed.input[0] = transposed
    for index in (2, 3):  # scales or sizes, by axis
        if index < len(resize.input) and resize.input[index]:
            changed.input[index] = f"{resized}/{('scales', 'sizes')[index - 2]}"
            nodes.append(
                helper.make_node(
                    "Gather", [resize.input[index], _ORDER_NAME], [changed.input[index]], name=changed.input[index]
                )
            )
    last = type(argmax)()
    last.CopyFrom(argmax)
    next(attribute for attribute in last.attribute if attribute.name == "axis").i = 3
    return [*nodes, changed, last]
