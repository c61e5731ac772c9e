"""Tests of the divergence of two softmaxes against its definition in float64, in one chunk and in several."""

import pytest
import torch

from bpkd_sdk.losses import divergence
from bpkd_sdk.losses.divergence import softmax_kl


@pytest.fixture(params=[1 << 20, 7], ids=["whole", "chunks"], autouse=True)
def _chunk(request, monkeypatch):
    monkeypatch.setattr(divergence, "_CHUNK", request.param)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_values_and_gradient(dim, temperature):
    student, teacher = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    p, q = ((x / temperature).exp() / (x / temperature).exp().sum(dim, keepdim=True) for x in (teacher, student))
    value = softmax_kl(student, teacher, dim=dim, temperature=temperature)
    torch.testing.assert_close(value, (p * (p / q).log()).sum(dim))
    assert torch.autograd.gradcheck(lambda s: softmax_kl(s, teacher, dim=dim, temperature=temperature), student)


def test_strided_logits():
    student, teacher = (torch.randn(2, 5, 3).mT for _ in range(2))
    expected = softmax_kl(student.contiguous(), teacher.contiguous(), dim=1)
    torch.testing.assert_close(softmax_kl(student, teacher, dim=1), expected)
