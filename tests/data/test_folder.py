"""Tests of folders: valid folders, and folders that are refused."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data import open_dataset

NAMES = ["road", "car", "sky"]


@pytest.fixture
def root(tmp_path):
    """A folder with three images and labels per split; the first label has a void pixel."""
    generator = np.random.default_rng(0)
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    for split in ("train", "val"):
        for i in range(3):
            image = generator.integers(0, 256, (20, 30, 3), np.uint8)
            label = generator.integers(0, 3, (20, 30), np.uint8)
            label[0, 0] = 255 if i == 0 else label[0, 0]
            write(tmp_path / "images" / split / f"{i}.png", image)
            write(tmp_path / "labels" / split / f"{i}.png", label)
    return tmp_path


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_samples_are_rgb_and_ids(root):
    data = open_dataset("folder", root=root, split="val")
    image, label = data[1]
    expected = cv2.imread(str(root / "images/val/1.png"))[:, :, ::-1]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(label.numpy(), np.asarray(Image.open(root / "labels/val/1.png")))
    assert (image.dtype, label.dtype, len(data)) == (torch.uint8, torch.uint8, 3)
    assert data.class_names == tuple(NAMES)
    assert len(set(data.palette)) == 3
    data.check()


def test_ids_of_16_bit_files_are_uint8_if_they_fit(root):
    """Labels of 8-bit and of 16-bit files can then share a batch."""
    path = root / "labels/val/1.png"
    ids = np.asarray(Image.open(path)).astype(np.uint16)
    write(path, ids)
    assert open_dataset("folder", root=root, split="val")[1][1].dtype == torch.uint8
    open_dataset("folder", root=root, split="val").check()
    write(path, ids + 300)
    with pytest.raises(ValueError, match=r"1\.png: labels \[300, 301, 302\] are outside the classes"):
        open_dataset("folder", root=root, split="val").check()


def test_a_path_opens_a_folder(root):
    assert open_dataset(root, split="train").name.endswith("/train")


def test_classes_with_palette_and_void(root):
    facts = {"class_names": NAMES, "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "ignore_index": 254}
    (root / "classes.json").write_text(json.dumps(facts))
    data = open_dataset("folder", root=root)
    assert (data.palette[1], data.ignore_index) == ((4, 5, 6), 254)
    with pytest.raises(
        ValueError, match=r"0\.png: labels \[255\] are outside the classes 0..2 and not the void label 254"
    ):
        data.check()


def test_palette_pngs_need_no_classes_file(root):
    (root / "classes.json").unlink()
    for path in sorted((root / "labels/train").iterdir()):
        indexed = Image.fromarray(np.asarray(Image.open(path)) % 2).convert("L")
        indexed = Image.fromarray(np.asarray(indexed), "P")
        indexed.putpalette([10, 20, 30, 40, 50, 60])
        indexed.save(path)
    data = open_dataset("folder", root=root)
    assert data.palette == ((10, 20, 30), (40, 50, 60))
    assert data.class_names == ("class 0", "class 1")
    assert set(torch.unique(data[1][1]).tolist()) == {0, 1}


def test_a_folder_without_labels_has_blank_labels(root):
    for path in (root / "labels").rglob("*.png"):
        path.unlink()
    for folder in ("labels/train", "labels/val", "labels"):
        (root / folder).rmdir()
    data = open_dataset("folder", root=root)
    assert not data.has_labels
    assert data[0][1].shape == (20, 30)


def test_all_problems_are_listed(root):
    write(root / "labels/train/0.png", np.full((20, 30), 9, np.uint8))
    write(root / "labels/train/1.png", np.zeros((20, 31), np.uint8))
    (root / "images/train/2.png").write_bytes((root / "images/train/2.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="3 of 3 samples") as caught:
        open_dataset("folder", root=root).check()
    text = str(caught.value)
    assert "0.png: labels [9] are outside the classes 0..2" in text
    assert "1.png: image is (20, 30), label is (20, 31)" in text
    assert "2.png: cannot be read as an image" in text


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        pytest.param(lambda r: (r / "labels/train/1.png").unlink(), ValueError, r"1 of 3 images have no label .*:\n.*1\.png", id="orphan"),
        pytest.param(lambda r: write(r / "images/train/1.jpg", np.zeros((4, 4, 3), np.uint8)), ValueError, "share the name", id="twice"),
        pytest.param(lambda r: [p.unlink() for p in (r / "images/train").iterdir()], FileNotFoundError, "contains no image", id="empty"),
        pytest.param(lambda r: (r / "classes.json").unlink(), ValueError, "classes of .* are not known", id="no-classes"),
        pytest.param(lambda r: (r / "classes.json").write_text("{"), ValueError, "is not JSON", id="not-json"),
        pytest.param(lambda r: (r / "classes.json").write_text("[]"), ValueError, "list of class names", id="no-names"),
        pytest.param(lambda r: (r / "classes.json").write_text('{"class_names": ["a"], "pallete": []}'), ValueError, "unknown keys .'pallete'", id="key"),
        pytest.param(lambda r: (r / "classes.json").write_text('{"class_names": ["a"], "palette": [[0,0,0],[1,1,1]]}'), ValueError, "1 class names but 2 colours", id="colours"),
    ],
)  # fmt: skip
def test_incomplete_folders_are_refused(root, damage, error, message):
    damage(root)
    with pytest.raises(error, match=message):
        open_dataset("folder", root=root)


def test_a_coloured_label_is_refused(root):
    write(root / "labels/train/1.png", np.full((20, 30, 3), (200, 0, 7), np.uint8))
    with pytest.raises(ValueError, match='contains colours #c80007, expected one class id per pixel .*"palette"'):
        open_dataset("folder", root=root).check()


def test_unknown_names_and_missing_roots_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'camvid'"):
        open_dataset("camvd", root="x")
    with pytest.raises(ValueError, match="needs `root`"):
        open_dataset("camvid")
    with pytest.raises(FileNotFoundError, match="splits found"):
        open_dataset("folder", root="tests", split="train")


def test_bad_data_stops_training_before_anything_is_written(root, tmp_path):
    from tests.networks import tiny

    write(root / "labels/train/0.png", np.full((20, 30), 9, np.uint8))
    with pytest.raises(ValueError, match="cannot be used"):
        bpkd_sdk.train(tiny(3), root, steps=1, batch_size=2, device="cpu", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_camvid_is_read(camvid):
    data = open_dataset("camvid", root=camvid, split="val")
    image, label = data[0]
    assert (len(data), data.num_classes, image.shape, label.shape) == (101, 11, (3, 360, 480), (360, 480))
    assert data.class_names[8] == "car"
    data.check()
