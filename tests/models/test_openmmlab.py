"""Tests of the import of OpenMMLab's checkpoints: networks are identified and loaded, other files are refused."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bpkd_sdk.models import load_model, save_model
from bpkd_sdk.models.openmmlab import identify, load_openmmlab, read_openmmlab
from bpkd_sdk.models.zoo import ZOO, build_network
from bpkd_sdk.output import as_output

CLASSES = ("road", "wall", "sky")
PALETTE = [[128, 64, 128], [102, 102, 156], [70, 130, 180]]
META = {"CLASSES": CLASSES, "PALETTE": PALETTE}
IMAGES = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Return the weights of a PSPNet-R18 with its auxiliary head, for three classes."""
    torch.manual_seed(0)
    return dict(build_network("pspnet_r18", 3, aux_head=True).state_dict())


@pytest.fixture(scope="module")
def expected(weights: dict[str, Tensor]) -> Tensor:
    model = build_network("pspnet_r18", 3, aux_head=True).eval()
    model.load_state_dict(weights)
    return logits(model)


def write(path: Path, state: dict[str, Any], meta: dict[str, Any] | None = None, **rest: Any) -> Path:
    torch.save({"meta": META if meta is None else meta, "state_dict": OrderedDict(state), **rest}, path)
    return path


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return as_output(model.eval()(IMAGES)).logits


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "model.", "student.", "architecture.", "architecture.model.", "module.architecture.model."],
)
def test_a_distillers_prefix_is_stripped(
    prefix: str, tmp_path: Path, weights: dict[str, Tensor], expected: Tensor
) -> None:
    model = load_openmmlab(write(tmp_path / "a.pth", prefixed(prefix, weights)), "pspnet_r18", 3)
    assert torch.equal(logits(model), expected)


def test_teacher_and_losses_of_a_distiller_are_left_out_and_listed(
    tmp_path: Path, weights: dict[str, Tensor], expected: Tensor
) -> None:
    extra = {
        "teacher.decode_head.conv_seg.weight": torch.ones(3, 512, 1, 1),
        "distiller.connectors.loss_cwd.conv.weight": torch.ones(1),
        "data_preprocessor.mean": torch.ones(3, 1, 1),
    }
    path = write(tmp_path / "a.pth", {**prefixed("architecture.", weights), **extra})
    assert sorted(read_openmmlab(path).left_out) == sorted(extra)
    assert torch.equal(logits(load_openmmlab(path)), expected)


def test_the_same_weight_with_and_without_a_prefix_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = write(tmp_path / "a.pth", {**weights, **prefixed("module.", weights)})
    with pytest.raises(ValueError, match=r"both with and without the prefix 'module\.'"):
        load_openmmlab(path)


