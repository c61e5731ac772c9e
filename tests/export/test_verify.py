"""The report of `verify` compared with agreement counted in the test, and the artifacts that it refuses."""

import json

import onnx
import pytest
import torch

import bpkd_sdk
from bpkd_sdk.boundary import edge_band
from bpkd_sdk.data import FileDataset, ShapesDataset, open_dataset
from bpkd_sdk.data.photos import photo
from bpkd_sdk.export import to_onnx, verify
from bpkd_sdk.runtime import AcceptedImages, TorchRuntime
from tests.networks import tiny


@pytest.fixture(scope="module")
def model():
    network = tiny(9, width=16).eval()
    network.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9, class_names=ShapesDataset().class_names)
    return network


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return to_onnx(model, tmp_path_factory.mktemp("onnx") / "m.onnx", input_size=(48, 64)).path


class TopRowsWrong(TorchRuntime):
    """The network with another class in the top rows."""

    def __init__(self, model, rows):
        super().__init__(model)
        self.rows = rows

    def infer(self, inputs):
        logits = super().infer(inputs)
        logits[:, :, : self.rows] = logits[:, :, : self.rows].roll(1, 1)
        return logits


def test_a_faithful_file_at_batches_that_were_not_traced(model, path):
    report = verify(path, model)
    assert [(run.size, run.batch_size) for run in report.runs] == [((48, 64), 1), ((48, 64), 3)]
    assert report.agreement >= 0.9999
    assert report.largest_difference is None
    assert report.network is None
    assert report.miou_change is None


def test_a_file_of_any_size_is_run_at_sizes_that_were_not_traced(model, tmp_path):
    report = to_onnx(model, tmp_path / "m.onnx", input_size=(48, 64), dynamic_size=True).verification
    assert len(report.runs) == 4
    assert all(run.size[0] != 48 and run.size[1] != 64 for run in report.runs)
    report = verify(tmp_path / "m.onnx", model, input_sizes=[(33, 90)], batch_sizes=[2])
    assert [(run.size, run.batch_size) for run in report.runs] == [((33, 90), 2)]
    assert report.agreement >= 0.9999


def test_an_artifact_that_accepts_only_several_images(model):
    artifact = TorchRuntime(model)
    artifact.accepts = AcceptedImages((2, 3), (40, 40), (48, 48))
    assert [run.batch_size for run in verify(artifact, model).runs] == [2, 3]


def test_agreement_is_counted_for_all_pixels_in_the_band_and_outside(model):
    report = verify(TopRowsWrong(model, 10), model, input_sizes=[(40, 50)], batch_sizes=[1])
    edge = edge_band(TorchRuntime(model).segment(photo(0, (40, 50))[None]), 7, ignore_index=-1)
    right = torch.ones(1, 40, 50, dtype=torch.bool)
    right[:, :10] = False
    (run,) = report.runs
    assert report.worst is run
    assert run.whole == pytest.approx(0.75)
    assert report.edge_agreement == run.edge == pytest.approx(right[edge].double().mean().item())
    assert report.body_agreement == run.body == pytest.approx(right[~edge].double().mean().item())


def test_a_mask_without_edges_has_no_edge_agreement(model):
    flat = tiny(9, width=16).eval()
    torch.nn.init.zeros_(flat[-1].weight)
    report = verify(TorchRuntime(flat), flat, input_sizes=[(40, 40)], batch_sizes=[1])
    assert (report.agreement, report.edge_agreement, report.body_agreement) == (1, None, 1)


def test_logits_are_compared_where_the_file_returns_them(model, tmp_path):
    to_onnx(model, tmp_path / "m.onnx", input_size=(40, 48), preprocess=False, argmax=False)
    assert verify(tmp_path / "m.onnx", model).largest_difference < 1e-5
    other = tiny(9, width=16, seed=1).eval()
    assert verify(tmp_path / "m.onnx", other).largest_difference > 0.1


def test_another_network_disagrees(path):
    assert verify(path, tiny(9, width=16, seed=1)).agreement < 0.9


