"""Exported files, run by ONNX Runtime."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import onnx as onnx_export
from bpkd_sdk.export import to_onnx
from bpkd_sdk.runtime import OnnxSegmenter
from tests.networks import tiny


@pytest.fixture(scope="module")
def model():
    network = tiny(9, width=16).eval()
    network.spec = bpkd_sdk.NetworkSpec(
        name=None, num_classes=9, class_names=ShapesDataset().class_names, mean=(0.4, 0.5, 0.6), size_divisor=8
    )
    return network


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return to_onnx(model, tmp_path_factory.mktemp("onnx") / "m.onnx", input_size=(44, 61)).path


def by_hand(model, images):
    """uint8 (N, H, W, 3) to logits at the images' size, written out."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(model.spec.mean).view(1, 3, 1, 1)) / torch.tensor(model.spec.std).view(1, 3, 1, 1)
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % 8, 0, -height % 8))
    with torch.no_grad():
        logits = F.interpolate(model(x), x.shape[2:], mode="bilinear", align_corners=False)
    return logits[:, :, :height, :width]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_images_in_masks_out_for_any_batch(model, path, batch):
    images = np.random.default_rng(batch).integers(0, 256, (batch, 44, 61, 3), np.uint8)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (masks,) = session.run(None, {"images": images})
    expected = by_hand(model, images)
    top = expected.topk(2, 1).values
    clear = (top[:, 0] - top[:, 1] > 1e-4).numpy()
    assert (masks.dtype, masks.shape) == (np.uint8, (batch, 44, 61))
    assert np.array_equal(masks[clear], expected.argmax(1).numpy()[clear])
    assert clear.mean() > 0.99


def test_logits_without_processing(model, tmp_path):
    report = to_onnx(
        model, tmp_path / "m.onnx", input_size=(40, 48), preprocess=False, argmax=False, dynamic_batch=False
    )
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    inputs = torch.randn(1, 3, 40, 48)
    (logits,) = session.run(None, {"images": inputs.numpy()})
    with torch.no_grad():
        expected = F.interpolate(model(inputs), (40, 48), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert report.largest_difference < 1e-4
    assert session.get_inputs()[0].shape == [1, 3, 40, 48]


def test_half_precision_is_in_the_file(model, tmp_path):
    report = to_onnx(model, tmp_path / "h.onnx", input_size=(40, 48), precision="fp16")
    proto = onnx.load(report.path)
    convolutions = {name for node in proto.graph.node if node.op_type == "Conv" for name in node.input[1:]}
    types = {tensor.data_type for tensor in proto.graph.initializer if tensor.name in convolutions}
    assert types == {onnx.TensorProto.FLOAT16}
    assert report.agreement >= 0.99
    assert next(model.parameters()).dtype is torch.float32


def test_the_file_describes_itself(model, path):
    proto = onnx.load(path)
    facts = json.loads({entry.key: entry.value for entry in proto.metadata_props}["bpkd"])
    assert facts["input_size"] == [44, 61]
    assert facts["network"]["class_names"] == list(model.spec.class_names)
    assert facts["agreement"] >= 0.9999
    assert {entry.version for entry in proto.opset_import if entry.domain == ""} == {18}
    assert OnnxSegmenter(path).spec == model.spec
    assert list(path.parent.iterdir()) == [path]


def test_evaluate_takes_the_file(model, tmp_path):
    data = ShapesDataset("val", length=3, size=(64, 64))
    to_onnx(model, tmp_path / "m.onnx", input_size=(64, 64))
    in_torch, in_onnx = bpkd_sdk.evaluate(model, data), bpkd_sdk.evaluate(tmp_path / "m.onnx", data)
    assert in_onnx.miou == pytest.approx(in_torch.miou, abs=1e-3)
    with pytest.raises(ValueError, match=r"takes images of \[64, 64\], but got \[32, 64\].*input_size=\(32, 64\)"):
        bpkd_sdk.evaluate(tmp_path / "m.onnx", ShapesDataset("val", length=1, size=(32, 64)))


def test_disagreement_leaves_no_file(model, tmp_path, monkeypatch):
    honest = onnx_export._trace

    def lying(network, *rest):
        with torch.no_grad():
            network.network[-1].bias += torch.arange(9.0)
        return honest(network, *rest)

    monkeypatch.setattr(onnx_export, "_trace", lying)
    with pytest.raises(RuntimeError, match="disagrees with torch.*No file was written"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48))
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="ends in '.onnx'"):
        to_onnx(model, tmp_path / "m.pb", input_size=(40, 48))
    with pytest.raises(ValueError, match="`precision`.*'half'"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), precision="half")
    with pytest.raises(ValueError, match=r"at least 32 pixels, but got \(8, 48\)"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(8, 48))


def test_files_that_cannot_be_run(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        OnnxSegmenter(tmp_path / "none.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not an ONNX file that ONNX Runtime can load"):
        OnnxSegmenter(tmp_path / "cut.onnx")
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="no metadata of bpkd-sdk"):
        OnnxSegmenter(tmp_path / "foreign.onnx")
