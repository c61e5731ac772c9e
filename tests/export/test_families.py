"""Every family of networks of other libraries is exported to a verified file, put into int8, and profiled."""

import pytest
import torch

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.export import quantize, to_onnx
from bpkd_sdk.models.library import size_limit
from bpkd_sdk.models.mask_classification import adapt_network
from tests.families import FAMILIES, SIZE, family
from tests.transformers_networks import build

# One export of any of the others takes 10 to 30 seconds; `make test-all` runs them too.
QUICK = {"segformer", "lraspp", "smp"}
BY_COST = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
ONE_SIZE = {"dpt", "eomt", "maskformer", "mask2former", "oneformer"}


@pytest.mark.parametrize("name", BY_COST)
def test_a_family_is_exported_at_all_sizes_that_it_takes_and_put_into_int8(name, tmp_path):
    network, path = family(name), tmp_path / "a.onnx"
    is_limited = size_limit(adapt_network(network)) is not None
    assert is_limited == (name in ONE_SIZE)
    report = to_onnx(network, path, input_size=SIZE, dynamic_size=not is_limited, dynamic_batch=not is_limited)
    assert report.verified
    assert report.agreement > 0.9999
    assert {run.size for run in report.verification.runs} == ({SIZE} if is_limited else {(81, 49), (49, 81)})
    data = ShapesDataset("train", length=4, size=SIZE)
    int8 = quantize(path, tmp_path / "b.onnx", data, images=4)
    assert any(layer.quantized and layer.kind != "Add" for layer in int8.layers)
    image = data[0][0].permute(1, 2, 0).numpy()
    masks = [bpkd_sdk.Predictor(file)(image).mask for file in (path, int8.path)]
    assert masks[0].shape == masks[1].shape == SIZE
    assert (masks[0] == masks[1]).mean() >= 0.5


@pytest.mark.parametrize("name", sorted(ONE_SIZE))
def test_a_network_of_one_size_is_refused_before_it_is_traced(name, tmp_path, monkeypatch):
    monkeypatch.setattr("bpkd_sdk.export.onnx.trace", None)
    network = family(name)
    kind = type(getattr(network, "network", network)).__name__
    reason = "64 x 64 pixels" if name == "dpt" else "a trace of its windows, position embeddings"
    with pytest.raises(ValueError, match=f"{kind} cannot be exported for images of any size: .*{reason}.*distil"):
        to_onnx(network, tmp_path / "a.onnx", input_size=SIZE, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_of_matrices_is_counted_and_the_rest_is_named(name):
    """The weights of a layer are used at least once, and the layers without weights are in the list."""
    network = adapt_network(family(name))
    cost = bpkd_sdk.profile(network, SIZE)
    products = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    assert cost.macs > sum(layer.weight.numel() for layer in products) / 2
    assert cost.by_operator["conv"] > 0
    assert ("grid_sampler_2d" in cost.not_counted) == (name in ("mask2former", "oneformer"))


@pytest.mark.parametrize("name", ["segformer", "beit", "dpt", "eomt"])
def test_fused_attention_costs_as_much_as_its_two_products(name):
    network = build(name)
    costs = []
    for implementation in ("sdpa", "eager"):
        network.set_attn_implementation(implementation)
        costs.append(bpkd_sdk.profile(network, SIZE).by_operator)
    assert costs[0] == costs[1]
    assert costs[0]["matmul"] > 0
