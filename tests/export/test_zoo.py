"""Every network of the paper, from torch to ONNX, to INT8, to engines compiled by TensorRT for RTX.

`benchmarks/export_table.py` makes every one in every precision, static and dynamic, which takes too long for each run of
the tests; here the four large ones, which differ from the others in depth and width alone, stay static.
"""

import json

import onnx
import pytest
import torch
from torch import nn

import bpkd_sdk
from benchmarks.networks import fitted, settled, to_int8
from bpkd_sdk.export import to_onnx, to_tensorrt
from bpkd_sdk.models import ZOO

ANY_SIZE = ["pspnet_r18", "isanet_r18", "hrnetv2p_w18s", "deeplabv3plus_mv2"]
LARGE = ["pspnet_r101", "isanet_r101", "hrnetv2p_w48", "deeplabv3plus_r101"]
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}


def check_engine(path, precision, network, **ranges):
    """Compile, and find every convolution in the precision asked for."""
    engine = to_tensorrt(path, path.with_suffix(".engine"), backend="tensorrt_rtx", hardware="sm89", **ranges)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert engine.manifest.layers["CONVOLUTION"] == {TYPES[precision]: convolutions}
    shapes = engine.manifest.inputs["images"]
    assert (shapes["min"] == shapes["max"]) == (not ranges)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_any_size_and_batch(name, compiler, tmp_path):
    size = (96, 128)
    network = settled(name, 2, size)
    report = to_onnx(network, tmp_path / "m.onnx", input_size=size, dynamic_size=True)
    assert report.verified
    assert {run.batch for run in report.verification.runs} == {1, 3}
    assert size not in {run.size for run in report.verification.runs}
    entry, _ = onnx.load(report.path).metadata_props
    assert json.loads(entry.value)["network"]["name"] == name
    to_int8(report.path, tmp_path / "int8.onnx", ends=True)
    for path, precision in ((report.path, "fp32"), (tmp_path / "int8.onnx", "int8")):
        check_engine(path, precision, network, batch=(1, 2, 4), size=((96, 96), size, (192, 256)))


@pytest.mark.parametrize("name", LARGE)
def test_large_networks(name, compiler, tmp_path):
    size = (96, 128) if name.startswith("isanet") else (64, 64)  # ISANet attends within blocks of 64 pixels
    network = fitted(name, size)
    paths = {precision: tmp_path / f"{precision}.onnx" for precision in TYPES}
    for precision in ("fp32", "fp16"):
        assert to_onnx(network, paths[precision], input_size=size, dynamic_batch=False, precision=precision).verified
    to_int8(paths["fp32"], paths["int8"], ends=True)
    for precision, path in paths.items():
        check_engine(path, precision, network)


def test_the_large_networks_are_made_of_the_others_parts():
    def parts(name):
        with torch.device("meta"):
            return {type(module) for module in bpkd_sdk.create_model(name, 2).modules()}

    seen = set().union(*map(parts, [*ANY_SIZE, LARGE[0]]))
    for name in ZOO:
        assert parts(name) <= seen, name
