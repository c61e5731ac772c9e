"""Export of every encoder and every decoder of the paper to ONNX, to INT8, and to engines compiled by TensorRT for RTX.

The networks have fewer residual blocks than the paper's, with all kinds of their layers: the number of repetitions does
not change what is exported. `benchmarks/export_table.py` exports the networks at their full depth.
"""

import json

import onnx
import pytest
from torch import nn

from benchmarks.networks import fitted, to_int8
from bpkd_sdk.export import to_onnx, to_tensorrt
from bpkd_sdk.models import ZOO

TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}
# (height, width) of the smallest images with enough edges to verify fp16.
SIZES = dict.fromkeys(ZOO, (96, 128)) | {"deeplabv3plus_mv2": (128, 192)}


# Networks with all encoders and all decoders. The other four combine the same parts in other widths and depths;
# `tests/models/test_zoo.py` traces these with dynamic axes.
NETWORKS = ("pspnet_r101", "deeplabv3plus_mv2", "isanet_r18", "hrnetv2p_w18s")


# The half precision of PSPNet's pooling matrices is a case of its own; the other networks have no layers of that kind.
ANY_SIZE = [
    ("pspnet_r18", ("fp32", "fp16", "int8")),
    *((name, ("fp32", "int8")) for name in NETWORKS[1:]),
    *(pytest.param(name, ("fp16",), marks=pytest.mark.slow) for name in NETWORKS),
    pytest.param("pspnet_r101", ("fp32", "int8"), marks=pytest.mark.slow),
]


def export(network, size, folder, precisions=tuple(TYPES), **options):
    """Return the network's files by precision, and the reports of the files that were compared with torch."""
    files = {precision: folder / f"{precision}.onnx" for precision in precisions}
    reports = [
        to_onnx(network, files[precision], input_size=size, precision=precision, **options)
        for precision in files
        if precision != "int8"
    ]
    if "int8" in files:
        to_int8(files["fp32"], files["int8"], ends=True)
    return files, reports


def check_engine(path, precision, network, **shapes):
    """Compile, check that every convolution has the file's precision, and return the shapes that the engine accepts."""
    engine = to_tensorrt(path, path.with_suffix(".engine"), backend="tensorrt_rtx", hardware="sm89", **shapes)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert engine.manifest.layers["CONVOLUTION"] == {TYPES[precision]: convolutions}
    return engine.manifest.inputs["images"]


@pytest.mark.parametrize(("name", "precisions"), ANY_SIZE)
def test_files_of_any_size(name, precisions, shallow, compiler, tmp_path):
    size = SIZES[name]
    network = fitted(name, size, scenes=12)
    files, reports = export(network, size, tmp_path, precisions, dynamic_size=True)
    for report in reports:
        assert report.verified
        assert {run.batch_size for run in report.verification.runs} == {1, 3}
        assert size not in {run.size for run in report.verification.runs}
    entry, *_ = onnx.load(files[precisions[0]]).metadata_props
    assert json.loads(entry.value)["network"]["name"] == name
    largest = (2 * size[0], 2 * size[1])
    for precision, path in files.items():
        shapes = check_engine(path, precision, network, batch_sizes=(1, 2, 4), input_sizes=(size, size, largest))
        assert (shapes["min"], shapes["max"]) == ([1, *size, 3], [4, *largest, 3])


def test_files_of_any_number_of_images(shallow, compiler, tmp_path):
    """Engines for one batch size and for several, from the same file."""
    size, path = SIZES["pspnet_r18"], tmp_path / "m.onnx"
    network = fitted("pspnet_r18", size, scenes=12)
    report = to_onnx(network, path, input_size=size)
    assert report.verified
    assert {run.batch_size for run in report.verification.runs} == {1, 3}
    one = check_engine(path, "fp32", network, batch_sizes=(1, 1, 1))
    assert one["min"] == one["max"] == [1, *size, 3]
    many = check_engine(path, "fp32", network, batch_sizes=(1, 2, 4))
    assert (many["min"], many["max"]) == ([1, *size, 3], [4, *size, 3])


@pytest.mark.parametrize("name", ["pspnet_r18", pytest.param("isanet_r18", marks=pytest.mark.slow)])
def test_files_of_one_shape(name, shallow, compiler, tmp_path):
    """These networks export other layers for one shape: they pool to a fixed size, or cut the image into blocks."""
    size = SIZES[name]
    network = fitted(name, size, scenes=12)
    files, reports = export(network, size, tmp_path, dynamic_batch=False)
    assert all(report.verified for report in reports)
    for precision, path in files.items():
        shapes = check_engine(path, precision, network)
        assert shapes["min"] == shapes["max"] == [1, *size, 3]
