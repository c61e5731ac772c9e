"""Every figure of a benchmark is confirmed by another measurement, and no artifact stops the others."""

import dataclasses
import io
import itertools
import json
import os
import re
import sys
import threading
import time
from html.parser import HTMLParser
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from torch import nn

import bpkd_sdk
from benchmarks.networks import to_int8
from bpkd_sdk import memory
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import benchmark, to_onnx
from bpkd_sdk.export.benchmark import BenchmarkReport, Environment, Percentiles, environment, subject
from bpkd_sdk.export.benchmark import page as html
from bpkd_sdk.export.benchmark.entry import Entry
from bpkd_sdk.export.benchmark.environment import describe_machine
from bpkd_sdk.export.benchmark.facts import count_cost, layer_precisions, profile_onnx_nodes
from bpkd_sdk.export.benchmark.process import ArtifactError, RemoteSubject
from bpkd_sdk.export.benchmark.report import STAGES
from bpkd_sdk.export.benchmark.table import format_number
from bpkd_sdk.export.onnx import seal_onnx
from bpkd_sdk.runtime import AcceptedImages, Runtime, TorchRuntime, open_runtime
from bpkd_sdk.runtime.device import Device
from bpkd_sdk.spec import NetworkSpec
from tests.networks import tiny

NETWORK = "smp/FPN/tu-test_resnet"
SIZE = (64, 96)
DATA = ShapesDataset("val", length=5, size=SIZE)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return bpkd_sdk.create_model(NETWORK, 9).eval()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    bpkd_sdk.save_model(network, folder / "m.safetensors")
    to_onnx(network, folder / "m.onnx", input_size=SIZE, dynamic_batch=False)
    (folder / "cut <b>.onnx").write_bytes((folder / "m.onnx").read_bytes()[:-1000])
    (folder / "m.engine").write_bytes(b"plan")
    (folder / "m.pt2").touch()
    return folder


@pytest.fixture(scope="module")
def report(network, files):
    module = TorchRuntime(network, name="in this process")
    paths = [files / name for name in ("m.safetensors", "m.onnx", "cut <b>.onnx", "m.engine", "m.pt2")]
    return benchmark([*paths, module], DATA, duration=0.05, device="cpu")


def test_the_table_has_a_row_with_the_facts_of_each_artifact(report, network, files):
    checkpoint, exported, *_, module = report.rows
    cost = bpkd_sdk.profile(network, SIZE)
    for row, name, format_ in ((checkpoint, "m.safetensors", "checkpoint"), (exported, "m.onnx", "ONNX")):
        assert (row.name, row.format, row.device) == (str(files / name), format_, "cpu")
        assert row.file_size == (files / name).stat().st_size
        assert row.host_memory > 1e6
    assert (module.name, module.format, module.file_size, module.host_memory) == (
        "in this process",
        "torch",
        None,
        None,
    )
    assert report.measured == (checkpoint, exported, module)
    weighted = sum(isinstance(part, nn.Conv2d) for part in network.modules())
    for row in report.measured:
        assert (row.params, row.macs) == (cost.params, cost.macs)
        assert row.precision == {"fp32": weighted}
        assert row.device_memory is None
    assert exported.executed == exported.precision
    assert exported.placement.keys() == {"CPU"}
    assert exported.placement["CPU"] >= weighted


def test_the_times_are_consistent(report):
    assert report.input_size == SIZE
    for row in report.measured:
        assert 0 < row.latency.p50 <= row.latency.p90 <= row.latency.p99
        assert row.stages.keys() == {"pre", "inference", "post"}
        assert len(row.rounds) == report.rounds
        assert min(row.rounds) <= row.latency.p50 <= max(row.rounds)
        assert row.calls >= 2 * report.rounds
        assert 500 / row.latency.p99 < row.throughput < 2000 / row.latency.p50
        assert row.warm_up_calls >= 4 + 2 * subject.WINDOW


