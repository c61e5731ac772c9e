"""Tests of the meaning of label files: ids, colours, masks of 0 and 255, and classes that occur in no label."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data import open_dataset
from tests.networks import tiny
from tests.scenes import NAMES, Scenes, scene, write_folder

COLORS = np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0)], np.uint8)
OPTIONS = {"steps": 1, "batch_size": 2, "crop_size": (32, 32), "device": "cpu"}


def shares(root, split="train"):
    """Return the share of pixels of each sample whose class is that of the scene."""
    data = open_dataset("folder", root=root, split=split)
    start = 0 if split == "train" else 100
    return [
        float((data[index][1].numpy() == scene(start + index, classes=data.num_classes)[1]).mean())
        for index in range(len(data))
    ]


def palette_png(order, colors=COLORS):
    """Return a writer of labels with a palette; files with an odd index have the palette in the given order."""

    def write(label, path, index):
        order_here = order if index % 2 else range(len(colors))
        image = Image.fromarray(np.argsort(order_here).astype(np.uint8)[label], "P")
        image.putpalette(colors[list(order_here)].flatten().tolist())
        image.save(path)

    return write


def rgb_png(colors=COLORS):
    return lambda label, path, _: Image.fromarray(colors[label]).save(path)


def mapped(*ids, dtype=np.uint8):
    return lambda label, path, _: Image.fromarray(np.array(ids, dtype)[label]).save(path)


def test_a_void_label_below_0_may_be_mapped(tmp_path):
    names = {"class_names": NAMES[:3], "ids": {"5": "void", "6": NAMES[1], "7": NAMES[2]}, "ignore_index": -1}
    data = open_dataset("folder", root=write_folder(tmp_path, names, label=mapped(5, 6, 7)))
    label, expected = data[0][1], torch.from_numpy(scene(0, classes=3)[1]).long()
    assert label.dtype == torch.int64
    assert label.tolist() == expected.where(expected != 0, -1).tolist()
    root = write_folder(tmp_path / "other", names, label=mapped(5, 6, 8))
    with pytest.raises(ValueError, match=r"contains the ids \[8\], which are not mapped"):
        open_dataset("folder", root=root)[0]


@pytest.mark.parametrize("names", [None, {"class_names": NAMES[:3], "palette": COLORS.tolist()}])
def test_palettes_in_another_order_are_read_by_colour(tmp_path, names):
    root = write_folder(tmp_path, names, label=palette_png([0, 2, 1]))
    assert min(shares(root)) == 1
    data = open_dataset("folder", root=root)
    assert data.palette == tuple(map(tuple, COLORS.tolist()))
    data.check()


def test_classes_get_the_colours_of_the_first_file_with_a_warning(tmp_path):
    """No file states which colour is which class, and the first file may be the exception."""
    root = write_folder(tmp_path, NAMES[:3], label=palette_png([0, 2, 1]))
    message = r"different orders.*background #000000, red #c80000, green #00c800.*palette"
    with pytest.warns(UserWarning, match=message) as caught:
        assert min(shares(root) + shares(root, "val")) == 1
    assert len(caught) == 1


def test_the_palette_of_classes_json_takes_precedence(tmp_path):
    names = {"class_names": ["background", "green", "red"], "palette": COLORS[[0, 2, 1]].tolist()}
    root = write_folder(tmp_path, names, label=palette_png([0, 1, 2]))
    label = open_dataset("folder", root=root)[0][1].numpy()
    assert np.array_equal(label, np.array([0, 2, 1])[scene(0)[1]])


def test_a_palette_without_its_last_colours_is_the_same_palette(tmp_path):
    def write(label, path, index):
        image = Image.fromarray(np.minimum(label, 1) if index == 0 else label, "P")
        image.putpalette(COLORS[: 2 if index == 0 else 3].flatten().tolist())
        image.save(path)

    root = write_folder(tmp_path, NAMES[:3], label=write)
    assert min(shares(root)[1:]) == 1


def test_void_of_palette_pngs(tmp_path):
    """PASCAL VOC stores void as index 255, with a separate colour."""

    def write(label, path, _):
        label[0] = 255
        image = Image.fromarray(label, "P")
        palette = np.zeros((256, 3), np.uint8)
        palette[:3], palette[255] = COLORS, (224, 224, 192)
        image.putpalette(palette.flatten().tolist())
        image.save(path)

    data = open_dataset("folder", root=write_folder(tmp_path, NAMES[:3], label=write))
    assert set(data[0][1][0].tolist()) == {255}
    assert np.array_equal(data[0][1][1:].numpy(), scene(0)[1][1:])


def test_rgb_labels_are_read_by_the_palette_of_classes_json(tmp_path):
    facts = {"class_names": NAMES[:3], "palette": COLORS.tolist()}
    root = write_folder(tmp_path, facts, label=rgb_png())
    assert min(shares(root)) == 1
    # Writers may save a black image as grey; it is read by colour like the other files.
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(root / "labels/train/0.png")
    assert set(open_dataset("folder", root=root)[0][1].unique().tolist()) == {0}
    Image.fromarray(np.full((48, 48), 200, np.uint8)).save(root / "labels/train/0.png")
    with pytest.raises(ValueError, match=r"0\.png: contains the colours #c8c8c8, which are not mapped to classes"):
        open_dataset("folder", root=root).check()


@pytest.mark.parametrize("write", [rgb_png(COLORS + np.uint8(1)), palette_png([0, 1, 2], COLORS + np.uint8(1))])
def test_a_colour_without_a_class_names_the_file(tmp_path, write):
    facts = {"class_names": NAMES[:3], "palette": COLORS.tolist()}
    root = write_folder(tmp_path, facts, label=write)
    with pytest.raises(ValueError, match=r"3\.png: contains the colours #01.* known are #000000, .*classes\.json"):
        open_dataset("folder", root=root).check()


def test_colours_without_a_palette_are_refused_with_advice(tmp_path):
    root = write_folder(tmp_path, NAMES[:3], label=rgb_png())
    with pytest.raises(ValueError, match=r'0\.png: contains colours #000000, .* "palette" in classes\.json'):
        open_dataset("folder", root=root).check()


def test_a_palette_with_one_colour_for_several_classes_is_ignored(tmp_path):
    """Some tools write a palette of black only; the indices are ids then."""
    root = write_folder(tmp_path, NAMES[:3], label=palette_png([0, 1, 2], np.zeros((3, 3), np.uint8)))
    assert min(shares(root)) == 1


def test_a_palette_file_among_grey_files_is_read_by_index_with_a_warning(tmp_path):
    def write(label, path, index):
        (palette_png([0, 1, 2]) if index == 3 else lambda *a: Image.fromarray(a[0]).save(a[1]))(label, path, 0)

    root = write_folder(tmp_path, {"class_names": NAMES[:3], "palette": COLORS.tolist()}, label=write)
    with pytest.warns(UserWarning, match="2 of 12 label files .* have colours and the others are grey"):
        assert min(shares(root)) == 1


def test_grey_ids_in_three_channels_are_ids_despite_a_palette(tmp_path):
    def write(label, path, _):
        Image.fromarray(np.repeat(label[..., None], 3, axis=2)).save(path)

    root = write_folder(tmp_path, {"class_names": NAMES[:3], "palette": COLORS.tolist()}, label=write)
    assert min(shares(root)) == 1


def test_palette_indices_are_read_if_they_are_mapped(tmp_path):
    facts = {"class_names": NAMES[:3], "palette": [[9, 9, 9], [8, 8, 8], [7, 7, 7]]}
    root = write_folder(tmp_path, facts, label=palette_png([0, 1, 2]))
    with pytest.raises(ValueError, match="map the indices"):
        open_dataset("folder", root=root).check()
    (root / "classes.json").write_text(json.dumps(facts | {"ids": dict(zip("012", NAMES[:3], strict=True))}))
    assert min(shares(root)) == 1


def test_white_of_a_one_bit_mask_is_1_if_255_is_void(tmp_path):
    facts = {"class_names": ["background", "cat"], "ids": {"0": "background", "2": "cat"}}
    root = write_folder(tmp_path, facts, classes=2, label=lambda label, p, _: Image.fromarray(label > 0).save(p))
    with pytest.raises(ValueError, match=r"0\.png: contains the ids \[1\], which are not mapped to classes"):
        open_dataset("folder", root=root).check()


def grey_palette_png(values, every=1):
    """Return a writer of grey values as indices into a palette of greys in descending order, as PNG optimisers do."""

    def write(label, path, index):
        greys = np.array(values, np.uint8)[label]
        if index % every:
            Image.fromarray(greys).save(path)
            return
        shades = np.unique(greys)[::-1]
        image = Image.fromarray(np.searchsorted(-shades.astype(int), -greys.astype(int)).astype(np.uint8), "P")
        image.putpalette(np.repeat(shades, 3).tolist())
        image.save(path)

    return write


@pytest.mark.parametrize("every", [1, 2])
def test_palettes_of_greys_are_read_by_their_greys(tmp_path, every):
    root = write_folder(tmp_path, NAMES[:3], label=grey_palette_png([0, 1, 2], every))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert min(shares(root)) == 1


def test_masks_of_0_and_255_in_palettes_of_greys(tmp_path):
    root = write_folder(tmp_path, NAMES[:2], classes=2, label=grey_palette_png([0, 255], 2))
    with pytest.warns(UserWarning, match="255 as 'red'"):
        assert min(shares(root)) == 1


def test_masks_of_0_and_1_beside_masks_of_0_and_255_give_a_warning(tmp_path):
    def write(label, path, _):
        Image.fromarray(label * np.uint8(255 if path.parent.name == "val" else 1)).save(path)

    root = write_folder(tmp_path, NAMES[:2], classes=2, label=write)
    with pytest.warns(UserWarning, match=r'contain only 0 and 255, others 0 and 1: 255 is read as void.*"255": "red"'):
        open_dataset("folder", root=root)


def test_labels_with_void_only_are_refused(tmp_path):
    root = write_folder(tmp_path, NAMES[:3], label=mapped(255, 255, 255))
    with pytest.raises(ValueError, match=r"All labels of .*/train are void \(255\)"):
        open_dataset("folder", root=root).check()


def test_labels_without_an_image_give_a_warning(tmp_path):
    root = write_folder(tmp_path, NAMES[:3])
    (root / "images/train/3.png").rename(root / "images/train/3.jp2")
    with pytest.warns(UserWarning, match=r"1 label files .* have no image .*\n.*3\.png"):
        assert len(open_dataset("folder", root=root)) == 7


def test_ids_from_1_are_mapped_in_the_error_message(tmp_path):
    root = write_folder(tmp_path / "data", NAMES[:3], label=mapped(1, 2, 3))
    with pytest.raises(ValueError, match=r'"ids": \{"1": "background", "2": "red", "3": "green"\}'):
        bpkd_sdk.train(tiny(3), root, output_dir=tmp_path / "run", **OPTIONS)


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="There is no folder no/such/folder"):
        open_dataset("no/such/folder")


def test_colours_mapped_to_classes(tmp_path):
    facts = {"ids": {"#000000": "void", "#c80000": "red", "#00c800": "green"}}
    data = open_dataset("folder", root=write_folder(tmp_path, facts, label=rgb_png()))
    assert (data.class_names, data.palette) == (("red", "green"), ((200, 0, 0), (0, 200, 0)))
    assert np.array_equal(data[0][1].numpy(), np.array([255, 0, 1])[scene(0)[1]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_values_mapped_to_classes(tmp_path, dtype):
    """0 is void and classes start at 1, as in ADE20K; two values can be the same class."""
    facts = {"ids": {"0": "void", "1": "thing", "40": "thing"}, "class_names": ["rest", "thing"]}
    data = open_dataset("folder", root=write_folder(tmp_path, facts, label=mapped(0, 1, 40, dtype=dtype)))
    assert data.class_names == ("rest", "thing")
    assert np.array_equal(data[0][1].numpy(), np.array([255, 1, 1])[scene(0)[1]])
    Image.fromarray(np.full((48, 48), 7, dtype)).save(tmp_path / "labels/train/0.png")
    with pytest.raises(ValueError, match=r"0\.png: contains the ids \[7\], which are not mapped to classes"):
        data.check()


def test_values_of_16_bits_mapped_to_classes(tmp_path):
    facts = {"ids": {"0": "void", "1000": "a", "26001": "b"}}
    data = open_dataset("folder", root=write_folder(tmp_path, facts, label=mapped(0, 1000, 26001, dtype=np.uint16)))
    assert np.array_equal(data[0][1].numpy(), np.array([255, 0, 1])[scene(0)[1]])
    data.check()


def test_the_error_for_labels_out_of_range_contains_a_mapping(tmp_path):
    root = write_folder(tmp_path, NAMES[1:3], label=mapped(0, 1, 2))
    with pytest.raises(ValueError, match=r"labels \[2\] are outside the classes 0..1") as caught:
        open_dataset("folder", root=root).check()
    written = str(caught.value).splitlines()[-1]
    assert json.loads(written) == {"class_names": ["red", "green"], "ids": {"0": "void", "1": "red", "2": "green"}}
    (root / "classes.json").write_text(written)
    assert np.array_equal(open_dataset("folder", root=root)[0][1].numpy(), np.array([255, 0, 1])[scene(0)[1]])


@pytest.mark.parametrize("channels", [1, 3])
def test_masks_of_0_and_255_are_two_classes_with_one_warning(tmp_path, channels):
    def write(label, path, _):
        mask = label * np.uint8(255)
        Image.fromarray(mask if channels == 1 else np.repeat(mask[..., None], 3, axis=2)).save(path)

    root = write_folder(tmp_path, ["background", "object"], classes=2, label=write)
    with pytest.warns(UserWarning, match="0 is read as 'background' and 255 as 'object'") as caught:
        assert shares(root) + shares(root, "val") == [1.0] * 12
    assert len(caught) == 1


def test_masks_of_one_bit_beside_those_of_0_and_255(tmp_path):
    def write(label, path, index):
        Image.fromarray(label.astype(bool) if index % 2 else label * np.uint8(255)).save(path)

    root = write_folder(tmp_path, ["background", "object"], classes=2, label=write)
    with pytest.warns(UserWarning, match="255 as 'object'"):
        assert min(shares(root)) == 1


def test_255_is_void_if_1_is_a_class(tmp_path):
    def write(label, path, index):
        Image.fromarray(label if index == 3 else np.where(label == 1, 255, 0).astype(np.uint8)).save(path)

    root = write_folder(tmp_path, ["background", "object"], classes=2, label=write)
    assert set(open_dataset("folder", root=root)[0][1].unique().tolist()) == {0, 255}
    open_dataset("folder", root=root, split="val").check()


def test_binary_masks_are_learnt(tmp_path):
    root = write_folder(tmp_path / "data", ["background", "object"], classes=2, label=mapped(0, 255))
    with pytest.warns(UserWarning, match="255 as 'object'"):
        result = bpkd_sdk.train(
            torch.nn.Conv2d(3, 2, 1), root, output_dir=tmp_path / "run",
            **OPTIONS | {"steps": 60, "learning_rate": 0.5, "scale": (1.0, 1.0)},
        )  # fmt: skip
    assert min(result.metrics.per_class_iou) > 0.9


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_of_few_bits(tmp_path, bits):
    """A PNG with fewer than 8 bits stores the ids, not scaled grey values."""
    classes = 2 if bits == 1 else 3

    def write(label, path, _):
        rows = np.packbits(
            np.unpackbits(label[..., None], axis=2, count=None)[..., -bits:].reshape(len(label), -1), axis=1
        )
        path.write_bytes(grey_png(label.shape, bits, rows))

    root = write_folder(tmp_path, NAMES[:classes], classes=classes, label=write)
    assert min(shares(root)) == 1


def grey_png(size, bits, rows):
    """Return a grey PNG with this number of bits, from packed rows."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", size[1], size[0], bits, 0, 0, 0, 0)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def train_one_step(entry, data, folder):
    """Train one step with a function of the public API."""
    if entry == "train":
        return bpkd_sdk.train(tiny(3), data, output_dir=folder, **OPTIONS)
    if entry == "distill":
        return bpkd_sdk.distill(tiny(3, seed=1).eval(), tiny(3), data, output_dir=folder, **OPTIONS)
    options = {name: value for name, value in OPTIONS.items() if name != "steps"}
    return bpkd_sdk.compare(
        tiny(3, seed=1).eval(), tiny(3), data, methods=["cwd"], steps=1, seeds=1, output_dir=folder, **options
    )


