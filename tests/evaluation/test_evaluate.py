"""Tests of `evaluate`: scores at the size of the labels, batches, modes of modules, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.evaluation.api import _batches
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.runtime.module import whole_logits
from tests.networks import tiny


class Oracle(nn.Module):
    """A perfect network of stride 1 for `LabelsAsImages`, whose first channel contains the class."""

    def forward(self, images):
        spec = bpkd_sdk.NetworkSpec(name=None, num_classes=3)
        red = (images[:, 0] * spec.std[0] + spec.mean[0]) * 255
        return F.one_hot(red.round().long(), 3).permute(0, 3, 1, 2).float()


class LabelsAsImages(bpkd_sdk.SegmentationDataset):
    """Images whose three channels are the label."""

    name, class_names, palette = "labels as images", ("a", "b", "c"), ((0, 0, 0),) * 3

    def __init__(self, sizes):
        generator = torch.Generator().manual_seed(0)
        self.labels = [torch.randint(0, 3, size, generator=generator, dtype=torch.uint8) for size in sizes]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.labels[index].expand(3, -1, -1).contiguous(), self.labels[index]


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_perfect_network_scores_one_for_images_of_several_sizes(mode, batch_size):
    data = LabelsAsImages([(20, 30), (20, 30), (33, 17), (20, 30)])
    metrics = bpkd_sdk.evaluate(
        Oracle(),
        data,
        protocol=EvaluationProtocol(crop_size=(16, 16) if mode == "slide" else None),
        batch_size=batch_size,
    )
    assert metrics.miou == 1
    assert metrics.images == 4


@pytest.mark.parametrize("crop_size", [None, (16, 16)], ids=["whole", "slide"])
def test_scores_do_not_depend_on_the_batch_size(crop_size):
    data = LabelsAsImages([(20, 30), (33, 17), (20, 30), (20, 30)])
    options = {"protocol": EvaluationProtocol(crop_size=crop_size, scales=(0.75, 1.0), flip=True)}
    alone, batched = (bpkd_sdk.evaluate(tiny(3).eval(), data, batch_size=size, **options) for size in (1, 4))
    assert str(batched) == str(alone)  # some scores are NaN


def test_samples_of_the_same_size_share_a_batch(monkeypatch):
    data = LabelsAsImages([(20, 30), (33, 17), (20, 30), (20, 30), (33, 17), (20, 30), (9, 9)])

    def batches(largest, workers=0):
        return list(_batches(data, lambda size: largest[size], workers))

    largest = {(20, 30): 3, (33, 17): 3, (9, 9): 1}
    in_process = batches(largest)
    assert [indices for indices, _, _ in in_process] == [[0, 2, 3], [6], [1, 4], [5]]
    for (indices, *tensors), (expected, *expected_tensors) in zip(batches(largest, 2), in_process, strict=True):
        assert indices == expected
        assert all(map(torch.equal, tensors, expected_tensors))
    monkeypatch.setattr("bpkd_sdk.evaluation.api.MAX_WAITING", 2 * 20 * 30)
    assert [indices for indices, _, _ in batches(largest)] == [[0, 2], [1, 4], [3, 5], [6]]


def test_whole_pads_to_the_divisor_and_resizes_logits_before_the_mask():
    model = tiny(5).eval()
    model.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=5, mean=(0.5,) * 3, std=(0.25,) * 3, size_divisor=16)
    images = torch.randint(0, 256, (2, 3, 30, 41), dtype=torch.uint8)
    padded = F.pad((images.float() / 255 - 0.5) / 0.25, (0, 7, 0, 2))
    expected = F.interpolate(model(padded), (32, 48), mode="bilinear", align_corners=False)[:, :, :30, :41]
    torch.testing.assert_close(whole_logits(model, images), expected)


def test_one_class_is_thresholded_at_zero():
    assert to_mask(torch.tensor([[[[-0.1, 0.2]]]])).tolist() == [[[0, 1]]]


@pytest.mark.parametrize("training", [True, False])
def test_a_module_returns_to_its_mode(training):
    model = tiny(9).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bpkd_sdk.evaluate(model, ShapesDataset("val", length=2))
    assert model.training is training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_reference_network_replaces_labels():
    data = ShapesDataset("val", length=2)
    model = tiny(9)
    assert bpkd_sdk.evaluate(model, data, reference=model).pixel_accuracy == 1
    data.has_labels = False
    with pytest.raises(ValueError, match="has no labels; pass `reference`"):
        bpkd_sdk.evaluate(model, data)


def test_invalid_arguments_are_named(tmp_path):
    data = ShapesDataset("val", length=1)
    with pytest.raises(ValueError, match="Did you mean 'slide'"):
        EvaluationProtocol(fit="slides")
    archive = tmp_path / "student.tar"
    with pytest.raises(FileNotFoundError, match="There is no file or folder .*student.tar"):
        bpkd_sdk.evaluate(archive, data)
    archive.touch()
    with pytest.raises(ValueError, match=r"ends in one of .safetensors, .pth, .pt, .onnx.*but got '.*student.tar'"):
        bpkd_sdk.evaluate(archive, data)
