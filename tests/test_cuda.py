"""Results on a GPU equal those on the CPU; skipped without a GPU."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import bpkd_sdk
from benchmarks.engines import HARDWARE, usable_backends
from benchmarks.networks import to_int8
from bpkd_sdk.boundary import edge_masks
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.data.shapes import render
from bpkd_sdk.export import benchmark, to_onnx, to_tensorrt
from bpkd_sdk.losses import METHODS, BPKDLoss, create_method
from bpkd_sdk.output import SegmentationOutput
from bpkd_sdk.runtime import TorchRuntime, open_runtime
from bpkd_sdk.runtime.onnx import open_session, run_session
from tests.networks import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

TRAIN, VAL = ShapesDataset("train", length=8, size=(64, 64)), ShapesDataset("val", length=4, size=(64, 48))
OPTIONS = {"batch_size": 4, "crop_size": (64, 64), "device": "cuda", "check_data": False}


@pytest.mark.parametrize("classes", [19, 150])
@pytest.mark.parametrize("size", [(32, 64), (33, 65)], ids=str)
@pytest.mark.parametrize("void", ["clear", "keep", "guard"])
def test_masks_are_the_cpus(classes, size, void):
    labels = torch.randint(0, classes, (2, 32, 64)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[torch.rand(labels.shape) < 0.02] = 255
    on_gpu = edge_masks(labels.cuda(), classes, size, void=void)
    assert torch.equal(on_gpu.cpu(), edge_masks(labels, classes, size, void=void))


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_the_cpus(method, monkeypatch):
    """CIRKD's memory is left out, because it draws random numbers on the device.

    TF32 is disabled, which the convolutions of the critics would use.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sizes = ((19, 32), (19, 64))  # (channels of the logits, channels of the feature map) of student and teacher
    maps = [[torch.randn(2, channels, 32, 64) for channels in pair] for pair in sizes]
    labels = torch.randint(0, 19, (2, 8, 16)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    loss = create_method(method, 19)
    loss.prepare(*(SegmentationOutput(logits, {"neck": feature}) for logits, feature in maps))
    results = []
    for device in ("cpu", "cuda"):
        logits, feature = (x.to(device, copy=True).requires_grad_() for x in maps[0])
        teacher = SegmentationOutput(maps[1][0].to(device), {"neck": maps[1][1].to(device)})
        student = SegmentationOutput(logits, {"neck": feature})
        terms = copy.deepcopy(loss).to(device).eval()(student, teacher, labels.to(device))
        kept = {name: term for name, term in terms.items() if not name.startswith("memory")}
        torch.stack(list(kept.values())).sum().backward()
        results.append((kept, [x.grad.cpu() for x in (logits, feature) if x.grad is not None]))
    for name, term in results[0][0].items():
        assert results[1][0][name].item() == pytest.approx(term.item(), rel=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_distills_in_half_precision(method, precision, tmp_path):
    result = bpkd_sdk.distill(
        tiny(9, width=12, seed=1).eval(), tiny(9), (TRAIN, None), method=method, steps=2, precision=precision,
        log_every=1, output_dir=tmp_path, **OPTIONS,
    )  # fmt: skip
    assert all(math.isfinite(term) for record in result.history for term in record["terms"].values())


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
def test_distills_in_every_precision(precision, tmp_path):
    teacher = tiny(9, seed=1).eval()
    result = bpkd_sdk.distill(
        teacher, tiny(9), (TRAIN, VAL), steps=8, precision=precision, output_dir=tmp_path, **OPTIONS
    )
    assert next(result.model.parameters()).is_cuda
    assert next(result.model.parameters()).dtype is torch.float32
    assert result.metrics.images == 4
    loaded = bpkd_sdk.load_model(result.checkpoint, model=tiny(9))
    assert bpkd_sdk.evaluate(loaded, VAL).miou == pytest.approx(result.metrics.miou, abs=0.01)


class Stopping(BPKDLoss):
    """Raises in its fifth call if `_stops`. Attributes with an underscore are not arguments of a method."""

    _stops, _calls = False, 0

    def forward(self, *inputs):
        self._calls += 1
        if self._stops and self._calls == 5:
            raise MemoryError
        return super().forward(*inputs)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumes_on_the_gpu(precision, tmp_path):
    options = OPTIONS | {"precision": precision, "steps": 6, "evaluate_every": 3}
    teacher, method = tiny(9, seed=1).eval(), Stopping(9)
    whole = bpkd_sdk.distill(teacher, tiny(9), (TRAIN, VAL), output_dir=tmp_path / "whole", **options)
    options["output_dir"] = tmp_path / "parts"
    method._stops = True
    with pytest.raises(MemoryError):
        bpkd_sdk.distill(teacher, tiny(9), (TRAIN, VAL), method=method, **options)
    parts = bpkd_sdk.distill(teacher, tiny(9, seed=3), (TRAIN, VAL), method=Stopping(9), resume=True, **options)
    for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return bpkd_sdk.create_model("smp/FPN/tu-mobilenetv3_small_050", 9).eval()


SCENES = np.stack([render(0, "cuda", index, (96, 160))[0] for index in range(3)])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["fixed", "batch", "size"])
def test_every_runtime_segments_as_torch_on_the_cpu(network, kind, precision, tmp_path):
    expected = TorchRuntime(network, "cpu")(SCENES)
    path = to_onnx(
        network, tmp_path / "m.onnx", input_size=(96, 160), precision=precision,
        dynamic_batch=kind != "fixed", dynamic_size=kind == "size",
    ).path  # fmt: skip
    sizes = ((64, 96), (96, 160), (128, 160)) if kind == "size" else None
    artifacts = [path]
    for backend in usable_backends():
        engine = tmp_path / f"{backend}.engine"
        artifacts.append(to_tensorrt(path, engine, input_sizes=sizes, backend=backend, hardware=HARDWARE[backend]).path)
    for artifact in artifacts:
        runtime = open_runtime(artifact, "cuda")
        assert runtime.device.type == "cuda"
        if artifact == path:
            assert (runtime.replay is not None) == (kind == "fixed")
        with torch.inference_mode():  # buffers that are created here must also work outside of inference mode
            runtime(SCENES[:1])
        alone = [runtime(scene[None])[0] for scene in SCENES]
        assert (np.stack(alone) == expected).mean() > (0.99 if precision == "fp16" else 0.999)
        with ThreadPoolExecutor(4) as pool:
            for index, mask in enumerate(pool.map(runtime, [SCENES[i % 3][None] for i in range(24)])):
                np.testing.assert_array_equal(mask[0], alone[index % 3])
        with torch.cuda.stream(torch.cuda.Stream()):  # tensors stay on the GPU, and ONNX Runtime waits for their stream
            tensors = torch.from_numpy(SCENES[:1]).permute(0, 3, 1, 2).cuda(non_blocking=True)
            masks = runtime.segment(tensors)
            assert masks.is_cuda
            runtime(SCENES[1:2])
            np.testing.assert_array_equal(masks[0].cpu(), alone[0])
        if kind != "fixed":
            assert (runtime(SCENES) == np.stack(alone)).mean() > 0.999


def test_a_file_on_the_cpu_waits_for_images_of_the_gpu(network, tmp_path):
    source = to_onnx(network, tmp_path / "m.onnx", input_size=(96, 160)).path
    runtime = open_runtime(source, "cpu")
    images = torch.from_numpy(SCENES).permute(0, 3, 1, 2)
    expected = runtime.segment(images)
    on_gpu = images.cuda()
    for _ in range(2):  # the second copy reuses host memory of the first, whose values are of other images
        torch.cuda._sleep(200_000_000)
        masks = runtime.segment(on_gpu)
        assert masks.device.type == "cpu"
        assert torch.equal(masks, expected)
        on_gpu, expected = on_gpu.flip(0), expected.flip(0)


def test_int8_is_the_same_with_a_graph_and_without(network, tmp_path):
    """ONNX Runtime has no int8 on a GPU: it computes in float32, and without a CUDA graph if a part runs on the CPU."""
    source = to_onnx(network, tmp_path / "m.onnx", input_size=(96, 160), dynamic_batch=False).path
    to_int8(source, tmp_path / "int8.onnx")
    runtime = open_runtime(tmp_path / "int8.onnx", "cuda")
    session = open_session(tmp_path / "int8.onnx", runtime.device)
    for scene in SCENES:
        inputs = runtime.prepare(torch.from_numpy(scene[None]))
        assert torch.equal(runtime.infer(inputs), run_session(session, inputs))


def test_the_benchmark_on_the_gpu(network, tmp_path):
    """Every format, with the memory of the device, and with the precision that the engine inspector reports."""
    size = (96, 160)
    bpkd_sdk.save_model(network, tmp_path / "m.safetensors")
    artifacts = [
        tmp_path / "m.safetensors",
        TorchRuntime(torch.compile(copy.deepcopy(network)), "cuda", name="compiled"),
    ]
    for precision in ("fp32", "fp16"):
        options = {"input_size": size, "precision": precision, "dynamic_batch": False}
        artifacts.append(to_onnx(network, tmp_path / f"{precision}.onnx", **options).path)
    engines = []
    for backend in usable_backends():
        engine = tmp_path / f"{backend}.engine"
        engines.append(to_tensorrt(artifacts[-1], engine, backend=backend, hardware=HARDWARE[backend]))
    report = benchmark([*artifacts, *(engine.path for engine in engines)], duration=0.5, device="cuda")
    assert [row.problem for row in report.rows] == [None] * len(report.rows)
    assert report.environment.gpus[0]["name"] == torch.cuda.get_device_name()
    for row in report.rows:
        assert row.device.startswith("cuda")
        assert (row.device_memory is None) if row.name == "compiled" else (row.device_memory > 0)
        assert row.agreement > 0.98
        assert sum(times.p50 for times in row.stages.values()) > 0.5 * row.latency.p50
    half, *made = report.rows[3:]
    assert half.precision.keys() == {"fp16"}
    assert half.placement["CUDA"] > half.placement.get("CPU", 0)
    for row, engine in zip(made, engines, strict=True):
        assert row.precision.keys() == {"fp16"}
        found = engine.manifest.inspected
        assert found.keys() <= {"HALF"}
        assert found or engine.manifest.backend == "tensorrt_rtx"  # the inspector of TensorRT for RTX may name no layer