@pytest.mark.parametrize("entry", ["train", "distill", "compare"])
def test_a_class_without_labels_gives_a_warning_before_the_first_step(tmp_path, entry):
    class NoGreen(Scenes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, torch.where(label == 2, 0, label)

    data = (NoGreen(), Scenes(start=100, length=2))
    with pytest.warns(UserWarning, match="No label of scenes has the class 'green'.* contain 0, 1, and 255"):
        train_one_step(entry, data, tmp_path / "a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_one_step(entry, (Scenes(), NoGreen(start=100, length=2)), tmp_path / "b")
    assert not [warning for warning in caught if "No label" in str(warning.message)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda p: Image.fromarray(np.zeros((48, 48), np.float32)).save(p, "TIFF"), "kind 'F'", id="fractions"),
        pytest.param(lambda p: Image.fromarray(np.zeros((48, 48), np.uint8)).save(p, "JPEG"), "none of PNG, TIFF, BMP", id="jpeg"),
        pytest.param(lambda p: Image.fromarray(np.full((48, 48, 4), 9, np.uint8)).save(p), "transparent pixels", id="alpha"),
        pytest.param(lambda p: p.write_bytes(b""), "cannot be read as a label map", id="empty"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:60]), "cannot be read as a label map", id="cut"),
    ],
)  # fmt: skip
def test_unreadable_label_files_are_listed_by_name(tmp_path, make, message):
    root = write_folder(tmp_path, NAMES[:3])
    make(root / "labels/train/3.png")
    with pytest.raises(ValueError, match=rf"1 of 8 samples .*\n.*3\.png: .*{message}"):
        open_dataset("folder", root=root).check()


