"""The teacher: a module or an exported file, opened once and run without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from bpkd_sdk.arrays import resize_bilinear
from bpkd_sdk.class_map import ClassGroups
from bpkd_sdk.errors import format_list, warn
from bpkd_sdk.features import Capture
from bpkd_sdk.files import ENGINE_SUFFIXES, NETWORK_SUFFIXES, SHAPES_TEACHER, is_pretrained_name, is_run_folder
from bpkd_sdk.hub import is_model_folder
from bpkd_sdk.models import ZOO, create_model, get_spec, load_model, set_spec
from bpkd_sdk.models.mask_classification import adapt_network
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.runtime import AcceptedImages, Runtime, open_runtime
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session, run_session
from bpkd_sdk.runtime.onnx_file import METADATA_KEY
from bpkd_sdk.runtime.viewed import ViewedRuntime
from bpkd_sdk.spec import IMAGENET_MEAN, IMAGENET_STD, NetworkSpec
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.objective import compiled_call, network_input, to_device
from bpkd_sdk.training.teacher_cache import TeacherCache
from bpkd_sdk.views import ViewedNetwork, Views

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

NetworkSource = nn.Module | str | Path  # a module, a name of `create_model`, or the path of a checkpoint
TeacherModel = nn.Module | Runtime

_FLOAT_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class Teacher:
    """A teacher that runs in inference mode and in its own precision.

    Args:
        model: Module in eval mode, which is moved to the device; or a runtime that returns logits.
        capture: Recorder of a module's feature map.
        config: Options of the run.
        device: Device of a module.
        dtype: Data type of a module's autocast; float32 for none.
        classes: The teacher's classes for each class of the data; None for the same classes.
    """

    def __init__(
        self,
        model: TeacherModel,
        capture: Capture,
        config: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype,
        classes: ClassGroups | None,
    ) -> None:
        self.model = model
        self.capture = capture
        self.config = config
        self.classes = classes
        if isinstance(model, nn.Module):
            self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            self.call = compiled_call(to_device(model, device, config), config)

    def __call__(self, images: Tensor, _kept: Mapping[str, Tensor]) -> SegmentationOutput:
        """Run the teacher on images; return its output without a gradient.

        Args:
            images: uint8 or float32 (N, channels, h, w), not normalised, on the device.
            _kept: Empty; a `CachedTeacher` gets its outputs here.

        Returns:
            Logits (N, C, h', w') of the C classes of the data, or (N, C + 1, h', w') with a channel for the classes of
            the teacher that are left out; and the recorded feature maps of a module.
        """
        if isinstance(self.model, Runtime):
            return SegmentationOutput(self._merge(teacher_logits(self.model, images)))
        with torch.inference_mode(), self.autocast:
            output = as_output(self.call(network_input(self.model, images, self.config)))
            features = self.capture.take()
        # Inference tensors cannot be saved for a backward pass; a clone made outside of inference mode can.
        logits = self._merge(output.logits.clone())
        return SegmentationOutput(logits, {path: map_.clone() for path, map_ in features.items()})

    def _merge(self, logits: Tensor) -> Tensor:
        return logits if self.classes is None else self.classes.merge(logits, others=True)


def teacher_spec(teacher: TeacherModel | TeacherCache) -> NetworkSpec:
    """Return the facts of a teacher: its classes and its images."""
    return get_spec(teacher) if isinstance(teacher, nn.Module) else teacher.spec


def teacher_logits(runtime: Runtime, images: Tensor) -> Tensor:
    """Run an exported file on images, in several batches if it takes fewer images at once.

    Args:
        runtime: Runtime that returns logits.
        images: uint8 or float32 (N, channels, H, W), not normalised.

    Returns:
        Logits (N, C, h, w) on the images' device.
    """
    parts = torch.split(images, runtime.accepts.batch_sizes[1] or len(images))
    return torch.cat([runtime.logits_at_stride(part) for part in parts]).to(images.device)


def is_name(source: NetworkSource | Runtime | None) -> TypeGuard[str | Path]:
    """Return whether a network is given by a name that `create_model` accepts, and not as a module or a file."""
    if not isinstance(source, (str, Path)) or is_model_folder(source):
        return False
    if Path(source).suffix.lower() in NETWORK_SUFFIXES:
        return False
    if str(source) == SHAPES_TEACHER:
        return False
    return str(source) in ZOO or not is_run_folder(source)  # a folder may have the name of a network


def open_network(
    source: NetworkSource,
    num_classes: int,
    backbone_weights: str,
    pixels: PixelFormat = PixelFormat(),  # noqa: B008  (frozen)
) -> nn.Module:
    """Return a module as it is, load a checkpoint, or build a network by name.

    Args:
        source: Module, checkpoint or name.
        num_classes: Number of classes of a network that is built by name.
        backbone_weights: Weights of the encoder of a network that is built by name, as for `create_model`.
        pixels: Format of the images that a network is built for by name.
    """
    if isinstance(source, nn.Module):
        return adapt_network(source)
    if is_name(source):
        options: dict[str, Any] = {"backbone_weights": backbone_weights, "in_channels": pixels.channels}
        network = create_model(str(source), num_classes, **options)
        set_spec(network, get_spec(network).for_images(pixels))
        return network
    return load_model(source)


def open_teacher(
    source: NetworkSource | Runtime,
    num_classes: int,
    config: TrainingConfig,
    device: torch.device,
    pixels: PixelFormat = PixelFormat(),  # noqa: B008  (frozen)
) -> TeacherModel:
    """Open a teacher as a module in eval mode, or as the runtime of an exported file.

    Args:
        source: Module, checkpoint, name, ONNX file, TensorRT engine, or an opened runtime.
        num_classes: Number of classes of a network that is built by name.
        config: Options of the run: the teacher's precision and normalisation.
        device: Device of the student. An ONNX file runs on it if it is a CUDA GPU, and otherwise on the CPU.
        pixels: Format of the images of the data.

    Raises:
        ValueError: If a module is in training mode, a file returns no logits, or an option does not apply.
    """
    suffix = Path(source).suffix.lower() if isinstance(source, (str, Path)) else ""
    if suffix == ".onnx":
        runtime = open_onnx_teacher(Path(str(source)), device, config.teacher_mean, config.teacher_std, pixels)
        return _check_runtime(runtime, config)
    if config.teacher_mean or config.teacher_std:
        raise ValueError(
            "teacher_mean and teacher_std apply only to an ONNX file that does not state how images are normalised. "
            "For a module, set its spec: teacher.spec = NetworkSpec(name=None, num_classes=..., mean=..., std=...). A "
            "checkpoint or an engine contains its own normalisation."
        )
    if isinstance(source, Runtime) or suffix in ENGINE_SUFFIXES:
        return _check_runtime(open_runtime(source, device), config)
    if is_pretrained_name(source):
        return load_model(str(source))
    network = open_network(source, num_classes, config.backbone_weights, pixels)
    if is_name(source):
        warn(
            f"The teacher {str(source)!r} is built by name, so its decoder has random weights. Pass the checkpoint of "
            "a trained network."
        )
        return network.eval()
    training = [name or "the network" for name, module in network.named_modules() if module.training]
    if training:
        raise ValueError(f"The teacher is in training mode ({training[0]}). Call teacher.eval() first.")
    return network


def add_views(teacher: TeacherModel, scale: float, augment: Sequence[str | float] = ()) -> TeacherModel:
    """Return a teacher that runs on views of its images; the same teacher if there is only the image itself.

    Args:
        teacher: Teacher, which is not changed.
        scale: Factor on the size of every view, `TrainingConfig.teacher_scale`.
        augment: Further views, `TrainingConfig.teacher_augment`.

    Raises:
        ValueError: If an exported file does not accept the sizes of the views.
    """
    scales = (scale, *(scale * factor for factor in augment if not isinstance(factor, str)))
    if scales == (1.0,) and not augment:
        return teacher
    spec = teacher_spec(teacher)
    views = Views(scales, flip="flip" in augment, size_divisor=spec.size_divisor)
    if isinstance(teacher, Runtime):
        return ViewedRuntime(teacher, views)
    viewed = ViewedNetwork(teacher, views)
    set_spec(viewed, spec)
    return viewed


def _check_runtime(runtime: Runtime, config: TrainingConfig) -> Runtime:
    if runtime.metadata["argmax"]:
        raise ValueError(
            f"The teacher {runtime.name} returns masks, but distillation needs logits. Export it with argmax=False."
        )
    if config.teacher_precision is not None:
        raise ValueError(
            f"teacher_precision applies only to a module, but {runtime.name} has a fixed precision. Leave it out."
        )
    return runtime


def open_onnx_teacher(
    path: Path,
    device: torch.device,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixels: PixelFormat = PixelFormat(),  # noqa: B008  (frozen)
) -> Runtime:
    """Open an ONNX file of this package or of another exporter.

    Args:
        path: ONNX file.
        device: Device of the student. The file runs on a CUDA device, and otherwise on the CPU.
        mean: Mean per channel of images in 0..1, for a file of another exporter; None: ImageNet's.
        std: Standard deviation per channel of images in 0..1, for the same files; None: ImageNet's.
        pixels: Format of the images of the data. If it is not 8-bit RGB, a file of another exporter needs mean and std.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not ONNX, returns no logits, or contains its own mean and std.
        RuntimeError: If ONNX Runtime cannot use the GPU.
    """
    device = device if device.type == "cuda" else torch.device("cpu")
    session = open_session(path, device)
    if METADATA_KEY not in session.get_modelmeta().custom_metadata_map:
        if not pixels.is_rgb8 and not (mean and std):
            raise ValueError(
                f"{path} does not state how images are normalised, and ImageNet's values are for 8-bit RGB, but the "
                f"data have {pixels}. Pass teacher_mean and teacher_std, {pixels.channels} values each, in 0..1."
            )
        facts = NetworkSpec(None, 0).for_images(pixels)
        facts = replace(facts, mean=tuple(mean or IMAGENET_MEAN), std=tuple(std or IMAGENET_STD))
        return ExternalOnnxRuntime(path, session, device, facts)
    if mean or std:
        raise ValueError(f"{path} contains its own normalisation. Leave out teacher_mean and teacher_std.")
    return OnnxRuntime(path, device)


class ExternalOnnxRuntime(Runtime):
    """Runtime of an ONNX file that another exporter wrote.

    The file must take one float image (N, channels, H, W) and return one map of logits (N, C, h, w) at any stride. Such
    a file does not state its normalisation, so the caller provides it.

    Args:
        path: ONNX file, named in errors.
        session: ONNX Runtime session of the file.
        device: Device of the session.
        spec: Format of the images, and normalisation.

    Raises:
        ValueError: If the file does not take one float image, or does not return one map of logits.
        RuntimeError: If ONNX Runtime cannot use the device.
    """

    def __init__(
        self,
        path: Path,
        session: InferenceSession,
        device: torch.device,
        spec: NetworkSpec,
    ) -> None:
        if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError(f"ONNX Runtime cannot use {device} for {path}. Run `bpkd doctor`.")
        self.session = session
        image = _image_input(path, session, spec.in_channels)
        classes = _logits_output(path, session).shape[1]
        self.dtype = _FLOAT_TYPES[image.type]
        spec = replace(spec, num_classes=classes if isinstance(classes, int) else 0)
        facts = {"preprocess": False, "argmax": False, "precision": str(self.dtype).removeprefix("torch.")}
        batch, _, height, width = (side if isinstance(side, int) else None for side in image.shape)
        super().__init__(
            str(path), spec, facts, device, AcceptedImages(*((side or 1, side) for side in (batch, height, width)))
        )

    def infer(self, inputs: Tensor) -> Tensor:
        """Run on normalised images (N, channels, H, W); return float32 logits (N, C, H, W) of the images' size."""
        return resize_bilinear(self._run(inputs), inputs.shape[2:])

    def logits_at_stride(self, images: Tensor) -> Tensor:
        """Run on images (N, channels, H, W), uint8 or float32; return float32 logits (N, C, h, w) as the file does."""
        return self._run(self.prepare(images.permute(0, 2, 3, 1)))

    def _run(self, inputs: Tensor) -> Tensor:
        try:
            return run_session(self.session, inputs.to(self.dtype)).float()
        except Exception as error:  # the errors of ONNX Runtime have no common base class
            raise RuntimeError(f"{self.name} failed on images of shape {tuple(inputs.shape)}: {error}") from error


def _image_input(path: Path, session: InferenceSession, count: int) -> Any:
    inputs = session.get_inputs()
    if len(inputs) == 1 and inputs[0].type in _FLOAT_TYPES and len(inputs[0].shape) == 4:
        channels = inputs[0].shape[1]
        if channels == count or not isinstance(channels, int):
            return inputs[0]
    raise ValueError(f"Expected {path} to take one image, float (N, {count}, H, W), but it takes:\n{_format(inputs)}")


def _logits_output(path: Path, session: InferenceSession) -> Any:
    outputs = session.get_outputs()
    if len(outputs) == 1 and outputs[0].type in _FLOAT_TYPES and len(outputs[0].shape) == 4:
        return outputs[0]
    raise ValueError(
        f"Expected {path} to return one map of logits, float (N, C, h, w), but it returns:\n{_format(outputs)}\n"
        "Distillation needs logits, not masks: export the network without its final argmax, with one output."
    )


def _format(values: Any) -> str:
    return format_list(f"{value.name}: {value.type} {value.shape}" for value in values)
