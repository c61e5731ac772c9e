"""Tests of ADE20K: 150 classes, label 0 is void."""

import hashlib

import pytest

from bpkd_sdk.data import open_dataset
from tests import trees


@pytest.fixture
def root(tmp_path):
    return trees.ade20k(tmp_path)


def test_label_zero_is_void_and_the_others_move_down_by_one(root):
    for split in ("train", "val"):
        data = open_dataset("ade20k", root=root, split=split)
        trees.assert_zero_is_void(data)
        data.check()


def test_classes(root):
    data = open_dataset("ade20k", root=root / "ADEChallengeData2016", split="val")
    assert (data.num_classes, len(set(data.class_names)), len(data.palette)) == (150, 150, 150)
    assert (data.class_names[0], data.class_names[7], data.class_names[149]) == ("wall", "bed", "flag")
    assert (data.palette[0], data.palette[149]) == ((120, 120, 120), (92, 0, 255))
    digest = hashlib.sha256(bytes(channel for color in data.palette for channel in color)).hexdigest()
    assert digest == "ce475c9151035eff51f4cf27fd7d906959b1480f6d15b9423ae2417c1b23a0ed"  # of OpenMMLab's 150 colours


def test_a_photograph_that_is_cut_short_is_refused(root):
    """Decoders fill the missing part with grey and raise no error."""
    data = open_dataset("ade20k", root=root)
    path = data.pairs[0].image
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"ADE_train_00000001.jpg: is cut short"):
        open_dataset("ade20k", root=root)[0]


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photograph(root):
    path = open_dataset("ade20k", root=root).pairs[0].image
    content = path.read_bytes()
    thumbnail = b"\xff\xe1\x00\x0a\xff\xd8\xff\xda\x00\x00\xff\xd9"
    path.write_bytes(content[:2] + thumbnail + content[2:])
    assert open_dataset("ade20k", root=root)[0][0].shape == (3, 64, 96)
    path.write_bytes(content[:2] + thumbnail + content[2:-500])
    with pytest.raises(ValueError, match="is cut short"):
        open_dataset("ade20k", root=root)[0]
