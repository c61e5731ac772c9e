"""Exported files, run by ONNX Runtime."""

import errno
import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import onnx as onnx_export
from bpkd_sdk.export import to_onnx
from bpkd_sdk.runtime.onnx import OnnxRuntime
from tests.edges import Brightness, images_with_edges, mask_offsets
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


class Pooled(nn.Module):
    """A network with every kind of pooling that exporters fix to the traced size: over 9, 20 and 1 cells."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        self.pool, self.globally = nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Conv2d(32, 3, 1)
        self.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=3, size_divisor=8)

    def forward(self, images):
        x = self.features(images)
        pooled = self.pool(x), F.interpolate(x, size=(4, 5), mode="area"), self.globally(x)
        resized = [F.interpolate(part, x.shape[-2:], mode="bilinear") for part in pooled]
        return self.classify(torch.cat([x, *resized], 1))


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def facts_of(path):
    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["bpkd"])


@pytest.fixture
def wrong_export(monkeypatch):
    """Make the exporter trace another network than the one it was given."""
    original = onnx_export.trace

    def trace(network, *args, **options):
        with torch.no_grad():
            network.network[-1].bias += torch.arange(9.0)
        return original(network, *args, **options)

    monkeypatch.setattr(onnx_export, "trace", trace)


def by_hand(model, images):
    """Compute logits at the images' size from uint8 (N, H, W, 3), step by step."""
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
    (masks,) = session_of(path).run(None, {"images": images})
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
    session = session_of(report.path)
    inputs = torch.randn(1, 3, 40, 48)
    (logits,) = session.run(None, {"images": inputs.numpy()})
    with torch.no_grad():
        expected = F.interpolate(model(inputs), (40, 48), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert report.largest_difference < 1e-4
    assert session.get_inputs()[0].shape == [1, 3, 40, 48]


@pytest.mark.parametrize("limit", [(160, 192), None], ids=["its own size only", "any size"])
def test_probabilities_are_refused_before_the_trace(limit, tmp_path, monkeypatch):
    class Probabilities(nn.Module):
        def __init__(self):
            super().__init__()
            self.classify = nn.Conv2d(3, 1, 1)

        def forward(self, images):
            if limit is not None and images.shape[2:] != limit:
                raise RuntimeError("wrong size")
            return self.classify(images).sigmoid()

    monkeypatch.setattr(onnx_export, "trace", None)
    with pytest.raises(ValueError, match="The network ends with a sigmoid"):
        to_onnx(Probabilities().eval(), tmp_path / "m.onnx", input_size=(160, 192))


def test_half_precision_is_in_the_file(model, tmp_path):
    report = to_onnx(model, tmp_path / "h.onnx", input_size=(40, 48), precision="fp16")
    proto = onnx.load(report.path)
    convolutions = {name for node in proto.graph.node if node.op_type == "Conv" for name in node.input[1:]}
    types = {tensor.data_type for tensor in proto.graph.initializer if tensor.name in convolutions}
    assert types == {onnx.TensorProto.FLOAT16}
    assert report.agreement >= 0.99
    assert next(model.parameters()).dtype is torch.float32


def test_the_file_describes_itself(model, path):
    facts = facts_of(path)
    assert facts["input_size"] == [44, 61]
    assert facts["network"]["class_names"] == list(model.spec.class_names)
    assert facts["parity"]["agreement"] >= 0.9999
    assert {entry.version for entry in onnx.load(path).opset_import if entry.domain == ""} == {18}
    assert OnnxRuntime(path).spec == model.spec
    assert list(path.parent.iterdir()) == [path]


def test_evaluate_accepts_the_file(model, tmp_path):
    data = ShapesDataset("val", length=3, size=(64, 64))
    to_onnx(model, tmp_path / "m.onnx", input_size=(64, 64))
    in_torch, in_onnx = bpkd_sdk.evaluate(model, data), bpkd_sdk.evaluate(tmp_path / "m.onnx", data)
    assert in_onnx.miou == pytest.approx(in_torch.miou, abs=1e-3)
    smaller = ShapesDataset("val", length=3, size=(32, 64))
    expected = bpkd_sdk.evaluate(model, smaller, protocol=bpkd_sdk.EvaluationProtocol("pad", (64, 64)))
    assert bpkd_sdk.evaluate(tmp_path / "m.onnx", smaller).miou == pytest.approx(expected.miou, abs=1e-3)


@pytest.mark.parametrize("size", [(40, 40), (33, 90), (101, 47), (200, 120)], ids=str)
def test_any_size_pads_pools_and_crops_as_torch(any_size_path, size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    (logits,) = session_of(any_size_path).run(None, {"images": images})
    np.testing.assert_allclose(logits, by_hand(Pooled(), images).numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def any_size_path(tmp_path_factory):
    target = tmp_path_factory.mktemp("onnx") / "m.onnx"
    return to_onnx(Pooled().eval(), target, input_size=(48, 48), dynamic_size=True, argmax=False).path


def test_an_any_size_file_states_so(any_size_path):
    session = session_of(any_size_path)
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    assert session.get_outputs()[0].shape == ["batch", 3, "height", "width"]
    facts = facts_of(any_size_path)
    assert (facts["dynamic_size"], facts["dynamic_batch"], facts["input_size"]) == (True, True, [48, 48])
    assert OnnxRuntime(any_size_path)(np.zeros((2, 37, 50, 3), np.uint8)).shape == (2, 37, 50)


def test_any_size_in_half_precision_and_one_image_at_a_time(model, tmp_path):
    options = {"dynamic_size": True, "dynamic_batch": False, "precision": "fp16"}
    report = to_onnx(model, tmp_path / "m.onnx", input_size=(64, 64), **options)
    assert report.agreement >= 0.99
    segmenter = OnnxRuntime(report.path)
    assert segmenter(np.zeros((1, 41, 90, 3), np.uint8)).shape == (1, 41, 90)
    with pytest.raises(ValueError, match="takes 1 image.* at a time, but got 2.*dynamic_batch=True"):
        segmenter(np.zeros((2, 64, 64, 3), np.uint8))


def test_the_networks_own_error_is_passed_on(tmp_path):
    class Picky(Pooled):
        def forward(self, images):
            if images.shape[-1] != 64:
                raise ValueError("I take 64 columns.")
            return super().forward(images)

    assert to_onnx(Picky().eval(), tmp_path / "fixed.onnx", input_size=(48, 64)).verified
    pooling = F.adaptive_avg_pool2d
    with pytest.raises(RuntimeError, match="I take 64 columns.*No file was written"):
        to_onnx(Picky().eval(), tmp_path / "any.onnx", input_size=(48, 64), dynamic_size=True)
    with pytest.raises(RuntimeError, match="torch cannot export Picky.*I take 64 columns.*No file was written"):
        to_onnx(Picky().eval(), tmp_path / "other.onnx", input_size=(48, 80))
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.onnx"]
    assert F.adaptive_avg_pool2d is pooling


def test_the_files_history_is_in_it(model, path, tmp_path):
    assert facts_of(path)["training"] == {}
    model.provenance = {"method": ["bpkd"], "steps": 12}
    try:
        exported = to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), opset=20)
    finally:
        del model.provenance
    facts = facts_of(exported.path)
    assert facts["training"] == {"method": ["bpkd"], "steps": 12}
    assert facts["parity"] == json.loads(json.dumps(exported.verification.to_dict()))
    assert facts["verified"] is exported.verified is True
    assert {entry.version for entry in onnx.load(exported.path).opset_import if entry.domain == ""} == {20}


@pytest.mark.usefixtures("wrong_export")
def test_disagreement_leaves_no_file(model, tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r"with torch: on 1 .*% of all pixels have.*99.99% are.*at edges have.*99.50% .* No file was written; force=",
    ):
        to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("wrong_export")
def test_disagreement_kept_by_force_is_marked(model, tmp_path):
    with pytest.warns(UserWarning, match=r"disagrees with torch.*kept as .*m\.UNVERIFIED\.onnx"):
        report = to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), force=True)
    assert list(tmp_path.iterdir()) == [report.path]
    assert report.path.name == "m.UNVERIFIED.onnx"
    assert (report.verified, facts_of(report.path)["verified"]) == (False, False)


