"""Every architecture of segmentation-models-pytorch is exported to a verified file."""

import json

import onnx
import pytest

import bpkd_sdk
from benchmarks.networks import settled
from bpkd_sdk.export import to_onnx
from bpkd_sdk.models.smp import ARCHITECTURES

DPT = "smp/DPT/tu-vit_tiny_patch16_224"
# The others have the same kinds of layers, and other tests export some of them: Unet and FPN in tests/test_your_own.py,
# PSPNet and Segformer in test_families.py, Linknet in tests/bands.py.
QUICK = {"DeepLabV3Plus", "PAN"}
FROM_SMP = [
    pytest.param(
        f"smp/{name}/{'mit_b0' if name == 'Segformer' else 'tu-test_resnet'}",
        marks=() if name in QUICK else pytest.mark.slow,
    )
    for name in ARCHITECTURES
    if name != "DPT"
]
# PAN pools its features three times; DPT's position embeddings are for one size.
SIZES = {"smp/PAN/tu-test_resnet": (176, 192), DPT: (224, 224), "smp/DPT/tu-test_vit": (96, 128)}


@pytest.mark.parametrize("name", FROM_SMP)
def test_any_size_and_batch(name, tmp_path):
    size = SIZES.get(name, (96, 128))
    report = to_onnx(settled(name, 2, size), tmp_path / "m.onnx", input_size=size, dynamic_size=True)
    assert report.verified
    assert {run.batch_size for run in report.verification.runs} == {1, 3}
    assert size not in {run.size for run in report.verification.runs}
    entry, *_ = onnx.load(report.path).metadata_props
    assert json.loads(entry.value)["network"]["name"] == name


@pytest.mark.parametrize("name", ["smp/PSPNet/tu-test_resnet", "smp/DPT/tu-test_vit"])
def test_one_size(name, tmp_path):
    size = SIZES.get(name, (90, 120))
    assert to_onnx(
        settled(name, 2, size), tmp_path / "m.onnx", input_size=size, dynamic_batch="DPT" not in name
    ).verified


@pytest.mark.parametrize(("name", "reason"), [(DPT, r"Input height \(.*\) doesn't match model \(224\)")])
def test_refused_with_the_networks_reason(name, reason, tmp_path):
    network = bpkd_sdk.create_model(name, 2).eval()
    with pytest.raises(RuntimeError, match=f"torch cannot export {name}.*{reason}.*dynamic_size=False.*No file"):
        to_onnx(network, tmp_path / "m.onnx", input_size=(96, 128), dynamic_size=True)
    assert list(tmp_path.iterdir()) == []
