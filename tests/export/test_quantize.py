"""INT8 as explicit Q/DQ: the layers that get it, their measured damage, and layers that stay in float32."""

import copy
import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import calibration, qdq, to_onnx
from bpkd_sdk.export.onnx import seal_onnx
from bpkd_sdk.export.quantization import quantize
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session

SIZE = (64, 64)


class Unlabelled(ShapesDataset):
    has_labels = False


class Flat(Unlabelled):
    """Images of one colour, except number 19."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image if index == 19 else torch.full_like(image, 90)), label


class ShortLabels(ShapesDataset):
    """Images with a row more than their labels."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label[1:]


def network(width=16):
    """Return a network of six convolutions and three sums, with a ReLU6 and a depthwise convolution."""
    torch.manual_seed(0)

    def block(channels, *, stride=1, groups=1, activation=nn.ReLU):
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(width), activation()
        )

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = block(3, stride=2)
            self.body = nn.ModuleList([block(width), block(width, groups=width, activation=nn.ReLU6), block(width)])
            self.mix = nn.Conv2d(width, width, 1)
            self.classify = nn.Conv2d(width, 9, 1)

        def forward(self, x):
            x = self.stem(x)
            for block in self.body:
                x = x + block(x)
            return self.classify(F.relu(self.mix(x)))

    return Network()


@pytest.fixture(scope="module")
def trained():
    """The network, trained for a few seconds on `shapes`."""
    model = network()
    model.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9, class_names=ShapesDataset().class_names)
    data = ShapesDataset("train", length=32, size=SIZE)
    images, labels = (torch.stack(part) for part in zip(*data, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(60):
        chosen = slice(step % 4 * 8, step % 4 * 8 + 8)
        logits = F.interpolate(model(model.spec.normalize(images[chosen])), SIZE, mode="bilinear")
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[chosen].long(), ignore_index=255).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory):
    return to_onnx(trained, tmp_path_factory.mktemp("onnx") / "m.onnx", input_size=SIZE).path


@pytest.fixture(scope="module")
def data():
    return ShapesDataset("val", length=24, size=SIZE)


@pytest.fixture(scope="module")
def report(path, data, tmp_path_factory):
    return quantize(path, tmp_path_factory.mktemp("int8") / "m.int8.onnx", data, max_boundary_loss=0.02)


