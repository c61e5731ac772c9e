"""Graphs in int8 have the same values in uint8, and fewer tensors are rounded twice."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest

from bpkd_sdk.export.graph import Graph
from bpkd_sdk.export.onnx_cpu import optimize_for_cpu, use_uint8


def graph(body, *, scale="0.05", other="0.05", top="6.0"):
    """Return a graph from x (2, 4) to y, with two scales s and o and a pair `p` of x in steps of s."""
    return onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[2, 4] x) => (float[2, N] y)
        <float s = {{{scale}}}, float o = {{{other}}}, int8 zero = {{0}}, float low = {{0}}, float top = {{{top}}},
         int8[4, 3] w = {{9, -8, 7, -6, 5, -4, 3, -2, 1, 127, -127, 0}}, float[3] ws = {{0.1, 0.2, 0.3}},
         int8[3] wz = {{0, 0, 0}}, int64[1] axis = {{0}}>
        {{ qp = QuantizeLinear (x, s, zero)  p = DequantizeLinear (qp, s, zero)  {body} }}
    """)


def outputs(proto, x):
    """Run a graph in ONNX Runtime without optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def as_uint8(proto):
    changed = copy.deepcopy(proto)
    use_uint8(changed)
    return changed


def operators(proto):
    return [node.op_type for node in proto.graph.node]


QDQ = ["QuantizeLinear", "DequantizeLinear"]
BODIES = {
    "a pair": ("y = Identity (p)", {}, [*QDQ, "Identity"]),
    "relu": ("y = Relu (p)", {}, ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "relu6, codes end at 6": ("y = Clip (p, low, top)", {"scale": "0.047244094"}, ["QuantizeLinear", "Clip", QDQ[1]]),
    "relu6, codes go beyond": ("y = Clip (p, low, top)", {}, [*QDQ, "Clip"]),
    "clip at another value": ("y = Clip (p, s, top)", {"scale": "0.04"}, [*QDQ, "Clip"]),
    "clip without an end": ("y = Clip (p, low)", {}, ["QuantizeLinear", "Clip", "DequantizeLinear"]),
    "clip without a beginning": ('y = Clip (p, "", top)', {"top": "1.0"}, [*QDQ, "Clip"]),
    "the same steps again": (
        "r = Relu (p)  qr = QuantizeLinear (r, o, zero)  y = DequantizeLinear (qr, o, zero)",
        {"other": "0.050000004"},
        ["QuantizeLinear", "Clip", "DequantizeLinear"],
    ),
    "other steps": (
        "qr = QuantizeLinear (p, o, zero)  y = DequantizeLinear (qr, o, zero)",
        {"other": "0.07"},
        [*QDQ, *QDQ],
    ),
    "two pairs of one tensor": (
        "qr = QuantizeLinear (x, o, zero)  r = DequantizeLinear (qr, o, zero)  y = Add (p, r)",
        {"other": "0.050000004"},
        ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Add"],
    ),
    "relu beside the sum of both": ("r = Relu (p)  y = Add (p, r)", {}, [*QDQ, "Clip", "DequantizeLinear", "Add"]),
    "relu of float32": ("r = Relu (x)  y = Add (p, r)", {}, [*QDQ, "Relu", "Add"]),
    "max pooling of a relu": (
        "u = Unsqueeze (x, axis)  r = Relu (u)  m = MaxPool <kernel_shape = [2]> (r)  y = Squeeze (m, axis)",
        {},
        ["Unsqueeze", "MaxPool", "Relu", "Squeeze"],
    ),
    "max pooling of a relu that another reads": (
        "u = Unsqueeze (x, axis)  r = Relu (u)  m = MaxPool <kernel_shape = [1]> (r)  s2 = Add (m, r)  "
        "y = Squeeze (s2, axis)",
        {},
        ["Unsqueeze", "Relu", "MaxPool", "Relu", "Add", "Squeeze"],
    ),
    "weights stay int8": (
        "v = DequantizeLinear <axis = 1> (w, ws, wz)  y = MatMul (p, v)",
        {},
        [*QDQ, "DequantizeLinear", "MatMul"],
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_the_same_values(name):
    body, numbers, expected = BODIES[name]
    proto = graph(body, **numbers)
    changed = as_uint8(proto)
    onnx.checker.check_model(changed, full_check=True)
    assert operators(changed) == expected
    # The values include ties, both ends of int8, and values beyond them.
    x = np.array([[0, 0.025, -0.025, 100], [-100, 6.351, -6.4, 2.43]], np.float32)
    np.testing.assert_allclose(outputs(changed, x), outputs(proto, x), rtol=1e-6, atol=0)


def test_codes_are_uint8():
    changed = as_uint8(graph("r = Relu (p)  y = Add (p, r)"))
    inferred = onnx.shape_inference.infer_shapes(changed)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert types["qp"] == onnx.TensorProto.UINT8


def test_a_graph_in_float32_is_not_changed():
    proto = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[2, 4] x) => (float[2, 4] y) <float a = {2}>
        { b = Constant <value = float[4] {1, 2, 3, 4}> ()  r = Relu (x)  s = Mul (r, a)  y = Add (s, b) }
    """)
    before = proto.SerializeToString()
    optimize_for_cpu(proto)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("zero", ["int8 zero = {3}", "uint8 zero = {128}"])
def test_other_quantised_graphs_are_not_changed(zero):
    """For example the graph of a network that was trained with fake quantisation and exported in float32."""
    proto = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[2, 4] x) => (float[2, 4] y) <float s = {{0.05}}, {zero}>
        {{ q = QuantizeLinear (x, s, zero)  p = DequantizeLinear (q, s, zero)  y = Relu (p) }}
    """)
    before = proto.SerializeToString()
    optimize_for_cpu(proto)
    assert proto.SerializeToString() == before


def test_tensors_that_only_a_branch_reads_stay():
    proto = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[2] x, bool c) => (float[2] y) <float a = {2}, float unused = {3}>
        {
            m = Mul (x, a)
            y = If (c) <
                then_branch = t () => (float[2] yt) { yt = Identity (m) },
                else_branch = e () => (float[2] ye) { ye = Add (x, a) }
            >
        }
    """)
    graph = Graph(proto)
    for node in graph.take_nodes():
        graph.keep(node)
    graph.finish()
    assert operators(proto) == ["Mul", "If"]
    assert [tensor.name for tensor in proto.graph.initializer] == ["a"]
    onnx.checker.check_model(proto)
