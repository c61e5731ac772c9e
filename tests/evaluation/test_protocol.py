"""Tests of evaluation protocols against step-by-step implementations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation.protocol import EvaluationProtocol
from bpkd_sdk.runtime import TorchRuntime
from bpkd_sdk.runtime.inference import resized_bands, sliding_bands
from bpkd_sdk.sizes import scaled_size
from tests.edges import Brightness, images_with_edges, mask_offsets
from tests.networks import tiny


def images_of(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def logits_of(model, images):
    """Return logits at the size of the images: normalise, run, resize."""
    spec = bpkd_sdk.NetworkSpec(name=None, num_classes=5)
    with torch.no_grad():
        return F.interpolate(model(spec.normalize(images)), images.shape[2:], mode="bilinear", align_corners=False)


def sliding_logits(model, images, crop, stride):
    """Return the mean logits over all windows, one window after the other."""
    height, width = images.shape[2:]
    total, visits = np.zeros((len(images), 5, height, width)), np.zeros((height, width))
    for y in range(max(-(-(height - crop[0]) // stride[0]), 0) + 1):
        for x in range(max(-(-(width - crop[1]) // stride[1]), 0) + 1):
            bottom, right = min(y * stride[0] + crop[0], height), min(x * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            total[:, :, top:bottom, left:right] += logits_of(model, images[:, :, top:bottom, left:right]).numpy()
            visits[top:bottom, left:right] += 1
    return torch.from_numpy(total / visits).float()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        pytest.param((40, 64), (24, 32), (12, 20), id="overlap"),
        pytest.param((37, 50), (24, 24), (12, 12), id="last-shifted-back"),
        pytest.param((48, 64), (24, 32), (24, 32), id="side-by-side"),
        pytest.param((20, 64), (24, 24), (16, 16), id="lower-than-a-window"),
        pytest.param((20, 20), (64, 64), (32, 32), id="smaller-than-a-window"),
    ],
)
def test_windows_in_batches_of_any_size_are_averaged(size, crop, stride, batch_size):
    model, images = tiny(5).eval(), images_of(2, 3, *size)
    expected = sliding_logits(model, images, crop, stride)
    actual = torch.cat(list(sliding_bands(TorchRuntime(model).logits, images, crop, stride, batch_size)), dim=2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    masks = EvaluationProtocol(crop_size=crop, stride=stride).segment(TorchRuntime(model), images, batch_size)
    assert (masks == expected.argmax(1)).float().mean() > 0.999  # except for ties


class LiveBytes(TorchDispatchMode):
    """The largest size in bytes of all floating point tensors that exist at the same time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = WeakTensorKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point:
                self.alive[leaf] = True
        storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in self.alive}
        self.peak = max(self.peak, sum(storages.values()))
        return out


def peak_bytes(height, width, *, images=1, **settings):
    protocol = EvaluationProtocol(crop_size=(32, 32), stride=(16, 16), **settings)
    with LiveBytes() as live:
        protocol.segment(TorchRuntime(tiny(19).eval()), images_of(images, 3, height, width), batch_size=4)
    return live.peak


WINDOWS = 4 * 4 * (19 + 3 + 5 * 8) * 32 * 32  # upper limit for four windows, inside and outside of the network


