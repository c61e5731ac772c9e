"""Data sets of other libraries: which are accepted, and that they are read, checked and trained on as ours are."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

import bpkd_sdk
from tests.conftest import missing
from tests.networks import tiny
from tests.scenes import NAMES, Scenes, scene, write_folder

OPTIONS = {"steps": 2, "batch_size": 2, "crop_size": (32, 32), "device": "cpu"}
CLASSES = NAMES[:3]


class Foreign(Dataset):
    """A data set as users write it: arrays (H, W, C) and (H, W) in a form that a function returns."""

    def __init__(self, form=lambda image, mask: (image, mask), length=8, start=0):
        self.form, self.length, self.start = form, length, start

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.form(*scene(self.start + index))


def as_dict(image, mask):
    return {"name": "a.png", "image": image, "mask": mask, "weight": 1.0}


def as_tensors(image, mask):
    return torch.from_numpy(image).permute(2, 0, 1) / 255, torch.from_numpy(mask).long()[None]


def samples(data):
    return [data[index] for index in range(len(data))]


def assert_same(ours, theirs):
    for sample, other in zip(samples(ours), samples(theirs), strict=True):
        assert all(torch.equal(part, same) for part, same in zip(sample, other, strict=True))


@pytest.mark.parametrize(
    "form",
    [
        lambda image, mask: (image, mask),
        lambda image, mask: [Image.fromarray(image), Image.fromarray(mask)],
        as_tensors,
        as_dict,
        lambda image, mask: {"pixel_values": image, "labels": mask},
        lambda image, mask: {"img": image, "gt_semantic_seg": mask[..., None]},
    ],
    ids=["tuple", "list-of-pil", "tensors", "dict", "hugging-face-names", "mmseg-names"],
)
def test_forms_of_samples(form):
    data = bpkd_sdk.as_dataset(Foreign(form), class_names=CLASSES)
    assert_same(data, Scenes())
    assert (data.name, data.sample_name(3), data.has_labels) == ("Foreign", "Foreign[3]", True)
    assert data.palette[0] == (0, 0, 0) not in data.palette[1:]
    data.check()


def test_places_of_image_and_mask_can_be_stated():
    triple = Foreign(lambda image, mask: ("a.png", mask, image))
    with pytest.raises(
        ValueError, match=r"Foreign\[0\]: sample is a tuple of 3 \(a str, an array.*as_dataset\(data, image=0"
    ):
        bpkd_sdk.as_dataset(triple, class_names=CLASSES)
    assert_same(bpkd_sdk.as_dataset(triple, class_names=CLASSES, image=2, label=1), Scenes())
    with_depth = Foreign(lambda image, mask: {"rgb": image, "depth": mask, "mask": mask})
    with pytest.raises(ValueError, match="not clear which is the image .*: 'rgb', 'depth', 'mask' may be"):
        bpkd_sdk.as_dataset(with_depth, class_names=CLASSES)
    assert_same(bpkd_sdk.as_dataset(with_depth, class_names=CLASSES, image="rgb"), Scenes())
    with pytest.raises(ValueError, match="has no 'rbg'. Did you mean 'rgb'"):
        bpkd_sdk.as_dataset(with_depth, class_names=CLASSES, image="rbg")


@pytest.mark.parametrize("form", [lambda i, _: i, lambda i, _: (i, None), lambda i, _: (i,), lambda i, _: {"image": i}])
def test_images_without_masks_have_no_labels(tmp_path, form):
    data = bpkd_sdk.as_dataset(Foreign(form), class_names=CLASSES)
    assert not data.has_labels
    assert (data[0][1] == 0).all()
    with pytest.raises(ValueError, match="Foreign has no labels. Use distill"):
        bpkd_sdk.train(tiny(3), data, output_dir=tmp_path, **OPTIONS)


def test_classes_of_images_are_no_masks():
    with pytest.raises(ValueError, match=r"Foreign\[0\]: mask is 5, which is a class of the whole image"):
        bpkd_sdk.as_dataset(Foreign(lambda image, _: (image, 5)), class_names=CLASSES)


def test_subsets_concatenations_and_loaders_of_both_kinds_of_data_sets():
    for whole, name in ((Foreign(), "Foreign"), (Scenes(), "scenes")):
        names = CLASSES if name == "Foreign" else None
        half, rest = random_split(whole, [5, 3], torch.Generator().manual_seed(0))
        for part in (half, rest):
            data = bpkd_sdk.as_dataset(part, class_names=names)
            assert_same(data, Subset(Scenes(), part.indices))
            assert data.sample_name(1) == f"{name}[{part.indices[1]}]"
        data = bpkd_sdk.as_dataset(ConcatDataset([half, Subset(rest, [2, 0])]), class_names=names)
        assert_same(data, Subset(Scenes(), [*half.indices, rest.indices[2], rest.indices[0]]))
        assert data.sample_name(5) == f"{name}[{rest.indices[2]}]"
        data.check()
        assert_same(
            bpkd_sdk.as_dataset(DataLoader(half, batch_size=2, shuffle=True), class_names=names),
            Subset(Scenes(), half.indices),
        )
    with pytest.warns(UserWarning, match="its collate_fn, sampler and batch size are not"):
        bpkd_sdk.as_dataset(DataLoader(Foreign(), collate_fn=list), class_names=CLASSES)


def test_data_sets_of_other_classes_are_not_concatenated():
    with pytest.raises(ValueError, match="the same class_names, but scenes has .'background', 'red'.*, and scenes has"):
        bpkd_sdk.as_dataset(ConcatDataset([Scenes(), Scenes((0, 2, 1))]))


def test_a_subset_does_not_need_the_other_samples():
    class Broken(Foreign):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("truncated")
            return super().__getitem__(index)

    bpkd_sdk.as_dataset(Subset(Broken(), [2, 1]), class_names=CLASSES).check()
    with pytest.raises(OSError, match="truncated"):
        bpkd_sdk.as_dataset(Broken(), class_names=CLASSES)


def test_a_wrapper_keeps_the_classes_of_the_data_set_inside():
    class Wrapper(Dataset):
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            image, label = self.dataset[index]
            return image.flip(-1), label.flip(-1)

    data = bpkd_sdk.as_dataset(Wrapper(Scenes((0, 2, 1))))
    assert (data.class_names, data.palette) == (Scenes((0, 2, 1)).class_names, Scenes((0, 2, 1)).palette)
    assert torch.equal(data[0][0], Scenes()[0][0].flip(-1))


def test_classes_that_differ_from_those_of_our_data_set_are_refused(tmp_path):
    root = write_folder(tmp_path / "data")
    assert bpkd_sdk.as_dataset(bpkd_sdk.open_dataset(root), class_names=list(CLASSES)).class_names == CLASSES
    with pytest.raises(
        ValueError, match=r"data/train states its class_names itself: .*Leave out class_names=.*classes\.json"
    ):
        bpkd_sdk.train(tiny(3), root, class_names=["a", "b", "c"], output_dir=tmp_path / "run", **OPTIONS)


def test_each_sample_that_cannot_be_used_is_listed_with_its_name(tmp_path):
    def changed(index, image, mask):
        return [(image, mask), (image, mask[:40]), (image, mask + 7), (image - 300.0, mask), (image, mask / 2)][
            index % 5
        ]

    class Faulty(Foreign):
        def __getitem__(self, index):
            return changed(index, *scene(index))

    with pytest.raises(ValueError, match="4 of 5 samples of Faulty cannot be used") as raised:
        bpkd_sdk.train(tiny(3), Faulty(length=5), class_names=CLASSES, output_dir=tmp_path, **OPTIONS)
    for line in (
        r"Faulty[1]: image is (48, 48), label is (40, 48)", r"Faulty[2]: labels [7, 8, 9] are outside the classes 0..2",
        r"Faulty[3]: image is an array, float64 (3, 48, 48), and its values go from -", r"Faulty[4]: mask is",
        "as_dataset(data, ids={",
    ):  # fmt: skip
        assert line in str(raised.value)


def test_training_on_a_foreign_data_set_equals_training_on_ours(tmp_path):
    weights = []
    foreign = (Foreign(as_tensors), Foreign(as_dict, start=100, length=2))
    splits = dict(zip(("train", "validation"), foreign, strict=True))
    for number, data in enumerate(((Scenes(), Scenes(start=100, length=2)), foreign, splits)):
        names = CLASSES if number else None
        result = bpkd_sdk.train(tiny(3), data, class_names=names, output_dir=tmp_path / str(number), **OPTIONS)
        weights.append(torch.cat([parameter.flatten() for parameter in result.model.parameters()]))
        assert result.metrics.images == 2
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_evaluation_takes_the_classes_of_the_network_where_the_data_state_none():
    network = tiny(3).eval()
    bpkd_sdk.models.set_spec(network, bpkd_sdk.NetworkSpec(None, 3, class_names=CLASSES))
    metrics = bpkd_sdk.evaluate(network, Foreign(length=3))
    assert metrics == bpkd_sdk.evaluate(network, Scenes(length=3))
    with pytest.raises(ValueError, match="Foreign does not state its classes. Pass their names"):
        bpkd_sdk.evaluate(tiny(3).eval(), Foreign())
    assert bpkd_sdk.evaluate(tiny(3).eval(), Foreign(length=3), class_names=CLASSES).class_names == CLASSES
    with pytest.raises(ValueError, match="do not have the same classes"):
        bpkd_sdk.evaluate(network, Foreign(length=3), class_names=("a", "b", "c"))


def test_comparison_accepts_foreign_data_sets(tmp_path):
    network = tiny(3, seed=1).eval()
    comparison = bpkd_sdk.compare(
        network, tiny(3), (Foreign(), Foreign(start=100, length=2)), class_names=CLASSES, methods="cwd", steps=1, seeds=1, transform="none",
        output_dir=tmp_path, **{key: value for key, value in OPTIONS.items() if key != "steps"}, check_teacher=False,
    )  # fmt: skip
    assert {run.method for run in comparison.runs} == {"alone", "cwd"}
    assert comparison.settings["transform"] == "none"


def test_images_of_several_channels_and_other_ranges():
    """Four channels of 12 bits, in which the last one shows the class."""

    def four(image, mask):
        return np.dstack([image, mask]).astype(np.uint16) * 16, mask

    with pytest.raises(ValueError, match="four channels, which may be RGB with transparency or four bands"):
        bpkd_sdk.as_dataset(Foreign(four), class_names=CLASSES, value_range=(0, 4095))
    stated = {"class_names": CLASSES, "channels": 4, "value_range": (0, 4095), "bands": (2, 1, 0)}
    data = bpkd_sdk.as_dataset(Foreign(four), **stated)
    assert (data.channels, data.value_range, data.pixels.bands) == (4, (0, 4095), (2, 1, 0))
    assert data[0][0].dtype == torch.uint16
    assert torch.equal(data[0][0][:3].long(), Scenes()[0][0].long() * 16)
    joined = bpkd_sdk.as_dataset(ConcatDataset([data, Foreign(four)]), **stated)
    assert (len(joined), joined.pixels) == (16, data.pixels)
    joined.check()
    with pytest.raises(ValueError, match="the same pixels, but Foreign has 4 channels of 0 to 4095, and scenes has 3"):
        bpkd_sdk.as_dataset(ConcatDataset([data, Scenes()]))
    grey = bpkd_sdk.as_dataset(
        Foreign(lambda image, mask: (image[..., :1] / 255, mask)), class_names=CLASSES, channels=1
    )
    assert (grey[0][0].dtype, grey.pixels.bands) == (torch.uint8, (0,))
    assert torch.equal(grey[0][0], Scenes()[0][0][:1])
    unit = bpkd_sdk.as_dataset(
        Foreign(lambda image, mask: (image / 254.7, mask)), class_names=CLASSES, value_range=(0, 1)
    )
    assert unit[0][0].dtype == torch.float32
    assert torch.allclose(unit[0][0], Scenes()[0][0] / 254.7)


# Hugging Face


@pytest.fixture(scope="module")
def hugging_face():
    try:
        import datasets
    except ImportError:
        missing("datasets is not installed")
    features = datasets.Features(
        {
            "file": datasets.Value("string"),
            "annotation": datasets.Image(),
            "image": datasets.Image(),
            "scene": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    columns = {"file": [], "annotation": [], "image": [], "scene": []}
    for index in range(8):
        image, mask = scene(index)
        columns["file"].append(f"{index}.png")
        columns["annotation"].append(Image.fromarray(mask))
        columns["image"].append(Image.fromarray(image))
        columns["scene"].append(0)
    return datasets.Dataset.from_dict(columns, features=features)


def test_hugging_face_columns_are_found_by_their_features(hugging_face):
    data = bpkd_sdk.as_dataset(hugging_face, class_names=CLASSES)
    assert (data.fields.image, data.fields.label) == ("image", "annotation")
    for form in (hugging_face, hugging_face.with_format("torch"), hugging_face.with_format("numpy")):
        assert_same(bpkd_sdk.as_dataset(form, class_names=CLASSES), Scenes())
    renamed = hugging_face.rename_columns({"image": "left", "annotation": "right"})
    with pytest.raises(ValueError, match="not clear which is the image .*: 'right', 'left' may be"):
        bpkd_sdk.as_dataset(renamed, class_names=CLASSES)
    assert not bpkd_sdk.as_dataset(hugging_face.remove_columns("annotation"), class_names=CLASSES).has_labels


def test_hugging_face_splits_train(tmp_path, hugging_face):
    import datasets

    splits = datasets.DatasetDict(hugging_face.train_test_split(2, seed=0))
    with pytest.raises(ValueError, match="`data` has 'train', 'test'"):
        bpkd_sdk.train(tiny(3), splits, class_names=CLASSES, output_dir=tmp_path, **OPTIONS)
    splits["validation"] = splits.pop("test")
    assert bpkd_sdk.train(tiny(3), splits, class_names=CLASSES, output_dir=tmp_path, **OPTIONS).metrics.images == 2
    with pytest.raises(TypeError, match="Data that are only iterated over cannot be shuffled"):
        bpkd_sdk.train(
            tiny(3), hugging_face.to_iterable_dataset(), output_dir=tmp_path / "b", class_names=CLASSES, **OPTIONS
        )


# torchvision


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_voc_of_torchvision(tmp_path):
    from torchvision.datasets import VOCSegmentation, wrap_dataset_for_transforms_v2

    image, mask = scene(0)
    mask[:2] = 255
    base = tmp_path / "VOCdevkit/VOC2012"
    save(image, base / "JPEGImages/a.jpg")
    save(mask, base / "SegmentationClass/a.png")
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/train.txt").write_text("a\n")
    for form in (
        VOCSegmentation(tmp_path, image_set="train"),
        wrap_dataset_for_transforms_v2(VOCSegmentation(tmp_path, image_set="train")),
    ):
        data = bpkd_sdk.as_dataset(form)
        assert (data.num_classes, data.class_names[:2]) == (21, ("background", "aeroplane"))
        assert torch.equal(data[0][1], torch.from_numpy(mask))
        data.check()


def test_cityscapes_of_torchvision(tmp_path):
    from torchvision.datasets import Cityscapes

    image, mask = scene(0)
    ids = np.array([0, 7, 26], np.uint8)[mask]  # unlabelled, road, car
    save(image, tmp_path / "leftImg8bit/train/a/a_leftImg8bit.png")
    save(ids, tmp_path / "gtFine/train/a/a_gtFine_labelIds.png")
    data = bpkd_sdk.as_dataset(Cityscapes(tmp_path, target_type="semantic"))
    assert (data.num_classes, data.class_names[13]) == (19, "car")
    assert torch.equal(data[0][1], torch.tensor([255, 0, 13], dtype=torch.uint8)[torch.from_numpy(mask).long()])
    with pytest.raises(ValueError, match=r"Cityscapes returns \['instance'\] .*target_type='semantic'"):
        bpkd_sdk.as_dataset(Cityscapes(tmp_path))
    with pytest.raises(ValueError, match="has a target_transform, so the values in its masks are not known"):
        bpkd_sdk.as_dataset(Cityscapes(tmp_path, target_type="semantic", target_transform=np.array))
    as_they_are = bpkd_sdk.as_dataset(
        Cityscapes(tmp_path, target_type="semantic"), class_names=list(map(str, range(34)))
    )
    assert torch.equal(as_they_are[0][1], torch.from_numpy(ids))


def test_trimaps_of_oxford_pets(tmp_path):
    from torchvision.datasets import OxfordIIITPet

    image, mask = scene(0)
    base = tmp_path / "oxford-iiit-pet"
    save(image, base / "images/cat_1.jpg")
    save(mask + np.uint8(1), base / "annotations/trimaps/cat_1.png")
    (base / "annotations/trainval.txt").write_text("cat_1 1 1 1\n")
    data = bpkd_sdk.as_dataset(OxfordIIITPet(tmp_path, target_types="segmentation"))
    assert data.class_names == ("background", "pet")
    assert torch.equal(data[0][1], torch.tensor([1, 0, 255], dtype=torch.uint8)[torch.from_numpy(mask).long()])
    with pytest.raises(ValueError, match=r"OxfordIIITPet returns \['category'\] .*target_types='segmentation'"):
        bpkd_sdk.as_dataset(OxfordIIITPet(tmp_path))


def test_made_palettes_are_black_for_background_only():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    data = TensorDataset(images, images[:, 0])
    assert (0, 0, 0) not in bpkd_sdk.as_dataset(data, class_names=["road", "car"]).palette
    palette = bpkd_sdk.as_dataset(data, class_names=["road", "Background", "car"]).palette
    assert [color == (0, 0, 0) for color in palette] == [False, True, False]
    assert len(set(palette)) == 3


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ((-1, 0, 1), {-1: "void", 0: "road", 1: "car"}),
        ((0, 1, 2), {0: "road", 1: "car", 2: "void"}),
        ((1, 2), {1: "road", 2: "car"}),
    ],
)  # fmt: skip
def test_the_advice_on_other_values_keeps_the_ids_of_the_classes(values, ids):
    label = np.resize(np.array(values, np.int64), (8, 8))
    dataset = bpkd_sdk.as_dataset([(np.zeros((8, 8, 3), np.uint8), label)], class_names=["road", "car"])
    assert f"ids={ids}" in dataset.label_advice(values)
