"""Averaging matrices compared with torch's adaptive pooling."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bpkd_sdk.export.trace import average_over_cells, exact_pooling


@pytest.mark.parametrize("cells", [1, 2, 6, (3, 5), (1, 4), (None, 2), (3, None), [2, 2]], ids=str)
@pytest.mark.parametrize("size", [(12, 16), (7, 11), (1, 1), (4, 5)], ids=str)
def test_equals_adaptive_pooling(size, cells):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(average_over_cells(x, cells), F.adaptive_avg_pool2d(x, cells), rtol=1e-6, atol=1e-7)


def test_half_precision_stays_half():
    x = torch.rand(1, 2, 60, 100).half()
    pooled = average_over_cells(x, 6)
    assert pooled.dtype is torch.float16
    torch.testing.assert_close(pooled.float(), F.adaptive_avg_pool2d(x.float(), 6), rtol=0, atol=2e-3)


def test_replaces_the_module_and_area_interpolation(monkeypatch):
    sizes = []

    def spy(input, output_size):
        sizes.append(output_size)
        return average_over_cells(input, output_size)

    monkeypatch.setattr("bpkd_sdk.export.trace.average_over_cells", spy)
    x = torch.randn(1, 2, 5, 7)
    expected = nn.AdaptiveAvgPool2d(3)(x)
    with exact_pooling():
        pooled, resized = nn.AdaptiveAvgPool2d(3)(x), F.interpolate(x, size=(3, 3), mode="area")
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(resized, expected)
    assert [tuple(torch.broadcast_to(torch.tensor(size), (2,)).tolist()) for size in sizes] == [(3, 3), (3, 3)]


def test_the_original_is_restored_after_an_error():
    original = F.adaptive_avg_pool2d
    with pytest.raises(TypeError), exact_pooling():
        F.adaptive_avg_pool2d()
    assert F.adaptive_avg_pool2d is original


def test_networks_are_compiled_as_before_afterwards():
    """torch.compile caches a table of torch's functions, here while the replacement is in place."""
    network, x = nn.AdaptiveAvgPool2d(3), torch.randn(1, 2, 5, 7)
    torch._dynamo.trace_rules.clear_lru_cache()
    with exact_pooling():
        torch._dynamo.trace_rules.get_torch_obj_rule_map()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))
