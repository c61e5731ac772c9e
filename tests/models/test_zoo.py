"""Tests of the networks of the zoo: parameters and logits equal to the original's, training, export, compilation."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bpkd_sdk.arrays import resize_bilinear
from bpkd_sdk.models.zoo import ZOO, ZooEntry, build_network
from bpkd_sdk.output import SegmentationOutput, as_output
from tests.export.test_zoo import NETWORKS as EXPORTED
from tests.networks import shallow_zoo

ENTRIES = [pytest.param(entry, id=name) for name, entry in ZOO.items()]
SIZES = [(128, 128), (97, 131)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=ENTRIES)
def network(request: pytest.FixtureRequest) -> tuple[ZooEntry, nn.Module]:
    """Return each network with three classes, random weights, and its auxiliary head if it has one."""
    entry: ZooEntry = request.param
    with shallow_zoo():  # the depth of the networks changes none of what these tests check
        return entry, build_network(entry.name, 3, aux_head=entry.has_aux_head)


def manifest(reference: Path, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((reference / "models" / f"{name.replace('hrnetv2p', 'hrnet')}.json").read_text())
    return facts


def fill(model: nn.Module) -> None:
    """Set the weights by the reference's published recipe."""
    state = {}
    for key, tensor in model.state_dict().items():
        random, shape = np.random.RandomState(zlib.crc32(key.encode())), tuple(tensor.shape)
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif key.endswith("running_mean"):
            value = 0.1 * random.standard_normal(shape)
        elif key.endswith("running_var"):
            value = 1 + 0.1 * random.random_sample(shape)
        elif len(shape) == 1:
            value = key.endswith("weight") + 0.1 * random.standard_normal(shape)
        else:
            value = random.standard_normal(shape) * np.sqrt(1.3 / np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    model.load_state_dict(state)


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    expected = torch.from_numpy(theirs).double()
    return float((ours.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("entry", ENTRIES)
def test_keys_and_shapes_equal_the_originals(entry: ZooEntry, reference: Path) -> None:
    facts = manifest(reference, entry.name)
    with torch.device("meta"):
        model = build_network(entry.name, 19, aux_head=entry.has_aux_head)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == facts["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == facts["params_total"]
    without = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary_head."))
    assert without == facts["params_without_aux"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=str)
def test_logits_equal_the_originals(
    size: tuple[int, int], dtype: torch.dtype, tolerance: float, reference: Path
) -> None:
    model = build_network("pspnet_r18", 19, aux_head=True).eval()
    fill(model)
    model.to(dtype)
    values = np.random.RandomState(20240108).standard_normal((1, 3, *size)).astype(np.float32)
    images = torch.from_numpy(values).to(dtype)
    with torch.no_grad():
        logits = model(images)
        aux_logits = model.get_submodule("auxiliary_head")(model.backbone(images))
        upsampled = resize_bilinear(logits, size)
    with np.load(reference / "models" / "parity_pspnet_r18.npz") as arrays:
        expected = {
            name: arrays[f"pspnet_r18__{size[0]}x{size[1]}__{name}"]
            for name in ("logits", "aux_logits", "upsampled_sub4", "argmax")
        }
    assert difference(logits[0], expected["logits"]) < tolerance
    assert difference(aux_logits[0], expected["aux_logits"]) < tolerance
    assert difference(upsampled[0, :, ::4, ::4], expected["upsampled_sub4"]) < 1e-4
    assert np.array_equal(upsampled[0].argmax(0).numpy(), expected["argmax"])


def test_trains(network: tuple[ZooEntry, nn.Module]) -> None:
    entry, model = network
    model.train().zero_grad()
    output = as_output(model(torch.randn(2, 3, 64, 64)))
    assert isinstance(output, SegmentationOutput)
    assert (output.aux_logits is not None) == entry.has_aux_head
    loss = output.logits.square().mean()
    if output.aux_logits is not None:
        loss = loss + output.aux_logits.square().mean()
    torch.autograd.backward(loss)
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle
    model.zero_grad()


@pytest.mark.parametrize("size", [(97, 131), (64, 72)], ids=str)
def test_logits_of_any_size_have_the_stride_in_the_table(
    network: tuple[ZooEntry, nn.Module], size: tuple[int, int]
) -> None:
    entry, model = network
    with torch.no_grad():
        logits = model.eval()(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3, *(-(-side // entry.stride) for side in size))
    assert logits.isfinite().all()


def test_runs_in_bfloat16(network: tuple[ZooEntry, nn.Module]) -> None:
    _, model = network
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.eval()(torch.randn(1, 3, 64, 64))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_channels_last_changes_nothing(network: tuple[ZooEntry, nn.Module]) -> None:
    _, model = network
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.eval()(images)
        model.to(memory_format=torch.channels_last)
        got = model(images.to(memory_format=torch.channels_last))
        model.to(memory_format=torch.contiguous_format)
    assert difference(got, expected.numpy()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO.keys() - {*EXPORTED}))
def test_exports_with_dynamic_batch_height_and_width(name: str) -> None:
    """`tests/export/test_zoo.py` exports the other networks to files."""
    with shallow_zoo():
        model = build_network(name, 3).eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 97, 131),), dynamic_shapes=(dynamic,)).module()
        images = torch.randn(1, 3, 72, 128)
        assert difference(program(images), model(images).numpy()) < 1e-5


def test_compiles_without_a_graph_break(network: tuple[ZooEntry, nn.Module]) -> None:
    _, model = network
    images = torch.randn(1, 3, 64, 96)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
        assert difference(compiled(images), model(images).numpy()) < 1e-5


def test_the_spec_describes_the_network() -> None:
    spec = build_network("hrnetv2p_w18s", 5).spec
    assert (spec.name, spec.num_classes, spec.aux_head) == ("hrnetv2p_w18s", 5, False)
    assert [round(255 * value, 3) for value in (*spec.mean, *spec.std)] == [
        123.675, 116.28, 103.53, 58.395, 57.12, 57.375,
    ]  # fmt: skip


def test_dropout_equals_the_originals() -> None:
    assert build_network("pspnet_r18", 2).decode_head.dropout.p == 0.1
    assert build_network("hrnetv2p_w18s", 2).decode_head.dropout.p == 0


def test_without_auxiliary_head_training_returns_logits() -> None:
    assert isinstance(build_network("pspnet_r18", 3).train()(torch.randn(2, 3, 32, 32)), Tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pspnet_r19"}, "Did you mean 'pspnet_r18'?"),
        ({"name": "hrnetv2p_w48", "aux_head": True}, "no auxiliary head"),
        ({"name": "pspnet_r18", "backbone_weights": "coco"}, "'imagenet'"),
    ],
    ids=["name", "aux_head", "backbone_weights"],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_network(**{"num_classes": 3, **arguments})
