"""Model repositories, and a real Triton server that serves them."""

import errno
import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from benchmarks.networks import to_int8
from bpkd_sdk.data.shapes import CLASS_NAMES
from bpkd_sdk.export import to_triton
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.runtime.manifest import EngineManifest, manifest_path
from tests.networks import tiny
from tests.tritonserver import SIZE, export, scenes


@pytest.fixture(scope="module")
def served(tiny_onnx, triton):
    """Load all three files of `tiny_onnx` into the server, with its python backend."""
    for name, path in tiny_onnx.items():
        delay = {} if name == "bare" else {"max_queue_delay_us": 50_000}
        to_triton(path, triton.repository, name=f"export_{name}", backend="python", **delay)
        triton.load(f"export_{name}")
    return triton


def request(server, model, images):
    """Send one request by a new client."""
    import tritonclient.http as http

    tensor = http.InferInput("images", list(images.shape), "UINT8" if images.dtype == np.uint8 else "FP32")
    tensor.set_data_from_numpy(images)
    with server.client() as client:
        result = client.infer(model, [tensor])
        return result.as_numpy(result.get_response()["outputs"][0]["name"])


def config_of(model):
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents_below(folder):
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_server_returns_the_masks_of_onnx_runtime(served, tiny_onnx, count):
    images = scenes(count)
    masks = request(served, "export_batch", images)
    assert (masks.dtype, masks.shape) == (np.uint8, (count, *SIZE))
    assert np.array_equal(masks, open_runtime(tiny_onnx["batch"], "cpu")(images))
    assert len(np.unique(masks)) > 1


