"""Tests of the default size of the training crops."""

import json

import pytest
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data import DatasetSubset
from bpkd_sdk.runtime import AcceptedImages, TorchRuntime
from bpkd_sdk.spec import NetworkSpec
from bpkd_sdk.training.crop import default_crop
from tests.networks import tiny


class Blank(bpkd_sdk.SegmentationDataset):
    """Black images of given sizes (height, width); it counts how many are read."""

    name, class_names, palette = "blank", ("a", "b"), ((0, 0, 0), (9, 9, 9))

    def __init__(self, *sizes):
        self.sizes, self.reads = sizes, 0

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        self.reads += 1
        return torch.zeros(3, *self.sizes[index], dtype=torch.uint8), torch.zeros(self.sizes[index], dtype=torch.uint8)


def network(divisor=1):
    model = tiny(2)
    model.spec = NetworkSpec(None, 2, size_divisor=divisor)
    return model


def folder(path, sizes):
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (path / kind / split).mkdir(parents=True)
            for index, (height, width) in enumerate(sizes):
                Image.new("L", (width, height), 90 * (kind == "images")).save(path / kind / split / f"{index:03}.png")
    (path / "classes.json").write_text(json.dumps(["a", "b"]))
    return path


@pytest.mark.parametrize(
    ("sizes", "divisor", "crop", "text"),
    [
        ([(96, 128)] * 3, 1, (96, 128), "96x128, the size of all 3 images. To choose"),
        ([(20, 30), (96, 128), (97, 130)], 1, (96, 128), "96x128, the median size of all 3 images. To"),
        ([(32, 40), *[(300, 400)] * 4], 1, (300, 400), "the median size of all 5 images"),
        ([(600, 800)] * 2, 1, (512, 512), "the size of all 2 images, at most 512 per side"),
        ([(100, 140)] * 2, 32, (96, 128), "the size of all 2 images, in multiples of 32"),
        ([(20, 600)] * 2, 32, (32, 512), "at most 512 per side and in multiples of 32"),
        ([(90, 120)] * 3 + [(120, 90)] * 2, 1, (90, 90), "90x90, the median shorter side of all 5 images, of which 40% "
         "are upright and 60% wide"),
        ([(90, 120)] * 20 + [(120, 90)], 1, (90, 120), "the median size of all 21 images"),
    ],
)  # fmt: skip
def test_the_crop_is_the_median_of_all_images(sizes, divisor, crop, text):
    chosen, sentence = default_crop(Blank(*sizes), [network(divisor), network()], None)
    assert chosen == crop
    assert text in sentence


def test_images_are_fitted_into_the_base_size_first():
    sizes = [(3000, 4000), (1500, 2000), (300, 400)]
    assert default_crop(Blank(*sizes), [network()], (200, 150))[0] == (150, 200)
    assert default_crop(Blank(*sizes), [network()], None)[0] == (512, 512)


def test_an_exported_file_of_one_size_determines_the_crop():
    runtime = TorchRuntime(network(), "cpu", name="teacher.onnx")
    runtime.accepts = AcceptedImages((1, 1), (48, 48), (64, 64))
    crop, sentence = default_crop(Blank((96, 96)), [network(), runtime], None)
    assert (crop, sentence) == ((48, 64), "48x64, the only size that teacher.onnx accepts.")


def test_headers_of_all_files_are_read_and_files_that_cannot_be_read_are_left_out(tmp_path):
    data = bpkd_sdk.open_dataset(folder(tmp_path, [(40, 50), *[(60, 80)] * 3]))
    data.pairs[3].image.write_bytes(b"no image")
    crop, sentence = default_crop(DatasetSubset(data, [0, 1, 2, 3]), [network()], None)
    assert crop == (60, 80)
    assert "the median size of all 4 images" in sentence


def test_orientation_of_photographs_is_applied(tmp_path):
    root = folder(tmp_path, [(40, 60)] * 2)
    for path in (root / "images/train").iterdir():
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        Image.new("RGB", (60, 40)).save(path.with_suffix(".jpg"), exif=exif)
        path.unlink()
    assert default_crop(bpkd_sdk.open_dataset(root), [network()], None)[0] == (60, 40)


def test_of_many_images_without_files_some_are_read_spread_evenly():
    data = Blank(*[(40, 40)] * 400, *[(80, 80)] * 600)
    crop, sentence = default_crop(data, [network()], None)
    assert crop == (80, 80)
    assert "64 of 1000 images" in sentence
    assert data.reads == 65


def test_a_data_set_that_resizes_its_files_is_read(tmp_path):
    class Halved(DatasetSubset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image[:, ::2, ::2], label[::2, ::2]

    data = Halved(bpkd_sdk.open_dataset(folder(tmp_path, [(40, 60)] * 2)), [0, 1])
    assert default_crop(data, [network()], None)[0] == (20, 30)


def test_training_states_its_crop_at_the_start(tmp_path, capfd):
    root = folder(tmp_path / "data", [(40, 48), (32, 40), (36, 44)])
    Image.new("L", (48, 40), 1).save(root / "labels/train/000.png")
    options = {"steps": 1, "batch_size": 2, "workers": 0, "trackers": (), "device": "cpu"}
    bpkd_sdk.train(tiny(2), root, output_dir=tmp_path / "run", **options)
    lines = capfd.readouterr().err.splitlines()
    assert sum("36x44, the median size of all 3 images." in line for line in lines if line.startswith("Crops:")) == 1
    assert json.loads((tmp_path / "run/run.json").read_text())["crop_size"] == [36, 44]
