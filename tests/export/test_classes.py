"""Exported files on data that have the same classes in another order, and networks of more classes than a mask holds."""

import numpy as np
import pytest
import torch
from torch import nn

import bpkd_sdk
from bpkd_sdk.export import benchmark, quantize, to_onnx, verify
from bpkd_sdk.models.classifier import reorder_classifier
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.serve import Predictor
from bpkd_sdk.serve.networks import open_models
from tests.scenes import COLORS, NAMES, Scenes

ORDER = (2, 0, 1)
SAME, OTHER = Scenes(length=8), Scenes(ORDER, length=8)
FOREIGN = Scenes(names=("one", "two", "three"))


class ByColor(nn.Module):
    """A network that predicts the class with the nearest colour, which is right on every scene."""

    def __init__(self):
        super().__init__()
        self.spec = bpkd_sdk.NetworkSpec(None, 3, class_names=NAMES[:3], mean=(0.0,) * 3, std=(1.0,) * 3)
        centers = torch.from_numpy(COLORS[:3]).float() / 255
        self.first, self.middle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            for layer in (self.first, self.middle):
                layer.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
                layer.bias.zero_()
            self.last.weight.copy_(2 * centers.view(3, 3, 1, 1))
            # The small offsets break ties: some pixels of the photographs have the same distance to two colours.
            self.last.bias.copy_(torch.tensor([0.0, 1e-3, 2e-3]) - centers.square().sum(1))

    def forward(self, images):
        return self.last(self.middle(self.first(images).relu()).relu())


@pytest.fixture(scope="module")
def model():
    return ByColor().eval()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("onnx") / "m.onnx"
    return to_onnx(model, target, input_size=(48, 48), verify_on=OTHER).path


def test_verify_scores_both_in_the_datas_order(model, path):
    for data in (SAME, OTHER):
        report = verify(path, model, data=data)
        assert (report.network.miou, report.artifact.miou) == (1, 1)
        assert report.network.class_names == data.class_names
    with pytest.raises(ValueError, match="do not have the same classes"):
        verify(path, model, data=FOREIGN)
    assert verify(path, model, data=FOREIGN, match_classes=False).artifact.miou == 1


def test_verify_on_other_classes_is_refused_before_the_export(model, tmp_path):
    with pytest.raises(ValueError, match="do not have the same classes"):
        to_onnx(model, tmp_path / "m.onnx", input_size=(48, 48), verify_on=FOREIGN)
    assert not list(tmp_path.iterdir())


def test_int8_is_scored_in_the_files_order(path, tmp_path):
    reports = [quantize(path, tmp_path / f"{i}.onnx", data) for i, data in enumerate((SAME, OTHER))]
    assert reports[0].boundary_loss == reports[1].boundary_loss
    assert reports[0].layers == reports[1].layers
    with pytest.raises(ValueError, match="do not have the same classes"):
        quantize(path, tmp_path / "q.onnx", FOREIGN)
    assert quantize(path, tmp_path / "q.onnx", FOREIGN, match_classes=False).boundary_loss == reports[0].boundary_loss


def test_the_benchmark_scores_in_the_datas_order(model, path):
    opened = open_runtime(path, "cpu")
    for row in benchmark([model, path], OTHER, duration=0.1).rows:
        assert row.miou == 1, row.notes
    rows = benchmark([model, opened], FOREIGN, duration=0.1).rows
    assert all(row.miou is None and "do not have the same classes" in " ".join(row.notes) for row in rows)
    rows = benchmark([model, opened], FOREIGN, duration=0.1, match_classes=False).rows
    assert [row.miou for row in rows] == [1, 1]


def test_the_benchmark_compares_classes_not_positions(model, path):
    other = ByColor().eval()
    with torch.no_grad():
        reorder_classifier(other, ORDER, torch.rand(1, 3, 48, 48))
    other.spec = bpkd_sdk.NetworkSpec(None, 3, class_names=OTHER.class_names, mean=(0.0,) * 3, std=(1.0,) * 3)
    rows = benchmark([open_runtime(path, "cpu"), other], SAME, duration=0.1).rows
    assert [(row.miou, row.agreement, row.edge_agreement) for row in rows] == [(1, 1, 1)] * 2


def test_a_file_of_masks_is_evaluated_in_the_datas_order(path):
    assert bpkd_sdk.evaluate(path, OTHER).miou == 1
    assert bpkd_sdk.evaluate(path, FOREIGN, match_classes=False).miou == 1


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("argmax", [True, False])
def test_more_than_256_classes_are_refused_everywhere(tmp_path, named, argmax):
    network = nn.Conv2d(3, 459, 1).eval()
    if named:
        network.spec = bpkd_sdk.NetworkSpec(None, 459)
    message = "at most 256 classes, but this network has 459"
    with pytest.raises(ValueError, match=message):
        to_onnx(network, tmp_path / "m.onnx", input_size=(32, 32), argmax=argmax)
    with pytest.raises(ValueError, match=message):
        Predictor(network)(np.zeros((32, 32, 3), np.uint8))
    if named:
        (unavailable,) = open_models([network], device="cpu").unavailable
        assert message in unavailable.reason
    assert not list(tmp_path.iterdir())