def test_both_are_scored_on_labelled_data(model, path):
    data = ShapesDataset("val", length=3, size=(48, 64))
    report = verify(path, model, data=data)
    assert [run.size for run in report.runs[2:]] == [(48, 64)] * 3
    assert report.network == bpkd_sdk.evaluate(model, data)
    assert report.miou_change == pytest.approx(0, abs=1e-4)
    wrong = verify(TopRowsWrong(model, 24), model, input_sizes=[(48, 64)], data=data)
    assert wrong.miou_change == wrong.artifact.miou - wrong.network.miou != 0
    assert wrong.boundary_iou_change == wrong.artifact.boundary_iou - wrong.network.boundary_iou != 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_camvid_at_a_size_that_was_not_traced(camvid, precision, tmp_path):
    """On street scenes the file agrees with the network and has the same scores."""
    val = open_dataset("camvid", root=camvid, split="val")
    data = FileDataset(val.name, val.pairs[::40], val.class_names, val.palette)
    network, path = tiny(11, width=16).eval(), tmp_path / "m.onnx"
    report = to_onnx(network, path, input_size=(48, 64), dynamic_size=True, precision=precision, verify_on=data)
    runs = report.verification.runs[4:]
    assert [(run.size, run.batch_size) for run in runs] == [((360, 480), 1)] * 3
    for run in runs:
        assert run.edge > (0.995 if precision == "fp32" else 0.95)
        assert run.body > 0.9999
    assert report.verification.network.images == 3
    assert report.verification.miou_change == pytest.approx(0, abs=1e-3)
    assert report.verification.boundary_iou_change == pytest.approx(0, abs=1e-3)


def test_data_without_labels_adds_images_only(model, path):
    data = ShapesDataset("val", length=2, size=(48, 64))
    data.has_labels = False
    report = verify(path, model, data=data)
    assert (len(report.runs), report.network, report.boundary_iou_change) == (4, None, None)


def test_the_report_is_plain_json(model, path):
    facts = json.loads(json.dumps(verify(path, model, data=ShapesDataset("val", length=1, size=(48, 64))).to_dict()))
    assert facts["agreement"] >= 0.9999
    assert facts["runs"][1]["batch_size"] == 3
    assert facts["network"]["miou"] == facts["artifact"]["miou"]


def test_the_network_is_not_changed(model, path):
    network = tiny(9, width=16).double().train()
    verify(path, network)
    assert network.training
    assert next(network.parameters()).dtype is torch.float64


def test_a_checkpoint_is_loaded_as_the_network(tmp_path):
    network = bpkd_sdk.create_model("smp/FPN/tu-mobilenetv3_small_050", 4).eval()
    bpkd_sdk.save_model(network, tmp_path / "m.safetensors")
    artifact = TorchRuntime(network)
    assert verify(artifact, tmp_path / "m.safetensors", input_sizes=[(64, 64)], batch_sizes=[1]).agreement == 1


def test_sizes_must_be_passed_if_the_artifact_states_none(model):
    with pytest.raises(ValueError, match="Sequential does not state which images it accepts. Pass `input_sizes`"):
        verify(TorchRuntime(model), model)


def test_files_that_are_not_artifacts(model, path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        verify(tmp_path / "none.onnx", model)
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a readable ONNX file"):
        verify(tmp_path / "cut.onnx", model)
    bpkd_sdk.save_model(model, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").rename(tmp_path / "renamed.onnx")
    with pytest.raises(ValueError, match="is not a readable ONNX file"):
        verify(tmp_path / "renamed.onnx", model)
    (tmp_path / "renamed.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        verify(tmp_path / "renamed.safetensors", model)
    (tmp_path / "m.tflite").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ends in one of .safetensors.*but got '.*m.tflite'"):
        verify(tmp_path / "m.tflite", model)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="no metadata of bpkd-sdk"):
        verify(tmp_path / "foreign.onnx", model)


def test_a_size_that_the_file_does_not_accept(model, path):
    with pytest.raises(ValueError, match=r"takes images of 48 x 64 .*, but got 64 x 64.*dynamic_size=True"):
        verify(path, model, input_sizes=[(64, 64)])
