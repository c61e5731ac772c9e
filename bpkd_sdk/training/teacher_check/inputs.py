"""Input formats of a teacher: normalisations and orders of the channels, and a teacher that runs in any of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bpkd_sdk.class_map import ClassGroups
from bpkd_sdk.features import eval_mode
from bpkd_sdk.models import get_spec
from bpkd_sdk.output import as_output
from bpkd_sdk.runtime import AcceptedImages, Runtime
from bpkd_sdk.runtime.device import Device
from bpkd_sdk.sizes import Size
from bpkd_sdk.spec import IMAGENET_MEAN, IMAGENET_STD
from bpkd_sdk.training.teacher import TeacherModel
from bpkd_sdk.training.teacher_check.crops import MAX_CROP_PIXELS, MAX_CROPS, Sample


@dataclass(frozen=True)
class InputFormat:
    """Normalisation of images and order of their channels.

    Attributes:
        name: Name of the normalisation in a finding; empty for the teacher's own.
        mean: Mean per channel of images in 0..1.
        std: Standard deviation per channel of images in 0..1.
        is_bgr: Whether the normalised channels are put in BGR order.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_bgr: bool = False

    @property
    def description(self) -> str:
        """Text of a finding that describes how this format differs from the teacher's own."""
        return " and ".join(part for part in (self.name, "channels in BGR order" * self.is_bgr) if part)


NORMALIZATIONS = (
    InputFormat("ImageNet's mean and std", IMAGENET_MEAN, IMAGENET_STD),
    InputFormat("mean and std 0.5", (0.5,) * 3, (0.5,) * 3),
    InputFormat("values in 0..1", (0.0,) * 3, (1.0,) * 3),
    InputFormat("values in 0..255", (0.0,) * 3, (1 / 255,) * 3),
    InputFormat("values in 0..255 minus ImageNet's mean", IMAGENET_MEAN, (1 / 255,) * 3),  # Caffe, in BGR order
)


class TeacherRunner:
    """A teacher that runs on images in any input format.

    Args:
        model: Module, which is moved to the device, or a runtime that returns logits.
        device: Device of a module.
        dtype: Data type of a module's autocast; float32 for none.
        classes: The teacher's classes for each class of the data; None for the same classes in the same order.
    """

    def __init__(
        self, model: TeacherModel, device: torch.device, dtype: torch.dtype, classes: ClassGroups | None
    ) -> None:
        self.model = model
        self.classes = classes
        self.dtype = dtype
        if isinstance(model, Runtime):
            self.device, self.spec, self.accepts = model.device, model.spec, model.accepts
            self.normalizes_inside = bool(model.metadata["preprocess"])
        else:
            # The module inside of torch.compile is used, because each size of the crops would compile it again.
            self.module: nn.Module = getattr(model, "_orig_mod", model).to(device)
            self.device, self.spec, self.accepts = Device(str(device)), get_spec(model), AcceptedImages()
            self.normalizes_inside = False
        self.own_format = InputFormat("", self.spec.mean, self.spec.std)

    def other_formats(self) -> Iterator[InputFormat]:
        """Yield all input formats but the teacher's own; none for other than three channels."""
        own = self.own_format
        if len(own.mean) != 3:
            return
        yield replace(own, is_bgr=True)
        if not self.normalizes_inside:
            for other in NORMALIZATIONS:
                if (other.mean, other.std) != (own.mean, own.std):
                    yield from (other, replace(other, is_bgr=True))

    def crop_size(self, image: Size, largest: Size) -> Size:
        """Choose the (height, width) of a crop: small, at most `largest`, and accepted by the teacher."""
        sides = [min(pair) for pair in zip(image, largest, strict=True)]
        shrink = min(1.0, math.sqrt(MAX_CROP_PIXELS / MAX_CROPS / math.prod(sides)))
        divisor = self.spec.size_divisor
        height, width = (max(divisor, int(side * shrink) // divisor * divisor) for side in sides)
        return _clamp(height, self.accepts.height), _clamp(width, self.accepts.width)

    def __call__(self, crops: Sequence[Sample], input_format: InputFormat) -> list[Tensor]:
        """Run the teacher on crops.

        Returns:
            The logits (C, h, w) of each crop, on the teacher's device.
        """
        least, most = self.accepts.batch_sizes
        most = (most or len(crops)) if len({crop.size for crop in crops}) == 1 else 1
        outputs: list[Tensor] = []
        for start in range(0, len(crops), most):
            chunk = [crop.image for crop in crops[start : start + most]]
            filled = chunk + chunk[-1:] * (least - len(chunk))
            outputs.extend(self._run(torch.stack(filled).to(self.device), input_format)[: len(chunk)])
        return outputs

    def _run(self, images: Tensor, input_format: InputFormat) -> Tensor:
        if isinstance(self.model, Runtime) and self.normalizes_inside:
            images = images.flip(1) if input_format.is_bgr else images
            logits: Tensor = self.model.infer(images.permute(0, 2, 3, 1).contiguous())
            return logits
        inputs = replace(self.spec, mean=input_format.mean, std=input_format.std).normalize(images)
        inputs = inputs.flip(1) if input_format.is_bgr else inputs.contiguous()
        if isinstance(self.model, Runtime):
            logits = self.model.infer(inputs)
            return logits
        half = self.dtype != torch.float32
        with eval_mode(self.module), torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            return as_output(self.module(inputs)).logits


def _clamp(value: int, allowed: tuple[int, int | None]) -> int:
    least, most = allowed
    return max(least, value if most is None else min(value, most))
