"""Images and masks of other libraries: which are accepted, what they become, and which are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import bpkd_sdk
from tests.scenes import NAMES, scene

PIXELS, LABEL = scene(0, 24, 4)
PLANES = torch.from_numpy(PIXELS).permute(2, 0, 1)
COLORS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
COLORED = np.array(COLORS, np.uint8)[LABEL]


def read(image=PIXELS, mask=LABEL, **options):
    """Read one sample through `as_dataset`."""
    data = bpkd_sdk.as_dataset([(image, mask)], **{"class_names": NAMES} | options)
    return data[0]


def palette_image():
    image = Image.fromarray(LABEL).convert("P")
    image.putdata(LABEL.flatten().tolist())
    image.putpalette(sum(COLORS[::-1], ()))  # the indices are the ids, not the colours
    return image


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(PIXELS, id="array"),
        pytest.param(PLANES, id="tensor"),
        pytest.param(PLANES.numpy(), id="array-with-channels-first"),
        pytest.param(torch.from_numpy(PIXELS), id="tensor-with-channels-last"),
        pytest.param(Image.fromarray(PIXELS), id="pil"),
        pytest.param(Image.fromarray(PIXELS).convert("RGBA"), id="opaque-rgba"),
        pytest.param(PIXELS.astype(np.int64), id="int64"),
        pytest.param(PIXELS.astype(np.float32), id="floats-of-bytes"),
        pytest.param(PLANES / 255, id="to-tensor"),
        pytest.param(PIXELS / 255, id="doubles"),
    ],
)
def test_images_become_the_same_bytes(image):
    pixels, label = read(image)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, PLANES)
    assert torch.equal(label, torch.from_numpy(LABEL))


@pytest.mark.parametrize(
    "grey",
    [PIXELS[..., 0], PIXELS[..., :1], PLANES[:1] / 255, Image.fromarray(PIXELS[..., 0])],
    ids=["array", "one-channel", "to-tensor", "pil"],
)
def test_grey_images_are_repeated_for_three_channels(grey):
    pixels, _ = read(grey)
    assert torch.equal(pixels, PLANES[:1].expand(3, -1, -1))


def test_transparent_images_are_put_over_white_and_palettes_are_colours():
    clear = np.dstack([PIXELS, np.zeros(LABEL.shape, np.uint8)])
    assert (read(Image.fromarray(clear))[0] == 255).all()
    pixels, _ = read(palette_image())
    assert torch.equal(
        pixels.permute(1, 2, 0), torch.tensor(COLORS[::-1], dtype=torch.uint8)[torch.from_numpy(LABEL).long()]
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param((PLANES / 255 - 0.45) / 0.22, r"list\[0\]: image is .* float32 .*go from -\S+ to \S+: it is normalised already. Remove", id="normalised"),
        pytest.param(PLANES / 256, r"neither bytes .* value_range=\(0, 1\)", id="divided-by-256"),
        pytest.param(PIXELS.astype(np.uint16) * 16, r"uint16 .*value_range=\(0, 4095\)", id="12-bits"),
        pytest.param(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256), r"value_range=\(0, 65535\)", id="pil-16-bits"),
        pytest.param(np.full((24, 24, 3), np.nan), "go from nan to nan", id="nan"),
        pytest.param(np.dstack([PIXELS, PIXELS[..., :1]]), "four channels, which may be RGB with transparency or four bands", id="four"),
        pytest.param("a.png", "is a str, expected a PIL image, an array", id="path"),
        pytest.param(np.zeros((24, 24, 3), complex), "is an array, complex128", id="complex"),
        pytest.param(np.zeros(24, np.uint8), r"uint8 \(24,\), expected two dimensions", id="one-dimension"),
    ],
)  # fmt: skip
def test_images_without_a_known_meaning_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read(image)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(LABEL.astype(np.int32), id="int32"),
        pytest.param(torch.from_numpy(LABEL).long(), id="int64"),
        pytest.param(torch.from_numpy(LABEL)[None], id="first-axis-of-one"),
        pytest.param(LABEL[..., None], id="last-axis-of-one"),
        pytest.param(torch.from_numpy(LABEL).float()[None], id="whole-floats"),
        pytest.param(Image.fromarray(LABEL), id="pil-grey"),
        pytest.param(palette_image(), id="pil-palette"),
        pytest.param(Image.fromarray(LABEL.astype(np.int32)), id="pil-int32"),
        pytest.param(Image.fromarray(LABEL.astype(np.uint16)), id="pil-16-bits"),
        pytest.param(np.repeat(LABEL[..., None], 3, 2), id="three-equal-channels"),
        pytest.param(np.eye(4, dtype=np.uint8)[LABEL], id="one-hot"),
        pytest.param(torch.eye(4)[torch.from_numpy(LABEL).long()].permute(2, 0, 1), id="one-hot-first"),
        pytest.param(np.eye(4, dtype=bool)[LABEL], id="one-hot-bool"),
    ],
)
def test_masks_become_the_same_class_ids(mask):
    label = read(mask=mask)[1]
    assert label.dtype == torch.uint8
    assert torch.equal(label, torch.from_numpy(LABEL))


@pytest.mark.parametrize("mask", [COLORED, torch.from_numpy(COLORED).permute(2, 0, 1), Image.fromarray(COLORED)])
def test_coloured_masks_are_read_by_the_palette_or_by_the_mapped_colours(mask):
    assert torch.equal(read(mask=mask, palette=COLORS)[1], torch.from_numpy(LABEL))
    ids = {"#0000ff": "blue", "#00ff00": "blue", "#ff0000": "void", "#000000": "background"}
    label = read(mask=mask, ids=ids, class_names=None)
    assert torch.equal(label[1], torch.tensor([1, 255, 0, 0], dtype=torch.uint8)[torch.from_numpy(LABEL).long()])


def test_three_classes_in_one_channel_each_are_no_colours():
    label = LABEL.clip(max=2)
    mask = np.eye(3, dtype=np.float32)[label]
    assert torch.equal(read(mask=mask, class_names=NAMES[:3])[1], torch.from_numpy(label))


def test_values_are_mapped_to_classes():
    ids = {0: "background", 1: "object", 2: "object", 3: "void"}
    data = bpkd_sdk.as_dataset([(PIXELS, LABEL)], ids=ids)
    assert data.class_names == ("background", "object")
    assert torch.equal(data[0][1], torch.tensor([0, 1, 1, 255], dtype=torch.uint8)[torch.from_numpy(LABEL).long()])
    with pytest.raises(ValueError, match=r"list\[0\]: mask contains the values \[3\], which `ids` does not map"):
        read(mask=LABEL, ids={0: "a", 1: "b", 2: "void"}, class_names=None)
    with pytest.raises(ValueError, match=r"names 'rod', which is not a class.*Did you mean 'road'"):
        read(ids={0: "rod"}, class_names=["road", "car"])


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        pytest.param(COLORED, {}, r"list\[0\]: mask is .* the colours #000000, .* Pass the colour of each class", id="unknown-colours"),
        pytest.param(COLORED, {"palette": (*COLORS[:3], (9, 9, 9))}, 'colours #0000ff, .*ids={"#0000ff": "void"}', id="one-colour-missing"),
        pytest.param(LABEL, {"ids": {"#000000": "background"}}, "but `ids` maps colours: expected three channels", id="values-for-colours"),
        pytest.param(torch.from_numpy(LABEL) / 255, {}, "class ids divided by 255, as ToTensor returns them: use .*PILToTensor", id="to-tensor"),
        pytest.param(torch.rand(24, 24), {}, "with fractions, .*nearest pixel", id="fractions"),
        pytest.param(np.zeros((24, 24, 4), np.uint8), {}, "576 pixels are in no class and 0 are in several", id="no-class"),
        pytest.param(np.ones((24, 24, 4), np.uint8), {}, "0 pixels are in no class and 576 are in several", id="several-classes"),
        pytest.param(np.zeros((24, 24, 7), np.uint8), {}, r"expected class ids \(H, W\), colours .*each of the 4 classes", id="seven-channels"),
        pytest.param(Image.fromarray(np.dstack([COLORED, LABEL])), {}, "transparent pixels", id="transparent"),
        pytest.param(7, {}, "mask is 7, which is a class of the whole image", id="class-of-the-image"),
        pytest.param(LABEL, {"ids": {"red": "background"}}, "keys of `ids` to be all values .* got 'red'", id="colour-name"),
    ],
)  # fmt: skip
def test_masks_without_a_known_meaning_are_refused(mask, options, message):
    with pytest.raises(ValueError, match=message):
        read(mask=mask, **options)


BINARY = (LABEL > 0).astype(np.uint8)


@pytest.mark.parametrize(
    "mask",
    [BINARY, BINARY.astype(bool), BINARY.astype(np.float32), Image.fromarray(BINARY.astype(bool)), BINARY[None] == 1],
    ids=["ids", "bool", "floats", "pil-1-bit", "bool-channel"],
)
def test_masks_of_two_classes(mask):
    assert torch.equal(read(mask=mask, class_names=NAMES[:2])[1], torch.from_numpy(BINARY))


def test_two_classes_of_0_and_255_are_read_as_classes_and_this_is_stated():
    white = [(PIXELS, BINARY * 0), (PIXELS, BINARY * 255)]
    with pytest.warns(
        UserWarning, match="only 0 and 255, .* 0 is read as 'background' and 255 as 'red'. If 255 is void"
    ):
        data = bpkd_sdk.as_dataset(white, class_names=NAMES[:2])
    assert torch.equal(data[1][1], torch.from_numpy(BINARY))
    with_void = [(PIXELS, BINARY * 255), (PIXELS, BINARY)]
    data = bpkd_sdk.as_dataset(with_void, class_names=NAMES[:2])
    assert torch.equal(data[0][1], torch.from_numpy(BINARY * 255))
    assert torch.equal(data[1][1], torch.from_numpy(BINARY))


def test_void_outside_of_bytes_is_kept():
    mask = torch.from_numpy(LABEL).long()
    mask[:4] = -1
    label = read(mask=mask, ignore_index=-1)[1]
    assert label.dtype == torch.int64
    assert torch.equal(label, mask)


def test_what_is_read_is_not_shared_with_a_read_only_array():
    frozen = PIXELS.copy()
    frozen.flags.writeable = False
    pixels, _ = read(frozen)
    assert torch.equal(pixels, PLANES)
