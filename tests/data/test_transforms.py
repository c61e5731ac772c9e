"""Tests of the augmentation: image and label stay aligned, and draws depend on the seed and their number only."""

import colorsys

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.data.transforms import (
    IMAGE_FILL,
    PadTo,
    PhotometricDistortion,
    VariedCrop,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment,
    training_transform,
)
from bpkd_sdk.sizes import resize_label
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loader import training_loader


def test_image_and_label_stay_aligned():
    """The image shows its label in grey; after any geometric augmentation both must agree."""
    torch.manual_seed(0)
    label = torch.randint(0, 5, (4, 6), dtype=torch.uint8).repeat_interleave(16, 0).repeat_interleave(16, 1)
    transform = training_transform((48, 64), ignore_index=255, preset="light")
    agreement = []
    for _ in range(20):
        image, moved = augment(transform, (label * 50).expand(3, -1, -1), label)
        assert image.shape == (3, 48, 64)
        assert (image.dtype, moved.dtype) == (torch.uint8, torch.uint8)
        inside = moved != 255
        agree = (image[0].float() - 50.0 * moved).abs() < 26
        agreement.append(agree[inside].float().mean().item())
    assert min(agreement) > 0.85


def test_pixels_outside_the_image_are_void():
    torch.manual_seed(0)
    transform = training_transform((64, 64), ignore_index=255, scale=(0.5, 0.5))
    _, label = augment(transform, torch.zeros(3, 32, 32, dtype=torch.uint8), torch.ones(32, 32, dtype=torch.uint8))
    assert (label[:16, :16] == 1).all()
    assert (label == 255).sum() == 64 * 64 - 16 * 16


def color_cube():
    """Return a grid of the colour cube with its corners, grey and black: (3, 6, 36)."""
    values = torch.tensor([0, 1, 90, 128, 200, 255], dtype=torch.uint8)
    return torch.cartesian_prod(values, values, values).T.reshape(3, 6, 36)


def saturated(red, green, blue, factor):
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    return [255 * channel for channel in colorsys.hsv_to_rgb(hue, min(1.0, factor * saturation), value)]


@pytest.mark.parametrize(
    ("adjust", "amount", "expected"),
    [
        pytest.param(adjust_brightness, -32, lambda *color: [max(0, x - 32) for x in color], id="darker"),
        pytest.param(adjust_brightness, 20.5, lambda *color: [min(255, int(x + 20.5)) for x in color], id="brighter"),
        pytest.param(adjust_contrast, 0.5, lambda *color: [x // 2 for x in color], id="less-contrast"),
        pytest.param(adjust_contrast, 1.5, lambda *color: [min(255, int(1.5 * x)) for x in color], id="more-contrast"),
        pytest.param(adjust_saturation, 0.5, lambda *color: saturated(*color, 0.5), id="paler"),
        pytest.param(adjust_saturation, 1.5, lambda *color: saturated(*color, 1.5), id="stronger"),
    ],
)
def test_colours_change_as_in_openmmlab(adjust, amount, expected):
    image = color_cube()
    adjusted = adjust(image, amount)
    assert adjusted.dtype == torch.uint8
    reference = torch.tensor([expected(*color) for color in image.flatten(1).T.tolist()])
    assert (adjusted.flatten(1).T - reference).abs().max() <= 0.51  # both round, in different directions


@pytest.mark.parametrize("amount", [-0.1, -0.03, 0.0, 0.07, 0.1])
def test_hues_are_those_of_torchvision(amount):
    for image in (color_cube(), torch.rand(3, 64, 80), torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)):
        adjusted, expected = adjust_hue(image, amount), v2.functional.adjust_hue(image, amount)
        assert adjusted.dtype == image.dtype
        difference = (adjusted.double() - expected.double()).abs()
        if image.is_floating_point():
            assert difference.max() < 1e-5
        else:
            assert difference.max() <= 1
            assert (difference > 0).sum() <= max(1, 5e-4 * difference.numel())


def test_each_colour_adjustment_has_probability_one_half():
    torch.manual_seed(0)
    draws = [PhotometricDistortion().make_params([])["adjustments"] for _ in range(2000)]
    for name, lowest, highest in (
        ("adjust_brightness", -32, 32), ("adjust_contrast", 0.5, 1.5), ("adjust_saturation", 0.5, 1.5),
        ("adjust_hue", -0.1, 0.1),
    ):  # fmt: skip
        amounts = torch.tensor([amount for drawn in draws for adjust, amount in drawn if adjust.__name__ == name])
        assert 900 < len(amounts) < 1100
        assert (amounts.min().item(), amounts.max().item()) == pytest.approx((lowest, highest), rel=0.02)
    orders = [[adjust.__name__ for adjust, _ in drawn] for drawn in draws if len(drawn) == 4]
    last = sum(order[-1] == "adjust_contrast" for order in orders)
    assert all(
        order[0] == "adjust_brightness" and order[-2:] != ["adjust_hue", "adjust_saturation"] for order in orders
    )
    assert 0.3 < last / len(orders) < 0.7


def test_labels_and_padding_are_not_distorted():
    torch.manual_seed(0)
    transform = training_transform((32, 32), ignore_index=255, scale=(0.5, 0.5))
    image, label = torch.full((3, 32, 32), 60, dtype=torch.uint8), torch.ones(32, 32, dtype=torch.uint8)
    samples = [augment(transform, image, label) for _ in range(20)]
    assert len({image[:, 0, 0].sum().item() for image, _ in samples}) > 5
    padding = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)
    assert all(torch.equal(image[:, 16:, 16:], padding) for image, _ in samples)
    assert all((label[:16, :16] == 1).all() for _, label in samples)
    mask = tv_tensors.Mask(label)
    assert torch.equal(PhotometricDistortion()(mask), mask)


