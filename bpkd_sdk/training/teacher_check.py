"""Checks a teacher on a few training images before the first step, so that a wrongly connected one is noticed.

The teacher runs on a few crops, about 0.26 million pixels in all, and its outputs are compared with the labels. Where
they leave room for improvement, it also runs on the first crop in BGR order and under other common normalisations. The
best of these runs on all crops, and is named if it fits the labels clearly better: a right but weak teacher is not
accused.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.transforms import IMAGE_FILL, scaled_size
from bpkd_sdk.features import eval_mode
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.spec import IMAGENET_MEAN, IMAGENET_STD
from bpkd_sdk.output import as_output
from bpkd_sdk.runtime import Accepts, Runtime
from bpkd_sdk.training.teacher import ExternalOnnxRuntime

MOST_PIXELS = 1 << 18  # of all crops together, unless the teacher takes only larger ones
MOST_CROPS, FEWEST_CROPS = 4, 2
MOST_READ = 12  # images that are read in search of more than one class
VOID = -1  # label of the pixels that are left out

GOOD_ERROR = 0.03  # share of wrong pixels at which no alternative is tried
CLEARLY_BETTER = 0.7  # an alternative's share of the error and of the cross-entropy, at most
ABOVE_CHANCE = 0.9, 0.8  # shares of the error and of the cross-entropy of constant answers, at most

Size = tuple[int, int]
Kind = Literal["logits", "probabilities", "sigmoids"]


class TeacherWarning(UserWarning):
    """A finding of `check_teacher`."""


@dataclass(frozen=True)
class TeacherCheck:
    """Result of `check_teacher`.

    Attributes:
        images: Number of training images that crops were cut from.
        pixels: Number of pixels of these crops.
        accuracy: Share of labelled pixels that the teacher gets right; None without labels.
        cross_entropy: Mean over labelled pixels; probabilities count as such. None without labels.
        findings: One line for each thing that looks wrong, with what to do; empty where all is well.
    """

    images: int
    pixels: int
    accuracy: float | None
    cross_entropy: float | None
    findings: tuple[str, ...]


def check_teacher(
    teacher: nn.Module | Runtime,
    dataset: SegmentationDataset,
    crop_size: Size,
    *,
    device: torch.device,
    dtype: torch.dtype,
    base_size: Size | None = None,
) -> TeacherCheck:
    """Check a teacher on a few training images.

    Its weights, buffers and training flags and the global random state stay as they are. A module is moved to the
    device, as training does.

    Args:
        teacher: A module, or a runtime that returns logits.
        dataset: Training data.
        crop_size: (height, width) of the training crops, which the teacher is known to take.
        device: Device of the training.
        dtype: Data type of a module's autocast; float32 for none.
        base_size: (longer side, shorter side) that training fits images into; None: they stay as they are.

    Raises:
        ValueError: If outputs are not finite.
    """
    with _random_state_kept(device), torch.no_grad():
        network = _Network(teacher, device, dtype)
        crops, outputs = _run_on_crops(network, _read_samples(dataset, base_size), crop_size)
        _check_finite(network, crops, outputs)
        kind = output_kind(outputs)
        fit = _measure(crops, outputs, kind)
        is_labelled = dataset.num_classes > 1 and fit.total > 0
        images = f"{len(crops)} training image{'s' if len(crops) > 1 else ''}"
        findings = []
        if _is_constant(crops, outputs):
            findings.append(
                f"The teacher returns the same output for every pixel of {images}. Check that its weights are loaded "
                "and that teacher.spec normalises images as in its training."
            )
        else:
            if kind != "logits":
                findings.append(_kind_finding(network, kind, images))
            if is_labelled:
                findings.extend(_fit_findings(network, crops, kind, fit, dataset.class_names, images))
    return TeacherCheck(
        images=len(crops),
        pixels=sum(crop.label.numel() for crop in crops),
        accuracy=fit.accuracy if is_labelled else None,
        cross_entropy=fit.cross_entropy if is_labelled else None,
        findings=tuple(findings),
    )


def warn_of_teacher(
    teacher: nn.Module | Runtime,
    dataset: SegmentationDataset,
    crop_size: Size,
    device: torch.device,
    dtype: torch.dtype,
    base_size: Size | None,
) -> None:
    """Warn of each finding of `check_teacher`, with its arguments and errors."""
    check = check_teacher(teacher, dataset, crop_size, device=device, dtype=dtype, base_size=base_size)
    for finding in check.findings:
        warnings.warn(finding, TeacherWarning, stacklevel=4)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch, which a data set or a teacher may draw from."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass(frozen=True)
class _Sample:
    """An image uint8 (3, H, W) and its label int16 (H, W), `VOID` where nothing is labelled."""

    image: Tensor
    label: Tensor

    @property
    def size(self) -> Size:
        return self.label.shape[0], self.label.shape[1]


def _read_samples(dataset: SegmentationDataset, base_size: Size | None) -> list[_Sample]:
    """Read images that are spread evenly over a data set, more than `MOST_CROPS` only in search of a second class."""
    count = min(len(dataset), MOST_READ)
    spread = [(2 * index + 1) * len(dataset) // (2 * count) for index in range(count)]
    gap = max(1, count // MOST_CROPS)
    samples: list[_Sample] = []
    classes: set[int] = set()
    for index in (index for start in range(gap) for index in spread[start::gap]):
        if len(samples) >= MOST_CROPS and (len(classes) > 1 or not dataset.has_labels):
            break
        samples.append(_read(dataset, index, base_size))
        classes |= set(torch.unique(samples[-1].label[::4, ::4]).tolist()) - {VOID}
    return samples


def _read(dataset: SegmentationDataset, index: int, base_size: Size | None) -> _Sample:
    image, label = dataset[index]
    label = label.int()  # a uint8 could not be compared with an ignore index outside 0..255
    known = (label >= 0) & (label < dataset.num_classes) & (label != dataset.ignore_index)
    label = torch.where(known, label, VOID).short() if dataset.has_labels else torch.full(label.shape, VOID).short()
    if base_size is not None:
        size = scaled_size((image.shape[1], image.shape[2]), 1.0, base_size)
        image = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().byte()
        label = F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0].short()
    return _Sample(image, label)


def _run_on_crops(network: _Network, samples: Sequence[_Sample], crop_size: Size) -> tuple[list[_Sample], list[Tensor]]:
    """Cut crops that the network takes, and run it on them."""
    crops = _cut(samples, [network.crop_size(sample.size, crop_size) for sample in samples])
    try:
        return crops, network(crops, network.given)
    except (RuntimeError, ValueError, AssertionError):  # some modules take the size of the training crops only
        if isinstance(network.teacher, Runtime) or all(crop.size == crop_size for crop in crops):
            raise
    crops = _cut(samples, [crop_size] * len(samples))
    return crops, network(crops, network.given)


def _cut(samples: Sequence[_Sample], sizes: Sequence[Size]) -> list[_Sample]:
    """Cut a crop of the most mixed classes out of each sample, and keep the most mixed crops, the best first."""
    crops = []
    for sample, size in zip(samples, sizes, strict=True):
        (top, left), mixture = _most_mixed_place(sample.label, size)
        image, label = (part[..., top : top + size[0], left : left + size[1]] for part in (sample.image, sample.label))
        crops.append((mixture, int((label != VOID).sum()), _padded(_Sample(image, label), size)))
    crops.sort(key=lambda crop: crop[:2], reverse=True)
    count = min(MOST_CROPS, max(FEWEST_CROPS, MOST_PIXELS // max(map(math.prod, sizes))))
    return [crop for _, _, crop in crops[:count]]


def _most_mixed_place(label: Tensor, size: Size) -> tuple[Size, float]:
    """Find the window whose classes have the highest entropy, on a coarse grid; the middle where all have none.

    Returns:
        (top, left) of the window, and the entropy of its classes, with void as none of them.
    """
    step = max(1, max(label.shape) // 64)
    grid = label[step // 2 :: step, step // 2 :: step]
    height, width = (min(-(-side // step), cells) for side, cells in zip(size, grid.shape, strict=True))
    classes = torch.unique(grid)
    masks = (grid == classes[classes != VOID].view(-1, 1, 1)).float()
    limits = [max(0, whole - side) for whole, side in zip(label.shape, size, strict=True)]
    middle = (limits[0] // 2, limits[1] // 2)
    if not len(masks):
        return middle, 0.0
    shares = F.avg_pool2d(F.avg_pool2d(masks, (height, 1), stride=1), (1, width), stride=1)
    entropy = torch.special.entr(shares).sum(0)
    mixture, place = entropy.flatten().max(0)
    if mixture <= 0:
        return middle, 0.0
    top, left = divmod(int(place), entropy.shape[1])
    return (min(top * step, limits[0]), min(left * step, limits[1])), float(mixture)


def _padded(sample: _Sample, size: Size) -> _Sample:
    """Append what a size lacks at the bottom and right, as training does."""
    height, width = sample.size
    if (height, width) == size:
        return sample
    image = torch.tensor(IMAGE_FILL, dtype=torch.uint8).view(3, 1, 1).repeat(1, *size)
    label = torch.full(size, VOID, dtype=torch.int16)
    image[:, :height, :width], label[:height, :width] = sample.image, sample.label
    return _Sample(image, label)


@dataclass(frozen=True)
class _InputFormat:
    """A way to feed images to a network.

    Attributes:
        name: What a finding calls the normalisation; empty for the given one.
        mean: Per RGB channel, of images in 0..1.
        std: Likewise.
        is_bgr: Whether the channels are in BGR order, after they are normalised.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_bgr: bool = False


