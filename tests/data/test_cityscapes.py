"""Tests of Cityscapes against the official scripts: classes, label mapping, scores."""

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling
from cityscapesscripts.helpers.labels import labels
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data import open_dataset
from bpkd_sdk.data.public import CITYSCAPES_CLASS_OF_ID, CITYSCAPES_LABEL_IDS
from tests import trees


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return trees.cityscapes(tmp_path_factory.mktemp("cityscapes"), images=3, encodings=("ids", "trainIds"))


def test_classes_are_the_official_ones(root):
    evaluated = sorted((label for label in labels if not label.ignoreInEval), key=lambda label: label.trainId)
    data = open_dataset("cityscapes", root=root, split="val")
    assert data.class_names == tuple(label.name for label in evaluated)
    assert data.palette == tuple(label.color for label in evaluated)


def test_every_id_becomes_the_official_training_id():
    for label in labels:
        if label.id >= 0:
            assert CITYSCAPES_CLASS_OF_ID[label.id] == (label.trainId if 0 <= label.trainId < 255 else 255), label.name


def test_mapped_ids_are_the_training_ids_that_the_official_script_draws(root):
    data = open_dataset("cityscapes", root=root, split="train")
    assert len(data) == 3
    for i, pair in enumerate(data.pairs):
        drawn = np.asarray(Image.open(str(pair.label).replace("labelIds", "labelTrainIds")))
        assert np.array_equal(data[i][1].numpy(), drawn)
    values = set(torch.unique(data[0][1]).tolist())
    assert 255 in values
    assert len(values) > 10
    data.check()


def test_training_ids_are_read_if_there_are_no_label_ids(root, tmp_path):
    both = open_dataset("cityscapes", root=root, split="val")
    trees.cityscapes(tmp_path, images=3, encodings=("trainIds",))
    drawn = open_dataset("cityscapes", root=tmp_path, split="val")
    assert all(pair.label.name.endswith("_labelTrainIds.png") for pair in drawn.pairs)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(both, drawn, strict=True))


class Guess(torch.nn.Module):
    """An untrained network, whose logits depend on the colours."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 19, 5, padding=2)

    def forward(self, images):
        return self.layer(images)


def test_scores_equal_those_of_the_official_script(root, tmp_path):
    data, model = open_dataset("cityscapes", root=root, split="val"), Guess().eval()
    predictions = []
    for i, (image, _) in enumerate(data):
        spec = bpkd_sdk.NetworkSpec(name=None, num_classes=19)
        classes = model(spec.normalize(image[None])).argmax(1)[0].numpy()
        predictions.append(str(tmp_path / f"{i}.png"))
        trees.save(tmp_path / f"{i}.png", np.array(CITYSCAPES_LABEL_IDS, np.uint8)[classes])
    options = evalPixelLevelSemanticLabeling.args
    options.evalInstLevelScore, options.JSONOutput, options.quiet = False, False, True
    label_paths = [str(pair.label) for pair in data.pairs]
    expected = evalPixelLevelSemanticLabeling.evaluateImgLists(predictions, label_paths, options)
    metrics = bpkd_sdk.evaluate(model, data)
    for name, iou in zip(metrics.class_names, metrics.per_class_iou, strict=True):
        assert iou == pytest.approx(expected["classScores"][name], abs=1e-12, nan_ok=True), name
    assert metrics.miou == pytest.approx(expected["averageScoreClasses"], abs=1e-12)


def test_an_id_out_of_range_names_the_file(tmp_path):
    trees.cityscapes(tmp_path)
    label = open_dataset("cityscapes", root=tmp_path).pairs[1].label
    trees.save(label, np.full((64, 128), 40, np.uint8))
    with pytest.raises(
        ValueError, match=r"1 of 2 samples.*\n.*000001_000019_gtFine_labelIds.png: contains the ids \[40\]"
    ):
        open_dataset("cityscapes", root=tmp_path).check()


def test_missing_folders_are_reported(tmp_path):
    trees.cityscapes(tmp_path)
    (tmp_path / "gtFine").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"Expected gtFine/train in .*it contains elsewhere, leftImg8bit. Get"):
        open_dataset("cityscapes", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*typo"):
        open_dataset("cityscapes", root=tmp_path / "typo")
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        open_dataset("cityscapes", root=tmp_path, split="trian")


def test_a_folder_named_cityscapes_inside_a_complete_copy_is_not_the_root(tmp_path):
    trees.cityscapes(tmp_path)
    (tmp_path / "cityscapes").mkdir()
    assert len(open_dataset("cityscapes", root=tmp_path)) == 2
    (tmp_path / "gtFine").rename(tmp_path / "cityscapes/gtFine")
    with pytest.raises(FileNotFoundError, match="Expected leftImg8bit/train in .*/cityscapes, but it contains gtFine"):
        open_dataset("cityscapes", root=tmp_path)