@pytest.mark.parametrize(("device", "type_"), [("auto", np.int8), ("cpu", np.uint8)])
def test_int8_is_uint8_for_a_server_on_a_cpu(served, tiny_onnx, tmp_path, device, type_):
    to_int8(tiny_onnx["batch"], tmp_path / "int8.onnx", ends=True)
    name = f"export_int8_{device}"
    to_triton(tmp_path / "int8.onnx", served.repository, name=name, backend="python", device=device)
    served.load(name)
    proto = onnx.load(served.repository / name / "1" / "model.onnx")
    zeros = {tensor.name: onnx.numpy_helper.to_array(tensor).dtype for tensor in proto.graph.initializer}
    assert {zeros[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"} == {np.dtype(type_)}
    images = scenes(2)
    found, expected = request(served, name, images), open_runtime(tmp_path / "int8.onnx", "cpu")(images)
    assert (found == expected).mean() > 0.99


def test_requests_of_sixteen_clients_are_batched(served, tiny_onnx):
    images = scenes(64)
    expected = open_runtime(tiny_onnx["batch"], "cpu")(images)
    before = served.statistics("export_batch")
    with ThreadPoolExecutor(16) as threads:
        masks = list(threads.map(lambda image: request(served, "export_batch", image[None])[0], images))
    after = served.statistics("export_batch")
    assert np.array_equal(masks, expected)
    inferences, executions = (after[key] - before[key] for key in ("inference_count", "execution_count"))
    assert inferences == 64
    assert executions < inferences


def test_a_wrong_request_does_not_affect_others(served, tiny_onnx):
    from tritonclient.utils import InferenceServerException

    local = open_runtime(tiny_onnx["any"], "cpu")
    small = (8, 80)
    sizes = [SIZE, small, (48, 80), SIZE] * 8

    def send(size):
        images = np.zeros((1, *size, 3), np.uint8) if size == small else scenes(1, size)
        try:
            return request(served, "export_any", images), images
        except InferenceServerException as error:
            return error, images

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(send, sizes))
    for size, (found, images) in zip(sizes, answers, strict=True):
        if size == small:
            assert "ONNX Runtime failed on images of shape (1, 8, 80, 3)" in str(found)
        else:
            assert np.array_equal(found, local(images))
    with pytest.raises(InferenceServerException, match=r"unexpected shape.*\[-1,64,96,3\]"):
        request(served, "export_batch", scenes(1, (48, 80)))
    with pytest.raises(InferenceServerException, match=r"must be <= 8"):
        request(served, "export_batch", scenes(9))


def test_logits_of_one_image_at_a_time(served, tiny_onnx):
    local = open_runtime(tiny_onnx["bare"], "cpu")
    inputs = local.prepare(torch.from_numpy(scenes(1)))
    np.testing.assert_allclose(
        request(served, "export_bare", inputs.numpy()), local.infer(inputs), rtol=1e-5, atol=1e-5
    )


def test_the_server_is_warm_before_the_first_request(tiny_onnx, triton):
    to_triton(tiny_onnx["batch"], triton.repository, name="warm", backend="python", preferred_batch_sizes=[4])
    triton.load("warm")
    ran = {entry["batch_size"]: entry["compute_infer"]["count"] for entry in triton.statistics("warm")["batch_stats"]}
    assert ran == {1: 1, 4: 1, 8: 1}
    assert (triton.repository / "warm/warmup/image").read_bytes() == scenes(1, split="warmup").tobytes()


def test_the_next_version_replaces_the_first(tiny_onnx, triton, tmp_path):
    images = scenes(2)
    first = to_triton(tiny_onnx["batch"], triton.repository, name="versions", backend="python")
    triton.load("versions")
    assert np.array_equal(request(triton, "versions", images), open_runtime(tiny_onnx["batch"], "cpu")(images))
    other = export(tiny(9, seed=1), tmp_path / "other.onnx")
    second = to_triton(other, triton.repository, name="versions", backend="python", max_batch_size=2)
    triton.load("versions")
    assert (first.version, second.version) == (1, 2)
    assert np.array_equal(request(triton, "versions", images), open_runtime(other, "cpu")(images))
    assert config_of(second.path).max_batch_size == 2


def engine(folder, onnx_path, **changes):
    """Write a plan of four bytes and a manifest for batches of up to 4 images."""
    facts = {
        "backend": "tensorrt",
        "build": "10.9.0.34",
        "version_compatible": False,
        "targets": ["sm86"],
        "device": None,
        "inputs": {"images": {"dtype": "UINT8", "min": [1, *SIZE, 3], "opt": [2, *SIZE, 3], "max": [4, *SIZE, 3]}},
        "outputs": {"masks": {"dtype": "UINT8", "shape": [-1, *SIZE]}},
        "precision": "fp32",
        "layers": {},
        "inspected": {},
        "plan_bytes": 4,
        "plan_sha256": hashlib.sha256(b"plan").hexdigest(),
        "onnx_sha256": "",
        "facts": open_runtime(onnx_path, "cpu").metadata,
    }
    path = folder / "m.engine"
    path.write_bytes(b"plan")
    manifest_path(path).write_text(EngineManifest(**{**facts, **changes}).to_json())
    return path


def test_an_onnx_file_in_a_repository(tiny_onnx, tmp_path):
    report = to_triton(tiny_onnx["batch"], tmp_path / "models", instances=2, device="gpu", preferred_batch_sizes=[8, 4])
    assert report.path == tmp_path / "models" / "batch"
    assert files_below(tmp_path) == [
        "models/batch/1/model.onnx", "models/batch/config.pbtxt", "models/batch/labels.txt", "models/batch/warmup/image",
    ]  # fmt: skip
    assert (report.path / "1/model.onnx").read_bytes() == tiny_onnx["batch"].read_bytes()
    assert (report.path / "labels.txt").read_text().split() == list(CLASS_NAMES)
    config = config_of(report.path)
    assert config == report.config
    assert (config.name, config.backend, config.max_batch_size) == ("batch", "onnxruntime", 8)
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([64, 96, 3], [64, 96])
    assert config.output[0].label_filename == "labels.txt"
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, config.instance_group[0].KIND_GPU)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]


def test_shapes_in_the_configuration(tiny_onnx, tmp_path):
    any_size = to_triton(tiny_onnx["any"], tmp_path).config
    assert (list(any_size.input[0].dims), list(any_size.output[0].dims)) == ([-1, -1, 3], [-1, -1])
    assert list(any_size.model_warmup[0].inputs["images"].dims) == [*SIZE, 3]
    bare = to_triton(tiny_onnx["bare"], tmp_path).config
    assert (list(bare.input[0].dims), list(bare.output[0].dims)) == ([1, 3, *SIZE], [1, 9, *SIZE])
    assert (bare.max_batch_size, bare.HasField("dynamic_batching")) == (0, False)
    single = to_triton(tiny_onnx["batch"], tmp_path, max_batch_size=1).config
    assert (single.max_batch_size, single.HasField("dynamic_batching")) == (1, False)