def test_a_label_with_too_many_pixels_is_listed_by_name(tmp_path, monkeypatch):
    """Pillow's error does not name the file."""
    root = write_folder(tmp_path, NAMES[:3])
    Image.fromarray(np.zeros((200, 200), np.uint8)).save(root / "labels/train/3.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"1 of 8 samples .*\n.*3\.png: .*too many pixels"):
        open_dataset("folder", root=root).check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe[\x00]\x00", "classes.json is not text in UTF-8"),
        ("[" * 5000, "classes.json is not JSON"),
        ('["a", "a"]', "names a class twice: a"),
        ('["a", ""]', "list of class names"),
        ('{"class_names": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 300]]}', r"a list of \[r, g, b\], each 0 to 255"),
        ('{"class_names": ["a", "b"], "palette": 7}', r"a list of \[r, g, b\]"),
        ('{"class_names": ["a", "b"], "ignore_index": "x"}', "whole number, but got 'x'"),
        ('{"class_names": ["a", "b"], "ids": {"0": "c"}}', "names 'c', which are not classes"),
        ('{"class_names": ["road", "car"], "ids": {"0": "raod"}}', "Did you mean 'road'"),
        ('{"ids": {"0": "a", "1": "b", "1": "c"}}', "contains the key '1' twice"),
        ('{"ids": {"zero": "a"}}', "but got 'zero'"),
        ('{"ids": {"#12": "a"}}', "a colour like .*'#12'"),
        ('{"ids": ["a"]}', "to map values to class names"),
        ('{"class_names": ["a", "b"], "ids": {}, "ignore_index": -1}', "to map values to class names"),
    ],
)
def test_invalid_classes_files_are_refused(tmp_path, content, message):
    root = write_folder(tmp_path, NAMES[:3], train=1, val=1)
    (root / "classes.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", root=root)


def test_a_byte_order_mark_is_ignored(tmp_path):
    root = write_folder(tmp_path, NAMES[:3], train=1, val=1)
    (root / "classes.json").write_text('["a", "b", "c"]', encoding="utf-8-sig")
    assert open_dataset("folder", root=root).class_names == ("a", "b", "c")
