"""The same numbers on a GPU as on the CPU; skipped where there is none."""

import pytest
import torch

import bpkd_sdk
from bpkd_sdk.boundary import edge_masks
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.losses import BPKDLoss
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


def test_loss_and_gradient_are_the_cpus():
    student, teacher = torch.randn(2, 19, 32, 64), torch.randn(2, 19, 32, 64)
    labels = torch.randint(0, 19, (2, 8, 16)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    results = []
    for device in ("cpu", "cuda"):
        logits = student.to(device, copy=True).requires_grad_()
        terms = BPKDLoss(19).to(device)(logits, teacher.to(device), labels.to(device))
        sum(terms.values()).backward()
        results.append((terms, logits.grad.cpu()))
    for name, term in results[0][0].items():
        assert results[1][0][name].item() == pytest.approx(term.item(), rel=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-7)


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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumes_on_the_gpu(precision, tmp_path):
    options = OPTIONS | {"precision": precision, "steps": 6, "evaluate_every": 3}

    class Stop(BPKDLoss):
        calls = 0

        def forward(self, *inputs):
            self.calls += 1
            if self.calls == 5:
                raise MemoryError
            return super().forward(*inputs)

    teacher = tiny(9, seed=1).eval()
    whole = bpkd_sdk.distill(teacher, tiny(9), (TRAIN, VAL), output_dir=tmp_path / "whole", **options)
    with pytest.raises(MemoryError):
        bpkd_sdk.distill(teacher, tiny(9), (TRAIN, VAL), method=Stop(9), output_dir=tmp_path / "parts", **options)
    parts = bpkd_sdk.distill(
        teacher, tiny(9, seed=3), (TRAIN, VAL), output_dir=tmp_path / "parts", resume=True, **options
    )
    for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
