"""Training on images of four channels of 12 bits: format, normalisation, augmentation, and what is refused."""

import json
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

import bpkd_sdk
from bpkd_sdk import NetworkSpec, TrainingConfig
from bpkd_sdk.data.transforms import PhotometricDistortion, augment, training_transform
from bpkd_sdk.models import get_spec, set_spec
from bpkd_sdk.training.loader import training_loader
from bpkd_sdk.training.normalization import measure_channels
from bpkd_sdk.training.teacher_check import check_teacher
from tests.bands import NAMES, RANGE, BandScenes, band_scene, write_bands
from tests.networks import tiny

OPTIONS = {"steps": 2, "batch_size": 2, "crop_size": (32, 32), "device": "cpu"}
SPEC = NetworkSpec(None, 2, in_channels=4, value_range=RANGE, mean=(0.1,) * 4, std=(0.05,) * 4, bands=(0, 1, 2))


def network(channels=4, classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, classes, 1))


def test_a_student_with_one_logit_learns_from_a_folder_and_keeps_the_format(bands):
    spec = bands.run.model.spec
    assert bands.run.metrics.miou > 0.6  # only the infrared channel shows the class
    assert (spec.num_classes, spec.in_channels, spec.value_range, spec.bands) == (1, 4, RANGE, (2, 1, 0))
    assert bpkd_sdk.load_model(bands.run.checkpoint).spec == spec
    record = json.loads((bands.run.output_dir / "run.json").read_text())
    assert record["student"]["spec"]["mean"] == list(spec.mean)


class Colours(BandScenes):
    channels = 3

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image[:3], label


@pytest.mark.parametrize("data", [BandScenes(), Colours()])
def test_a_student_by_name_is_built_for_the_images_and_measured(data, tmp_path):
    options = OPTIONS | {"steps": 1, "output_dir": tmp_path / "run", "backbone_weights": "none"}
    spec = bpkd_sdk.train("smp/Linknet/tu-test_resnet", data, **options).model.spec
    assert (spec.in_channels, spec.value_range) == (data.channels, RANGE)
    assert spec.mean == measure_channels(data, 0)[0]


