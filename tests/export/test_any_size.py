"""The README's chain with images of several sizes, none of which is the size of the exported file."""

import json

import pytest
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk.data.shapes import CLASS_NAMES, render
from bpkd_sdk.export import benchmark, to_onnx, verify
from bpkd_sdk.export.calibration import read_samples
from bpkd_sdk.runtime import TorchRuntime, open_runtime
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.serve import Predictor
from tests.networks import tiny

SIZE = (48, 64)
IMAGES = [(60, 80), (80, 60), (40, 50), (70, 100), (64, 64), (90, 70), (50, 130), (66, 80)]  # (height, width)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index, size in enumerate(IMAGES):
            for kind, picture in zip(("images", "labels"), render(0, split, index, size), strict=True):
                Image.fromarray(picture).save(folder / kind / split / f"{index}.png")
    (folder / "classes.json").write_text(json.dumps(CLASS_NAMES))
    return folder


@pytest.fixture(scope="module")
def student(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {"steps": 2, "batch_size": 2, "workers": 0, "trackers": (), "device": "cpu", "learning_rate": 0.1}
    model = bpkd_sdk.train(tiny(len(CLASS_NAMES)), root, output_dir=folder, **options).model
    with torch.no_grad():  # every class is predicted somewhere
        model[-1].weight *= 20
    to_onnx(model, folder / "student.onnx", input_size=SIZE)
    to_onnx(model, folder / "logits.onnx", input_size=SIZE, argmax=False)
    return folder, model


@pytest.mark.filterwarnings("ignore:.*windows of 48 x 64")
@pytest.mark.filterwarnings("ignore:.*takes images of 48 x 64")
@pytest.mark.parametrize("fit", ["slide", "resize", "pad"])
def test_the_chain_of_the_readme_with_images_of_any_size(bpkd, root, student, tmp_path, fit):
    folder, model = student
    data = bpkd_sdk.open_dataset(root, split="val")
    int8 = tmp_path / "student.int8.onnx"
    code, out, err = bpkd(
        "export", folder / "student.onnx", int8, "--precision", "int8", "--data", root, "--fit", fit,
        "--max-boundary-loss", 1,
    )  # fmt: skip
    assert code == 0, err
    assert open_runtime(int8).metadata["quantization"]["fit"] == fit
    code, out, err = bpkd("evaluate", int8, "--data", root, "--fit", fit, "--json")
    assert code == 0, err
    evaluated = json.loads(out)
    assert evaluated["images"] == len(IMAGES)

    predictor = Predictor(int8, fit=fit)
    predictions = predictor([image.permute(1, 2, 0).numpy() for image, _ in data])
    assert [prediction.mask.shape for prediction in predictions] == IMAGES
    pairs = [(prediction.mask, label.numpy()) for prediction, (_, label) in zip(predictions, data, strict=True)]
    correct = sum(((mask == label) & (label != 255)).sum() for mask, label in pairs)
    assert evaluated["pixel_accuracy"] == pytest.approx(correct / sum((label != 255).sum() for _, label in pairs))

    report = benchmark([open_runtime(int8), TorchRuntime(model)], data, duration=0.02, fit=fit)
    assert [row.problem for row in report.rows] == [None, None]
    assert report.rows[0].miou == pytest.approx(evaluated["miou"])


@pytest.mark.filterwarnings("ignore:.*windows of 48 x 64")
@pytest.mark.filterwarnings("ignore:.*takes images of 48 x 64")
@pytest.mark.parametrize("name", ["student.onnx", "logits.onnx"])
@pytest.mark.parametrize("fit", ["slide", "resize", "pad"])
def test_a_file_is_verified_on_images_of_any_size(root, student, name, fit):
    folder, model = student
    report = verify(folder / name, model, data=bpkd_sdk.open_dataset(root, split="val"), batch_sizes=[1], fit=fit)
    assert [run.size for run in report.runs] == [SIZE, *IMAGES]
    assert report.agreement > 0.999
    protocol = bpkd_sdk.EvaluationProtocol(fit)
    scores = bpkd_sdk.evaluate(folder / name, bpkd_sdk.open_dataset(root, split="val"), protocol=protocol)
    assert report.artifact.miou == pytest.approx(scores.miou)


class Coordinates(bpkd_sdk.data.ShapesDataset):
    """Images whose first channels are the row and the column, and whose labels are the row."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        rows, columns = (torch.arange(side, dtype=torch.uint8) for side in label.shape)
        image[0], image[1] = rows[:, None], columns
        return image, (rows[:, None] % 9).expand(label.shape)


@pytest.mark.parametrize(("length", "each"), [(16, 1), (4, 4)])
def test_calibration_gets_windows_of_all_places(student, length, each):
    """Of many images one window each, at different places; of few images several windows."""
    folder, _ = student
    data = Coordinates("train", length=length, size=(120, 160))  # 16 windows
    samples = read_samples(data, 16, OnnxRuntime(folder / "student.onnx", "cpu"), "slide", True)
    assert [len(parts) for parts in samples] == [each] * length
    for image, label in (sample for parts in samples for sample in parts):
        assert image.shape == (3, *SIZE)
        assert torch.equal(image[0] % 9, label)
    places = [{(int(image[0, 0, 0]), int(image[1, 0, 0])) for image, _ in parts} for parts in samples]
    assert all(len(part) == each for part in places)
    assert len(set.union(*places)) > 9
    assert set.union(*places) <= {(top, left) for top in (0, 32, 64, 72) for left in (0, 42, 84, 96)}


def test_labels_do_not_cover_the_padding(student):
    folder, _ = student
    runtime = OnnxRuntime(folder / "student.onnx", "cpu")
    for size, fit, inner in [((32, 40), "slide", (32, 40)), ((100, 80), "pad", (48, 38)), ((100, 80), "resize", SIZE)]:
        data = Coordinates("train", length=4, size=size)
        ((image, label),) = read_samples(data, 4, runtime, fit, True)[0]
        assert (image.shape, label.shape) == ((3, *SIZE), inner)
        assert torch.equal(image[0, inner[0] :], torch.full((SIZE[0] - inner[0], SIZE[1]), 124, dtype=torch.uint8))
