"""A network with one logit, a sigmoid, is a network of two classes from training to the exported file."""

import copy

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn

import bpkd_sdk
from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.export import quantize, to_onnx, to_triton, verify
from bpkd_sdk.losses import CanonicalKDLoss
from bpkd_sdk.models import get_spec
from bpkd_sdk.output import check_final_activation
from bpkd_sdk.runtime import open_runtime
from bpkd_sdk.runtime.module import whole_logits
from bpkd_sdk.serve import Predictor
from tests.export.test_triton import config_of
from tests.networks import tiny
from tests.scenes import Scenes

DATA = Scenes((0, 1))
VAL = Scenes((0, 1), start=100, length=4)
OPTIONS = {"batch_size": 4, "crop_size": (48, 48), "device": "cpu", "log_every": 1}
UNCHECKED = OPTIONS | {"check_teacher": False}


def with_two_logits(network):
    """Return a network of the class `tiny` with the logits 0 and z of one with the logit z."""
    two = tiny(2, width=network[0].out_channels, stride=2 * network[3].stride[0])
    two.load_state_dict(
        {key: F.pad(value, (0,) * (2 * value.ndim - 2) + (1, 0)) if key[0] == "6" else value
         for key, value in network.state_dict().items()}
    )  # fmt: skip
    return two.train(network.training)


def first_terms(folder, teacher, student, data=DATA, **options):
    result = bpkd_sdk.distill(teacher, student, (data, None), steps=1, output_dir=folder, **UNCHECKED | options)
    return result.history[0]["terms"]


METHOD = ["bpkd", "cwd", "canonical"]


@pytest.mark.parametrize("labels", ["dataset", "teacher"])
def test_all_pairs_of_networks_have_the_same_losses(tmp_path, labels):
    teacher, student = tiny(1, width=12, seed=1).eval(), tiny(1)
    options = {"method": METHOD, "labels": labels}
    expected = first_terms(tmp_path / "two", with_two_logits(teacher), with_two_logits(student), **options)
    assert expected["ce"] > 0
    pairs = {
        "one": (teacher, copy.deepcopy(student)),
        "student": (teacher, with_two_logits(student)),
        "teacher": (with_two_logits(teacher), copy.deepcopy(student)),
    }
    for name, (ours, theirs) in pairs.items():
        terms = first_terms(tmp_path / name, ours, theirs, **options)
        assert terms == pytest.approx(expected, rel=2e-4)  # the projections of "canonical" have other seeds


def test_the_class_of_one_logit_is_found_by_its_name(tmp_path):
    """A network whose logit stands for the first class of the data is negated, as a teacher and as a student."""
    swapped = Scenes((1, 0))
    facts = {"name": None, "num_classes": 1}
    teacher = tiny(1, width=12, seed=1).eval()
    teacher.spec = bpkd_sdk.NetworkSpec(**facts, class_names=("red",))
    student = tiny(1)
    student.spec = bpkd_sdk.NetworkSpec(**facts, class_names=("background", "red"))
    before = student[-1].weight.detach().clone()
    options = {"method": CanonicalKDLoss(2, feature_weight=0), "learning_rate": 1e-9, "final_learning_rate": 0}
    expected = first_terms(tmp_path / "same", teacher, copy.deepcopy(student), **options)
    terms = first_terms(tmp_path / "swapped", teacher, student, swapped, **options)
    assert list(terms) == ["ce", "logit"]
    assert terms == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(student[-1].weight.detach(), -before)
    assert (student.spec.num_classes, student.spec.class_names) == (1, ("red", "background"))
    placeholder = tiny(1).eval()
    placeholder.spec = bpkd_sdk.NetworkSpec(**facts, class_names=("LABEL_0",))  # of Hugging Face
    assert bpkd_sdk.evaluate(placeholder, VAL).images == 4
    placeholder.spec = bpkd_sdk.NetworkSpec(**facts, class_names=("crack",))
    with pytest.raises(ValueError, match="do not have the same classes"):
        bpkd_sdk.evaluate(placeholder, VAL)