def test_mean_and_deviation_are_those_of_the_training_images(bands):
    pixels = np.stack([band_scene(index)[0] for index in range(8)]).reshape(-1, 4) / 4095
    np.testing.assert_allclose(bands.run.model.spec.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(bands.run.model.spec.std, pixels.std(0), rtol=1e-5)


def test_the_measured_values_are_stated_at_the_start(capsys, tmp_path):
    bpkd_sdk.train(network(), BandScenes(), output_dir=tmp_path / "run", **OPTIONS)
    line = (
        "Images: 4 channels of 0 to 4095; mean and standard deviation of each channel in 0..1, measured on 8 training"
    )
    assert line in " ".join(capsys.readouterr().err.split())


def test_at_most_64_images_are_measured_and_the_seed_selects_them():
    data = BandScenes(length=80, size=6)
    first = measure_channels(data, 0)
    assert first[2] == 64
    assert first == measure_channels(data, 0)
    assert first[0] != measure_channels(data, 1)[0]


def test_a_constant_channel_is_named():
    class Constant(BandScenes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return torch.cat([image[:3], torch.full_like(image[:1], 7)]), label

    with pytest.warns(UserWarning, match=r"Channels \[3\] of bands .counted from 0. have the same value"):
        _, std, _ = measure_channels(Constant(), 0)
    assert std[3] == 1


def test_the_normalisation_that_a_network_states_is_kept(tmp_path):
    student = network()
    set_spec(student, SPEC)
    result = bpkd_sdk.train(student, BandScenes(), output_dir=tmp_path / "run", **OPTIONS)
    assert (result.model.spec.mean, result.model.spec.std) == (SPEC.mean, SPEC.std)


def test_a_refused_run_leaves_the_spec_of_the_student_as_it_was(tmp_path):
    student = network(classes=3)
    with pytest.raises(ValueError, match="predicts 3 classes"):
        bpkd_sdk.train(student, BandScenes(), output_dir=tmp_path / "run", **OPTIONS)
    assert not hasattr(student, "spec")


def test_a_run_is_resumed_with_the_same_normalisation(tmp_path):
    options = OPTIONS | {"output_dir": tmp_path / "run", "checkpoint_every": 1}
    whole = bpkd_sdk.train(network(), BandScenes(), **options | {"output_dir": tmp_path / "whole"})
    bpkd_sdk.train(network(), BandScenes(), **options)
    again = bpkd_sdk.train(network(), BandScenes(), resume=True, **options)
    assert again.model.spec == whole.model.spec


def test_a_teacher_of_the_same_channels_is_checked_and_teaches(bands, tmp_path):
    data = bpkd_sdk.open_dataset(bands.root)
    result = bpkd_sdk.distill(
        bands.run.checkpoint, network(), (data, None), method="bpkd", output_dir=tmp_path / "run", **OPTIONS
    )
    assert result.history[-1]["terms"]["edge"] >= 0


def test_a_teacher_that_is_no_better_than_chance_names_what_was_not_tried():
    teacher = network().eval()
    set_spec(teacher, SPEC)
    with torch.no_grad():
        teacher[2].weight.mul_(-30)
        teacher[2].bias.copy_(torch.tensor([-300.0, 300.0]) + 1)
    findings = check_teacher(teacher, BandScenes(), (48, 48), device=torch.device("cpu"), dtype=torch.float32).findings
    assert "Other normalisations and orders of the 4 channels were not tried" in findings[0]


class Wide(BandScenes):
    value_range = (0, 65535)


class WithoutRange(BandScenes):
    value_range = (0, 255)


class Dark(BandScenes):
    value_range = (0, 65535)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image.int() // 16).to(torch.uint16), label


@pytest.mark.parametrize(
    ("teacher", "student", "data", "message"),
    [
        (
            tiny(2).eval(),
            network(),
            BandScenes(),
            "The teacher takes images of 3 channels of 0 to 255, as networks with",
        ),
        (None, tiny(2), BandScenes(), r"student cannot process a crop of \(32, 32\) with 4 channels"),
        (None, network(), WithoutRange(), r"image is not .4, H, W., 4 channels of 0 to 255.*value_range=\(0, 4095\)"),
        (
            None,
            network(),
            Dark(),
            "largest value in all images of bands is .*, but their range is stated as 0 to 65535",
        ),
        (
            None,
            network(),
            (BandScenes(), Wide()),
            "takes images of 4 channels of 0 to 65535, but bands has 4 channels of 0",
        ),
    ],
)
def test_networks_and_data_that_do_not_fit_are_refused_before_step_1(teacher, student, data, message, tmp_path):
    options = OPTIONS | {"output_dir": tmp_path / "run"}
    run = partial(bpkd_sdk.train, student) if teacher is None else partial(bpkd_sdk.distill, teacher, student)
    with pytest.raises(ValueError, match=message):
        run(data, **options)
    assert not (tmp_path / "run").exists()


def test_a_student_that_states_another_range_is_refused(tmp_path):
    student = network()
    set_spec(student, replace(SPEC, value_range=(0, 65535)))
    with pytest.raises(ValueError, match="The student takes images of 4 channels of 0 to 65535, but bands has"):
        bpkd_sdk.train(student, BandScenes(), output_dir=tmp_path / "run", **OPTIONS)


def test_a_folder_states_the_format_in_classes_json(tmp_path):
    data = bpkd_sdk.open_dataset(write_bands(tmp_path / "data", train=1, val=0))
    image, _ = data[0]
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image, np.moveaxis(band_scene(0)[0], -1, 0))
    with pytest.raises(ValueError, match=r"describe images as in .*\"channels\": 4.*1 to 16, but got 40"):
        bpkd_sdk.open_dataset(write_bands(tmp_path / "bad", train=1, val=0, channels=40))


def test_batches_are_float32_with_the_mean_in_the_padding():
    config = TrainingConfig(steps=1, batch_size=2, scale=(0.5, 0.5))
    loader = training_loader(BandScenes(), config, (32, 32), first_step=0, on_gpu=False, network=SPEC)
    images, labels = next(iter(loader))
    assert images.dtype == torch.float32
    assert images.shape == (2, 4, 32, 32)
    torch.testing.assert_close(images[:, :, 31, 31], torch.full((2, 4), 409.5))  # a scene has 24 pixels
    assert (labels[:, 24:] == 255).all()


@pytest.mark.parametrize(("visible", "changed"), [((0, 1, 2), [0, 1, 2]), ((), []), ((3,), [])])
def test_colours_are_distorted_in_three_visible_bands_only(visible, changed):
    image = torch.from_numpy(np.moveaxis(band_scene(0)[0], -1, 0).astype(np.float32))
    transform = training_transform((48, 48), ignore_index=255, scale=(1, 1), network=replace(SPEC, bands=visible))
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        result, _ = augment(transform, image, torch.zeros(48, 48, dtype=torch.uint8))
        reference = min((image, image.flip(2)), key=lambda other: (other[3] - result[3]).abs().sum())
        seen |= set((result != reference).flatten(1).any(1).nonzero().flatten().tolist())
    assert sorted(seen) == changed


def test_the_brightness_of_bands_changes_relative_to_their_spread():
    """A standard deviation of 0.0226, a tenth of that of natural images, makes the added number a tenth as large."""
    distortion = PhotometricDistortion(replace(SPEC, std=(0.0226,) * 4))
    image = torch.full((4, 2, 2), 2000.0)
    adjust = next(
        iter({a for s in range(20) if (a := _first_adjustment(distortion, s)).__name__ == "adjust_brightness"})
    )
    result = distortion._distort_bands(image, [(adjust, 25.5)])
    torch.testing.assert_close(result[:3], torch.full((3, 2, 2), 2000 + 0.1 * 0.1 * 4095), rtol=1e-3, atol=0)
    torch.testing.assert_close(result[3], image[3])


def _first_adjustment(distortion, seed):
    torch.manual_seed(seed)
    return next(iter(distortion.make_params([])["adjustments"]), (print, 0))[0]


def test_class_names_come_from_the_data(bands):
    assert get_spec(bands.run.model).class_names == NAMES


@pytest.mark.parametrize(("extra", "warns"), [("unspecified", True), ("unassalpha", False)])
def test_a_fourth_channel_that_is_not_read_is_reported(extra, warns, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part / "train").mkdir(parents=True)
    image, label = band_scene(0)
    content = {"photometric": "rgb", "extrasamples": [extra]}
    tifffile.imwrite(tmp_path / "images/train/a.tif", (image >> 4).astype(np.uint8), **content)
    Image.fromarray(label).save(tmp_path / "labels/train/a.png")
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bpkd_sdk.open_dataset(tmp_path).check()
    assert any("have a fourth channel" in str(warning.message) for warning in caught) == warns