def test_the_scores_are_those_of_evaluate(report, network):
    expected = bpkd_sdk.evaluate(network, DATA)
    assert report.data == DATA.name
    for row in report.measured:
        assert row.miou == pytest.approx(expected.miou, abs=1e-3)
        assert row.boundary_iou == pytest.approx(expected.boundary_iou, abs=1e-3)
        assert row.agreement > 0.999
        assert row.edge_agreement > 0.999
    assert report.rows[0].agreement == 1.0


@pytest.mark.parametrize(
    ("index", "format_", "reason"),
    [
        (2, "ONNX", "ValueError: .*cut <b>.onnx is not a readable ONNX file"),
        (3, "TensorRT", "ValueError: .*m.engine is of the format TensorRT, which runs on cuda, but got device='cpu'"),
        (4, "other", "ValueError: Expected a file that ends in one of .safetensors"),
    ],
    ids=["truncated", "another device", "unknown format"],
)
def test_an_artifact_that_cannot_run_is_a_row_with_the_reason(report, index, format_, reason):
    row = report.rows[index]
    assert row.format == format_
    assert pytest.approx(0) == row.calls
    with pytest.raises(ValueError, match=reason):
        raise ValueError(row.problem)
    assert row.problem in report.to_markdown()


def test_an_artifact_that_does_not_accept_the_batch_is_a_row_with_the_reason(files):
    here = [open_runtime(files / name, "cpu") for name in ("m.onnx", "m.safetensors")]
    fixed, free = benchmark(here, batch_size=2, input_size=(32, 48), duration=0.1).rows
    assert (fixed.format, free.format) == ("ONNX", "checkpoint")
    assert "takes 1 image(s) at a time, but got 2. Export with dynamic_batch=True" in fixed.problem
    assert free.problem is None
    assert free.agreement == 1.0  # with its own masks, because it is the first artifact that ran
    assert free.miou is None


@pytest.mark.parametrize(
    ("fit", "size", "note", "windows"),
    [
        ("slide", (64, 192), "segmented in 3 windows of 64 x 96, because fit='slide'", 3),
        ("resize", (128, 96), "resized to 64 x 96, because fit='resize'", 1),
    ],
)
def test_images_of_other_sizes_are_timed_and_scored_by_one_rule(report, files, fit, size, note, windows):
    data = ShapesDataset("val", length=2, size=size)
    row = benchmark(open_runtime(files / "m.onnx", "cpu"), data, duration=0.02, fit=fit).rows[0]
    assert note in row.notes[0]
    assert row.macs == windows * report.rows[1].macs
    expected = bpkd_sdk.evaluate(files / "m.onnx", data, protocol=bpkd_sdk.EvaluationProtocol(fit), device="cpu")
    assert row.miou == pytest.approx(expected.miou)
    assert not any("because" in note for note in report.rows[1].notes)


@pytest.mark.parametrize("width", [80, 160])
def test_nothing_is_cut_off_in_a_narrow_terminal(report, width):
    times = Percentiles(123.4, 135.6, 147.8)
    full = dataclasses.replace(
        report.rows[1], name="runs/a/student.int8.onnx", latency=times, stages=dict.fromkeys(STAGES, times)
    )
    full = dataclasses.replace(
        full, throughput=123.4, miou=0.5642, boundary_iou=0.3748, agreement=1.0, edge_agreement=0.98
    )
    console = Console(file=io.StringIO(), width=width)
    console.print(dataclasses.replace(report, rows=(full, dataclasses.replace(full, name="runs/b/last.safetensors"))))
    text = console.file.getvalue()
    for part in (
        "student.int8.onnx",
        "last.safetensors",
        "123 / 136 / 148",
        "123 + 123 + 123",
        "56.42",
        "37.48",
        "98.00",
    ):
        assert part in text
    assert "\u2026" not in text


def test_a_report_read_from_json_equals_the_one_written(report):
    text = report.to_json()
    assert BenchmarkReport.from_json(text) == report
    assert json.loads(text)["rows"][0]["latency"]["p50"] == report.rows[0].latency.p50
    for wrong in ("[]", '{"format": "bpkd-benchmark/0"}'):
        with pytest.raises(ValueError, match=r"Expected JSON of BenchmarkReport.to_json"):
            BenchmarkReport.from_json(wrong)
    with pytest.raises(ValueError, match=r"does not hold a valid BenchmarkReport:\n  batch_size: .* \(got 'many'\)"):
        BenchmarkReport.from_json(json.dumps(json.loads(text) | {"batch_size": "many"}))


