"""Tests of `check_dataset`: counts, sizes, classes, and problems."""

import numpy as np
import pytest

from bpkd_sdk.data import DATASETS, check_dataset, open_dataset
from bpkd_sdk.data.names import NAMES
from tests import trees

BUILDERS = {"cityscapes": trees.cityscapes, "ade20k": trees.ade20k, "pascal_context_59": trees.pascal_context}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_small_copy_is_reported_as_incomplete(name, tmp_path):
    BUILDERS[name](tmp_path)
    for report in check_dataset(name, tmp_path):
        assert (report.images, report.expected) == (2, DATASETS[name].images[report.split])
        assert report.problems[0] == f"2 images, but a complete copy has {report.expected}"
        sizes = [line for line in report.problems[1:] if "all images of this data set are (1024, 2048)" in line]
        assert len(sizes) == len(report.problems) - 1 == (2 if name == "cityscapes" else 0)
        labels = {
            label
            for _, label in open_dataset(name, root=tmp_path, split=report.split)
            for label in label.unique().tolist()
        }
        names = open_dataset(name, root=tmp_path, split=report.split).class_names
        assert set(report.absent_classes) == {names[i] for i in range(len(names)) if i not in labels}


def test_expected_counts_are_the_official_ones():
    """Cordts et al. 2016; the page of the challenge; the split of the release (the paper of 2014 counts 2 and 1 more)."""
    images = {name: entry.images for name, entry in DATASETS.items()}
    assert images["cityscapes"] == {"train": 2975, "val": 500}
    assert images["ade20k"] == {"train": 20210, "val": 2000}
    assert images["pascal_context_59"] == {"train": 4996, "val": 5104}


def test_a_complete_copy_has_no_problems(camvid):
    train, val = check_dataset("camvid", camvid)
    assert train.problems == val.problems == ()
    assert (train.images, train.smallest, train.largest) == (367, (360, 480), (360, 480))
    assert train.absent_classes == val.absent_classes == ()


def test_every_kind_of_damage_is_listed(tmp_path):
    trees.ade20k(tmp_path, images=6)
    top = tmp_path / "ADEChallengeData2016"
    image = top / "images/training/ADE_train_00000001.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    label = top / "annotations/training/ADE_train_00000002.png"
    label.write_bytes(label.read_bytes()[:60])
    trees.save(top / "annotations/training/ADE_train_00000003.png", np.full((64, 96), 151, np.uint8))
    trees.save(top / "annotations/training/ADE_train_00000004.png", np.zeros((64, 95), np.uint8))
    (top / "images/training/ADE_train_00000005.jpg").write_bytes(b"")
    (top / "annotations/validation/ADE_val_00000002.png").unlink()
    train, val = check_dataset("ade20k", tmp_path)
    text = "\n".join(train.problems)
    assert len(train.problems) == 6
    assert "00000001.jpg: is cut short" in text
    assert "00000002.png: cannot be read as a label map" in text
    assert "00000003.png: contains the ids [151], which are not mapped to classes of ade20k/train" in text
    assert "00000004.jpg: image is (64, 96), label is (64, 95)" in text
    assert "00000005.jpg: cannot be read as an image" in text
    assert val.images is None
    assert "1 of 6 images have no label" in val.problems[0]


def test_the_names_that_are_known_without_torch_are_those_of_the_registry():
    assert ("shapes", *DATASETS) == NAMES


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'cityscapes'"):
        check_dataset("cityscape", "x")
