"""The last two steps of a segmentation network, resizing and argmax, over images whose classes are the last axis.

ONNX Runtime's argmax on a CPU is faster over neighbours in memory, and so is its bilinear resizing with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

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
