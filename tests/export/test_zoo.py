"""Every network of the paper, from torch to ONNX, to INT8, to engines compiled by TensorRT for RTX.

Files of any size are made of all but HRNet-W48 (of the same parts as W18, and the slowest by far), whose files take any
number of images; all become engines for one shape and for many. Files of one shape are made of the networks whose
layers are then others: those that pool to a fixed size or cut the image into blocks. `benchmarks/export_table.py` makes
files of any size and of one shape of all.
"""

import json

import onnx
import pytest
from torch import nn

from benchmarks.networks import fitted, to_int8
from bpkd_sdk.export import to_onnx, to_tensorrt
from bpkd_sdk.models import ZOO

TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}
# (height, width) of the smallest images by which fp16 can be judged: that have edges enough.
SIZES = dict.fromkeys(ZOO, (96, 128)) | {
    "deeplabv3plus_mv2": (128, 192),
    "deeplabv3plus_r101": (80, 96),
    "hrnetv2p_w48": (64, 64),
}


def export(network, size, folder, **options):
    """The network's files by precision, and the reports of those that were compared with torch."""
    files = {precision: folder / f"{precision}.onnx" for precision in TYPES}
    reports = [
        to_onnx(network, files[precision], input_size=size, precision=precision, **options)
        for precision in ("fp32", "fp16")
    ]
    to_int8(files["fp32"], files["int8"], ends=True)
    return files, reports


def check_engine(path, precision, network, **shapes):
    """Compile, and find every convolution in the precision asked for; the shapes the engine takes."""
    engine = to_tensorrt(path, path.with_suffix(".engine"), backend="tensorrt_rtx", hardware="sm89", **shapes)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert engine.manifest.layers["CONVOLUTION"] == {TYPES[precision]: convolutions}
    return engine.manifest.inputs["images"]


@pytest.mark.parametrize("name", [name for name in ZOO if name != "hrnetv2p_w48"])
def test_files_of_any_size(name, compiler, tmp_path):
    """Into engines for one shape and for many."""
    size = SIZES[name]
    network = fitted(name, size)
    files, reports = export(network, size, tmp_path, dynamic_size=True)
    for report in reports:
        assert report.verified
        assert {run.batch for run in report.verification.runs} == {1, 3}
        assert size not in {run.size for run in report.verification.runs}
    entry, _ = onnx.load(files["fp32"]).metadata_props
    assert json.loads(entry.value)["network"]["name"] == name
    largest = (2 * size[0], 2 * size[1])
    for precision, path in files.items():
        one = check_engine(path, precision, network, batch=(1, 1, 1), size=(size, size, size))
        assert one["min"] == one["max"] == [1, *size, 3]
        many = check_engine(path, precision, network, batch=(1, 2, 4), size=(size, size, largest))
        assert (many["min"], many["max"]) == ([1, *size, 3], [4, *largest, 3])


def test_files_of_any_number_of_images(compiler, tmp_path):
    size = SIZES["hrnetv2p_w48"]
    network = fitted("hrnetv2p_w48", size)
    files, reports = export(network, size, tmp_path)
    for report in reports:
        assert report.verified
        assert {run.batch for run in report.verification.runs} == {1, 3}
    for precision, path in files.items():
        one = check_engine(path, precision, network, batch=(1, 1, 1))
        assert one["min"] == one["max"] == [1, *size, 3]
        many = check_engine(path, precision, network, batch=(1, 2, 4))
        assert (many["min"], many["max"]) == ([1, *size, 3], [4, *size, 3])


@pytest.mark.parametrize("name", ["pspnet_r18", "isanet_r18"])
def test_files_of_one_shape(name, compiler, tmp_path):
    size = SIZES[name]
    network = fitted(name, size)
    files, reports = export(network, size, tmp_path, dynamic_batch=False)
    assert all(report.verified for report in reports)
    for precision, path in files.items():
        shapes = check_engine(path, precision, network)
        assert shapes["min"] == shapes["max"] == [1, *size, 3]
