"""Edits of ONNX graphs: the one class by which export reads a graph and rewrites its nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto


class Graph:
    """An ONNX graph that is rewritten in place, node by node in the order of computation.

    To edit, loop over `take_nodes()`, pass the nodes that stay to `keep`, create new ones with `add`, then call
    `finish()`. Without an edit, use the object to look up nodes.

    Args:
        model: Model whose main graph is edited.

    Attributes:
        model: The same model.
        constants: Initializers by name.
        readers: Nodes that read each tensor, as the graph was before the edit, once per input.
        outputs: Names of the graph's outputs.
        kept: Nodes that the edit has put into the graph so far.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for tensor in node.input:
                self.readers[tensor].append(node)
        self.outputs = {output.name for output in model.graph.output}
        self.kept: list[NodeProto] = []
        self._replacements: dict[str, str] = {}

    def take_nodes(self) -> Iterator[NodeProto]:
        """Yield every node; its inputs are renamed as `replace` has stated so far."""
        for node in list(self.model.graph.node):
            node.input[:] = [self._replacements.get(tensor, tensor) for tensor in node.input]
            yield node

    def keep(self, node: NodeProto) -> None:
        """Put a node into the graph, behind those that are kept already."""
        self.kept.append(node)

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Put a new node with one output into the graph and return the output's name; the node has the same name."""
        from onnx import helper

        self.kept.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def replace(self, tensor: str, replacement: str) -> None:
        """Let the nodes that are taken from now on read another tensor in place of this one."""
        self._replacements[tensor] = replacement

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer unless one has this name already, and return the name."""
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
            self.model.graph.initializer.append(self.constants[name])
        return name

    def value(self, tensor: str) -> Any:
        """Return the value of a constant as an array; None for any other tensor."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[tensor]) if tensor in self.constants else None

    def finish(self) -> None:
        """Write the nodes that were kept into the model, without nodes and initializers that nothing reads."""
        graph = self.model.graph
        read, nodes = self.outputs | self._read_by_subgraphs(), []
        for node in reversed(self.kept):
            if read.intersection(node.output):
                nodes.append(node)
                read.update(node.input)
        del graph.node[:]
        graph.node.extend(reversed(nodes))
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name not in read:
                del graph.initializer[index]

    def _read_by_subgraphs(self) -> set[str]:
        """Return all names that the bodies of control-flow nodes (If, Loop, Scan) use."""
        names: set[str] = set()
        bodies = [attribute.g for node in self.kept for attribute in node.attribute if attribute.HasField("g")]
        while bodies:
            body = bodies.pop()
            names.update(output.name for output in body.output)
            for node in body.node:
                names.update(node.input)
                bodies += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        return names


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node as plain values."""
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
