"""Tests of PASCAL Context: the conversion of its release, against labels drawn pixel by pixel, and the data set."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from bpkd_sdk.data import convert_pascal_context, open_dataset
from bpkd_sdk.data.public import PASCAL_CATEGORIES
from tests import trees

TOP = "VOCdevkit/VOC2010"


@pytest.fixture
def root(tmp_path):
    return trees.pascal_release(tmp_path, images=3)


def release_of(root):
    return json.loads((root / TOP / "trainval_merged.json").read_text())


def rewrite(root, release):
    (root / TOP / "trainval_merged.json").write_text(json.dumps(release))


def test_later_masks_cover_earlier_masks_and_the_rest_is_background(root):
    convert_pascal_context(root)
    release = release_of(root)
    numbers = sorted(PASCAL_CATEGORIES.values())
    for image in (image for image in release["images"] if image["phase"] != "test"):
        expected = np.zeros((image["height"], image["width"]), int)
        for mask in release["annos_segmentation"]:
            if mask["image_id"] == image["image_id"]:
                for y, x in zip(*np.nonzero(coco.decode(mask["segmentation"])), strict=True):
                    expected[y, x] = numbers.index(mask["category_id"]) + 1
        written = Image.open((root / TOP / "SegmentationClassContext" / image["file_name"]).with_suffix(".png"))
        assert np.array_equal(np.asarray(written), expected)
        assert 0 in expected


def test_lists_contain_the_images_of_their_phase_without_test_images(root):
    convert_pascal_context(root)
    for split, numbers in (("train", (0, 1, 2)), ("val", (3, 4, 5))):
        names = (root / TOP / f"ImageSets/SegmentationContext/{split}.txt").read_text().split()
        assert names == [f"2008_{number:06d}" for number in numbers]
    assert len(list((root / TOP / "SegmentationClassContext").iterdir())) == 6


def test_the_background_is_void(root):
    convert_pascal_context(root)
    data = open_dataset("pascal_context_59", root=root, split="val")
    assert (len(data), data.num_classes, len(data.palette)) == (3, 59, 59)
    assert (data.palette[0], data.palette[58]) == ((180, 120, 120), (31, 0, 255))
    trees.assert_zero_is_void(data)
    data.check()
    assert open_dataset("pascal_context_59", root=root / TOP, split="val").class_names == data.class_names


def test_class_names_belong_to_their_numbers():
    """The 459 categories of the release, and so the 59 classes, are numbered in alphabetical order."""
    assert list(PASCAL_CATEGORIES) == sorted(PASCAL_CATEGORIES)
    assert list(PASCAL_CATEGORIES.values()) == sorted(PASCAL_CATEGORIES.values())
    assert len(PASCAL_CATEGORIES) == 59


def test_an_interrupted_conversion_continues(root):
    release = release_of(root)
    complete = release_of(root)
    # A category of the sixth image that is not among the 59 stops the conversion, as Ctrl-C would.
    last = release["images"][5]
    release["annos_segmentation"].append(trees.mask_record(last, 3, np.ones((64, 96), np.uint8)))
    rewrite(root, release)
    with pytest.raises(ValueError, match=r"2008_000005.jpg has categories \[3\]"):
        convert_pascal_context(root)
    labels = root / TOP / "SegmentationClassContext"
    done = {path: path.stat().st_mtime_ns for path in labels.iterdir()}
    assert len(done) == 5
    with pytest.raises(FileNotFoundError, match="train.txt"):
        open_dataset("pascal_context_59", root=root)
    rewrite(root, complete)
    convert_pascal_context(root)
    assert len(list(labels.iterdir())) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert len(open_dataset("pascal_context_59", root=root)) == 3


def test_damaged_release_files_are_refused(root):
    file = root / TOP / "trainval_merged.json"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"is not JSON .* Download it again. Get VOCtrainval"):
        convert_pascal_context(root)
    file.write_text('{"images": []}')
    with pytest.raises(ValueError, match="is not the release .* lacks 'annos_segmentation'"):
        convert_pascal_context(root)
    release = json.loads(content)
    release["images"][0]["height"] = 63
    rewrite(root, release)
    with pytest.raises(ValueError, match=r"a mask of 2008_000000.jpg is \(64, 96\), the image \(63, 96\)"):
        convert_pascal_context(root)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected trainval_merged.json in .* Get VOCtrainval_03-May-2010.tar"):
        convert_pascal_context(root)


def test_missing_files_are_reported(root):
    convert_pascal_context(root)
    (root / TOP / "JPEGImages/2008_000001.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images are missing:\n.*2008_000001.jpg"):
        open_dataset("pascal_context_59", root=root)
    (root / TOP / "SegmentationClassContext/2008_000004.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images have no label:\n.*2008_000004.jpg"):
        open_dataset("pascal_context_59", root=root, split="val")
    (root / TOP / "ImageSets/SegmentationContext/val.txt").write_text("")
    with pytest.raises(ValueError, match="lists no image"):
        open_dataset("pascal_context_59", root=root, split="val")
