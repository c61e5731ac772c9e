"""`transform=`: presets, transforms of other libraries and functions; one geometry, repeatable draws, refusals."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, random_split
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

import bpkd_sdk
from bpkd_sdk.training.augmentation import Augmentation, describe_transform
from bpkd_sdk.training.augmentation_check import check_augmentation
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.loader import training_loader
from tests.conftest import missing
from tests.networks import tiny
from tests.scenes import COLORS, NAMES, Scenes

try:
    import albumentations
except ImportError:
    albumentations = None

OPTIONS = {"steps": 4, "batch_size": 2, "crop_size": (32, 32), "device": "cpu", "log_every": 1}
CONFIG = TrainingConfig(steps=4, batch_size=2)


@pytest.fixture
def A():  # noqa: N802  (the name under which Albumentations is imported)
    if albumentations is None:
        missing("albumentations is not installed")
    return albumentations


def batches(transform, dataset=None, *, config=CONFIG, crop_size=(32, 32), **options):
    options = {"first_step": 0, "on_gpu": False, "transform": transform} | options
    return list(training_loader(dataset or Scenes(), config, crop_size, **options))


def assert_aligned(drawn):
    """Each labelled pixel has the colour of its class, up to noise, and to mixed pixels at edges."""
    colors = torch.from_numpy(COLORS).long()
    for images, labels in drawn:
        expected = colors[labels.long().clamp(max=3)].permute(0, 3, 1, 2)
        is_wrong = ((images.long() - expected).abs().amax(1) > 20) & (labels != 255)
        assert is_wrong.float().mean() < 0.1
        assert (labels != 255).any()


def same(drawn, others):
    pairs = [
        (part, other)
        for batch, again in zip(drawn, others, strict=True)
        for part, other in zip(batch, again, strict=True)
    ]
    return all(torch.equal(part, other) for part, other in pairs)


def test_the_preset_none_only_crops_and_light_keeps_the_colours():
    for images, labels in batches("none"):
        for image, label in zip(images, labels, strict=True):
            windows = [(pixels.unfold(1, 32, 1).unfold(2, 32, 1), ids) for pixels, ids in Scenes()]
            assert any((window == image[:, None, None]).all(dim=(0, 3, 4)).any() for window, _ in windows)
            assert label.max() < 3
    light = batches("light", config=TrainingConfig(steps=4, batch_size=2, scale=(1, 1)))
    assert_aligned(light)
    assert light[0][0].max() <= 228
    assert not same(light, batches("none"))
    assert batches("paper")[0][0].shape == (2, 3, 32, 32)


def flip(image, label, p=0.5):
    return (image.flip(-1), label.flip(-1)) if torch.rand(()) < p else (image, label)


def rotate(image, label):
    angle = float(torch.empty(()).uniform_(-30, 30))
    return v2.functional.rotate(image, angle, fill=[0]), v2.functional.rotate(label, angle, fill=[255])


def numpy_flip(image, label):
    image, label = image.permute(1, 2, 0).numpy(), label.numpy()
    return (image[:, ::-1], label[:, ::-1]) if np.random.rand() < 0.5 else (image, label)


def random_flip(image, label):
    return (image.flip(-2), label.flip(-2)) if random.random() < 0.5 else (image, label)  # noqa: S311


FILL = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
TORCHVISION = v2.Compose(
    [v2.RandomHorizontalFlip(), v2.RandomAffine(20, (0.1, 0.1), (0.8, 1.2), fill=FILL), v2.RandomCrop(40)]
)
TO_FLOAT = v2.Compose(
    [v2.RandomVerticalFlip(), v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
)


def test_augmentations_of_torchvision_and_functions():
    transforms = (flip, partial(flip, p=1.0), rotate, numpy_flip, random_flip, TORCHVISION, TO_FLOAT)
    for transform in transforms:
        drawn = batches(transform)
        assert drawn[0][0].dtype == torch.uint8
        assert_aligned(drawn)
        assert same(drawn[2:], batches(transform, first_step=2))
        check_augmentation(Augmentation(transform, Scenes(), CONFIG, (32, 32)))
    assert (drawn[0][0] > 1).any()


def compose(library, **options):
    return library.Compose(
        [
            library.HorizontalFlip(p=0.5),
            library.Affine(rotate=(-30, 30), scale=(0.8, 1.2), fill_mask=255, p=1),
            library.RandomCrop(36, 36),
            library.RandomBrightnessContrast(brightness_limit=0.02, contrast_limit=0, p=0.5),
        ],
        **options,
    )


def test_augmentations_of_albumentations(A):  # noqa: N803
    transform = compose(A)
    drawn = batches(transform)
    assert_aligned(drawn)
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert same(drawn[1:], batches(compose(A), first_step=1))
    assert same(drawn, batches(compose(A, seed=7)))
    check_augmentation(Augmentation(transform, Scenes(), CONFIG, (32, 32)))
    single = A.HorizontalFlip(p=1)
    assert torch.equal(Augmentation(single, Scenes(), CONFIG).draw(0, 0)[0], Scenes()[0][0].flip(-1))


@pytest.mark.parametrize("void", [-1, 300])
def test_void_labels_outside_of_bytes_pass_through_albumentations(A, void):  # noqa: N803
    data = Scenes()
    data.ignore_index = void
    transform = A.Compose([A.Affine(rotate=(20, 30), fill_mask=255, p=1)])
    label = Augmentation(transform, data, CONFIG).draw(0, 0)[1]
    assert label.dtype == torch.int64
    assert (label == void).any()
    assert set(label.unique().tolist()) <= {void, 0, 1, 2}


def test_images_in_float_are_read_as_bytes_and_normalised_ones_are_refused(A):  # noqa: N803
    from albumentations.pytorch import ToTensorV2

    drawn = batches(A.Compose([A.ToFloat(max_value=255), ToTensorV2()]))
    assert drawn[0][0].dtype == torch.uint8
    assert_aligned(drawn)
    for normalize in (
        A.Compose([A.Normalize(), ToTensorV2()]),
        v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]),
    ):
        with pytest.raises(
            ValueError, match="cannot be used: image is .* normalised already. Remove the normalisation"
        ):
            batches(normalize)


def image_only(image, label):
    return flip(image, label)[0], label


def mask_only(image, label):
    return image, rotate(image, label)[1]


def shift_image(image, label):
    return image.roll(int(torch.randint(6, 12, ())), -1), label


def same_geometry_and_other_colours(image, label):
    image, label = flip(255 - image, label)
    image[:, :20, :20] = 0
    return v2.functional.gaussian_blur(image, 3), label


@pytest.mark.parametrize("transform", [image_only, mask_only, shift_image])
def test_a_transform_of_the_image_or_the_mask_only_is_found_before_the_first_step(tmp_path, transform):
    with pytest.raises(
        ValueError, match=r"moves the image and not the mask, .* in \d+ of 24 draws.*Albumentations and torchvision"
    ):
        bpkd_sdk.train(tiny(3), (Scenes(), None), transform=transform, output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_changes_of_colours_are_no_change_of_the_geometry():
    check_augmentation(Augmentation(same_geometry_and_other_colours, Scenes(), CONFIG, (48, 48)))


def test_fill_that_is_a_class_is_named(A):  # noqa: N803
    transform = A.Compose([A.Affine(rotate=(20, 30), p=1)])
    with pytest.warns(UserWarning, match=r"adds to the mask the class 'background' \(0\).*fill_mask=255"):
        check_augmentation(Augmentation(transform, Scenes(), CONFIG, (48, 48)))


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        pytest.param("ligth", ValueError, "one of {'paper', 'light', 'none'}, but got 'ligth'. Did you mean 'light'", id="name"),
        pytest.param(3, TypeError, "Expected `transform` to be one of paper, light, none, None, a transform of Alb", id="number"),
        pytest.param(v1.Compose([v1.RandomHorizontalFlip()]), ValueError, r"changes the image and not the mask. Use .*transforms\.v2", id="v1"),
        pytest.param(lambda image: image, ValueError, "failed: TypeError: .*Functions get tensors: the image, uint8", id="one-argument"),
        pytest.param(lambda image, mask: image, ValueError, r"returned a Image|returned a tensor.*expected \(image, mask\)", id="one-result"),
        pytest.param(lambda image, mask: (image[:, :20], mask), ValueError, r"image of \(20, 48\) and a mask of \(48, 48\). Crop", id="one-cropped"),
        pytest.param(lambda image, mask: (image, mask / 2), ValueError, "mask that cannot be used: .*fractions", id="fractions"),
        pytest.param(lambda image, mask: (image, mask + 5), ValueError, r"returns labels \[5, 7\], which are outside", id="other-labels"),
    ],
)  # fmt: skip
def test_transforms_that_cannot_work_are_refused_before_the_first_step(tmp_path, transform, error, message):
    data = Scenes()
    with pytest.raises(error, match=message):
        bpkd_sdk.train(tiny(3), (data, None), transform=transform, output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_options_without_an_effect_are_refused(tmp_path):
    for transform, option in (
        ("none", {"scale": (1.0, 1.0)}),
        (flip, {"base_size": (64, 48)}),
        (None, {"max_class_share": 0.5}),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* has no effect with transform="):
            bpkd_sdk.train(tiny(3), (Scenes(), None), transform=transform, output_dir=tmp_path, **OPTIONS, **option)


class Augmenting(Dataset):
    """A data set as users write it, which augments by a transform of its own; `size` crops the samples."""

    def __init__(self, draw, size=32):
        self.draw, self.size = draw, size

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image, label = Scenes()[index]
        top = int(self.draw() * (48 - self.size))
        return image[:, top : top + self.size, : self.size], label[top : top + self.size, : self.size]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: float(torch.rand(())),
        np.random.rand,
        random.random,
        np.random.default_rng(3).random,
        random.Random(3).random,  # noqa: S311
    ],
    ids=["torch", "numpy", "random", "generator", "random-object"],
)
def test_samples_of_a_data_set_that_augments_are_used_as_they_are_and_can_be_drawn_again(draw):
    data = bpkd_sdk.as_dataset(Augmenting(draw), class_names=NAMES[:3])
    drawn = batches(None, data)
    assert_aligned(drawn)
    assert len({int(image.sum()) for images, _ in drawn for image in images}) == 8
    assert same(drawn[1:], batches(None, data, first_step=1))


def test_albumentations_within_a_data_set_are_seeded(A):  # noqa: N803
    transform = compose(A)  # a variable of the method, as in notebooks

    class Notebook(Augmenting):
        def __getitem__(self, index):
            image, label = Scenes()[index]
            out = transform(image=image.permute(1, 2, 0).numpy(), mask=label.numpy())
            return out["image"], out["mask"]

    data = bpkd_sdk.as_dataset(Notebook(None), class_names=NAMES[:3])
    drawn = batches(None, data, crop_size=(36, 36))
    assert same(drawn[1:], batches(None, data, crop_size=(36, 36), first_step=1))


def interrupted_run(folder, data, transform, monkeypatch):
    """A run that stops after step 2, and goes on to step 4."""
    from bpkd_sdk.training import loop

    options = OPTIONS | {"checkpoint_every": 2, "output_dir": folder, "transform": transform, "class_names": NAMES[:3]}
    with monkeypatch.context() as patch:
        save = loop._Trainer._save

        def save_and_stop(trainer):
            save(trainer)
            raise InterruptedError

        patch.setattr(loop._Trainer, "_save", save_and_stop)
        with pytest.raises(InterruptedError):
            bpkd_sdk.train(tiny(3), (data, None), **options)
    return bpkd_sdk.train(tiny(3), (data, None), resume=True, **options)


def test_a_resumed_run_sees_the_same_draws(tmp_path, monkeypatch, A):  # noqa: N803
    for number, (data, transform) in enumerate([(Scenes(), compose(A)), (Augmenting(np.random.rand), None)]):
        options = OPTIONS | {"checkpoint_every": 2, "class_names": NAMES[:3]}
        whole = bpkd_sdk.train(
            tiny(3), (data, None), transform=transform, output_dir=tmp_path / f"whole{number}", **options
        )
        again = interrupted_run(tmp_path / f"parts{number}", data, transform, monkeypatch)
        for ours, theirs in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_run_records_its_transform_and_resumes_with_it_only(tmp_path, A):  # noqa: N803
    options = OPTIONS | {"output_dir": tmp_path}
    bpkd_sdk.train(tiny(3), (Scenes(), None), transform=compose(A), **options)
    recorded = json.loads((tmp_path / "run.json").read_text())["transform"]
    assert "HorizontalFlip(p=0.5)" in recorded
    assert bpkd_sdk.train(tiny(3), (Scenes(), None), transform=compose(A), resume=True, **options)
    with pytest.raises(ValueError, match=r"transform: was .Compose.* is 'light'"):
        bpkd_sdk.train(tiny(3), (Scenes(), None), transform="light", resume=True, **options)


def test_descriptions_of_transforms(A):  # noqa: N803
    inner = A.Compose([A.HorizontalFlip(p=0.25)])

    def augment(image, label):
        return inner(image=image, mask=label)

    assert describe_transform(None) is None
    assert describe_transform(flip).startswith("test_augmentation.flip, code ") or ".flip, code " in describe_transform(
        flip
    )
    assert describe_transform(partial(flip, p=1.0)) == f"{describe_transform(flip)} with p=1.0"
    assert describe_transform(flip) != describe_transform(rotate)
    assert "HorizontalFlip(p=0.25)" in describe_transform(augment)
    assert " at 0x" not in describe_transform(v2.Lambda(flip))


def test_samples_of_different_sizes_are_not_used_as_they_are():
    class Sizes(Augmenting):
        def __getitem__(self, index):
            image, label = Scenes()[index]
            return image[:, : 40 + index], label[: 40 + index]

    data = bpkd_sdk.as_dataset(Sizes(None), class_names=NAMES[:3])
    with pytest.raises(ValueError, match=r"have different sizes: \(40, 48\), \(41, 48\).*transform='none'"):
        bpkd_sdk.train(tiny(3), data, transform=None, **OPTIONS | {"crop_size": None})
    with pytest.raises(
        ValueError, match=r"Sizes\[\d\]: the sample is \(4\d, 48\), but the training crops are \(40, 48\)"
    ):
        batches(None, data, crop_size=(40, 48))


def test_the_crop_is_the_size_of_the_transforms_results(tmp_path):
    bpkd_sdk.train(
        tiny(3), (Scenes(), None), transform=v2.RandomCrop(24), output_dir=tmp_path, **OPTIONS | {"crop_size": None}
    )
    assert json.loads((tmp_path / "run.json").read_text())["crop_size"] == [24, 24]
    assert batches(flip, crop_size=(64, 64))[0][1][:, 48:].eq(255).all()


def test_data_that_augment_twice_and_validation_data_that_augment_are_named(tmp_path):
    parts = random_split(Augmenting(np.random.rand), [6, 2])
    with (
        pytest.warns(UserWarning, match="augments its samples by itself, .* once more .paper.. Pass transform=None"),
        pytest.warns(UserWarning, match="The validation data Augmenting return .* random_split"),
    ):
        bpkd_sdk.train(tiny(3), tuple(parts), class_names=NAMES[:3], output_dir=tmp_path, **OPTIONS)


def test_draws_that_cannot_be_repeated_are_named():
    counter = iter(range(10**6))

    def drift(image, label):
        return image.clamp(max=250) + next(counter) % 5, label

    with pytest.warns(UserWarning, match="Two draws of .* with the same seeds differ, so a resumed run"):
        check_augmentation(Augmentation(drift, Scenes(), CONFIG, (32, 32)))


def four_channels(image, label):
    return (torch.cat([image, image[:1]]).float() * 4, label)


def test_transforms_of_images_of_several_channels(A):  # noqa: N803
    class Four(Scenes):
        channels, value_range = 4, (0, 1020)

        def __getitem__(self, index):
            return four_channels(*super().__getitem__(index))

    network = bpkd_sdk.NetworkSpec(None, 3, in_channels=4, value_range=(0, 1020), mean=(0.4,) * 4, std=(0.2,) * 4)
    for transform in (flip, TORCHVISION.transforms[0], A.Compose([A.HorizontalFlip(), A.RandomCrop(40, 40)]), "light"):
        check_augmentation(Augmentation(transform, Four(), CONFIG, (32, 32), network))
        images, labels = batches(transform, Four(), network=network)[0]
        assert (images.dtype, images.shape) == (torch.float32, (2, 4, 32, 32))
        if transform != "light":
            assert_aligned([(images[:, :3] / 4, labels)])
    with pytest.raises(ValueError, match=r"moves the image and not the mask"):
        check_augmentation(Augmentation(image_only, Four(), CONFIG, (32, 32), network))
    with pytest.raises(
        ValueError, match=r"at most 1 for images of scenes with values of 0 to 1020.*value_range=\(0, 1\)"
    ):
        batches(A.Compose([A.RandomBrightnessContrast(p=1)]), Four())


def test_teacher_and_student_see_the_same_pixels(tmp_path):
    seen = {"teacher": [], "student": []}

    class Listening(nn.Module):
        def __init__(self, role):
            super().__init__()
            self.role, self.body = role, tiny(3)

        def forward(self, images):
            seen[self.role].append(images.detach().clone())
            return self.body(images)

    bpkd_sdk.distill(
        Listening("teacher").eval(), Listening("student"), (Scenes(), None), transform=TORCHVISION, method="cwd",
        check_teacher=False, output_dir=tmp_path, **OPTIONS,
    )  # fmt: skip
    for ours, theirs in zip(seen["student"][-4:], seen["teacher"][-4:], strict=True):
        assert ours.shape == (2, 3, 32, 32)
        assert torch.equal(ours, theirs)


def test_the_command_line_has_the_presets(bpkd):
    code, _, errors = bpkd("train", "smp/FPN/mobilenet_v2", "--transform", "strong", "--device", "cpu")
    assert code != 0
    assert "one of {'paper', 'light', 'none'}, but got 'strong'" in errors