def batches(workers, first_step=0):
    config = TrainingConfig(steps=6, batch_size=3, workers=workers)
    loader = training_loader(
        ShapesDataset("train", length=7, size=(32, 32)), config, (32, 32), first_step=first_step, on_gpu=False
    )
    return [(images.clone(), labels.clone()) for images, labels in loader]


def test_batches_do_not_depend_on_workers_or_on_the_step_of_resumption():
    expected = batches(workers=0)
    assert len(expected) == 6
    for other in (batches(workers=2), batches(workers=0, first_step=2)):
        for (images, labels), (other_images, other_labels) in zip(reversed(expected), reversed(other), strict=False):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_every_sample_is_drawn_once_per_epoch():
    from bpkd_sdk.training.loader import _ShuffledDraws

    draws = list(_ShuffledDraws(7, range(21), seed=0))
    for epoch in range(3):
        assert sorted(index for _, index in draws[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert list(_ShuffledDraws(7, range(10, 21), seed=0)) == draws[10:]


def test_scale_is_relative_to_the_base_size():
    """As with OpenMMLab's `img_scale`, an image of 500 x 375 is fitted into 520 x 520, then scaled."""
    image, label = torch.zeros(3, 375, 500, dtype=torch.uint8), torch.ones(375, 500, dtype=torch.uint8)
    for factor, height, width in ((1.0, 390, 520), (0.5, 195, 260)):
        transform = training_transform((600, 600), ignore_index=255, scale=(factor, factor), base_size=(520, 520))
        assert (augment(transform, image, label)[1] == 1).sum() == height * width


def test_crops_that_one_class_fills_are_drawn_again():
    """The left three quarters are one class, the right quarter four: most first crops contain one class only."""
    label = torch.zeros(64, 256, dtype=torch.uint8)
    label[:, 192:] = torch.arange(1, 5, dtype=torch.uint8).repeat_interleave(16)
    image = torch.zeros(3, 64, 256, dtype=torch.uint8)
    filled = {}
    for share in (0.75, 1.0):
        torch.manual_seed(0)
        transform = training_transform((64, 64), ignore_index=255, scale=(1.0, 1.0), max_class_share=share)
        crops = [augment(transform, image, label)[1] for _ in range(60)]
        filled[share] = sum((torch.bincount(crop.flatten()).max() >= 0.75 * 64 * 64).item() for crop in crops)
    assert filled[1.0] > 30
    assert filled[0.75] < 15


def test_void_does_not_count_as_a_class_that_fills_a_crop():
    label = torch.full((64, 64), 255, dtype=torch.uint8)
    label[:4, :32], label[:4, 32:] = 1, 2
    transform = training_transform((64, 64), ignore_index=255, scale=(1.0, 1.0), max_class_share=0.75)
    _, crop = augment(transform, torch.zeros(3, 64, 64, dtype=torch.uint8), label)
    assert crop.unique().tolist() == [1, 2, 255]


SCALES = np.linspace(0.5, 2, 31).tolist()
SIZES = [pytest.param((40, 56), id="even"), pytest.param((39, 55), id="odd")]
LIGHT = 200


def two_edges(size, row, column):
    """Return an image and its label with two edges: red is light below a row, green is light right of a column."""
    below, beside = torch.zeros(2, *size, dtype=torch.uint8)
    below[row:], beside[:, column:] = 1, 1
    return torch.stack([below, beside, below]) * LIGHT, 2 * below + beside


def label_offsets(transform, size, margin=10):
    """Return the offsets in pixels of the label's edges, down and to the right, against those of the image: (n, 2).

    The position of an edge is measured by the light area on the pixels that are not void; NaN if the edge is outside of
    the crop. The n positions are symmetric about the middle of the image.
    """
    offsets = []
    count = min(size) - 2 * margin + 1
    for position in range(count):
        pair = augment(transform, *two_edges(size, *((side - count + 1) // 2 + position for side in size)))
        image, label = (tensor.numpy() for tensor in pair)
        known = label != 255
        assert (image[:, ~known].T == IMAGE_FILL).all()
        offsets.append([])
        for axis, is_light in enumerate((label >= 2, label % 2 == 1)):
            shift = (image[axis][known] / LIGHT).sum() - is_light[known].sum()
            offsets[-1].append(shift / known.any(axis).sum() if 0 < is_light[known].mean() < 1 else np.nan)
    return np.array(offsets)


def resized(scale, base_size=None):
    """Return a transform that resizes by a factor and leaves the image whole."""
    return VariedCrop((1000, 1000), 255, 1.0, (scale, scale), base_size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base_size", [None, (90, 90), (33, 31)], ids=["own-size", "larger", "smaller"])
def test_scaled_labels_stay_on_their_edges(size, base_size):
    means = [label_offsets(resized(scale, base_size), size).mean(0) for scale in SCALES]
    assert np.abs(np.mean(means, axis=0)).max() < 0.02
    assert np.abs(means).max() < 0.05


@pytest.mark.parametrize(
    ("size", "base_size"), [((52, 64), (32, 26)), ((64, 84), (63, 48)), ((64, 96), (24, 16))], ids=str
)
def test_ties_between_two_label_pixels_have_no_bias(size, base_size):
    """At 1/2, 3/4 and 1/4 many centres are between two pixels; "nearest-exact" would move labels by up to 0.25."""
    assert np.abs(label_offsets(resized(1, base_size), size, margin=12).mean(0)).max() < 0.05


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(VariedCrop((31, 40), 255, 1.0), id="crop"),
        pytest.param(VariedCrop((31, 40), 255, 0.75), id="varied-crop"),
        pytest.param(v2.RandomHorizontalFlip(1.0), id="flip"),
        pytest.param(PadTo((80, 81), 255), id="pad"),
    ],
)
def test_crops_flips_and_padding_keep_the_alignment(transform, size):
    torch.manual_seed(0)
    offsets = label_offsets(transform, size)
    assert np.isfinite(offsets).sum() > 20
    assert np.nanmax(np.abs(offsets)) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base_size", [None, (70, 52)], ids=["own-size", "base-size"])
def test_training_keeps_labels_on_their_edges(size, base_size):
    torch.manual_seed(0)
    transform = training_transform((57, 64), ignore_index=255, base_size=base_size, preset="light")
    offsets = np.concatenate([label_offsets(transform, size) for _ in SCALES])
    assert np.isfinite(offsets).sum(0).min() > 500
    assert np.abs(np.nanmean(offsets, axis=0)).max() < 0.05


@pytest.mark.parametrize(
    ("dtype", "ids"),
    [
        pytest.param(torch.uint8, [0, 7, 254, 255], id="uint8"),
        pytest.param(torch.int64, [-1, 0, 255, 2**24 - 1, 2**24 + 1, 2**40 + 1], id="int64"),
        pytest.param(torch.int16, [-1, 0, 300], id="int16"),
    ],
)
@pytest.mark.parametrize("scale", [0.5, 0.83, 1.0, 1.7])
def test_scaled_labels_keep_their_dtype_and_ids(dtype, ids, scale):
    label = torch.tensor(ids, dtype=dtype).repeat_interleave(8).expand(24, -1)
    image, scaled = augment(resized(scale), torch.zeros(3, *label.shape, dtype=torch.uint8), label)
    assert scaled.dtype == dtype
    assert scaled.shape == image.shape[1:]
    assert scaled.unique().tolist() == ids


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("scale", [0.3, 0.5, 0.83, 1.0, 1.3, 2.0])
def test_crops_are_those_of_the_resized_image(dtype, channels, scale):
    torch.manual_seed(0)
    interleaved = (255 * torch.rand(61, 97, channels)).to(dtype).permute(2, 0, 1)
    label = torch.randint(0, 9, interleaved.shape[1:], dtype=torch.uint8)
    whole_label = augment(resized(scale), interleaved, label)[1]
    for image in (interleaved, interleaved.contiguous()):
        whole = v2.functional.resize(image, list(whole_label.shape), antialias=True)
        for share in (1.0, 0.5):
            transform = VariedCrop((24, 40), 255, share, (scale, scale))
            params = transform.make_params([tv_tensors.Image(image), tv_tensors.Mask(label)])
            crop = params["rows"], params["columns"]
            assert torch.equal(transform.transform(tv_tensors.Image(image), params), whole[:, *crop])
            assert torch.equal(transform.transform(tv_tensors.Mask(label), params), whole_label[crop])


@pytest.mark.parametrize("length", [1, 2, 7, 12, 64, 97])
@pytest.mark.parametrize("cells", [1, 3, 6, 32, 97, 150, 194])
def test_resized_labels_take_the_nearest_pixel(length, cells):
    taken = resize_label(torch.arange(length)[None], (1, cells))[0]
    centres, pixels = (2 * torch.arange(cells) + 1) * length, (2 * torch.arange(length) + 1) * cells
    distances = (centres[:, None] - pixels).abs()  # in units of 1 / (2 cells) pixels
    assert torch.equal(distances.gather(1, taken[:, None])[:, 0], distances.amin(1))
    unique = (distances == distances.amin(1, keepdim=True)).sum(1) == 1
    exact = torch.nn.functional.interpolate(torch.arange(length)[None, None].double(), cells, mode="nearest-exact")
    assert torch.equal(taken[unique], exact[0, 0].long()[unique])