@pytest.mark.parametrize(("part", "region"), [("edge", "at edges"), ("body", "in bodies")])
def test_disagreement_in_one_part_is_disagreement(model, tmp_path, monkeypatch, part, region):
    monkeypatch.setitem(onnx_export.LEAST_AGREEMENT["fp16"], part, 1.01)
    with pytest.raises(RuntimeError, match=rf"with torch: on 1 .* of the pixels {region} have .*101.00% are required"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_further_images_are_verified_too(model, tmp_path):
    data = ShapesDataset("val", length=2, size=(40, 48))
    report = to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), verify_on=data)
    assert len(report.verification.runs) == 2 + 2
    assert report.verification.miou_change == pytest.approx(0, abs=1e-3)
    assert len(facts_of(report.path)["parity"]["runs"]) == 4


@pytest.mark.parametrize(("dynamic", "count"), [(False, 2), (True, 3)])
def test_resizes_to_the_same_size_are_removed(tmp_path, dynamic, count):
    """With dynamic sizes it is not known whether 2 * ceil(height / 2) is the height."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.classify = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 9, 1)

        def forward(self, x):
            y = self.down(x)
            y = F.interpolate(y, (2 * y.shape[2], 2 * y.shape[3]), mode="bilinear")
            return self.classify(F.interpolate(y, x.shape[2:], mode="bilinear"))[:, :, ::2, ::2]

    torch.manual_seed(0)
    model = Network().eval()
    model.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9)
    report = to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), dynamic_size=dynamic)
    assert [node.op_type for node in onnx.load(report.path).graph.node].count("Resize") == count


@pytest.mark.parametrize("step", ["pathlib.Path.write_bytes", "os.fsync"])
def test_a_full_disk_leaves_no_new_file_and_keeps_the_old_one(model, tmp_path, monkeypatch, step):
    (tmp_path / "m.onnx").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "old"


@pytest.mark.parametrize(
    ("package", "command"),
    [
        *((name, "'bpkd-sdk[export]'") for name in ("onnx", "onnxscript", "onnxslim")),
        ("onnxruntime", "onnxruntime, or"),
    ],
)
def test_a_missing_package_is_named_before_any_work(model, tmp_path, monkeypatch, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install {re.escape(command)}"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48))


def test_bad_arguments_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="ends in '.onnx'"):
        to_onnx(model, tmp_path / "m.pb", input_size=(40, 48))
    with pytest.raises(ValueError, match="`precision`.*'half'"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), precision="half")
    with pytest.raises(ValueError, match=r"at least 32 pixels, but got \(8, 48\)"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(8, 48))
    for opset in (17, 24):
        with pytest.raises(ValueError, match=f"`opset` to be 18 to 23.*but got {opset}"):
            to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), opset=opset)
    coarse = tiny(9)
    coarse.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9, size_divisor=64)
    with pytest.raises(ValueError, match=r"at least 64 pixels, but got \(48, 80\)"):
        to_onnx(coarse, tmp_path / "m.onnx", input_size=(48, 80))
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_run(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        OnnxRuntime(tmp_path / "none.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.onnx is not a readable ONNX file"):
        OnnxRuntime(tmp_path / "cut.onnx")
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="no metadata of bpkd-sdk"):
        OnnxRuntime(tmp_path / "foreign.onnx")
    for damaged, problem in (("{", "not readable"), ('{"network": {}}', "lacks input_size, dynamic_batch")):
        onnx.helper.set_model_props(proto, {"bpkd": damaged})
        onnx.save(proto, tmp_path / "damaged.onnx")
        with pytest.raises(ValueError, match=f"metadata of bpkd-sdk in .*damaged.onnx.*{problem}.*export it again"):
            OnnxRuntime(tmp_path / "damaged.onnx")


def test_an_altered_file_is_refused(path, tmp_path):
    content = path.read_bytes()
    weights = onnx.load(path).graph.initializer[0].raw_data
    other = bytes([weights[0] ^ 1]) + weights[1:]
    resaved = onnx.load(path)
    onnx.helper.set_model_props(resaved, {"bpkd": json.dumps(facts_of(path) | {"verified": False})})
    for altered in (
        content.replace(weights, other),
        content.replace(b'"input_size": [44, 61]', b'"input_size": [61, 44]'),
        content[:-1] + bytes([content[-1] ^ 1]),
        resaved.SerializeToString(),
    ):
        assert altered != content
        (tmp_path / "altered.onnx").write_bytes(altered)
        with pytest.raises(ValueError, match=r"altered.onnx has been altered since bpkd-sdk wrote it.*Export it again"):
            OnnxRuntime(tmp_path / "altered.onnx")


def test_the_runtime_normalises_and_takes_the_argmax_if_the_file_does_not(model, path, tmp_path):
    bare = to_onnx(model, tmp_path / "m.onnx", input_size=(44, 61), preprocess=False, argmax=False).path
    images = np.random.default_rng(0).integers(0, 256, (2, 44, 61, 3), np.uint8)
    masks = OnnxRuntime(bare)(images)
    assert (masks.dtype, masks.shape) == (np.uint8, (2, 44, 61))
    assert (masks == OnnxRuntime(path)(images)).mean() > 0.999


def test_images_of_another_type_or_shape_are_refused(path):
    for images in (
        np.zeros((1, 44, 61, 3), np.float32),
        np.zeros((1, 3, 44, 61), np.uint8),
        np.zeros((44, 61, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"Expected images uint8 \(N, H, W, 3\), but got"):
            OnnxRuntime(path)(images)


@pytest.mark.parametrize("dynamic_size", [False, True])
def test_masks_of_a_file_lie_on_the_edges_of_images(tmp_path, dynamic_size):
    """The logits have a quarter of the padded images' size; the file resizes them and crops the padding."""
    size = (46, 61)
    path = to_onnx(Brightness(4, 8), tmp_path / "m.onnx", input_size=size, dynamic_size=dynamic_size).path
    for axis in (0, 1):
        images, places = images_with_edges(size, axis)
        masks = torch.from_numpy(OnnxRuntime(path)(images.permute(0, 2, 3, 1).numpy()))
        assert abs(mask_offsets(masks, places, axis).mean()) < 0.05
