"""Resizing and argmax over (N, H, W, C) give the same classes in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest

from bpkd_sdk.export import to_onnx
from bpkd_sdk.export.onnx_cpu import put_classes_last
from bpkd_sdk.runtime.onnx import OnnxRuntime
from tests.networks import tiny

X = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
LINEAR = 'mode = "linear", coordinate_transformation_mode = "half_pixel"'


def graph(body):
    return onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[2, 3, H, W] x) => (int64[N, A, B] y)
        <int64[4] sizes = {{2, 3, 8, 15}}, float[4] scales = {{1, 1, 2, 3}}, float two = {{2}}>
        {{ {body} }}
    """)


def outputs(proto):
    """Run a graph in ONNX Runtime without optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


ARGMAX = "y = ArgMax <axis = 1, keepdims = 0> (r)"
BODIES = {
    "sizes": f'r = Resize <{LINEAR}> (x, "", "", sizes)  {ARGMAX}',
    "scales": f'r = Resize <{LINEAR}> (x, "", scales)  {ARGMAX}',
    "sizes that are computed": f"""
        b = Shape <start = 0, end = 2> (x)  s = Shape <start = 2> (x)  t = Add (s, s)  u = Concat <axis = 0> (b, t)
        r = Resize <{LINEAR}> (x, "", "", u)  {ARGMAX}""",
    "aligned corners": f"""
        r = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (x, "", "", sizes)  {ARGMAX}""",
}


@pytest.mark.parametrize("name", BODIES)
def test_the_same_classes(name):
    proto = graph(BODIES[name])
    expected = outputs(proto)
    put_classes_last(proto)
    onnx.checker.check_model(proto, full_check=True)
    (argmax,) = (node for node in proto.graph.node if node.op_type == "ArgMax")
    assert {attribute.name: attribute.i for attribute in argmax.attribute}["axis"] == 3
    np.testing.assert_array_equal(outputs(proto), expected)


@pytest.mark.parametrize(
    "body",
    [
        f'r = Resize <mode = "nearest"> (x, "", "", sizes)  {ARGMAX}',
        f'r = Resize <{LINEAR}> (x, "", "", sizes)  y = ArgMax <axis = 2, keepdims = 0> (r)',
        f'r = Resize <{LINEAR}> (x, "", "", sizes)  m = ArgMax <axis = 1, keepdims = 0> (r)  a = Size (r)  y = Add (m, a)',
        f"r = Mul (x, two)  {ARGMAX}",
    ],
    ids=["nearest", "argmax of rows", "read twice", "no resize"],
)
def test_other_graphs_are_not_changed(body):
    proto = graph(body)
    before = proto.SerializeToString()
    put_classes_last(proto)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("options", [{"dynamic_batch": False}, {"dynamic_size": True}], ids=["one shape", "any size"])
def test_the_masks_equal_those_of_the_file_as_written(tmp_path, options):
    path = to_onnx(tiny(5).eval(), tmp_path / "m.onnx", input_size=(48, 64), **options).path
    changed, written = OnnxRuntime(path, "cpu"), OnnxRuntime(path, "cpu", as_written=True)
    assert written.model() == path.read_bytes()
    order = [node.op_type for node in onnx.load_from_string(changed.model()).graph.node]
    assert "Gather" in order[order.index("Transpose") :]
    images = np.random.default_rng(1).integers(0, 256, (1, 48, 64, 3), np.uint8)
    np.testing.assert_array_equal(changed(images), written(images))
