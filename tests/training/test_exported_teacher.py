"""Exported files as teachers: files of this package and of other exporters."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import to_onnx
from bpkd_sdk.runtime import AcceptedImages, TorchRuntime
from bpkd_sdk.spec import NetworkSpec
from tests.networks import tiny
from tests.runtime.test_manifest import engine

TRAIN, VAL = ShapesDataset("train", length=4, size=(48, 48)), ShapesDataset("val", length=2, size=(32, 32))
OPTIONS = {"batch_size": 4, "crop_size": (32, 32), "device": "cpu", "check_data": False, "log_every": 1, "steps": 2}


def distilled(teacher, folder, **options):
    return bpkd_sdk.distill(teacher, tiny(9), (TRAIN, VAL), output_dir=folder, **OPTIONS | options)


def assert_taught_alike(run, other):
    for ours, theirs in zip(run.history, other.history, strict=True):
        assert ours.get("terms", {}) == pytest.approx(theirs.get("terms", {}), rel=1e-4)
    for key, value in run.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[key], rtol=1e-4, atol=1e-6)


def foreign(path, *, batch="n", size=("h", "w"), dtype=TensorProto.FLOAT, inputs=("x",), outputs=("logits",)):
    """Write one convolution as an ONNX file without metadata of bpkd-sdk, and return the same layer in torch."""
    torch.manual_seed(1)
    network = nn.Conv2d(3, 9, 3, stride=4, padding=1)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = [numpy_helper.from_array(p.detach().numpy().astype(kind), n) for n, p in network.named_parameters()]
    nodes = [helper.make_node("Conv", ["x", "weight", "bias"], ["logits"], strides=[4, 4], pads=[1, 1, 1, 1])]
    nodes.append(helper.make_node("ArgMax", ["logits"], ["mask"], axis=1, keepdims=0))
    kinds = {"x": (dtype, [batch, 3, *size]), "size": (TensorProto.INT64, [2])}
    kinds |= {"logits": (dtype, [batch, 9, None, None]), "mask": (TensorProto.INT64, [batch, None, None])}
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info(name, *kinds[name]) for name in inputs],
        [helper.make_tensor_value_info(name, *kinds[name]) for name in outputs],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return network.eval()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="any-size"),
        pytest.param({"batch": 1, "size": (32, 32)}, id="one-image-of-one-size"),
    ],
)
def test_a_foreign_onnx_file_teaches_as_its_network(tmp_path, shape):
    network = foreign(tmp_path / "teacher.onnx", **shape)
    run = distilled(tmp_path / "teacher.onnx", tmp_path / "file")
    assert_taught_alike(run, distilled(network, tmp_path / "module"))
    assert run.history[0]["terms"]["edge"] > 0


def test_half_precision_and_another_normalization(tmp_path):
    network = foreign(tmp_path / "teacher.onnx", dtype=TensorProto.FLOAT16)
    network.spec = NetworkSpec(None, 9, mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5))
    options = {"teacher_mean": (0.0, 0.0, 0.0), "teacher_std": (0.5, 0.5, 0.5)}
    ours = distilled(tmp_path / "teacher.onnx", tmp_path / "file", **options).history[0]["terms"]
    assert ours == pytest.approx(distilled(network, tmp_path / "module").history[0]["terms"], rel=1e-2)
    other = distilled(tmp_path / "teacher.onnx", tmp_path / "imagenet").history[0]["terms"]
    assert other["edge"] != pytest.approx(ours["edge"], rel=0.1)


class FullSize(nn.Module):
    """An exported file resizes its logits to the image; the teacher gives them at that size."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return F.interpolate(self.network(images), images.shape[2:], mode="bilinear", align_corners=False)


class OneShape(TorchRuntime):
    """A runtime that accepts one shape only, like an engine for one shape."""

    def __init__(self, module):
        super().__init__(module, "cpu")
        self.accepts = AcceptedImages((1, 1), (32, 32), (32, 32))
        self.calls = 0

    def infer(self, inputs):
        assert inputs.shape == (1, 3, 32, 32)
        self.calls += 1
        return super().infer(inputs)