@pytest.mark.parametrize(
    "base_size",
    [
        pytest.param(lambda height, width: None, id="as-it-is"),
        pytest.param(lambda height, width: (max(height, width), min(height, width)), id="base-size-is-its-own"),
        pytest.param(lambda height, width: (max(height, width) // 2, min(height, width) // 2), id="resized"),
    ],
)
def test_memory_does_not_grow_with_the_height_of_the_image(base_size):
    low, high = (peak_bytes(height, 64, base_size=base_size(height, 64)) for height in (256, 1024))
    assert high < 1.25 * low
    assert high < 4 * 19 * 1024 * 64


@pytest.mark.parametrize("base_size", [None, (1024, 64), (1280, 80)], ids=["as-it-is", "its-own", "resized"])
@pytest.mark.parametrize("images", [1, 3])
def test_a_wide_image_needs_memory_for_a_few_bands_of_a_windows_height(base_size, images):
    width, height = base_size or (1024, 64)
    band = 4 * images * 19 * 32 * width
    view = 4 * images * 3 * height * width  # size of the image while it is resized
    assert peak_bytes(64, 1024, images=images, base_size=base_size) < 4 * band + 3 * view + WINDOWS


def test_bands_cover_the_image_once():
    bands = list(sliding_bands(TorchRuntime(tiny(3).eval()).logits, images_of(1, 3, 50, 40), (24, 24), (10, 10)))
    assert [band.shape[2] for band in bands] == [10, 10, 6, 24]


@pytest.mark.parametrize("size", [(37, 20), (30, 41), (50, 50), (9, 7), (311, 90), (1, 1)], ids=str)
@pytest.mark.parametrize("rows", [(30,), (10, 1, 2, 17), (1,) * 30], ids=["whole", "bands", "rows"])
def test_resized_bands_equal_the_resized_whole(rows, size):
    logits = torch.randn(2, 3, 30, 41, generator=torch.Generator().manual_seed(0))
    bands = list(resized_bands(torch.split(logits, rows, dim=2), 30, size))
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.cat(bands, dim=2), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_logits_of_fitted_images_are_resized_to_the_image_size(mode):
    model, images = tiny(5).eval(), images_of(2, 3, 30, 45)
    resized = F.interpolate(images.float(), (40, 60), mode="bilinear", align_corners=False).round().to(torch.uint8)
    inner = logits_of(model, resized) if mode == "whole" else sliding_logits(model, resized, (32, 32), (16, 16))
    expected = F.interpolate(inner, (30, 45), mode="bilinear", align_corners=False).argmax(1)
    window = {"crop_size": (32, 32), "stride": (16, 16)} if mode == "slide" else {}
    protocol = EvaluationProtocol(**window, base_size=(60, 40))
    assert (protocol.segment(TorchRuntime(model), images) == expected).float().mean() > 0.999


@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_of_all_views_are_averaged(flip):
    model, images = tiny(5).eval(), images_of(1, 3, 32, 48)
    total = np.zeros((1, 5, 32, 48))
    for height, width in ((16, 24), (32, 48), (56, 84)):
        view = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True).round()
        for mirrored in [False, True][: 1 + flip]:
            inputs = torch.flip(view, [3]) if mirrored else view
            logits = logits_of(model, inputs)
            logits = torch.flip(logits, [3]) if mirrored else logits
            logits = F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False).double().numpy()
            exponentials = np.exp(logits - logits.max(1, keepdims=True))
            total += exponentials / exponentials.sum(1, keepdims=True)
    masks = EvaluationProtocol(scales=(0.5, 1.0, 1.75), flip=flip).segment(TorchRuntime(model), images)
    assert (masks.numpy() == total.argmax(1)).mean() > 0.999


def test_one_class_has_its_threshold_at_an_averaged_probability_of_one_half():
    model, images = tiny(1).eval(), images_of(1, 3, 32, 48)
    left, right = (logits_of(model, view).sigmoid() for view in (images, images.flip(3)))
    masks = EvaluationProtocol(flip=True).segment(TorchRuntime(model), images)
    assert torch.equal(masks, ((left + right.flip(3))[:, 0] / 2 > 0.5).long())


def test_a_symmetric_image_has_a_symmetric_mask_with_flip():
    half = images_of(1, 3, 32, 24)
    images = torch.cat([half, half.flip(3)], dim=3)
    masks = EvaluationProtocol(flip=True).segment(TorchRuntime(tiny(5).eval()), images)
    assert torch.equal(masks, masks.flip(2))


