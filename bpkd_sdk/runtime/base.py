"""The interface `Runtime` of everything that segments images: torch modules, ONNX files, engines, Triton servers.

A call has three stages, which can be called and timed one by one:

    prepare   images (N, H, W, channels)  -> inputs of the artifact, on its device
    infer     inputs of the artifact      -> outputs of the artifact, on its device
    masks     outputs of the artifact     -> class ids (N, H, W) uint8, on its device

Images are uint8 for the range 0 to 255, as 8-bit RGB is, and float32 for any other range of the network's spec.
If an artifact does not contain the normalisation or the argmax, the runtime does it, on the artifact's device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.errors import check_choice
from bpkd_sdk.models.mask_classification import adapt_network
from bpkd_sdk.models.spec import get_spec
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.runtime.inference import full_size_logits, to_mask
from bpkd_sdk.spec import NetworkSpec

Range = tuple[int, int | None]


@dataclass(frozen=True)
class AcceptedImages:
    """The images that an artifact accepts; each attribute is a smallest and a largest number, None for no limit.

    Attributes:
        batch_sizes: Number of images per batch.
        height: Height of every image in pixels.
        width: Width of every image in pixels.
    """

    batch_sizes: Range = (1, None)
    height: Range = (1, None)
    width: Range = (1, None)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """The only (height, width) that is accepted; None if there are several."""
        (height, tallest), (width, widest) = self.height, self.width
        return (height, width) if (height, width) == (tallest, widest) else None

    @property
    def is_static(self) -> bool:
        """Whether only one shape is accepted."""
        return self.fixed_size is not None and self.batch_sizes[0] == self.batch_sizes[1]

    def takes_size(self, height: int, width: int) -> bool:
        """Return whether images of this size are accepted."""
        return _within(height, self.height) and _within(width, self.width)

    def describe_size(self) -> str:
        """Return the accepted sizes as text, such as "512 x 1024" or "256 to 512 x 256 to 1024"."""
        return f"{_format_range(self.height)} x {_format_range(self.width)}"

    def check(self, images: Tensor, name: str, pixels: PixelFormat = PixelFormat()) -> None:  # noqa: B008  (frozen)
        """Raise ValueError unless a batch (N, H, W, channels) is accepted; the values are not read.

        Args:
            images: The batch.
            name: Name of the artifact in the error message.
            pixels: Format of the images that the artifact accepts.
        """
        dtype = torch.uint8 if pixels.is_uint8 else torch.float32
        if images.dtype != dtype or images.ndim != 4 or images.shape[3] != pixels.channels:
            kind, expected = (str(type_).removeprefix("torch.") for type_ in (images.dtype, dtype))
            expected = f"{expected} (N, H, W, {pixels.channels})"
            unit = "" if pixels.is_rgb8 else f" of {pixels}"
            raise ValueError(f"Expected images {expected}{unit}, but got {kind} {tuple(images.shape)}.")
        count, height, width = images.shape[:3]
        if not self.takes_size(height, width):
            raise ValueError(
                f"{name} takes images of {self.describe_size()} (height x width), but got {height} x {width}. Resize "
                f"the images, or export with input_size=({height}, {width}) or dynamic_size=True."
            )
        self.check_batch(count, name)

    def check_batch(self, count: int, name: str) -> None:
        """Raise ValueError unless this number of images is accepted at a time."""
        if not _within(count, self.batch_sizes):
            advice = "Export with dynamic_batch=True." if self.batch_sizes[1] == 1 else "Split the batch."
            raise ValueError(
                f"{name} takes {_format_range(self.batch_sizes)} image(s) at a time, but got {count}. {advice}"
            )


def _within(value: int, allowed: Range) -> bool:
    least, most = allowed
    return least <= value and (most is None or value <= most)


def _format_range(allowed: Range) -> str:
    least, most = allowed
    if most is None:
        return f"at least {least}"
    return str(least) if least == most else f"{least} to {most}"


class Runtime(ABC):
    """A network that segments images. Several threads may call it at the same time.

    Args:
        name: Name in error messages: a path, a URL or a class.
        spec: Facts of the network.
        metadata: Facts of the artifact. "preprocess": whether it accepts images (N, H, W, channels) and normalises
            them, otherwise it accepts normalised float32 (N, channels, H, W). "argmax": whether it returns uint8 masks
            (N, H, W), otherwise it returns float32 logits (N, C, H, W). "precision": fp32, fp16 or int8. For a file,
            all other metadata of the file.
        device: Device that it runs on, and that has the results of `prepare`, `infer` and `masks`.
        accepts: Images that it accepts.
    """

    def __init__(
        self, name: str, spec: NetworkSpec, metadata: Mapping[str, Any], device: torch.device, accepts: AcceptedImages
    ) -> None:
        self.name = name
        self.spec = spec
        self.metadata = metadata
        self.device = device
        self.accepts = accepts

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Segment images (N, H, W, channels) in host memory into uint8 masks (N, H, W) in host memory.

        Raises:
            ValueError: If the artifact does not accept the images' type or size.
            RuntimeError: If the library that runs the artifact fails.
        """
        masks = self.masks(self.infer(self.prepare(torch.from_numpy(images))))
        return np.asarray(masks.cpu().numpy())

    def segment(self, images: Tensor) -> Tensor:
        """Segment images (N, channels, H, W) on any device into class ids (N, H, W) uint8 on the runtime's device."""
        return self.masks(self.infer(self.prepare(images.permute(0, 2, 3, 1))))

    def logits(self, images: Tensor) -> Tensor:
        """Compute float32 logits (N, C, H, W) on the runtime's device from images (N, channels, H, W) on any device.

        Raises:
            ValueError: If the artifact returns masks, or does not accept the images' type or size.
        """
        if self.metadata["argmax"]:
            raise ValueError(f"{self.name} returns masks, not logits; export the network with argmax=False.")
        return self.infer(self.prepare(images.permute(0, 2, 3, 1)))

    def logits_at_stride(self, images: Tensor) -> Tensor:
        """Compute float32 logits (N, C, h, w), at the network's stride if the artifact can return them at that size."""
        return self.logits(images)

    def prepare(self, images: Tensor) -> Tensor:
        """Check images (N, H, W, channels) and return the artifact's inputs, on its device: the first stage."""
        self.accepts.check(images, self.name, self.spec.pixels)
        images = images.to(self.device, non_blocking=True)
        if self.metadata["preprocess"]:
            return images.contiguous()
        return self.spec.normalize(images.permute(0, 3, 1, 2)).contiguous()

    @abstractmethod
    def infer(self, inputs: Tensor) -> Tensor:
        """Run the artifact on the inputs of `prepare`, and return its outputs: the second stage."""

    def masks(self, outputs: Tensor) -> Tensor:
        """Return class ids for the outputs of `infer`: the third stage."""
        return outputs if self.metadata["argmax"] else to_mask(outputs).to(torch.uint8)

    def synchronize(self) -> None:
        """Wait for the work that this thread has queued on the device; all stages use the thread's current stream.

        A wait for the whole device would break a CUDA graph that another thread records at the same time.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


DEVICE_TYPES = ("cpu", "cuda", "mps")


def choose_device(device: str | torch.device = "auto", types: Sequence[str] = DEVICE_TYPES) -> torch.device:
    """Choose a torch device by name; the one rule for device="auto", in training too.

    "auto" is torch's current accelerator if there is one, otherwise the CPU. "cuda" without an index is torch's current
    GPU, and the index is filled in, because without one, torch, TensorRT and ONNX Runtime choose different GPUs.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps", or a torch device, which is not checked.
        types: Types of device that the caller supports; "auto" chooses the CPU in place of any other accelerator.

    Raises:
        ValueError: If the name is not "auto" or one of `types`.
        RuntimeError: If torch does not see the device.
    """
    chosen = device if isinstance(device, torch.device) else _parse_device(device, types)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _parse_device(device: str, types: Sequence[str]) -> torch.device:
    kind, _, index = device.partition(":")
    check_choice("device", device if kind == "auto" else kind, ("auto", *types))
    if kind == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None and accelerator.type in types else torch.device("cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"Expected device={device!r} to be present, but torch sees {torch.cuda.device_count()} CUDA devices. "
            "Run `bpkd doctor`."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError("Expected device='mps' to be present, but torch sees no Apple GPU. Run `bpkd doctor`.")
    return torch.device(device)


class TorchRuntime(Runtime):
    """A torch module, run in its own precision; its logits are resized to the images' size.

    Args:
        module: Network in eval mode, which is moved to the device; the result of `torch.compile` is allowed.
        device: Device name of `choose_device`; None: the module's device.
        name: Name in error messages; None: the network's name.
    """

    def __init__(self, module: nn.Module, device: str | torch.device | None = None, *, name: str | None = None) -> None:
        parameter = next(module.parameters(), None)
        chosen = choose_device(device or (parameter.device if parameter is not None else "cpu"))
        precision = parameter.dtype if parameter is not None else torch.float32
        self.module = adapt_network(module).to(chosen)
        spec = get_spec(module)
        metadata = {"preprocess": False, "argmax": False, "precision": str(precision).removeprefix("torch.")}
        super().__init__(name or spec.name or type(module).__name__, spec, metadata, chosen, AcceptedImages())

    @torch.inference_mode()
    def infer(self, inputs: Tensor) -> Tensor:
        """Compute float32 logits (N, C, H, W) of the images' size from normalised images (N, channels, H, W)."""
        return full_size_logits(self.module, inputs, self.spec.size_divisor)