def test_teacher_keys_without_a_student_are_not_left_out(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = write(tmp_path / "a.pth", {**weights, "teacher.conv.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"unexpected: teacher\.conv\.weight"):
        load_openmmlab(path)


@pytest.mark.parametrize(
    "meta",
    [META, {"dataset_meta": {"classes": list(CLASSES), "palette": PALETTE}}],
    ids=["0.x", "1.x"],
)
def test_classes_and_palette_come_from_the_file(
    meta: dict[str, Any], tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    spec = load_openmmlab(write(tmp_path / "a.pth", weights, meta)).spec
    assert (spec.name, spec.num_classes, spec.class_names) == ("pspnet_r18", 3, CLASSES)
    assert spec.palette == tuple(tuple(color) for color in PALETTE)


@pytest.mark.parametrize(
    "meta",
    [{}, {"CLASSES": CLASSES[:2], "PALETTE": PALETTE[:2]}, {"CLASSES": None, "PALETTE": [[1, 2], 3, "x"]}, 7],
    ids=["none", "fewer", "malformed", "no dict"],
)
def test_classes_that_do_not_fit_are_ignored(meta: Any, tmp_path: Path, weights: dict[str, Tensor]) -> None:
    checkpoint = read_openmmlab(write(tmp_path / "a.pth", weights, meta))
    assert (checkpoint.class_names, checkpoint.palette, checkpoint.num_classes) == ((), (), 3)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_plain_state_dict_in_either_file_format(
    zipped: bool, tmp_path: Path, weights: dict[str, Tensor], expected: Tensor
) -> None:
    torch.save(weights, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    model = load_openmmlab(tmp_path / "a.pth", aux_head=True)
    assert torch.equal(logits(model), expected)
    assert model.state_dict().keys() == weights.keys()


def test_round_trip_through_the_format_of_this_package(
    tmp_path: Path, weights: dict[str, Tensor], expected: Tensor
) -> None:
    model = load_openmmlab(write(tmp_path / "a.pth", weights))
    save_model(model, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", model=build_network("pspnet_r18", 3))
    assert torch.equal(logits(loaded), expected)
    assert loaded.spec == model.spec


def test_other_objects_beside_the_weights_are_not_built(
    tmp_path: Path, weights: dict[str, Tensor], expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.log = np.arange(3.0)

        def mean(self) -> float:
            return 0.0

        def __getstate__(self) -> dict[str, Any]:
            return {"log": self.log, "last": np.float64(2), "methods": {"mean": HistoryBuffer.mean}}

    for value, name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.mean, "HistoryBuffer.mean")):
        value.__module__, value.__qualname__ = module.__name__, name
    vars(module)["HistoryBuffer"] = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    path = write(
        tmp_path / "a.pth", weights, message_hub={"loss": HistoryBuffer()}, optimizer={"state": {0: torch.ones(2)}}
    )
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(logits(load_openmmlab(path)), expected)


@pytest.mark.parametrize("name", ZOO)
def test_every_network_is_identified(name: str) -> None:
    with torch.device("meta"):
        state = build_network(name, 7, aux_head=ZOO[name].has_aux_head).state_dict()
    state.pop(next(iter(state)))
    assert identify(state) == name


@pytest.mark.parametrize("variant", [name for name, entry in ZOO.items() if entry.variant_of])
def test_a_variant_is_built_for_the_name_in_the_papers_table(variant: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", dict(build_network(variant, 3).state_dict()))
    model = load_openmmlab(path, ZOO[variant].variant_of, 3)
    assert model.spec.name == variant


def test_every_weight_that_does_not_fit_is_listed(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    state = {**weights, "decode_head.extra": torch.ones(1), "backbone.layer1.0.bn1.weight": torch.ones(5)}
    state.pop("backbone.layer4.1.conv2.weight")
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_openmmlab(write(tmp_path / "a.pth", state))
    for line in (
        "missing: backbone.layer4.1.conv2.weight",
        "unexpected: decode_head.extra",
        "misshapen: backbone.layer1.0.bn1.weight is (5,), the network has (64,)",
    ):
        assert line in str(caught.value)


def test_a_missing_auxiliary_head_is_an_error(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    state = {key: value for key, value in weights.items() if not key.startswith("auxiliary_head.")}
    path = write(tmp_path / "a.pth", state)
    assert not read_openmmlab(path).has_aux_head
    with pytest.raises(ValueError, match=r"missing: auxiliary_head\.conv_seg\.weight"):
        load_openmmlab(path, aux_head=True)


@pytest.mark.parametrize(
    ("name", "num_classes", "message"),
    [("isanet_r18", 3, "contains 'pspnet_r18', not 'isanet_r18'"), ("pspnet_r18", 19, "Pass num_classes=3")],
    ids=["network", "classes"],
)
def test_another_network_is_refused(
    name: str, num_classes: int, message: str, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=message):
        load_openmmlab(write(tmp_path / "a.pth", weights), name, num_classes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "contains a list"),
        ({"state_dict": {}}, "has no weights"),
        ({"state_dict": {"epoch": 3}}, "epoch: int"),
        ({"fc.weight": torch.ones(2, 2)}, "decode_head.conv_seg.weight"),
        (
            {"decode_head.conv_seg.weight": torch.ones(3, 9, 1, 1), "x": torch.ones(1)},
            "does not fit any network of the zoo",
        ),
    ],
    ids=["list", "empty", "number", "no head", "other network"],
)
def test_files_that_are_not_checkpoints_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_openmmlab(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_refused_and_not_executed(zipped: bool, tmp_path: Path, weights: dict[str, Tensor]) -> None:
    target = tmp_path / "owned"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(target), "w")

    torch.save({"state_dict": weights, "meta": Hostile()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused: its pickle refers to 'io\.open'.*Nothing was executed"):
        load_openmmlab(tmp_path / "a.pth")
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(zipped: bool, kept: float, tmp_path: Path) -> None:
    state = dict(build_network("pspnet_r18", 3).decode_head.state_dict())
    torch.save({"state_dict": state}, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="may be truncated"):
        read_openmmlab(tmp_path / "a.pth")


def test_a_text_file_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("<html>Not found</html>")
    with pytest.raises(ValueError, match="not a readable PyTorch checkpoint"):
        read_openmmlab(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="No checkpoint exists at"):
        read_openmmlab(tmp_path / "b.pth")


def test_early_class_names_of_pascal_context_are_put_in_the_order_of_the_logits(tmp_path: Path) -> None:
    """Early files list the twenty classes of PASCAL VOC first, but their logits have alphabetical order."""
    from bpkd_sdk.data.public import PASCAL_CLASS_NAMES

    voc = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog"]
    early = [*voc, *(name for name in reversed(PASCAL_CLASS_NAMES) if name not in voc)]
    state = build_network("pspnet_r18", 59).state_dict()
    for names in (early, list(PASCAL_CLASS_NAMES)):
        spec = load_openmmlab(write(tmp_path / "a.pth", state, {"CLASSES": tuple(names)})).spec
        assert spec.class_names == PASCAL_CLASS_NAMES