def test_an_engine_in_a_repository(tiny_onnx, tmp_path):
    report = to_triton(engine(tmp_path, tiny_onnx["batch"]), tmp_path / "models")
    assert {"m/1/model.plan", "m/1/model.plan.json"} < {*files_below(tmp_path / "models")}
    config = report.config
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 4]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_an_engine_that_is_best_with_one_image_batches_all_sizes(tiny_onnx, tmp_path):
    shapes = {"dtype": "UINT8", "min": [1, *SIZE, 3], "opt": [1, *SIZE, 3], "max": [8, *SIZE, 3]}
    config = to_triton(engine(tmp_path, tiny_onnx["batch"], inputs={"images": shapes}), tmp_path / "models").config
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (8, [])


def test_an_engine_for_one_width_and_many_heights(tiny_onnx, tmp_path):
    shapes = {"dtype": "UINT8", "min": [1, 64, 96, 3], "opt": [1, 80, 96, 3], "max": [1, 128, 96, 3]}
    config = to_triton(engine(tmp_path, tiny_onnx["batch"], inputs={"images": shapes}), tmp_path / "models").config
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([-1, 96, 3], [-1, 96])
    assert list(config.model_warmup[0].inputs["images"].dims) == [80, 96, 3]
    assert (tmp_path / "models/m/warmup/image").stat().st_size == 80 * 96 * 3


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_the_server_reads_configurations_for_missing_backends(tiny_onnx, triton, tmp_path, backend):
    from tritonclient.utils import InferenceServerException

    artifact = engine(tmp_path, tiny_onnx["batch"]) if backend == "tensorrt" else tiny_onnx["batch"]
    to_triton(artifact, triton.repository, name=backend, device="auto")
    with pytest.raises(InferenceServerException, match=f"unable to find backend library for backend '{backend}'"):
        triton.load(backend)


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize("written", range(5))
def test_a_full_disk_leaves_the_repository_as_it_was(tiny_onnx, tmp_path, monkeypatch, name, written):
    to_triton(tiny_onnx["batch"], tmp_path, name="old", backend="python")
    before = contents_below(tmp_path)
    room = iter(range(written))

    def fsync(_):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        to_triton(tiny_onnx["batch"], tmp_path, name=name, backend="python", max_batch_size=2)
    assert contents_below(tmp_path) == before
    room = iter(range(5))
    assert to_triton(tiny_onnx["batch"], tmp_path, name=name, backend="python", max_batch_size=2).path.is_dir()