def test_evaluate_applies_all_settings_and_labels_keep_their_size():
    data = ShapesDataset("val", length=2, size=(48, 64))
    model = tiny(data.num_classes)
    settings = {"crop_size": (32, 32), "stride": (20, 20), "base_size": (80, 60), "scales": (0.5, 1.0)}
    protocol = EvaluationProtocol(**settings, flip=True)
    metrics = bpkd_sdk.evaluate(model, data, protocol=protocol, batch_size=3)
    correct = total = 0
    for image, label in data:
        mask = protocol.segment(TorchRuntime(model.eval()), image[None])[0]
        correct, total = correct + ((mask == label) & (label != 255)).sum(), total + (label != 255).sum()
    assert metrics.pixel_accuracy == pytest.approx((correct / total).item(), abs=1e-3)


@pytest.mark.parametrize(
    ("size", "base", "expected"),
    [
        pytest.param((375, 500), (520, 520), (390, 520), id="pascal-context"),
        pytest.param((500, 333), (520, 520), (520, 346), id="upright"),
        pytest.param((512, 683), (2048, 512), (512, 683), id="ade20k"),
        pytest.param((600, 3000), (2048, 512), (410, 2048), id="ade20k-wide"),
        pytest.param((1024, 2048), (2048, 1024), (1024, 2048), id="cityscapes"),
    ],
)
def test_sizes_of_the_papers_data_sets(size, base, expected):
    assert scaled_size(size, 1.0, base) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "slides"}, "Did you mean 'slide'"),
        ({"crop_size": (0, 8)}, r"`crop_size` to be \(height, width\), two whole numbers of at least 1"),
        ({"crop_size": 512}, r"but got 512. For a square, pass \(512, 512\)"),
        ({"crop_size": (8, 8), "stride": (9, 8)}, "`stride` to be at most `crop_size`"),
        ({"crop_size": (8, 8), "stride": (4, 4), "fit": "pad"}, r"stride=\(4, 4\) is the step of a window"),
        ({"stride": (16, 16)}, r"stride=\(16, 16\) is the step of a window"),
        ({"fit": "resize", "base_size": (80, 60)}, "have no effect with fit='resize'"),
        ({"fit": "resize", "scales": (0.5, 1.0)}, "have no effect with fit='resize'"),
        ({"base_size": (512, 2048)}, "longer side, shorter side"),
        ({"scales": ()}, "`scales` to be numbers above 0"),
        ({"scales": (1.0, 0.0)}, "`scales` to be numbers above 0"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationProtocol(**settings)


@pytest.mark.parametrize("network", [(1, 1), (4, 8)], ids=["stride-1", "stride-4"])
@pytest.mark.parametrize("size", [(80, 8), (79, 9)], ids=["even", "odd"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="whole"),
        pytest.param({"base_size": (40, 40)}, id="half-size"),
        pytest.param({"base_size": (62, 62)}, id="smaller"),
        pytest.param({"base_size": (111, 111)}, id="larger"),
        pytest.param({"scales": (0.5, 1.0, 1.75), "flip": True}, id="scales-and-flip"),
        pytest.param({"crop_size": (48, 48)}, id="slide"),
        pytest.param(
            {"crop_size": (56, 56), "stride": (43, 43), "base_size": (100, 100), "flip": True},
            id="all-together",
        ),
    ],
)
def test_masks_lie_on_the_edges_of_images(settings, size, network):
    runtime = TorchRuntime(Brightness(*network).eval())
    for axis, images_size in enumerate((size, size[::-1])):
        images, places = images_with_edges(images_size, axis)
        masks = EvaluationProtocol(**settings).segment(runtime, images, batch_size=64)
        assert abs(mask_offsets(masks, places, axis).mean()) < 0.05


def test_lists_are_as_good_as_tuples():
    lists = EvaluationProtocol("pad", [32, 32], None, [80, 60], [1.0])
    assert lists == EvaluationProtocol("pad", (32, 32), None, (80, 60), (1.0,))