def test_the_layers_are_int8_and_symmetric(report):
    proto = onnx.load(report.path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    makers = {tensor: node for node in proto.graph.node for tensor in node.output}
    readers = {tensor: node for node in proto.graph.node for tensor in node.input}
    convolutions, sums = ([node for node in proto.graph.node if node.op_type == kind] for kind in ("Conv", "Add"))
    quantized = {f"network.{layer.name}.weight" for layer in report.layers if layer.quantized and layer.kind == "Conv"}
    assert (len(quantized), len(sums)) == (4, 3)
    for node in convolutions:
        weights = makers.get(node.input[1])
        if node.input[1] in constants:
            continue
        quantized.remove(weights.output[0].removesuffix("/dequantized"))
        assert weights.op_type == "DequantizeLinear"
        values, scale, _ = (constants[name] for name in weights.input)
        assert (values.dtype, scale.shape, weights.attribute[0].i) == (np.int8, (len(values),), 0)
        assert np.abs(values).max() <= 127
    assert not quantized
    for source in [node.input[0] for node in convolutions[1:-1]] + [source for node in sums for source in node.input]:
        assert makers[source].op_type == "DequantizeLinear"
        assert makers[makers[source].input[0]].op_type == "QuantizeLinear"
    assert {readers[node.output[0]].op_type for node in convolutions[1:-1] + sums} == {"QuantizeLinear"}
    pairs = ("QuantizeLinear", "DequantizeLinear")
    zeros = [constants[node.input[2]] for node in proto.graph.node if node.op_type in pairs]
    assert len(zeros) > 3 * 4
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


def test_onnx_runtime_computes_in_int8(report, tmp_path):
    """On a CPU all layers between the first and the last are integer; in the file's own graph the convolutions are."""
    operators = fused(OnnxRuntime(report.path, "cpu").model(), tmp_path)
    assert (operators.count("QLinearConv"), operators.count("QLinearAdd")) == (4, 3)
    assert (operators.count("QuantizeLinear"), operators.count("DequantizeLinear")) == (1, 1)
    assert fused(report.path, tmp_path).count("QLinearConv") == 4


def fused(model, folder):
    """Return the operators of a graph after ONNX Runtime's optimisation."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node]


def test_masks_hardly_change(path, report, data):
    before, after = OnnxRuntime(path), OnnxRuntime(report.path)
    images = torch.stack([image for image, _ in data])
    agreement = (before.segment(images) == after.segment(images)).double().mean().item()
    assert agreement > 0.97
    assert report.agreement == pytest.approx(agreement, abs=0.02)
    assert report.edge_agreement < report.body_agreement
    assert report.size == report.path.stat().st_size


def test_the_report_adds_up(path, report, data):
    assert [layer.name for layer in report.layers] == [layer.name for layer in qdq.find_layers(onnx.load(path))]
    assert [layer.kind for layer in report.layers] == ["Conv", *["Conv", "Add"] * 3, "Conv", "Conv"]
    assert [layer.name for layer in report.layers if layer.kind == "Add"] == [
        "stem.0 + body.0.0",
        "add + body.1.0",
        "add_1 + body.2.0",
    ]
    assert [layer.quantized for layer in report.layers] == [False, *[True] * 7, False]
    assert all(0 <= layer.edge_damage <= 1 and 0 <= layer.body_damage <= 1 for layer in report.layers)
    assert (report.calibration_images, report.held_out_images) == (18, 6)
    before, after = (bpkd_sdk.evaluate(file, shifted(data, 18, 6)).boundary_iou for file in (path, report.path))
    assert report.boundary_loss == pytest.approx(before - after, abs=1e-9)
    assert report.boundary_loss == report.boundary_loss_of_all <= 0.02
    assert json.dumps(report.to_dict())


def test_data_sets_of_other_libraries_are_accepted(trained, path, data, tmp_path):
    """Arrays without class names, which are then those of the file."""
    ours, theirs = list(data)[:6], [(image.permute(1, 2, 0).numpy(), label.numpy()) for image, label in list(data)[:6]]
    report = quantize(path, tmp_path / "m.onnx", theirs, max_boundary_loss=1)
    assert report.labelled
    assert (report.calibration_images, report.held_out_images) == (5, 1)
    scores = bpkd_sdk.verify(path, trained, data=theirs, input_sizes=[SIZE], batch_sizes=[1]).network
    assert scores == bpkd_sdk.evaluate(trained, bpkd_sdk.as_dataset(ours, class_names=data.class_names))
    with pytest.raises(ValueError, match=r"list\[1\]: image is .* normalised already"):
        quantize(path, tmp_path / "m.onnx", [theirs[0], (ours[0][0] - 500.0, ours[0][1]), *theirs])


def shifted(data, start, length):
    """Return the scenes `start` to `start + length` of a data set."""

    class Part(type(data)):
        def __getitem__(self, index):
            if index >= length:
                raise IndexError
            return data[start + index]

    return Part(data.split, length=length, size=data.size)


def test_the_file_describes_itself(path, report):
    before, after = OnnxRuntime(path), OnnxRuntime(report.path)
    facts = after.metadata
    assert after.spec == before.spec
    assert facts["precision"] == "int8"
    assert not {"verified", "parity"} & facts.keys()  # they describe the float32 file
    assert facts["weights_sha256"] == before.metadata["weights_sha256"]
    summary = facts["quantization"]
    assert (summary["quantized"], summary["data"]) == (4, "shapes/val")
    assert (summary["boundary_loss"], summary["agreement"]) == (report.boundary_loss, report.agreement)
    assert summary["layers"] == [dataclasses.asdict(layer) for layer in report.layers]
    assert summary["agreement_before"] == before.metadata["parity"]["agreement"]


def test_the_worst_layers_come_first(report):
    damages = [(layer.edge_damage, layer.body_damage) for layer in report.worst]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > damages[-1]
    assert set(report.worst) == set(report.layers)


def test_switched_layers_harm_as_much_as_a_model_for_each_layer(path, report, data):
    """The damage of each layer is measured in few sessions; a model with this layer alone in int8 has the same."""
    proto, part = onnx.load(path), shifted(data, 18, 4)
    layers = qdq.find_layers(proto)
    ranges = calibration.measure_ranges(proto, layers, [image for image, _ in shifted(data, 0, 18)])
    held_out = calibration.HeldOutImages(OnnxRuntime(path, "cpu"), data, list(part))
    for layer, measured in zip(layers, report.layers, strict=True):
        alone = held_out.agreement(held_out.segment(qdq.insert_qdq(proto, [layer], ranges)))
        assert measured.edge_damage == pytest.approx(1 - alone.edge, abs=1e-6)
        assert measured.body_damage == pytest.approx(1 - alone.body, abs=1e-6)
    assert len({layer.damage for layer in report.layers}) > 3


def test_a_layer_that_int8_destroys_stays_in_float32(trained, data, tmp_path):
    """One channel is a thousand times larger, and the weights that read it a thousand times smaller."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.mix.weight[3] *= 1000
        model.mix.bias[3] *= 1000
        model.classify.weight[:, 3] /= 1000
    to_onnx(model, tmp_path / "m.onnx", input_size=SIZE)
    report = quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data, max_boundary_loss=0.02)
    worst = max(report.layers[1:-1], key=lambda layer: layer.edge_damage)
    assert (worst.name, worst.quantized) == ("mix", False)
    assert sum(layer.quantized for layer in report.layers) == 6
    assert report.boundary_loss <= 0.02 < report.boundary_loss_of_all
    with pytest.raises(RuntimeError, match="No layer can be int8 within max_boundary_loss=-1"):
        quantize(tmp_path / "m.onnx", tmp_path / "r.onnx", data, max_boundary_loss=-1)
    assert not (tmp_path / "r.onnx").exists()


