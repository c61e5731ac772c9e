"""The check of a teacher before the first step: its findings, correct teachers without findings, and no side effects."""

import copy
import random
import re
from functools import partial

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.runtime import AcceptedImages, MatchedRuntime, TorchRuntime
from bpkd_sdk.spec import IMAGENET_MEAN, IMAGENET_STD, NetworkSpec
from bpkd_sdk.training.teacher import open_onnx_teacher
from bpkd_sdk.training.teacher_check import TeacherWarning, check_teacher, warn_about_teacher
from bpkd_sdk.training.teacher_check.crops import MAX_CROP_PIXELS, MAX_READ
from bpkd_sdk.training.teacher_check.scores import LabelScores, _resize_and_subsample

CPU = torch.device("cpu")
COLORS = torch.tensor([[30, 30, 30], [220, 40, 40], [40, 220, 40]])
CAFFE_STD = (1 / 255,) * 3


class Scenes(SegmentationDataset):
    """Two squares on a ground, with one colour per class; `noise` hides the colours."""

    def __init__(self, size=(64, 64), *, noise=8, length=8, classes=3, start=0):
        self.name = "scenes"
        self.class_names = ("ground", "red", "green")[:classes]
        self.palette = tuple(map(tuple, COLORS.tolist()))[:classes]
        self.size, self.noise, self.length, self.start = size, noise, length, start
        self.read = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        generator = torch.Generator().manual_seed(self.start + index)
        label = torch.zeros(self.size, dtype=torch.uint8)
        for color in range(1, self.num_classes):
            top, left = (int(torch.randint(side - side // 3, (), generator=generator)) for side in self.size)
            label[top : top + self.size[0] // 3, left : left + self.size[1] // 3] = color
        noise = torch.randint(-self.noise, self.noise + 1, (3, *self.size), generator=generator)
        return (COLORS[label.long()].permute(2, 0, 1) + noise).clamp(0, 255).byte(), label


class Patches(Scenes):
    """A random chequerboard of five colours, which strong noise makes hard to distinguish."""

    def __init__(self, *, noise=180, start=0):
        super().__init__(start=start, noise=noise)
        self.class_names = tuple("abcde")
        self.palette = tuple((x, x, x) for x in range(5))

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.start + index)
        label = torch.randint(5, (8, 8), generator=generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
        colors = torch.tensor([[90, 90, 90], [160, 90, 90], [90, 160, 90], [90, 90, 160], [160, 160, 160]])
        image = colors[label].permute(2, 0, 1) + self.noise * torch.randn(3, 64, 64, generator=generator)
        return image.clamp(0, 255).byte(), label


class Changed(SegmentationDataset):
    """A data set whose samples pass through a function."""

    def __init__(self, dataset, change, **attributes):
        self.dataset, self.change = dataset, change
        self.name, self.class_names, self.palette = dataset.name, dataset.class_names, dataset.palette
        vars(self).update(attributes)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.change(*self.dataset[index])


class Around(nn.Module):
    """A network between two functions; without a spec unless one is passed."""

    def __init__(self, network, before=lambda x: x, after=lambda y: y, spec=None):
        super().__init__()
        self.network, self.before, self.after = network, before, after
        if spec is not None:
            self.spec = spec
        self.train(network.training)

    def forward(self, images):
        return self.after(self.network(self.before(images)))


SCENES = Scenes()
PATCHES = Patches(noise=40)


def small(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, classes, 1),
    ).eval()


def trained(dataset, steps=60, seed=0):
    network = small(dataset.num_classes, seed).train()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    images, labels = (torch.stack(part) for part in zip(*dataset, strict=True))
    inputs = NetworkSpec(None, 0).normalize(images)
    for _ in range(steps):
        loss = F.cross_entropy(F.interpolate(network(inputs), labels.shape[1:], mode="bilinear"), labels.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teacher():
    """A correct teacher with ImageNet's normalisation."""
    return trained(SCENES)


@pytest.fixture(scope="module")
def sensitive():
    """A correct teacher for colours that differ less."""
    return trained(PATCHES)


def check(teacher, dataset=SCENES, crop_size=(64, 64), dtype=torch.float32, **options):
    return check_teacher(teacher, dataset, crop_size, device=CPU, dtype=dtype, **options)


def finding(*arguments, **options):
    (line,) = check(*arguments, **options).findings
    assert line.startswith("The teacher ")
    assert "\n" not in line
    return line


def expecting(network, mean, std, *, bgr=False):
    """A network for another normalisation, which it converts to ImageNet's."""

    def before(images):
        values = (images.flip(1) if bgr else images) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(
            3, 1, 1
        )
        return (values - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)

    return Around(network, before)


def test_a_right_teacher(teacher):
    result = check(teacher)
    assert result.findings == ()
    assert result.accuracy > 0.95
    assert result.cross_entropy < 0.15
    assert (result.images, result.pixels) == (4, 4 * 64 * 64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("dataset", "lowest", "highest"),
    [
        pytest.param(partial(Scenes, noise=600), 0.75, 0.9, id="scenes"),
        pytest.param(Patches, 0.4, 0.55, id="patches"),
    ],
)
def test_a_weak_teacher_is_not_accused(dataset, lowest, highest, seed):
    result = check(trained(dataset(start=100 * seed), steps=25, seed=seed), dataset(start=100 * seed + 50))
    assert lowest < result.accuracy < highest
    assert result.findings == ()


@pytest.mark.parametrize(
    ("after", "words"),
    [
        pytest.param(lambda y: y.softmax(1), ("softmax inside", "sum to 1", "activation=None"), id="softmax"),
        pytest.param(lambda y: y.sigmoid(), ("sigmoid inside", "0..1", "activation=None"), id="sigmoid"),
        pytest.param(lambda y: y.softmax(1).bfloat16(), ("softmax inside",), id="softmax-in-half-precision"),
    ],
)
def test_probabilities(teacher, after, words):
    line = finding(Around(teacher, after=after))
    assert all(word in line for word in words)
    assert (
        check(Around(teacher, after=after)).cross_entropy < 0.15
    )  # computed from the probabilities, not from their softmax


@pytest.mark.parametrize("dataset", [SCENES, Changed(SCENES, lambda x, y: (x, y * 0), has_labels=False)])
def test_log_probabilities_are_logits(teacher, dataset):
    assert check(Around(teacher, after=lambda y: y.log_softmax(1)), dataset).findings == ()


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [
        pytest.param((0.5,) * 3, (0.5,) * 3, "mean and std 0.5", id="half"),
        pytest.param((0.0,) * 3, (1.0,) * 3, "values in 0..1:", id="0..1"),
        pytest.param((0.0,) * 3, CAFFE_STD, "values in 0..255:", id="0..255"),
        pytest.param(IMAGENET_MEAN, CAFFE_STD, "values in 0..255 minus ImageNet's mean:", id="0..255-minus-mean"),
    ],
)
def test_another_normalisation(sensitive, mean, std, name):
    network = expecting(sensitive, mean, std)
    line = finding(network, PATCHES)
    assert f"better with {name}" in line
    assert re.search(r"accuracy is (0\.9\d\d|1\.000) instead of 0\.\d{3}, and its cross-entropy 0\.\d{3} instead", line)
    code = re.search(r"teacher\.spec = (.*)\.$", line)[1]
    network.spec = eval(code, {"NetworkSpec": NetworkSpec})  # noqa: S307
    assert network.spec.num_classes == 5
    assert check(network, PATCHES).findings == ()


def test_imagenet_where_the_spec_says_another(sensitive):
    spec = NetworkSpec("own", 5, class_names=PATCHES.class_names, mean=(0.0,) * 3, std=CAFFE_STD)
    line = finding(Around(sensitive, spec=spec), PATCHES)
    assert "ImageNet's mean and std" in line
    assert "teacher.spec = dataclasses.replace(get_spec(teacher), mean=(0.485, 0.456, 0.406)" in line


@pytest.mark.parametrize(
    ("mean", "std", "names"),
    [
        pytest.param(IMAGENET_MEAN, IMAGENET_STD, "better with channels in BGR order:", id="bgr"),
        pytest.param(IMAGENET_MEAN, CAFFE_STD, "ImageNet's mean and channels in BGR order:", id="caffe"),
        pytest.param((0.0,) * 3, (1.0,) * 3, "values in 0..1 and channels in BGR order:", id="bgr-in-0..1"),
    ],
)
def test_bgr_order(sensitive, mean, std, names):
    network = expecting(sensitive, mean, std, bgr=True)
    line = finding(network, PATCHES)
    assert names in line
    code = re.search(r"whose forward returns teacher\(x\.flip\(1\)\), with its spec = (.*)\.$", line)[1]
    spec = eval(code, {"NetworkSpec": NetworkSpec})  # noqa: S307
    assert check(Around(network, before=lambda x: x.flip(1), spec=spec), PATCHES).findings == ()


def test_two_findings(teacher):
    lines = check(Around(teacher, before=lambda x: x.flip(1), after=lambda y: y.softmax(1))).findings
    assert "softmax" in lines[0]
    assert "BGR" in lines[1]


@pytest.mark.parametrize("seed", range(5))
def test_random_weights(seed):
    line = finding(small(seed=seed))
    assert "no better than chance" in line
    assert "(always 'ground': 0." in line


def test_classes_in_another_order(teacher):
    assert "data's order" in finding(Around(teacher, after=lambda y: y.roll(1, dims=1)))


@pytest.mark.parametrize("value", [0.0, 3.0, 1 / 3])
def test_the_same_output_everywhere(teacher, value):
    assert "same output for every pixel" in finding(Around(teacher, after=lambda y: torch.full_like(y, value)))


def test_one_flat_colour_gives_one_output():
    flat = Changed(SCENES, lambda x, y: (torch.full_like(x, 90), y), has_labels=False)
    network = nn.Conv2d(3, 3, 1)
    assert check(network.eval(), flat).findings == ()


def with_nan(y):
    y = y.clone()
    y[0, 0, 0, 0] = float("nan")
    return y


def test_outputs_that_are_not_finite(teacher):
    with pytest.raises(ValueError, match=r"^The teacher's outputs are not finite .* for 1 of 4 .* in 1 of 4096 pixels"):
        check(Around(teacher, after=with_nan))
    with pytest.raises(ValueError, match=r"Its precision is float32: export it again"):
        check(TorchRuntime(Around(teacher, after=lambda y: y / 0)))


def test_half_precision_that_overflows(teacher):
    large = Around(teacher, after=lambda y: (y * 1e6).to(y.dtype))
    with pytest.raises(
        ValueError, match=r"They are finite in float32 but not in float16: pass teacher_precision='fp32'"
    ):
        check(large, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"not finite in float32 either, so bfloat16 is not the reason"):
        check(Around(teacher, after=with_nan), dtype=torch.bfloat16)
    assert check(teacher, dtype=torch.bfloat16).findings == ()


@pytest.mark.parametrize(
    "dataset",
    [
        pytest.param(Changed(SCENES, lambda x, y: (x, y * 0), has_labels=False), id="no-labels"),
        pytest.param(Changed(SCENES, lambda x, y: (x, y * 0 + 255)), id="all-void"),
        pytest.param(Changed(SCENES, lambda x, y: (x, y.long() * 0 - 1), ignore_index=-1), id="void-below-zero"),
        pytest.param(Changed(SCENES, lambda x, y: (x, y * 0 + 9)), id="outside-the-classes"),
    ],
)
def test_without_labels(teacher, dataset):
    result = check(small(), dataset)
    assert (result.accuracy, result.cross_entropy, result.findings) == (None, None, ())
    assert "softmax" in finding(Around(teacher, after=lambda y: y.softmax(1)), dataset)


def test_one_class_in_the_labels_says_nothing_about_chance():
    dataset = Changed(Scenes(length=40), lambda x, y: (x, y * 0))
    assert check(small(), dataset).findings == ()
    assert len(dataset.dataset.read) == MAX_READ


def test_one_class_in_each_label(teacher):
    """Only the last images have a second class."""
    labels = iter([255, 0, 1, 2] * 4)
    dataset = Changed(Scenes(length=4), lambda x, y: (x, torch.full_like(y, next(labels))))
    result = check(teacher, dataset)
    assert result.accuracy < 0.5
    assert "no better than chance" in check(small(), dataset).findings[0]


def test_one_channel(teacher):
    """One logit predicts the second of two classes."""
    dataset = Scenes(classes=2)
    network = Around(teacher, after=lambda y: y[:, 1:2] - y[:, 0:1])
    assert check(network, dataset).accuracy > 0.95
    assert check(network, dataset).findings == ()
    assert "sigmoid" in finding(Around(network, after=torch.sigmoid), dataset)
    assert check(network, Scenes(classes=1)).accuracy is None
    assert check(
        Around(network, after=lambda y: y.softmax(1)), dataset
    ).findings  # a softmax over one channel is 1 everywhere


class OneShape(TorchRuntime):
    """A runtime that accepts exactly two images of one size."""

    def __init__(self, module, size):
        super().__init__(module, "cpu")
        self.accepts = AcceptedImages((2, 2), (size[0], size[0]), (size[1], size[1]))

    def infer(self, inputs):
        assert inputs.shape[0] == 2
        assert tuple(inputs.shape[2:]) == self.accepts.fixed_size
        return super().infer(inputs)


@pytest.mark.parametrize("size", [(32, 32), (96, 80)])
def test_a_runtime_of_one_shape(teacher, size):
    result = check(OneShape(teacher, size), crop_size=size)
    assert result.findings == ()
    assert result.accuracy > 0.95
    assert result.pixels == 4 * size[0] * size[1]
    line = finding(OneShape(Around(teacher, before=lambda x: x.flip(1)), size), Scenes(length=3), crop_size=size)
    assert line.endswith("Export it again from a module whose forward returns network(x.flip(1)).")


class NormalizesInside(TorchRuntime):
    def __init__(self, module):
        super().__init__(module, "cpu")
        self.metadata = {**self.metadata, "preprocess": True}

    def infer(self, inputs):
        assert inputs.dtype == torch.uint8
        return super().infer(self.spec.normalize(inputs.permute(0, 3, 1, 2)))


def test_of_a_runtime_that_normalises_inside_the_order_of_channels_is_tried(teacher):
    assert check(NormalizesInside(teacher)).findings == ()
    assert "BGR" in finding(NormalizesInside(Around(teacher, before=lambda x: x.flip(1))))
    assert "BGR" not in finding(NormalizesInside(expecting(teacher, (0.0,) * 3, CAFFE_STD)))


def export(network, path):
    """The network of `small` as an ONNX file without metadata, so without its normalisation."""
    first, last = fuse_conv_bn_eval(network[0], network[1]), network[3]
    weights = {f"w{i}": x.numpy() for i, x in enumerate([*first.parameters(), *last.parameters()])}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "w1"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("Conv", ["z", "w2", "w3"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, None, None])
        for name, channels in (("x", 3), ("logits", len(last.weight)))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_an_onnx_file(sensitive, tmp_path):
    path = export(sensitive, tmp_path / "teacher.onnx")
    assert check(open_onnx_teacher(path, CPU), PATCHES).findings == ()
    line = finding(open_onnx_teacher(path, CPU, (0.5,) * 3, (0.5,) * 3), PATCHES)
    assert line.endswith("Pass teacher_mean=(0.485, 0.456, 0.406), teacher_std=(0.229, 0.224, 0.225).")
    wrapped = MatchedRuntime(open_onnx_teacher(path, CPU, (0.0,) * 3, CAFFE_STD), PATCHES, "data", None)
    assert "Pass teacher_mean=(0.485, 0.456, 0.406)" in finding(wrapped, PATCHES)


def test_another_runtime(sensitive):
    line = finding(TorchRuntime(expecting(sensitive, (0.0,) * 3, CAFFE_STD)), PATCHES)
    assert line.endswith(
        "Export it again from a network whose spec has mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255)."
    )


class Picky(nn.Module):
    """A network that accepts images of some sizes only."""

    def __init__(self, network, takes):
        super().__init__()
        self.network, self.takes = network, takes
        self.eval()

    def forward(self, images):
        assert self.takes(*images.shape[2:]), images.shape
        return self.network(images)


def test_a_network_that_takes_training_crops_only(teacher):
    scenes = Scenes((330, 340))
    result = check(Picky(teacher, lambda height, width: (height, width) == (320, 320)), scenes, (320, 320))
    assert result.accuracy > 0.95
    assert (result.images, result.pixels) == (2, 2 * 320 * 320)
    with pytest.raises(AssertionError):
        check(Picky(teacher, lambda *_: False), scenes, (320, 320))


def test_sizes_are_multiples_of_the_divisor(teacher):
    network = Picky(teacher, lambda height, width: height % 16 == width % 16 == 0)
    network.spec = NetworkSpec(None, 3, size_divisor=16)
    assert check(network, Scenes((70, 90)), (64, 64)).pixels == 4 * 64 * 64
    assert check(network, Scenes((90, 13)), (64, 64)).pixels == 4 * 64 * 16  # padded
    assert check(network, Scenes((1000, 90)), (960, 80)).pixels < MAX_CROP_PIXELS


def test_images_of_all_sizes(teacher):
    sizes = iter([(64, 64), (40, 80), (100, 90), (33, 35)] * 3)

    def cut(image, label):
        height, width = next(sizes)
        return image[:, :height, :width], label[:height, :width]

    assert check(teacher, Changed(Scenes((100, 100)), cut)).accuracy > 0.95


def test_crops_are_cut_where_classes_meet(teacher):
    """Scenes with objects in one corner of a large image."""

    def shrink(image, label):
        large = COLORS[0].byte().view(3, 1, 1).repeat(1, 400, 600)
        large[:, 330:394, 530:594] = image
        return large, F.pad(label, (530, 6, 330, 6))

    result = check(Around(teacher, before=lambda x: x.flip(1)), Changed(SCENES, shrink), (80, 80))
    assert result.pixels == 4 * 80 * 80
    assert "BGR" in result.findings[0]


def test_images_are_fitted_into_the_base_size(teacher):
    def enlarge(image, label):
        return image.repeat_interleave(4, 1).repeat_interleave(4, 2), label.repeat_interleave(4, 0).repeat_interleave(
            4, 1
        )

    result = check(teacher, Changed(SCENES, enlarge), (512, 512), base_size=(64, 64))
    assert result.pixels == 4 * 64 * 64
    assert result.accuracy > 0.95


def test_nothing_is_changed(teacher):
    """The check changes neither the teacher nor any random state."""
    network = Around(copy.deepcopy(teacher), before=lambda x: x + 0 * torch.rand_like(x))
    network.network[1].train()
    flags = [part.training for part in network.modules()]
    weights = copy.deepcopy(network.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def draw(image, label):
        random.random(), np.random.rand(), torch.rand(())  # noqa: S311
        return image, label

    check(network, Changed(SCENES, draw), dtype=torch.bfloat16)
    assert [part.training for part in network.modules()] == flags
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_every_second_pixel_of_the_bilinear_resize():
    logits = torch.randn(3, 9, 14)
    for size in ((70, 33), (9, 14), (5, 20)):
        resized = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0, :, ::2, ::2]
        torch.testing.assert_close(_resize_and_subsample(logits, size), resized)


def test_a_teacher_of_a_weighted_loss_is_not_at_chance():
    """Such a teacher finds most pixels of a rare class, and assigns as many pixels of the other class to it."""
    scores = LabelScores(
        losses=torch.tensor([400.0]), counts=torch.tensor([[970.0, 30.0]]), hits=torch.tensor([[938.0, 29.0]])
    )
    assert scores.accuracy < scores.majority_accuracy
    assert scores.cross_entropy > scores.entropy
    assert not scores.is_chance


def test_findings_become_warnings(teacher):
    with pytest.warns(TeacherWarning, match="no better than chance"):
        warn_about_teacher(small(), SCENES, (64, 64), CPU, torch.float32, None)
