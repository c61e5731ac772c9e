"""The teacher: images in, what the method learns from out, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.errors import listed
from bpkd_sdk.features import Capture
from bpkd_sdk.models.spec import IMAGENET_MEAN, IMAGENET_STD, NetworkSpec
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.runtime import Accepts, Runtime
from bpkd_sdk.runtime.onnx import METADATA_KEY, OnnxRuntime, open_session, run_session
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.objective import network_input, runner

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


TeacherModel = nn.Module | Runtime
Teacher = Callable[[Tensor], SegmentationOutput]  # from uint8 images (N, 3, h, w) on the device


def create_teacher(
    guide: TeacherModel, capture: Capture, config: TrainingConfig, device: torch.device, dtype: torch.dtype
) -> Teacher:
    """What teaches: an exported file by its runtime, or a module.

    Args:
        guide: A runtime that gives logits, or a module in eval mode, which is moved to the device.
        capture: Of a module's feature map.
        config: All options.
        device: Where a module runs.
        dtype: Of a module's autocast; float32 for none.
    """
    if isinstance(guide, Runtime):
        return lambda images: SegmentationOutput(teacher_logits(guide, images))
    return ModuleTeacher(guide, capture, config, device, dtype)


def teacher_logits(runtime: Runtime, images: Tensor) -> Tensor:
    """Logits (N, C, h, w) of an exported file for uint8 images (N, 3, H, W), on the images' device.

    A file that takes fewer images at once is asked several times.
    """
    parts = torch.split(images, runtime.accepts.batch[1] or len(images))
    return torch.cat([runtime.logits_at_stride(part) for part in parts]).to(images.device)


class ModuleTeacher:
    """A module in inference mode and in its own precision; arguments as `create_teacher`."""

    def __init__(
        self, network: nn.Module, capture: Capture, config: TrainingConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.network = to_device(network, device, config)
        self.run = runner(network, config)
        self.capture = capture
        self.config = config
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def __call__(self, images: Tensor) -> SegmentationOutput:
        """uint8 images (N, 3, h, w) on the device -> its output for them, constant."""
        with torch.inference_mode(), self.autocast:
            output = as_output(self.run(network_input(self.network, images, self.config)))
            features = self.capture.take()
        # Inference tensors cannot be saved for a backward pass; a clone made outside can.
        return SegmentationOutput(output.logits.clone(), {path: x.clone() for path, x in features.items()})


def to_device(network: nn.Module, device: torch.device, config: TrainingConfig) -> nn.Module:
    """Move a network, and lay out its weights as configured."""
    network.to(device)
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


_FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def open_onnx(
    path: Path,
    device: torch.device,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Runtime:
    """Open an ONNX file, ours or another.

    Args:
        path: The file.
        device: Of the student; other than a CUDA GPU it means the CPU.
        mean: Per RGB channel, of images in 0..1; only for a file that is not ours. None: ImageNet's.
        std: Likewise.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no ONNX file, returns no logits, or says itself what `mean` and `std` would.
        RuntimeError: If ONNX Runtime cannot use the GPU.
    """
    device = device if device.type == "cuda" else torch.device("cpu")
    session = open_session(path, device)
    if METADATA_KEY not in session.get_modelmeta().custom_metadata_map:
        return ExternalOnnxRuntime(path, session, device, mean or IMAGENET_MEAN, std or IMAGENET_STD)
    if mean or std:
        raise ValueError(f"{path} says itself how images are normalised; leave out teacher_mean and teacher_std.")
    return OnnxRuntime(path, device)


class ExternalOnnxRuntime(Runtime):
    """A foreign ONNX file as a `Runtime`.

    Args:
        path: For errors.
        session: ONNX Runtime's, of the file.
        device: Where to run.
        mean: Per RGB channel, of images in 0..1.
        std: Likewise.

    Raises:
        ValueError: If it does not take one float image, or does not return one map of logits.
        RuntimeError: If ONNX Runtime cannot use the device.
    """

    def __init__(
        self,
        path: Path,
        session: InferenceSession,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError(f"ONNX Runtime cannot use {device} for {path}. Run `bpkd doctor`.")
        self.session = session
        taken = _image_input(path, session)
        classes = _logits_output(path, session).shape[1]
        self.dtype = _FLOATS[taken.type]
        spec = NetworkSpec(None, classes if isinstance(classes, int) else 0, mean=tuple(mean), std=tuple(std))
        facts = {"preprocess": False, "argmax": False, "precision": str(self.dtype).removeprefix("torch.")}
        batch, _, height, width = (side if isinstance(side, int) else None for side in taken.shape)
        super().__init__(
            str(path), spec, facts, device, Accepts(*((side or 1, side) for side in (batch, height, width)))
        )

    def infer(self, inputs: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) -> float32 logits (N, C, H, W) of the images' size."""
        return F.interpolate(self._run(inputs), inputs.shape[2:], mode="bilinear", align_corners=False)

    def logits_at_stride(self, images: Tensor) -> Tensor:
        """As `logits`, but (N, C, h, w) as the file returns them."""
        return self._run(self.prepare(images.permute(0, 2, 3, 1)))

    def _run(self, inputs: Tensor) -> Tensor:
        try:
            return run_session(self.session, inputs.to(self.dtype)).float()
        except Exception as error:  # ONNX Runtime's own errors share no base class
            raise RuntimeError(f"{self.name} failed on images of shape {tuple(inputs.shape)}: {error}") from error


def _image_input(path: Path, session: InferenceSession) -> Any:
    inputs = session.get_inputs()
    if len(inputs) == 1 and inputs[0].type in _FLOATS and len(inputs[0].shape) == 4:
        channels = inputs[0].shape[1]
        if channels == 3 or not isinstance(channels, int):
            return inputs[0]
    raise ValueError(f"Expected {path} to take one image, float (N, 3, H, W), but it takes:\n{_listed(inputs)}")


def _logits_output(path: Path, session: InferenceSession) -> Any:
    outputs = session.get_outputs()
    if len(outputs) == 1 and outputs[0].type in _FLOATS and len(outputs[0].shape) == 4:
        return outputs[0]
    raise ValueError(
        f"Expected {path} to return one map of logits, float (N, C, h, w), but it returns:\n{_listed(outputs)}\n"
        "A teacher's masks are not enough: export it without its last argmax, and with its logits only."
    )


def _listed(values: Any) -> str:
    return listed(f"{value.name}: {value.type} {value.shape}" for value in values)
