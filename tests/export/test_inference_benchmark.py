"""The speed benchmarks compare the same work, and do not measure again what is in their files."""

import json

import numpy as np
import pytest
import torch

import bpkd_sdk
from benchmarks import export_table, inference
from benchmarks.networks import to_int8
from benchmarks.records import RESULTS, Records
from bpkd_sdk.data.shapes import render
from bpkd_sdk.export import to_onnx
from bpkd_sdk.export.benchmark import BenchmarkReport, BenchmarkRow, Environment, Percentiles
from bpkd_sdk.export.onnx import LEAST_AGREEMENT
from bpkd_sdk.models import ZOO
from bpkd_sdk.runtime import TorchRuntime, open_runtime
from bpkd_sdk.runtime.onnx import OnnxRuntime
from tests.networks import tiny

SIZE = (64, 96)


def test_all_ways_give_the_same_mask(tmp_path):
    network = tiny(9, width=16, stride=8).eval()
    network.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=9)
    to_onnx(network, tmp_path / "whole.onnx", input_size=SIZE)
    assert to_int8(tmp_path / "whole.onnx", tmp_path / "int8.onnx") == 1
    program = torch.onnx.export(network, (torch.zeros(1, 3, *SIZE),), dynamo=True, verbose=False)
    program.save(tmp_path / "bare.onnx", external_data=False)
    images = render(0, "ways", 0, SIZE)[0][None]
    expected = TorchRuntime(network)(images)
    assert len(np.unique(expected)) > 1
    usual = inference.UsualRuntime(tmp_path / "bare.onnx", network)
    for runtime, least in ((usual, 0.9999), (open_runtime(tmp_path / "whole.onnx", "cpu"), 0.9999)):
        assert (runtime(images) == expected).mean() >= least
    in_int8 = open_runtime(tmp_path / "int8.onnx", "cpu")
    assert in_int8.metadata["quantization"] == {"quantized": 1}
    assert not {"verified", "parity"} & in_int8.metadata.keys()  # it was not compared with torch
    assert (in_int8(images) == expected).mean() > 0.9
    as_written = OnnxRuntime(tmp_path / "int8.onnx", "cpu", as_written=True)
    assert (as_written(images) == in_int8(images)).mean() > 0.99


def report(rounds):
    """Return the report of ways with these milliseconds in each round."""
    rows = tuple(
        BenchmarkRow(
            way,
            "ONNX",
            latency=Percentiles.of([ms / 1000 for ms in times]),
            rounds=times,
            stages=dict.fromkeys(("pre", "inference", "post"), Percentiles(1.0, 1.0, 1.0)),
        )
        for way, times in rounds.items()
    )
    return BenchmarkReport(rows, 1, SIZE, "", None, 1.0, 3, 0.2, Environment.here())


def test_ratios_of_known_times():
    times = {
        "torch": (40.0, 42.0, 50.0),
        "fp32": (20.0, 21.0, 20.0),
        "int8": (10.0, 7.0, 8.0),
        "int8 file": (12.0, 12.0, 12.0),
        "usual": (24.0, 25.0, 26.0),
    }
    found = inference.ratios(report(times))
    eager, integer, plain, inside = (found[name] for name in inference.RATIOS)
    assert eager == {"ratio": 2.1, "lowest": 2.0, "highest": 2.5, "target": 2.0}
    assert integer["ratio"] == pytest.approx(20 / 8)
    assert plain == {"ratio": 12 / 8, "lowest": 12 / 10, "highest": 12 / 7, "target": None}
    assert inside["ratio"] == pytest.approx(25 / 20)
    share = found["share of pre- and post-processing in the usual way"]["ratio"]
    assert share == pytest.approx(2 / 25)
    calm = json.loads(report(times).to_json())["environment"] | {"load": 0.0, "governor": "performance"}
    done = {
        name: {"ratios": found, "report": {"rows": [{"latency": {"p50": 42.0}}] * 5, "environment": calm | changes}}
        for name, changes in (("net", {}), ("other", {"load": 99.0}))
    }
    table = inference.table(done)
    assert "| net | 42 | 42 | 42 | 42 | 42 | 2.10 (2.00 to 2.50; 2.0 required) |" in table
    assert "| 1.50 (1.20 to 1.71) |" in table
    assert table.splitlines()[-1].startswith("- other: The machine was busy: a load of 99.0")
    assert "- net" not in table


def test_nothing_is_measured_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "benchmark", None)  # a call would fail
    measured = report(dict.fromkeys(inference.WAYS, (1.0, 2.0)))
    found = {"ratios": inference.ratios(measured), "report": json.loads(measured.to_json()) | {"rows": []}}
    Records(tmp_path / "inference-cpu.jsonl", {"size": SIZE}).add("pspnet_r18", found)
    assert inference.run(tmp_path, ["pspnet_r18"], SIZE, 1.0, tmp_path).keys() == {"pspnet_r18"}
    made = []

    def make_rows(name, shapes):
        made.append((name, shapes))
        row = {"whole": 1.0, "edge": None, "body": 1.0, "onnx_mb": 1.0, "onnx_layers": {"fp32": 3}}
        return dict.fromkeys(
            export_table.PRECISIONS, row | {"engine_mb": 1.0, "engine_layers": {"CONVOLUTION": {"FLOAT": 3}}}
        )

    monkeypatch.setattr(export_table, "make_rows", make_rows)
    for networks in (["pspnet_r18"], ["pspnet_r18", "isanet_r18"]):
        export_table.run(tmp_path, networks)
    assert made == [(name, shapes) for name in ("pspnet_r18", "isanet_r18") for shapes in ("static", "dynamic")]
    table = (tmp_path / "export-table.md").read_text()
    assert "| pspnet_r18 | dynamic | int8 | 100.00 | – | 100.00 | 1.0 | 3 fp32 | 1.0 | 3 FLOAT convolution |" in table


def test_the_committed_table_has_every_network():
    path = RESULTS / "export-table.jsonl"
    rows = Records(path, json.loads(path.read_text().splitlines()[0])["setting"]).runs
    assert len(rows) == len(ZOO) * len(export_table.SHAPES) * len(export_table.PRECISIONS)
    for name, row in rows.items():
        precision = name.rpartition(" ")[2]
        kind = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}[precision]
        convolutions = row["engine_layers"]["CONVOLUTION"]
        assert convolutions[kind] >= sum(convolutions.values()) - (2 if precision == "int8" else 0), name
        assert all(row[part] >= least for part, least in LEAST_AGREEMENT.get(precision, {"whole": 0.8}).items()), name