def test_an_opened_runtime_teaches_as_its_network(tmp_path):
    """A stand-in for a TensorRT engine, which cannot run without a GPU."""
    teacher = OneShape(tiny(9, seed=1).eval())
    run = distilled(teacher, tmp_path / "runtime", crop_size=None, check_teacher=False)
    assert teacher.calls == 4 + 2 * 4  # one call per image: 4 before the first step, and 4 in each of two steps
    assert_taught_alike(run, distilled(FullSize(tiny(9, seed=1)).eval(), tmp_path / "module"))


def test_an_engine_is_refused_before_anything_starts(tmp_path):
    path = engine(tmp_path)
    with pytest.raises(
        ValueError, match="m.engine is of the format TensorRT, which runs on cuda, but got device='cpu'"
    ):
        distilled(path, tmp_path / "run")
    with pytest.raises(ValueError, match="teacher_mean and teacher_std apply only to an ONNX file"):
        distilled(path, tmp_path / "run", teacher_mean=(0, 0, 0))
    assert not (tmp_path / "run").exists()


def test_an_onnx_file_of_ours_teaches_as_its_network(tmp_path):
    teacher = tiny(9, seed=1).eval()
    to_onnx(teacher, tmp_path / "teacher.onnx", input_size=(32, 32), argmax=False)
    run = distilled(tmp_path / "teacher.onnx", tmp_path / "file", labels="teacher", method=["cwd", "bpkd"])
    other = distilled(FullSize(teacher).eval(), tmp_path / "module", labels="teacher", method=["cwd", "bpkd"])
    assert_taught_alike(run, other)
    assert run.metrics.pixel_accuracy == pytest.approx(other.metrics.pixel_accuracy, abs=1e-3)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        pytest.param(
            {"outputs": ["mask"]}, {}, "(?s)one map of logits.*mask: tensor.int64.*without its final argmax", id="mask"
        ),
        pytest.param({"outputs": ["logits", "mask"]}, {}, "(?s)one map of logits.*logits: .*mask: ", id="two-outputs"),
        pytest.param({"inputs": ["x", "size"]}, {}, "(?s)one image, float.*size: tensor.int64", id="two-inputs"),
        pytest.param({"size": (64, 64)}, {}, r"teacher cannot process a crop of \(32, 32\).*64 x 64", id="size"),
        pytest.param({"batch": 8}, {}, "teacher cannot process a crop.*takes 8 image.*but got 4", id="batch"),
        pytest.param(
            {}, {"method": "canonical"}, "(?s)'canonical' compares feature maps.*checkpoint.*bpkd", id="features"
        ),
        pytest.param({}, {"teacher_precision": "bf16"}, "has a fixed precision. Leave it out", id="precision"),
    ],
)
def test_files_that_cannot_teach_are_refused_before_anything_starts(tmp_path, file, options, message):
    foreign(tmp_path / "teacher.onnx", **file)
    with pytest.raises(ValueError, match=message):
        distilled(tmp_path / "teacher.onnx", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_other_refusals(tmp_path):
    to_onnx(tiny(9).eval(), tmp_path / "masks.onnx", input_size=(32, 32))
    with pytest.raises(ValueError, match="returns masks.*argmax=False"):
        distilled(tmp_path / "masks.onnx", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        distilled(tmp_path / "none.onnx", tmp_path / "run")
    with pytest.raises(ValueError, match="teacher_mean and teacher_std apply only to an ONNX file"):
        distilled(tiny(9).eval(), tmp_path / "run", teacher_mean=(0, 0, 0))


def test_a_file_of_one_size_labels_images_of_other_sizes(tmp_path):
    foreign(tmp_path / "small.onnx", size=(48, 48))
    run = distilled(tmp_path / "small.onnx", tmp_path / "run", labels="teacher", crop_size=None)
    assert run.metrics.images == len(VAL)  # of 32 x 32, padded
