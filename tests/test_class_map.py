"""Tests of class maps: the arithmetic of merged logits, scores of a network with other classes, and refusals."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bpkd_sdk
from bpkd_sdk.class_map import ABSENT_LOGIT, ClassGroups, group_classes, map_by_name
from bpkd_sdk.classes import two_class_logits
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.models import set_spec
from bpkd_sdk.runtime import TorchRuntime
from tests.networks import tiny
from tests.scenes import COLORS, NAMES, Scenes

TEACHER = ("road", "parking", "Car", "traffic-light", "tree", "pole", "pole")
DATA = ("road", "car", "light", "other")
FULL = {"road": ["road", 1], "car": "car", "light": "traffic light", "other": "*"}


def spec(names, count=None):
    return bpkd_sdk.NetworkSpec(None, len(names) if count is None else count, class_names=names)


def grouped(class_map, teacher=TEACHER, data=DATA, count=None):
    facts = spec(teacher, count), spec(data)
    return group_classes(class_map, *facts, network_name="the teacher", data_name="the data")


def color_network(names, colors, sharpness=20.0):
    """Build a network whose logit of each class is the negative squared distance to the colour of the class."""
    network = nn.Conv2d(3, len(names), 1).double().eval()
    weight = torch.tensor(COLORS[list(colors)] / 255)
    with torch.no_grad():
        network.weight[:] = (2 * sharpness * weight)[..., None, None]
        network.bias[:] = -sharpness * weight.square().sum(1)
    set_spec(network.float(), bpkd_sdk.NetworkSpec(None, len(names), class_names=names, mean=(0,) * 3, std=(1,) * 3))
    return network


def test_merged_logits_add_up_the_probabilities_of_the_softmax():
    logits = torch.randn(2, 7, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = torch.stack([p[:, 0] + p[:, 1], p[:, 2], p[:, 3], p[:, 4] + p[:, 5] + p[:, 6]], 1)
    groups = grouped(FULL)
    assert (groups.columns, groups.rest, groups.taught) == (((0, 1), (2,), (3,), ()), 3, (0, 1, 2, 3))
    merged = groups.merge(logits)
    torch.testing.assert_close(merged.softmax(1), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(merged[:, 1:3], logits[:, 2:4])  # classes of one column keep their logits
    assert torch.equal(groups.merge(logits, others=True), merged)  # nothing is left out


def test_probabilities_are_renormalised_over_the_classes_that_are_kept():
    logits = torch.randn(2, 7, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    groups = grouped({"road": ["road", "parking"], "car": ["car"], "light": [], "other": [5]})
    assert groups.taught == (0, 1, 3)
    kept = torch.stack([p[:, 0] + p[:, 1], p[:, 2], torch.zeros_like(p[:, 0]), p[:, 5]], 1)
    merged = groups.merge(logits, others=True)
    torch.testing.assert_close(merged[:, :4].softmax(1), kept / kept.sum(1, keepdim=True), rtol=1e-12, atol=1e-14)
    everything = torch.cat([kept, (p[:, 3] + p[:, 4] + p[:, 6])[:, None]], 1)  # the last channel is what is left out
    torch.testing.assert_close(merged.softmax(1), everything, rtol=1e-12, atol=1e-14)
    assert torch.equal(groups.merge(logits), merged[:, :4])
    assert (merged[:, 2] == ABSENT_LOGIT).all()


def test_half_precision_is_merged_in_float32():
    logits = torch.randn(1, 7, 2, 2, generator=torch.Generator().manual_seed(2)).half()
    merged = grouped(FULL).merge(logits)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, grouped(FULL).merge(logits.double()).float())


@pytest.mark.parametrize(
    ("class_map", "names", "swap"),
    [
        ({"a": ["background"], "b": ["thing"]}, ("background", "thing"), False),
        ({"a": [1], "b": [0]}, (), True),
        ({"a": "thing", "b": "*"}, ("thing",), True),  # one name is that of the logit
    ],
)
def test_a_single_logit_is_two_classes(class_map, names, swap):
    z = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    groups = grouped(class_map, names, ("a", "b"), count=1)
    p = 1 / (1 + (-z).exp())
    expected = torch.cat([p, 1 - p] if swap else [1 - p, p], 1)
    torch.testing.assert_close(two_class_logits(groups.merge(z)).softmax(1), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (
            {"road": "road", "car": "car"},
            r"leaves out 2 classes of the data:\n  'light'.*\n  'other'.*\nAdd each",
        ),
        (FULL | {"lihgt": [4]}, "has the key 'lihgt', which is not a class of the data. Did you mean 'light'?"),
        (FULL | {"light": "trafic light"}, "names the class 'trafic light', .*Did you mean 'traffic-light'"),
        (FULL | {"light": "pole"}, "the teacher has 2 classes of this name. Use their ids: 5, 6"),
        (FULL | {"light": ["parking", 3]}, "uses 'parking' of the teacher twice, for 'road' and 'light'"),
        (FULL | {"light": [3, "traffic light"]}, "twice, for 'light' and 'light'"),
        (FULL | {"light": "*"}, r"uses '\*' of the teacher twice"),
        (FULL | {"light": 7}, "uses the id 7 of the teacher, but its ids start at 0 and end at 6"),
        (FULL | {"light": -1}, "uses the id -1 of the teacher, but its ids start at 0"),
        (FULL | {"light": [3, 4, 5, 6]}, r"names all 7 classes of the teacher, so that none is left"),
        ({"road": [], "car": [], "light": [], "other": "*"}, "for 1 class of the data, but at least two"),
        (FULL | {"Road": [4]}, "two keys for the class 'road'"),
    ],
)
def test_maps_that_do_not_fit_are_refused(class_map, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        grouped(class_map)


@pytest.mark.parametrize(
    "class_map", [["road"], FULL | {"light": None}, FULL | {"light": [True]}, FULL | {"light": 3.0}]
)
def test_values_of_other_types_are_refused(class_map):
    with pytest.raises(TypeError, match="Expected .?class_map"):
        grouped(class_map)


def test_ids_of_numpy_and_sets_are_accepted():
    groups = grouped({"road": {"road", "parking"}, "car": np.int64(2), "light": np.arange(3, 5).tolist(), "other": "*"})
    assert groups.columns == ((1, 0), (2,), (3, 4), ())
    assert json.dumps(groups.class_map) == '{"road": ["parking", "road"], "car": [2], "light": [3, 4], "other": ["*"]}'


def test_names_need_a_network_that_states_names():
    with pytest.raises(ValueError, match="states no class names. Use ids"):
        grouped(FULL, (), count=7)
    groups = grouped({"road": [0], "car": [149], "light": [], "other": []}, (), count=0)  # checked by the first call
    with pytest.raises(ValueError, match="returns logits of 19 classes, but class_map uses its class 149"):
        groups.merge(torch.zeros(1, 19, 1, 1))
    with pytest.raises(ValueError, match="returns logits of 6 classes, but its classes are 7"):
        grouped(FULL).merge(torch.zeros(1, 6, 1, 1))


def by_name(teacher, data):
    return map_by_name(spec(teacher), spec(data), network_name="The teacher", data_name="the data")


def test_a_network_with_more_classes_is_matched_by_name():
    assert by_name(TEACHER, ("car", "traffic light")) == {"car": "Car", "traffic light": "traffic-light"}
    assert by_name(TEACHER, ("car", "bus")) is None
    assert by_name(TEACHER, ("car", "pole")) is None  # two classes have this name
    assert by_name(TEACHER, tuple(reversed(TEACHER))) is None  # as many classes
    assert by_name(("0", "1", "2"), ("0", "1")) is None  # placeholders
    with pytest.raises(
        ValueError, match=r"State whether it contains the 1 others.*'background': \[\"\*\", 'Background'\]"
    ):
        by_name(("Background", "cat", "dog"), ("background", "cat"))


def test_evaluate_scores_a_network_of_other_classes():
    data = Scenes((0, 1, 2), length=3)
    network = color_network(("grey", "crimson", "scarlet", "green"), (0, 1, 1, 2))
    class_map = {"background": "grey", "red": ["crimson", "scarlet"], "green": "green"}
    assert bpkd_sdk.evaluate(network, data, class_map=class_map).miou == 1
    views = EvaluationProtocol(scales=(1.0, 2.0), flip=True)
    assert bpkd_sdk.evaluate(network, data, class_map=class_map, protocol=views).miou > 0.95
    swapped = class_map | {"background": "green", "green": "grey"}
    assert bpkd_sdk.evaluate(network, data, class_map=swapped).per_class_iou == (0, 1, 0)
    with pytest.raises(ValueError, match="do not have the same classes"):
        bpkd_sdk.evaluate(network, data)


def test_pixels_of_classes_that_are_left_out_are_not_scored_against_a_reference():
    data = Scenes((0, 1), length=3)  # its images have no green
    scenes = Scenes((0, 1, 2), length=3)
    images = [scenes[index][0] for index in range(3)]
    data.__class__ = type("Images", (Scenes,), {"__getitem__": lambda _, i: (images[i], torch.zeros(48, 48).byte())})
    reference = color_network(("red", "green", "background"), (1, 2, 0))
    never = tiny(2).eval()
    nn.init.zeros_(never[-1].weight)
    never[-1].bias.data = torch.tensor([0.0, 1.0])  # predicts red everywhere
    red, green = (sum(int((scenes[i][1] == c).sum()) for i in range(3)) for c in (1, 2))
    assert green
    for class_map, total in (
        ({"background": "background", "red": "red"}, 3 * 48 * 48 - green),
        ({"background": "*", "red": "red"}, 3 * 48 * 48),
    ):
        metrics = bpkd_sdk.evaluate(never, data, reference=reference, class_map=class_map)
        assert metrics.pixel_accuracy == pytest.approx(red / total)
    assert NAMES[:2] == metrics.class_names


def test_masks_cannot_be_merged():
    runtime = TorchRuntime(color_network(("a", "b", "c"), (0, 1, 2)))
    runtime.metadata = {**runtime.metadata, "argmax": True}
    with pytest.raises(ValueError, match="returns masks. Export it with argmax=False"):
        bpkd_sdk.evaluate(runtime, Scenes((0, 1)), class_map={"background": "*", "red": "b"})


def test_groups_of_one_column_each_only_reorder():
    logits = torch.randn(1, 3, 2, 2).half()
    assert torch.equal(ClassGroups(((2,), (0,), (1,))).merge(logits), logits[:, [2, 0, 1]])
