"""Export of a student of four channels of 12 bits: float32 input with the scaling inside, INT8, engine, benchmark."""

import numpy as np
import onnx
import pytest
import torch

import bpkd_sdk
from bpkd_sdk.export.verification import verify
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.runtime.module import whole_logits
from tests.bands import BandScenes, band_scene
from tests.conftest import missing


@pytest.fixture(scope="module")
def val(bands):
    return bpkd_sdk.open_dataset(bands.root, split="val")


def test_the_file_takes_original_values_as_float32_and_agrees_with_torch(bands):
    (image,) = onnx.load(bands.onnx).graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [side.dim_value for side in image.type.tensor_type.shape.dim][1:] == [48, 48, 4]
    runtime = open_runtime(bands.onnx)
    assert (runtime.metadata["input_dtype"], runtime.spec.value_range) == ("float32", (0, 4095))
    assert bands.report.verified
    assert bands.report.agreement > 0.999
    pixels = band_scene(200)[0].astype(np.float32)[None]
    expected = whole_logits(bands.run.model, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert (runtime(pixels) == to_mask(expected).numpy()).mean() > 0.999


def test_int8_is_calibrated_on_the_images_and_scored(bands, val, tmp_path):
    report = bpkd_sdk.quantize(bands.onnx, tmp_path / "int8.onnx", val, max_boundary_loss=0.5)
    assert any(layer.quantized for layer in report.layers)
    before, after = (bpkd_sdk.evaluate(path, val).miou for path in (bands.onnx, report.path))
    assert after > before - 0.1


def test_verify_and_benchmark_use_the_images_of_the_data(bands, val):
    assert verify(bands.onnx, bands.run.checkpoint, data=val).agreement > 0.999
    (row,) = bpkd_sdk.benchmark(open_runtime(bands.onnx), val, duration=0.1, device="cpu").rows
    assert row.problem is None
    assert row.miou == pytest.approx(bpkd_sdk.evaluate(bands.run.model, val).miou, abs=0.01)


def test_tensorrt_compiles_the_float32_input(bands, tmp_path):
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        missing("tensorrt_rtx")
    manifest = bpkd_sdk.to_tensorrt(bands.onnx, tmp_path / "a.engine", hardware=["sm86"]).manifest
    assert manifest.inputs["images"] == {
        "dtype": "FLOAT", "min": [1, 48, 48, 4], "opt": [1, 48, 48, 4], "max": [8, 48, 48, 4]
    }  # fmt: skip


def test_triton_gets_the_type_and_the_channels(bands, tmp_path):
    config = bpkd_sdk.to_triton(bands.onnx, tmp_path / "models").config
    assert list(config.input[0].dims) == [48, 48, 4]
    assert config.input[0].data_type == 11  # TYPE_FP32
    assert (tmp_path / "models/student/warmup/image").stat().st_size == 48 * 48 * 4 * 4


class Wide(BandScenes):
    value_range = (0, 65535)


def test_data_of_another_range_are_refused(bands, tmp_path):
    for use in (
        lambda: bpkd_sdk.evaluate(bands.onnx, Wide()),
        lambda: bpkd_sdk.quantize(bands.onnx, tmp_path / "a.onnx", Wide()),
        lambda: verify(bands.onnx, bands.run.model, data=Wide()),
    ):
        with pytest.raises(
            ValueError, match="takes images of 4 channels of 0 to 4095, but bands has 4 channels of 0 to 65"
        ):
            use()
    with pytest.raises(ValueError, match=r"Expected images float32 \(N, H, W, 4\) of 4 channels of 0 to 4095"):
        open_runtime(bands.onnx)(np.zeros((1, 48, 48, 4), np.uint8))
