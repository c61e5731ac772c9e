"""Networks of other libraries, without any change to them."""

import segmentation_models_pytorch as smp
import torch
from torchvision.models import segmentation

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset

DATA = ShapesDataset("train", length=4, size=(64, 64)), ShapesDataset("val", length=2, size=(64, 80))
OPTIONS = {"steps": 2, "batch_size": 2, "crop_size": (64, 64), "device": "cpu", "check_data": False}


def test_torchvision_teaches_segmentation_models_pytorch(tmp_path):
    torch.manual_seed(0)
    teacher = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=9).eval()
    student = smp.Unet("tu-mobilenetv3_small_050", encoder_weights=None, classes=9)
    result = bpkd_sdk.distill(teacher, student, DATA, output_dir=tmp_path, **OPTIONS)
    assert list(result.history[0]["terms"]) == ["ce", "edge", "body"]
    assert result.metrics.images == 2


def test_torchvision_with_an_auxiliary_head_learns(tmp_path):
    torch.manual_seed(0)
    student = segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=9, aux_loss=True
    )
    teacher = bpkd_sdk.create_model("smp/FPN/tu-mobilenetv3_small_050", 9).eval()
    before = student.aux_classifier[-1].weight.clone()
    result = bpkd_sdk.distill(teacher, student, (DATA[0], None), output_dir=tmp_path, **OPTIONS)
    assert list(result.history[0]["terms"]) == ["ce", "aux", "edge", "body"]
    assert not torch.equal(before, student.aux_classifier[-1].weight)