class Auxiliary(nn.Module):
    """A network with one logit and an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.body, self.auxiliary = tiny(1), tiny(1, seed=3)

    def forward(self, images):
        return {"out": self.body(images), "aux": self.auxiliary(images)}


def test_an_auxiliary_head_has_the_loss_of_a_sigmoid(tmp_path):
    model = Auxiliary()
    model.auxiliary.load_state_dict(model.body.state_dict())
    terms = bpkd_sdk.train(model, (DATA, None), steps=1, output_dir=tmp_path, **OPTIONS).history[0]["terms"]
    assert terms["aux"] == pytest.approx(0.4 * terms["ce"])
    assert terms["ce"] > 0.1


def test_a_network_of_the_zoo_is_read_again(tmp_path, shallow):
    model = bpkd_sdk.create_model("pspnet_r18", 1, aux_head=True)
    result = bpkd_sdk.train(model, (DATA, None), steps=1, output_dir=tmp_path, **OPTIONS)
    assert list(result.history[0]["terms"]) == ["ce", "aux"]
    loaded = bpkd_sdk.load_model(result.checkpoint)
    spec = get_spec(loaded)
    assert (spec.name, spec.num_classes, spec.class_names) == ("pspnet_r18", 1, DATA.class_names)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), result.model(images))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained network with one logit, distilled from a teacher with one logit that predicts by colour."""
    teacher = nn.Conv2d(3, 1, 1)
    teacher.weight.data, teacher.bias.data = torch.tensor([4.0, -2.0, -2.0]).view(1, 3, 1, 1), torch.zeros(1)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)
    result = bpkd_sdk.distill(
        teacher.eval(), nn.Sequential(*layers), (DATA, VAL), steps=60, scale=(1.0, 1.0),
        optimizer="adamw", learning_rate=0.02,
        output_dir=tmp_path_factory.mktemp("trained"), **OPTIONS,
    )  # fmt: skip
    assert result.metrics.miou > 0.8
    assert result.history[0]["loss"] > result.history[59]["loss"] > 0
    return result.model


def test_evaluation_and_predictor_agree_with_the_sigmoid(trained):
    two = nn.Sequential(*copy.deepcopy(trained))
    two[-1] = nn.Conv2d(8, 2, 1)
    two[-1].weight.data, two[-1].bias.data = (F.pad(value.detach(), (0,) * (2 * value.ndim - 2) + (1, 0))
                                              for value in trained[-1].parameters())  # fmt: skip
    for protocol in (
        EvaluationProtocol(),
        EvaluationProtocol(scales=(0.75, 1.0), flip=True),
        EvaluationProtocol(crop_size=(32, 32)),
    ):
        one = bpkd_sdk.evaluate(trained, VAL, protocol=protocol)
        assert one.to_dict() == bpkd_sdk.evaluate(two.eval(), VAL, protocol=protocol).to_dict()
        assert one.class_names == VAL.class_names
    image = VAL[0][0]
    with torch.no_grad():
        z = whole_logits(trained, image[None])[0, 0].double().numpy()
    prediction = Predictor(trained, "cpu")(image.permute(1, 2, 0).numpy(), confidence=True)
    np.testing.assert_array_equal(prediction.mask, z > 0)
    np.testing.assert_allclose(prediction.confidence, np.maximum(1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))), rtol=1e-5)
    assert prediction.class_names == VAL.class_names
    assert prediction.palette == VAL.palette


def test_exported_files_agree_with_the_sigmoid(trained, tmp_path):
    masks = to_onnx(trained, tmp_path / "masks.onnx", input_size=(48, 48), verify_on=VAL).path
    logits = to_onnx(trained, tmp_path / "logits.onnx", input_size=(48, 48), argmax=False).path
    images = torch.stack([image for image, _ in VAL])
    with torch.no_grad():
        z = whole_logits(trained, images)
    torch.testing.assert_close(open_runtime(logits, "cpu").logits(images), z, rtol=1e-4, atol=1e-4)
    pixels = images.permute(0, 2, 3, 1).numpy()
    confidence = Predictor(logits, "cpu")(pixels[0], confidence=True).confidence
    np.testing.assert_allclose(confidence, z[0, 0].abs().sigmoid().numpy(), rtol=1e-4)
    for path in (masks, logits):
        assert (open_runtime(path, "cpu")(pixels) == (z[:, 0] > 0).numpy()).mean() > 0.999
        assert verify(path, trained, data=VAL).miou_change == pytest.approx(0, abs=1e-3)
        assert Predictor(path, "cpu").class_names == VAL.class_names
    for path, labels, dims in ((masks, "background\nred\n", [48, 48]), (logits, "background\nred\n", [1, 48, 48])):
        model = to_triton(path, tmp_path / "models", name=path.stem).path
        config = config_of(model)
        assert list(config.output[0].dims)[-len(dims) :] == dims
        assert (model / "labels.txt").read_text() == labels
    report = quantize(masks, tmp_path / "int8.onnx", VAL, max_boundary_loss=1)
    assert any(layer.quantized for layer in report.layers)
    int8 = bpkd_sdk.evaluate(report.path, VAL)
    assert int8.miou > bpkd_sdk.evaluate(trained, VAL).miou - 0.2
    student = tiny(1)  # the file is also a teacher
    bpkd_sdk.distill(logits, student, (DATA, None), method="cwd", steps=1, output_dir=tmp_path / "run", **OPTIONS)
    assert student.spec.num_classes == 1