class Page(HTMLParser):
    """The tags, attributes and text of a page. It fails if tags are not nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def test_the_page_needs_no_other_file_and_plots_every_artifact(report):
    text = report.to_html()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset")]
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("svg") == 2
    points = [value for name, value in page.attributes if name == "class" and value == "point"]
    assert len(points) == 2 * len(report.measured)
    for row in report.measured:  # the tooltip, and the name in the legend
        name = os.path.basename(row.name)
        assert f"{name}: {format_number(row.latency.p50)} ms, {100 * row.miou:.2f} %" in page.text
        assert page.texts.count(name) == 3  # in two legends and in the table
    assert page.tags.count("tr") == 1 + len(report.rows)
    for row in report.rows:
        assert (row.problem or "boundary IoU in %") in page.text
    assert "cut <b>.onnx" in page.text
    assert "prefers-color-scheme" in text or "light-dark(" in text


def test_without_scores_agreement_is_plotted(report):
    rows = tuple(dataclasses.replace(row, miou=None, boundary_iou=None) for row in report.rows)
    page = Page(dataclasses.replace(report, rows=rows, data=None).to_html())
    assert "pixels at edges as the first artifact's, in %" in page.text
    nothing = Page(dataclasses.replace(report, rows=report.rows[2:4]).to_html())
    assert "svg" not in nothing.tags


def test_percentiles_are_numpys():
    times = np.random.default_rng(0).gamma(2.0, 0.01, 137)
    found = Percentiles.of(times.tolist())
    assert dataclasses.astuple(found) == pytest.approx(np.percentile(times, [50, 90, 99]) * 1000)
    assert Percentiles.of([0.001, 0.002, 0.003, 0.004, 0.005]).p50 == pytest.approx(3)


def test_the_warm_up_ends_when_the_times_settle(monkeypatch):
    durations = itertools.chain([0.06, 0.05, 0.04, 0.03, 0.025], itertools.repeat(0.02))
    calls, settled = subject.settle(lambda: time.sleep(next(durations)))
    assert settled
    assert 5 + subject.WINDOW <= calls <= 20
    monkeypatch.setattr(subject, "LONGEST_WARM_UP", 0.05)
    growing = itertools.count(1)
    calls, settled = subject.settle(lambda: time.sleep(0.003 * next(growing)))
    assert not settled


def test_the_end_of_a_process_is_reported(files):
    remote = RemoteSubject(files / "m.onnx", "cpu", 1)
    try:
        assert remote.describe().input_size == SIZE
        remote._process.kill()
        with pytest.raises(ArtifactError, match="process ended with code -9"):
            remote.measure_round(0.1)
    finally:
        remote.close()


@pytest.fixture(scope="module")
def precisions(tmp_path_factory):
    """Write a network of three convolutions in each precision."""
    folder = tmp_path_factory.mktemp("precisions")
    network = tiny(9, width=16).eval()
    to_onnx(network, folder / "fp32.onnx", input_size=SIZE)
    to_onnx(network, folder / "fp16.onnx", input_size=SIZE, precision="fp16")
    to_int8(folder / "fp32.onnx", folder / "int8.onnx", ends=True)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precision_as_found_in_a_file(precisions, precision):
    runtime = open_runtime(precisions / f"{precision}.onnx", "cpu")
    assert layer_precisions(runtime) == {precision: 3}
    placement, executed = profile_onnx_nodes(runtime, torch.zeros(1, *SIZE, 3, dtype=torch.uint8))
    assert sum(placement.values()) > 3
    # A CPU computes half precision in float32.
    assert executed == {"int8" if precision == "int8" else "fp32": 3}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_file_states_the_cost_of_a_network_that_cannot_be_built_again(precisions, precision, monkeypatch):
    cost = bpkd_sdk.profile(tiny(9, width=16), SIZE)
    monkeypatch.setitem(sys.modules, "onnx", None)
    runtime = open_runtime(precisions / f"{precision}.onnx", "cpu")
    assert count_cost(runtime, SIZE) == (cost.params, cost.macs)
    assert count_cost(runtime, (SIZE[0] + 32, SIZE[1])) == (cost.params, None)
    assert layer_precisions(runtime) == {precision: 3}


def test_metadata_that_contradicts_the_layers_is_noted(precisions):
    proto = onnx.load(precisions / "fp32.onnx")
    facts = json.loads(proto.metadata_props[0].value) | {"precision": "int8", "quantization": {}}
    (precisions / "claimed.onnx").write_bytes(seal_onnx(proto, facts))
    (row,) = benchmark(open_runtime(precisions / "claimed.onnx", "cpu"), duration=0.1).rows
    assert row.claim == "int8"
    assert "its metadata states int8, but its layers are fp32" in row.notes


def graph(nodes, weights):
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 8, 8])]
        for name, channels in (("images", 3), ("logits", 4))
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", *ends, weights), opset_imports=[helper.make_opsetid("", 18)]
    )
    network = bpkd_sdk.NetworkSpec(name=None, num_classes=4).to_dict()
    facts = {"network": network, "input_size": [8, 8], "precision": "fp32"}
    facts |= dict.fromkeys(("dynamic_batch", "preprocess", "argmax"), False)
    proto.ir_version = 9
    return seal_onnx(proto, facts)


def test_precision_of_weights_behind_other_nodes(tmp_path):
    """Weights stored as integers leave a layer in float; weights may be behind other nodes; a product has no weights."""
    integers = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.int8), "w8")
    matrix = numpy_helper.from_array(np.ones((8, 8), np.float32))
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "scale"], ["w"]),
        helper.make_node("Conv", ["images", "w"], ["a"]),
        helper.make_node("Constant", [], ["m"], value=matrix),
        helper.make_node("Transpose", ["m"], ["mt"], perm=[1, 0]),
        helper.make_node("MatMul", ["a", "mt"], ["b"]),
        helper.make_node("MatMul", ["b", "b"], ["logits"]),
    ]
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    (tmp_path / "m.onnx").write_bytes(graph(nodes, [integers, scale]))
    assert layer_precisions(open_runtime(tmp_path / "m.onnx", "cpu")) == {"fp32": 2}


def test_products_of_two_activations_are_not_layers(tmp_path):
    """This also holds if one or both activations were converted to int8."""
    weights = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("MatMul", ["a", "d"], ["b"]),
        helper.make_node("MatMul", ["d", "d"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["logits"]),
    ]
    scale, zero = (numpy_helper.from_array(*pair) for pair in ((np.float32(0.1), "scale"), (np.int8(0), "zero")))
    (tmp_path / "m.onnx").write_bytes(graph(nodes, [weights, scale, zero]))
    assert layer_precisions(open_runtime(tmp_path / "m.onnx", "cpu")) == {"fp32": 1}


@pytest.fixture
def gpu(monkeypatch):
    """Replace the GPU by a counter of the bytes in use."""
    used = SimpleNamespace(bytes=500)
    monkeypatch.setattr(memory, "GpuContext", lambda index: SimpleNamespace(used_memory=lambda: used.bytes))
    monkeypatch.setattr(subject, "_expected_device", lambda _, device: Device(device))
    return used


class MemoryUser(Runtime):
    """A runtime that uses memory of the GPU for its weights, and more memory while it runs."""

    def __init__(self, gpu, weights, scratch):
        spec, facts = bpkd_sdk.NetworkSpec(name=None, num_classes=9), {"preprocess": True, "argmax": True}
        super().__init__("memory user", spec, facts, "cuda", AcceptedImages())
        gpu.bytes += weights
        self.gpu, self.scratch = gpu, scratch

    def prepare(self, images):
        return images

    def infer(self, inputs):
        self.gpu.bytes += self.scratch
        time.sleep(0.02)
        self.gpu.bytes -= self.scratch
        return inputs[..., 0]


def test_gpu_memory_is_measured_for_each_artifact_separately(gpu, monkeypatch):
    """All artifacts are opened before the first warm-up; the memory of each still includes only its own."""
    sizes = {"small": (100, 10), "large": (3000, 500)}
    monkeypatch.setattr(subject, "open_runtime", lambda name, _: MemoryUser(gpu, *sizes[name]))
    subjects = [subject.Subject(name, "cuda", 1) for name in sizes]
    images = np.zeros((1, *SIZE, 3), np.uint8)
    assert [item.warm_up(images).device_memory for item in subjects] == [110, 3500]


def test_sampling_stops_after_a_failure(gpu, monkeypatch):
    def fail(*_):
        raise ValueError("It does not open.")

    monkeypatch.setattr(subject, "open_runtime", fail)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="It does not open"):
        subject.Subject("m.onnx", "cuda", 1)
    assert threading.active_count() == threads


def test_a_crash_while_scoring_is_reported(files):
    entry = Entry(files / "m.onnx", "cpu", 1)
    try:
        entry.open()
        entry._remote._process.kill()
        entry.score(DATA)
        assert entry.problem is None
        assert "process ended with code -9" in entry.not_scored
    finally:
        entry.close()


def test_names_in_a_plot_do_not_overlap():
    crowd = [html.Point(f"student.number{i}.onnx", "s0", "o", 10 + 0.01 * i, 99.9) for i in range(8)]
    names = [*(point.name for point in crowd), "_slow <b> $x$"]
    figure = html.draw("mIoU in %", [*crowd, html.Point(names[-1], "s1", "s", 200, 98)])
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations([*boxes, axes.get_tightbbox()], 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= figure.bbox.y0 for box in boxes)
    points = {line.get_gid(): axes.transData.transform(line.get_xydata()[0]) for line in axes.lines}
    assert all(axes.bbox.contains(*point) for point in points.values())
    (fast_x, fast_y), (slow_x, slow_y) = points["point0"], points["point8"]
    assert slow_x > fast_x
    assert slow_y < fast_y
    assert all(0 <= tick <= 100 for tick in axes.get_yticks())


def test_text_in_a_plot_is_escaped_and_follows_the_colours_of_the_page():
    page = Page(text := html.to_svg("a <b> & c", [html.Point("_name <b> $x$", "s1", "s", 20, 98)]))
    assert "b" not in page.tags
    assert ("aria-label", "a <b> & c against latency") in page.attributes
    assert "_name <b> $x$" in page.texts
    assert "_name <b> $x$: 20.0 ms, 98.00 %" in page.texts
    assert "var(--s1)" in text
    assert re.findall("#0000[ef].", text) == []


def test_the_machine_is_stated(monkeypatch, report):
    here = report.environment
    assert here.versions["torch"] == version("torch")
    assert here.cores >= 1
    assert here.cpu in describe_machine(here)
    monkeypatch.setattr(environment.psutil, "getloadavg", lambda: (99.0, 1.0, 1.0))
    assert any("busy: a load of 99.0" in warning for warning in Environment.here().warnings)
    calm = dataclasses.replace(here, load=0.0, governor="performance")
    assert calm.warnings == ()


def test_bad_arguments(files):
    with pytest.raises(ValueError, match="at least one artifact"):
        benchmark([])
    with pytest.raises(ValueError, match="`batch_size` of at least 1 and `duration` above 0, but got 0 and 10.0"):
        benchmark(files / "m.onnx", batch_size=0)


def test_a_file_whose_network_cannot_be_built_here_has_no_cost():
    class File(Runtime):
        def infer(self, inputs):
            return inputs

    spec = NetworkSpec("transformers/a", 2, config={"class": "Unknown", "arguments": {"model_type": "unknown"}})
    file = File("a", spec, {"preprocess": True, "argmax": True}, torch.device("cpu"), AcceptedImages())
    assert count_cost(file, SIZE) == (None, None)
