"""The interface `Runtime` of everything that segments images: torch modules, ONNX files, engines, Triton servers.

A call has three stages, which can be called and timed one by one:

    prepare   images (N, H, W, channels)  -> inputs of the artifact
    infer     inputs of the artifact      -> outputs of the artifact
    masks     outputs of the artifact     -> class ids (N, H, W) uint8

Images are uint8 for the range 0 to 255, as 8-bit RGB is, and float32 for any other range of the network's spec.
If an artifact does not contain the normalisation or the argmax, the runtime does it.

All stages take numpy arrays or torch tensors. Tensors are moved to the artifact's device by `prepare` and stay there.
Numpy arrays stay in host memory between the stages, and torch is not needed for them; an artifact that torch runs turns
them into tensors in `prepare`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bpkd_sdk.arrays import Array, array_namespace, contiguous, to_device, to_numpy
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.runtime.device import Device
from bpkd_sdk.runtime.inference import to_mask
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

    def check(self, images: Array, name: str, pixels: PixelFormat = PixelFormat()) -> None:  # noqa: B008  (frozen)
        """Raise ValueError unless a batch (N, H, W, channels) is accepted; the values are not read.

        Args:
            images: The batch.
            name: Name of the artifact in the error message.
            pixels: Format of the images that the artifact accepts.
        """
        dtype, kind = "uint8" if pixels.is_uint8 else "float32", str(images.dtype).removeprefix("torch.")
        if kind != dtype or images.ndim != 4 or images.shape[3] != pixels.channels:
            expected = f"{dtype} (N, H, W, {pixels.channels})"
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
        device: Device that it runs on, and on which tensors are between the stages; its name, or a torch device.
        accepts: Images that it accepts.
    """

    is_module: ClassVar[bool] = False  # whether it is a torch module, which may have changed since its spec was set

    def __init__(
        self, name: str, spec: NetworkSpec, metadata: Mapping[str, Any], device: Any, accepts: AcceptedImages
    ) -> None:
        self.name = name
        self.spec = spec
        self.metadata = metadata
        self.device = Device(str(device))
        self.accepts = accepts

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Segment images (N, H, W, channels) in host memory into uint8 masks (N, H, W) in host memory.

        Raises:
            ValueError: If the artifact does not accept the images' type or size.
            RuntimeError: If the library that runs the artifact fails.
        """
        return to_numpy(self.masks(self.infer(self.prepare(images))))

    def segment(self, images: Array) -> Array:
        """Segment images (N, channels, H, W) into class ids (N, H, W) uint8.

        Args:
            images: A numpy array, or a torch tensor on any device.

        Returns:
            A numpy array for a numpy array, and for a tensor a tensor on the runtime's device.
        """
        return _of_kind(images, self.masks(self.infer(self.prepare(_channels_last(images)))))

    def logits(self, images: Array) -> Array:
        """Compute float32 logits (N, C, H, W) from images (N, channels, H, W).

        Args:
            images: A numpy array, or a torch tensor on any device.

        Returns:
            A numpy array for a numpy array, and for a tensor a tensor on the runtime's device.

        Raises:
            ValueError: If the artifact returns masks, or does not accept the images' type or size.
        """
        if self.metadata["argmax"]:
            raise ValueError(f"{self.name} returns masks, not logits; export the network with argmax=False.")
        return _of_kind(images, self.infer(self.prepare(_channels_last(images))))

    def logits_at_stride(self, images: Any) -> Any:
        """Compute float32 logits (N, C, h, w), at the network's stride if the artifact can return them at that size."""
        return self.logits(images)

    def prepare(self, images: Any) -> Any:
        """Check images (N, H, W, channels) and return the artifact's inputs: the first stage."""
        self.accepts.check(images, self.name, self.spec.pixels)
        images = to_device(images, self.device)
        if self.metadata["preprocess"]:
            return contiguous(images)
        xp = array_namespace(images)
        return contiguous(self.spec.normalize(xp.permute_dims(images, (0, 3, 1, 2))))

    @abstractmethod
    def infer(self, inputs: Any) -> Any:
        """Run the artifact on the inputs of `prepare`, and return its outputs: the second stage."""

    def masks(self, outputs: Any) -> Any:
        """Return class ids for the outputs of `infer`: the third stage."""
        return outputs if self.metadata["argmax"] else to_mask(outputs)

    def synchronize(self) -> None:
        """Wait for the work that this thread has queued on the device; all stages use the thread's current stream.

        A wait for the whole device would break a CUDA graph that another thread records at the same time.
        """
        torch = sys.modules.get("torch")  # nothing is queued unless torch uses CUDA, which it may lack
        if self.device.type == "cuda" and torch is not None and torch.cuda.is_initialized():
            torch.cuda.current_stream(self.device).synchronize()


def _channels_last(images: Array) -> Array:
    """Return images (N, channels, H, W) as a view (N, H, W, channels)."""
    result: Array = array_namespace(images).permute_dims(images, (0, 2, 3, 1))
    return result


def _of_kind(images: Array, results: Any) -> Array:
    """Return results as a numpy array if the images are one, otherwise as they are."""
    kept: Array = to_numpy(results) if isinstance(images, np.ndarray) else results
    return kept