class Ends(nn.Module):
    """A network with an activation after a resize."""

    def __init__(self, classes, activation):
        super().__init__()
        self.body, self.activation = tiny(classes), activation

    def forward(self, images):
        return F.interpolate(self.activation(self.body(images)), images.shape[2:], mode="bilinear")


def smp_network(**options):
    return smp.FPN("tu-mobilenetv3_small_050", encoder_weights=None, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ends(1, torch.sigmoid), r"ends with a sigmoid, .*x\.logit\(eps=1e-6\)"),
        (lambda: Ends(2, torch.sigmoid), "ends with a sigmoid.*2 independent sigmoids .* are not supported"),
        (lambda: Ends(1, nn.Softmax(1)), "ends with a softmax"),
        (
            lambda: smp_network(classes=2, activation="sigmoid"),
            "ends with a sigmoid.*2 independent sigmoids.*activation=None",
        ),
        (lambda: smp_network(classes=1, activation="sigmoid"), "ends with a sigmoid"),
    ],
)
def test_networks_that_return_probabilities_are_refused(tmp_path, make, message):
    options = OPTIONS | {"steps": 1, "crop_size": (32, 32), "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match=f"The student {message}"):
        bpkd_sdk.train(make(), (DATA, None), **options)
    with pytest.raises(ValueError, match=f"The teacher {message}"):
        bpkd_sdk.distill(make().eval(), tiny(1), (DATA, None), **options)
    with pytest.raises(ValueError, match=f"The network {message}"):
        to_onnx(make().eval(), tmp_path / "m.onnx", input_size=(32, 32))
    assert not list(tmp_path.iterdir())


def test_probabilities_of_a_softmax_are_not_exported(tmp_path):
    model, images = Ends(2, nn.Softmax(1)).eval(), torch.zeros(1, 3, 32, 32)
    check_final_activation("it", model, images, model(images), allow_softmax=True)  # its masks are exported
    with pytest.raises(ValueError, match=r"ends with a softmax.*x\.clamp\(min=1e-6\)\.log\(\)"):
        to_onnx(model, tmp_path / "logits.onnx", input_size=(32, 32), argmax=False)


def test_a_predictor_warns_of_a_sigmoid_inside(trained):
    predict = Predictor(nn.Sequential(trained, nn.Sigmoid()).eval(), "cpu")
    image = VAL[0][0].permute(1, 2, 0).numpy()
    with pytest.warns(UserWarning, match="one channel of Sequential lies in 0..1"):
        predict(image)


def test_one_logit_and_other_numbers_of_classes(tmp_path):
    options = OPTIONS | {"steps": 1, "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match="The student predicts two classes by one logit, but scenes has 3: background"):
        bpkd_sdk.train(tiny(1), (Scenes(), None), **options)

    class MultiHot(Scenes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, torch.stack([label == 0, label == 1]).byte()

    with pytest.raises(ValueError, match=r"uint8 \(2, 48, 48\).*Return label\.argmax\(0\).*multi-label"):
        bpkd_sdk.train(tiny(2), (MultiHot((0, 1)), None), **options)

    class White(Scenes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, label * 255

    with pytest.raises(ValueError, match="only 0 and 255, and 255 is void.*'red'.*return 1 in its place"):
        bpkd_sdk.train(tiny(1), (White((0, 1)), None), **options)


def test_a_comparison_takes_networks_with_one_logit(trained, tmp_path):
    comparison = bpkd_sdk.compare(
        trained, lambda classes: tiny(1, seed=torch.initial_seed()), (DATA, VAL), methods="bpkd", steps=1, seeds=1,
        class_weights="balanced", output_dir=tmp_path, **UNCHECKED,
    )  # fmt: skip
    assert len(comparison.settings["options"]["class_weights"]) == 2  # computed once for all runs
    assert [run.method for run in comparison.runs] == ["alone", "bpkd"]
    assert all(run.metrics["class_names"] == list(VAL.class_names) for run in comparison.runs)