def test_without_labels_the_float32_masks_are_the_reference(path, tmp_path):
    data = Unlabelled("val", length=8, size=SIZE)
    report = quantize(path, tmp_path / "q.onnx", data, images=4, max_boundary_loss=1)
    assert not report.labelled
    assert (report.calibration_images, report.held_out_images) == (3, 1)
    assert 0 < report.boundary_loss < 0.5


def test_without_labels_the_classes_may_differ(path, tmp_path):
    data = Unlabelled("val", length=4, size=SIZE)
    data.class_names = ("thing", "other")
    assert quantize(path, tmp_path / "q.onnx", data, max_boundary_loss=1).agreement > 0.9


def test_images_without_edges_to_rank_by(path, tmp_path):
    """The layers are ranked by the first four of the five held-out images, which have one colour."""
    report = quantize(path, tmp_path / "q.onnx", Flat("val", length=20, size=SIZE), max_boundary_loss=1)
    assert report.held_out_images == 5
    assert {layer.edge_damage for layer in report.layers} == {None}
    assert all(layer.body_damage is not None for layer in report.layers)
    json.dumps(report.to_dict(), allow_nan=False)
    json.dumps(OnnxRuntime(report.path).metadata, allow_nan=False)


def test_a_dead_channel_does_not_overflow(trained, data, tmp_path):
    """With tiny weights and a bias, the bias would overflow as int32 in steps of the scales."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.mix.weight[0] *= 1e-12
        model.mix.bias[0] = 2.0
    to_onnx(model, tmp_path / "m.onnx", input_size=SIZE)
    report = quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data, max_boundary_loss=1)
    assert report.agreement > 0.95


def test_products_with_constant_weights_are_layers():
    proto = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[2, 4] x) => (float[2, 3] y)
        <float[4, 5] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20},
         float[3, 5] v = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, float[3] b = {1, 2, 3}>
        { [first] a = MatMul (x, w)  r = Relu (a)  [second] y = Gemm <transB = 1> (r, v, b) }
    """)
    layers = qdq.find_layers(proto)
    assert [(layer.name, layer.kind, layer.kept) for layer in layers] == [
        ("w", "MatMul", "r"),
        ("v", "Gemm", "y"),
    ]
    changed = qdq.insert_qdq(proto, layers, {"x": 1.0, "r": 60.0, "y": 3000.0})
    onnx.checker.check_model(changed, full_check=True)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in changed.graph.initializer}
    assert constants["w/scale"] == pytest.approx(np.arange(16, 21) / 127)
    assert constants["v/scale"] == pytest.approx(np.array([5, 10, 15]) / 127)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 4)).astype(np.float32)
    (expected,), (found,) = run(proto, x), run(changed, x)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_sums_are_layers_if_they_add_layers():
    """Sums with a constant, of tensors that no layer makes, and behind the last layer are left out."""
    proto = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[2, 2] x) => (float[2, 2] z, float[2, 2] y)
        <float[2, 2] v = {1, 2, 3, 4}, float[2, 2] w = {-4, 3, -2, 1}, float[2] b = {1, 2}>
        {
            [early] e = Add (x, x)  [first] a = MatMul (e, v)  [constant] c = Add (a, b)  [twice] d = Add (a, a)
            r = Relu (d)  [sum] f = Add (r, c)  [last] z = MatMul (f, w)  [late] y = Add (z, f)
        }
    """)
    layers = qdq.find_layers(proto)
    assert [(layer.node, layer.name, layer.kept) for layer in layers] == [
        ("first", "v", "a"),
        ("twice", "v + v", "r"),
        ("sum", "r + c", "f"),
        ("last", "w", "z"),
        ("late", "w + f", "y"),
    ]
    assert [layer.node for layer in qdq.inner_layers(layers)] == ["twice", "sum"]
    x = np.random.default_rng(0).uniform(-1, 1, (2, 2)).astype(np.float32)
    tensors = qdq.range_tensors(layers)
    changed = qdq.insert_qdq(
        proto, layers, dict(zip(tensors, run(qdq.with_range_outputs(proto, tensors), x), strict=True))
    )
    onnx.checker.check_model(changed, full_check=True)
    readers = {tensor for node in changed.graph.node if node.op_type == "Add" for tensor in node.input}
    assert {"twice/a/dequantized", "sum/r/dequantized", "sum/c/dequantized"} <= readers
    for expected, found in zip(run(proto, x), run(changed, x), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def run(proto, x):
    return open_session(proto.SerializeToString()).run(None, {"x": x})


def test_bad_input(path, report, trained, data, tmp_path):
    with pytest.raises(ValueError, match="ends in '.onnx'"):
        quantize(path, tmp_path / "m.engine", data)
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        quantize(tmp_path / "none.onnx", tmp_path / "q.onnx", data)
    with pytest.raises(ValueError, match="is int8 already; quantize the float32 file"):
        quantize(report.path, tmp_path / "q.onnx", data)
    with pytest.raises(ValueError, match="at least 4 images.*shapes/val, which has 0"):
        quantize(path, tmp_path / "q.onnx", ShapesDataset("val", length=0, size=SIZE))
    with pytest.raises(ValueError, match="got images=3"):
        quantize(path, tmp_path / "q.onnx", data, images=3)
    with pytest.raises(ValueError, match="Expected `fit` to be one of .*, but got 'pads'. Did you mean 'pad'"):
        quantize(path, tmp_path / "q.onnx", data, fit="pads")
    with pytest.raises(ValueError, match=r"shapes/val\[0\]: the image is 64 x 64 and the label 63 x 64"):
        quantize(path, tmp_path / "q.onnx", ShortLabels("val", length=4, size=SIZE))
    other = copy.deepcopy(data)
    other.class_names, other.palette = other.class_names[:5], other.palette[:5]
    with pytest.raises(ValueError, match="m.onnx predicts 9 classes, but shapes/val has 5"):
        quantize(path, tmp_path / "q.onnx", other)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="no metadata of bpkd-sdk"):
        quantize(tmp_path / "foreign.onnx", tmp_path / "q.onnx", data)
    proto = onnx.load(path)
    facts = json.loads(proto.metadata_props[0].value)
    for change, problem in (
        ({"argmax": False}, "preprocess=True and argmax=True"),
        ({"verified": False}, "disagrees with torch and was kept by force.*without force=True"),
    ):
        (tmp_path / "changed.onnx").write_bytes(seal_onnx(proto, facts | change))
        with pytest.raises(ValueError, match=problem):
            quantize(tmp_path / "changed.onnx", tmp_path / "q.onnx", data)
    with pytest.raises(
        ValueError, match=r"2 image\(s\) of shapes/val .*have no edges, in the masks. Pass images that show"
    ):
        quantize(path, tmp_path / "q.onnx", Flat("val", length=8, size=SIZE))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["changed.onnx", "foreign.onnx"]