def test_a_version_appears_after_its_configuration(tiny_onnx, tmp_path, monkeypatch):
    first = to_triton(tiny_onnx["batch"], tmp_path, name="m")

    def rename(self, target):
        assert target == first.path / "2"
        assert config_of(first.path).max_batch_size == 2
        raise OSError("Killed.")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Killed"):
        to_triton(tiny_onnx["batch"], tmp_path, name="m", max_batch_size=2)
    assert {path.name for path in first.path.iterdir()} == {"1", "config.pbtxt", "labels.txt", "warmup"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_artifacts_that_triton_cannot_run(tiny_onnx, tmp_path):
    def refused(problem, artifact, **options):
        with pytest.raises(ValueError, match=problem):
            to_triton(artifact, tmp_path / "models", **options)

    refused(r"\.onnx.*\.engine.*'student.safetensors'.*to_onnx first", "student.safetensors")
    refused(
        "no .onnx file such as .*pass an engine of bpkd_sdk.export.to_tensorrt", tiny_onnx["batch"], backend="tensorrt"
    )
    refused("no .engine file such as .*pass the ONNX file", "m.engine", backend="python")
    refused("`backend`.*'onnxruntime', 'tensorrt', 'python'.*'onnxrt'. Did you", tiny_onnx["batch"], backend="onnxrt")
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        to_triton("none.onnx", tmp_path / "models")
    (tmp_path / "cut.onnx").write_bytes(tiny_onnx["batch"].read_bytes()[:-100])
    refused("is not a readable ONNX file", tmp_path / "cut.onnx")
    proto = onnx.load(tiny_onnx["batch"])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    refused("foreign.onnx has no metadata of bpkd-sdk", tmp_path / "foreign.onnx")
    refused(
        "compiled by tensorrt_rtx, and Triton's tensorrt backend.*to_tensorrt.*backend='tensorrt'.*or pass the ONNX",
        engine(tmp_path, tiny_onnx["batch"], backend="tensorrt_rtx"),
    )
    shapes = {"dtype": "UINT8", "min": [2, *SIZE, 3], "opt": [2, *SIZE, 3], "max": [4, *SIZE, 3]}
    refused(
        r"at least 2 images.*batch_sizes=\(1, \.\.\.\)", engine(tmp_path, tiny_onnx["batch"], inputs={"images": shapes})
    )
    engine(tmp_path, tiny_onnx["batch"]).write_bytes(b"plam")
    refused("not the plan that its manifest describes", tmp_path / "m.engine")
    assert not (tmp_path / "models").exists()


def test_bad_arguments_are_named(tiny_onnx, tmp_path):
    def refused(problem, file="batch", **options):
        with pytest.raises(ValueError, match=problem):
            to_triton(tiny_onnx[file], tmp_path / "models", **options)

    refused("takes one image at a time, but got max_batch_size=4.*dynamic_batch=True", "bare", max_batch_size=4)
    refused("takes one image at a time.*preferred_batch_sizes=", "bare", preferred_batch_sizes=[2])
    refused("`max_batch_size` to be at least 1, but got 0", max_batch_size=0)
    refused(r"`preferred_batch_sizes` to be 1 to 4 \(max_batch_size\).*8", max_batch_size=4, preferred_batch_sizes=[8])
    refused("`max_queue_delay_us` to be at least 0, but got -1", max_queue_delay_us=-1)
    refused("`instances` to be at least 1, but got 0", instances=0)
    refused("`device`.*'auto', 'cpu', 'gpu'.*'cuda'", device="cuda")
    for name in ("a/b", "../up", ".hidden", "a b", "ä"):
        refused("`name` to be letters", name=name)
    with pytest.raises(ValueError, match="1 to 4, which the engine takes, but got 8"):
        to_triton(engine(tmp_path, tiny_onnx["batch"]), tmp_path / "models", max_batch_size=8)
    with pytest.raises(ValueError, match="runs on GPUs only.*Pass the ONNX file"):
        to_triton(tmp_path / "m.engine", tmp_path / "models", device="cpu")
    assert not (tmp_path / "models").exists()


def test_a_name_that_is_taken(tiny_onnx, tmp_path):
    report = to_triton(tiny_onnx["batch"], tmp_path, name="m")
    before = (report.path / "config.pbtxt").read_text()
    with pytest.raises(ValueError, match="have another input(.|\n)*dims: -1(.|\n)*choose another `name`"):
        to_triton(tiny_onnx["any"], tmp_path, name="m")
    with pytest.raises(ValueError, match="have another backend"):
        to_triton(tiny_onnx["batch"], tmp_path, name="m", backend="python")
    assert (report.path / "config.pbtxt").read_text() == before
    shutil.rmtree(report.path / "1")
    assert to_triton(tiny_onnx["batch"], tmp_path, name="m").version == 1
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="foreign exists and contains no model.*Choose another `name`"):
        to_triton(tiny_onnx["batch"], tmp_path, name="foreign")
    assert list((tmp_path / "foreign").iterdir()) == []


def test_a_missing_package_is_named(tiny_onnx, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(ImportError, match=r"'tritonclient'.*bpkd-sdk\[triton\]"):
        to_triton(tiny_onnx["batch"], tmp_path / "models")


def test_the_command(bpkd, tiny_onnx, tmp_path):
    preferred = ("--preferred-batch-size", 2, "--preferred-batch-size", 4)
    code, out, err = bpkd("triton", tiny_onnx["batch"], tmp_path / "models", "--name", "m", *preferred)
    assert code == 0, err
    assert "version 1, backend onnxruntime" in out
    assert f"tritonserver --model-repository={tmp_path / 'models'}" in out
    assert "triton://localhost:8000/m" in out
    assert list(config_of(tmp_path / "models/m").dynamic_batching.preferred_batch_size) == [2, 4]