NORMALIZATIONS = (
    _InputFormat("ImageNet's mean and std", IMAGENET_MEAN, IMAGENET_STD),
    _InputFormat("mean and std 0.5", (0.5,) * 3, (0.5,) * 3),
    _InputFormat("values in 0..1", (0.0,) * 3, (1.0,) * 3),
    _InputFormat("values in 0..255", (0.0,) * 3, (1 / 255,) * 3),
    _InputFormat("values in 0..255 minus ImageNet's mean", IMAGENET_MEAN, (1 / 255,) * 3),  # Caffe's, in BGR order
)


class _Network:
    """A teacher that runs on images in any normalisation.

    Args:
        teacher: A module, which is moved to the device, or a runtime.
        device: Device of a module.
        dtype: Data type of a module's autocast.
    """

    def __init__(self, teacher: nn.Module | Runtime, device: torch.device, dtype: torch.dtype) -> None:
        self.teacher = teacher
        self.dtype = dtype
        if isinstance(teacher, Runtime):
            self.device, self.spec, self.accepts = teacher.device, teacher.spec, teacher.accepts
            self.normalizes_inside = bool(teacher.metadata["preprocess"])
        else:
            # A compiled network would be compiled anew for each size of the crops.
            self.module = getattr(teacher, "_orig_mod", teacher).to(device)
            self.device, self.spec, self.accepts = device, get_spec(teacher), Accepts()
            self.normalizes_inside = False
        self.given = _InputFormat("", self.spec.mean, self.spec.std)

    def other_formats(self) -> Iterator[_InputFormat]:
        """Yield the normalisations in both orders of the channels, without the given one."""
        given = self.given
        yield replace(given, is_bgr=True)
        if not self.normalizes_inside:
            for other in NORMALIZATIONS:
                if (other.mean, other.std) != (given.mean, given.std):
                    yield from (other, replace(other, is_bgr=True))

    def crop_size(self, image: Size, largest: Size) -> Size:
        """Choose the size of a crop: at most that of training, and few pixels, where the network takes it."""
        sides = [min(pair) for pair in zip(image, largest, strict=True)]
        shrink = min(1.0, math.sqrt(MOST_PIXELS / MOST_CROPS / math.prod(sides)))
        divisor = self.spec.size_divisor
        height, width = (max(divisor, int(side * shrink) // divisor * divisor) for side in sides)
        return _clamped(height, self.accepts.height), _clamped(width, self.accepts.width)

    def __call__(self, crops: Sequence[_Sample], input_format: _InputFormat) -> list[Tensor]:
        """Run on crops.

        Returns:
            For each crop its logits (C, h, w), on the device of the network.
        """
        least, most = self.accepts.batch
        most = (most or len(crops)) if len({crop.size for crop in crops}) == 1 else 1
        outputs: list[Tensor] = []
        for start in range(0, len(crops), most):
            chunk = [crop.image for crop in crops[start : start + most]]
            filled = chunk + chunk[-1:] * (least - len(chunk))
            outputs.extend(self._run(torch.stack(filled).to(self.device), input_format)[: len(chunk)])
        return outputs

    def _run(self, images: Tensor, input_format: _InputFormat) -> Tensor:
        if isinstance(self.teacher, Runtime) and self.normalizes_inside:
            images = images.flip(1) if input_format.is_bgr else images
            return self.teacher.infer(images.permute(0, 2, 3, 1).contiguous())
        inputs = replace(self.spec, mean=input_format.mean, std=input_format.std).normalize(images)
        inputs = inputs.flip(1) if input_format.is_bgr else inputs.contiguous()
        if isinstance(self.teacher, Runtime):
            return self.teacher.infer(inputs)
        half = self.dtype != torch.float32
        with eval_mode(self.module), torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            return as_output(self.module(inputs)).logits


def _clamped(value: int, allowed: tuple[int, int | None]) -> int:
    least, most = allowed
    return max(least, value if most is None else min(value, most))


def _check_finite(network: _Network, crops: Sequence[_Sample], outputs: Sequence[Tensor]) -> None:
    """Raise ValueError for outputs with NaN or infinity."""
    wrong = _not_finite(outputs)
    if not any(wrong):
        return
    if isinstance(network.teacher, Runtime):
        precision = network.teacher.metadata["precision"]
        advice = f"Its precision is {precision}: export it again with precision='fp32', from weights that are finite."
    elif network.dtype != torch.float32:
        name = str(network.dtype).removeprefix("torch.")
        network.dtype = torch.float32
        if any(_not_finite(network(crops, network.given))):
            advice = f"They are not finite in float32 either, so {name} is not the reason: check its weights."
        else:
            advice = f"In float32 they are finite, in {name} not: pass teacher_precision='fp32'."
    else:
        advice = "Check its weights, and that teacher.spec normalises images as in its training."
    raise ValueError(
        f"The teacher's outputs are not finite (NaN or infinity) for {sum(map(bool, wrong))} of {len(crops)} training "
        f"images, in {sum(wrong)} of {sum(output[0].numel() for output in outputs)} pixels. {advice}"
    )


def _not_finite(outputs: Sequence[Tensor]) -> list[int]:
    """Count the pixels of each output that have a value which is not finite."""
    return [int((~torch.isfinite(output)).any(0).sum()) for output in outputs]


def _is_constant(crops: Sequence[_Sample], outputs: Sequence[Tensor]) -> bool:
    """Tell whether outputs are the same for every pixel, although the images vary."""
    images = [crop.image for crop in crops]
    if max(int(image.max()) for image in images) - min(int(image.min()) for image in images) < 16:
        return False
    lowest, highest = _ranges(outputs)
    return bool((highest - lowest).max() <= 1e-4 * torch.maximum(highest.abs(), lowest.abs()).max())


def output_kind(outputs: Sequence[Tensor]) -> Kind:
    """Tell logits from probabilities, whose sum over the classes is 1, and from sigmoids, which are in 0..1 too."""
    lowest, highest = _ranges(outputs)
    if lowest.min() < 0 or highest.max() > 1.001:
        return "logits"
    tolerance = max(1e-3, torch.finfo(outputs[0].dtype).eps)
    sums = torch.cat([output.float().sum(0).flatten() for output in outputs])
    if float(((sums - 1).abs() <= tolerance).float().mean()) > 0.99:
        return "probabilities"
    # Random weights too may give small values of one sign, but not ones that vary so much.
    return "sigmoids" if (highest - lowest).max() > 0.5 else "logits"


def _ranges(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each class, (C,) each."""
    lowest = torch.stack([output.flatten(1).amin(1) for output in outputs]).amin(0)
    return lowest, torch.stack([output.flatten(1).amax(1) for output in outputs]).amax(0)


def _kind_finding(network: _Network, kind: Kind, images: str) -> str:
    softmax = kind == "probabilities"
    measured, layer = ("lie in 0..1 and sum to 1", "softmax") if softmax else ("all lie in 0..1", "sigmoid")
    inverse = "x.clamp(min=1e-6).log()" if softmax else "x.logit(eps=1e-6)"
    if isinstance(network.teacher, Runtime):
        advice = f"Export it again without its last {layer}."
    else:
        advice = (
            f"Return the logits before the {layer} (segmentation-models-pytorch: activation=None), or pass a module "
            f"that returns {inverse} of its output x."
        )
    return (
        f"The teacher has a {layer} inside: over {images} its outputs {measured}. Distillation takes logits. {advice}"
    )


@dataclass(frozen=True)
class _Fit:
    """How well outputs fit the labels.

    Attributes:
        losses: (N,) sums of the cross-entropies of a crop's pixels.
        counts: (N, C) numbers of pixels of each class.
        hits: (N, C) numbers of those that are right.
    """

    losses: Tensor
    counts: Tensor
    hits: Tensor

    @property
    def first(self) -> _Fit:
        """The same for the first crop alone."""
        return _Fit(self.losses[:1], self.counts[:1], self.hits[:1])

    @property
    def total(self) -> float:
        return float(self.counts.sum())

    @property
    def accuracy(self) -> float:
        return float(self.hits.sum()) / max(1.0, self.total)

    @property
    def cross_entropy(self) -> float:
        return float(self.losses.sum()) / max(1.0, self.total)

    @property
    def most_frequent(self) -> float:
        """Accuracy of the answer that is always the most frequent class."""
        return float(self.counts.sum(0).max()) / self.total

    @property
    def entropy(self) -> float:
        """Cross-entropy of the answer that is always the classes' frequencies."""
        return float(torch.special.entr(self.counts.sum(0) / self.total).sum())

    @property
    def leaves_room(self) -> bool:
        """Whether outputs could fit better; never where the labels have one class only."""
        return self.entropy > 0 and 1 - self.accuracy > min(GOOD_ERROR, (1 - self.most_frequent) / 2)

    @property
    def is_chance(self) -> bool:
        """Whether constant answers fit as well.

        A teacher of a weighted loss gives rare classes more pixels than they have; its mean recall tells it from
        chance, unless it errs more than twice as often as a constant answer.
        """
        counts, hits = self.counts.sum(0), self.hits.sum(0)
        present = counts > 0
        recall = float((hits[present] / counts[present]).mean())
        error, constant_error = 1 - self.accuracy, 1 - self.most_frequent
        return (
            self.cross_entropy >= self.entropy
            and error >= 0.95 * constant_error
            and (recall <= (1 + 1 / int(present.sum())) / 2 or error > 2 * constant_error)
        )

    def is_clearly_better(self, other: _Fit) -> bool:
        """Tell whether this fit is better than chance, and than another by a margin and on every crop."""
        error, cross_entropy = ABOVE_CHANCE
        return (
            1 - self.accuracy <= error * (1 - self.most_frequent)
            and self.cross_entropy <= cross_entropy * self.entropy
            and 1 - self.accuracy <= (1.0 if other.is_chance else CLEARLY_BETTER) * (1 - other.accuracy)
            and self.cross_entropy <= CLEARLY_BETTER * other.cross_entropy
            and bool((self.losses <= other.losses).all())
        )


def _measure(crops: Sequence[_Sample], outputs: Sequence[Tensor], kind: Kind) -> _Fit:
    """Compare outputs with labels, at every second pixel of both directions."""
    losses, counts, hits = [], [], []
    for crop, output in zip(crops, outputs, strict=True):
        logits = _as_logits(_at_every_second_pixel(output.float(), crop.size), kind)
        label = crop.label[::2, ::2].to(logits.device).long()
        label = torch.where(label < len(logits), label, VOID)
        losses.append(F.cross_entropy(logits[None], label[None], ignore_index=VOID, reduction="sum"))
        own = label.clamp(min=0)[None]
        # Where several classes share the highest logit none is right. argmax is ten times slower on a CPU.
        rivals = logits.scatter(0, own, -torch.inf).amax(0)
        known = label != VOID
        counts.append(torch.bincount(label[known], minlength=len(logits)))
        hits.append(torch.bincount(label[known & (logits.gather(0, own)[0] > rivals)], minlength=len(logits)))
    return _Fit(*(torch.stack(values).cpu().double() for values in (losses, counts, hits)))


def _at_every_second_pixel(logits: Tensor, size: Size) -> Tensor:
    """Bring logits (C, h, w) to a size bilinearly (align_corners False); keep every second row and column of it."""
    if tuple(logits.shape[1:]) == size:
        return logits[:, ::2, ::2]
    rows, columns = (
        F.interpolate(torch.eye(given, device=logits.device)[None], wanted, mode="linear", align_corners=False)
        for given, wanted in zip(logits.shape[1:], size, strict=True)
    )
    return rows[0, :, ::2].T @ logits @ columns[0, :, ::2]


def _as_logits(values: Tensor, kind: Kind) -> Tensor:
    """Undo a softmax or sigmoid; one channel becomes two classes."""
    if kind == "probabilities":
        values = values.clamp(min=1e-6).log()
    elif kind == "sigmoids":
        values = values.logit(eps=1e-6)
    return torch.cat([torch.zeros_like(values), values]) if len(values) == 1 else values


def _fit_findings(
    network: _Network, crops: Sequence[_Sample], kind: Kind, fit: _Fit, class_names: Sequence[str], images: str
) -> list[str]:
    """Look for a better way to feed the network, and for outputs that have nothing to do with the labels."""
    if not fit.leaves_room:
        return []
    better = _better_format(network, crops, kind, fit)
    if better is not None:
        input_format, its_fit = better
        return [
            f"The teacher fits the labels better with {_format_name(input_format)}: over {images} its accuracy is "
            f"{its_fit.accuracy:.3f} instead of {fit.accuracy:.3f}, and its cross-entropy {its_fit.cross_entropy:.3f} "
            f"instead of {fit.cross_entropy:.3f}. {_format_advice(network, input_format, len(class_names))}"
        ]
    if not fit.is_chance:
        return []
    return [
        f"The teacher is no better than chance: over {images} its accuracy is {fit.accuracy:.3f} (always "
        f"{class_names[int(fit.counts.sum(0).argmax())]!r}: {fit.most_frequent:.3f}), and its cross-entropy "
        f"{fit.cross_entropy:.3f} (the classes' frequencies: {fit.entropy:.3f}). Check that its weights are loaded, "
        "that its classes are in the data's order, and that it was trained for these classes."
    ]


def _better_format(
    network: _Network, crops: Sequence[_Sample], kind: Kind, fit: _Fit
) -> tuple[_InputFormat, _Fit] | None:
    """Try other ways to feed the network on the first crop, and the best of them on all crops.

    Returns:
        The best, if it is clearly better than the given one.
    """
    best, best_fit = network.given, fit.first
    for input_format in network.other_formats():
        its_fit = _measure(crops[:1], network(crops[:1], input_format), kind)
        if its_fit.cross_entropy < best_fit.cross_entropy:
            best, best_fit = input_format, its_fit
    if best == network.given:
        return None
    best_fit = _measure(crops, network(crops, best), kind)
    return (best, best_fit) if best_fit.is_clearly_better(fit) else None


def _format_name(input_format: _InputFormat) -> str:
    return " and ".join(part for part in (input_format.name, "channels in BGR order" * input_format.is_bgr) if part)


def _format_advice(network: _Network, input_format: _InputFormat, num_classes: int) -> str:
    """Say what to write."""
    mean, std = _code(input_format.mean), _code(input_format.std)
    if isinstance(network.teacher, Runtime):
        advice = []
        if input_format.name and isinstance(_innermost(network.teacher), ExternalOnnxRuntime):
            advice.append(f"Pass teacher_mean={mean}, teacher_std={std}.")
        elif input_format.name:
            advice.append(f"Export it again from a network whose spec has mean={mean}, std={std}.")
        if input_format.is_bgr:
            advice.append("Export it again from a module whose forward returns network(x.flip(1)).")
        return " ".join(advice)
    spec = network.spec
    if spec.name or spec.class_names:
        code = f"dataclasses.replace(get_spec(teacher), mean={mean}, std={std})"
    else:
        divisor = f", size_divisor={spec.size_divisor}" if spec.size_divisor > 1 else ""
        code = f"NetworkSpec(name=None, num_classes={num_classes}, mean={mean}, std={std}{divisor})"
    if not input_format.is_bgr:
        return f"Set teacher.spec = {code}."
    return f"Swap its channels: pass a module whose forward returns teacher(x.flip(1)), with its spec = {code}."


def _code(values: Sequence[float]) -> str:
    return f"({', '.join('1 / 255' if value == 1 / 255 else f'{value:g}' for value in values)})"


def _innermost(runtime: Runtime) -> Runtime:
    """Return the runtime inside wrappers that change the order of the classes."""
    while isinstance(inner := getattr(runtime, "runtime", None), Runtime):
        runtime = inner
    return runtime
