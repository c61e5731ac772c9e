"""One interface for all that segments images: a torch module, an ONNX file, a TensorRT engine, a Triton server.

A call goes through three stages, which can be called (and timed) one by one:

    prepare   uint8 images (N, H, W, 3)   -> what the artifact takes, on its device
    infer     that                        -> what the artifact returns, on its device
    masks     that                        -> class ids (N, H, W) uint8, on its device

What an artifact leaves out, normalisation or argmax, is done around it, on its device.
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
from bpkd_sdk.models.spec import NetworkSpec, get_spec
from bpkd_sdk.runtime.inference import full_size_logits, to_mask

Range = tuple[int, int | None]


@dataclass(frozen=True)
class Accepts:
    """The images that an artifact takes: least and largest of each, None for no bound.

    Attributes:
        batch: Images at once.
        height: Of every image, in pixels.
        width: Of every image, in pixels.
    """

    batch: Range = (1, None)
    height: Range = (1, None)
    width: Range = (1, None)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) if that is the only one; None otherwise."""
        (height, tallest), (width, widest) = self.height, self.width
        return (height, width) if (height, width) == (tallest, widest) else None

    @property
    def is_static(self) -> bool:
        """Whether there is only one shape."""
        return self.fixed_size is not None and self.batch[0] == self.batch[1]

    def takes_size(self, height: int, width: int) -> bool:
        """Whether images of this size are taken."""
        return _within(height, self.height) and _within(width, self.width)

    def check(self, images: Tensor, name: str) -> None:
        """Raise ValueError for a batch (N, H, W, 3) that is not taken."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            kind = str(images.dtype).removeprefix("torch.")
            raise ValueError(f"Expected images uint8 (N, H, W, 3), but got {kind} {tuple(images.shape)}.")
        count, height, width = images.shape[:3]
        if not self.takes_size(height, width):
            raise ValueError(
                f"{name} takes images of {_told(self.height)} x {_told(self.width)} (height x width), but got "
                f"{height} x {width}. Resize the images, or export with input_size=({height}, {width}) or "
                "dynamic_size=True."
            )
        if not _within(count, self.batch):
            advice = "Export with dynamic_batch=True." if self.batch[1] == 1 else "Split the batch."
            raise ValueError(f"{name} takes {_told(self.batch)} image(s) at a time, but got {count}. {advice}")


def _within(value: int, allowed: Range) -> bool:
    least, most = allowed
    return least <= value and (most is None or value <= most)


def _told(allowed: Range) -> str:
    least, most = allowed
    if most is None:
        return f"at least {least}"
    return str(least) if least == most else f"{least} to {most}"


class Runtime(ABC):
    """Something that segments images. Calls from several threads at once are safe.

    Args:
        name: What errors call it: a path, a URL, a class.
        spec: The network's facts.
        facts: What the artifact says of itself; see `metadata`.
        device: Where it runs, and where `prepare`, `infer` and `masks` leave their results.
        accepts: The images that it takes.

    Attributes:
        metadata: "preprocess": whether it takes uint8 (N, H, W, 3) and normalises inside, otherwise normalised
            float32 (N, 3, H, W); "argmax": whether it returns uint8 masks (N, H, W), otherwise float32 logits
            (N, C, H, W); "precision"; and of files all that lies in their metadata.
    """

    def __init__(
        self, name: str, spec: NetworkSpec, facts: Mapping[str, Any], device: torch.device, accepts: Accepts
    ) -> None:
        self.name = name
        self.spec = spec
        self.metadata = facts
        self.device = device
        self.accepts = accepts

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """From host to host: uint8 RGB (N, H, W, 3) -> uint8 masks (N, H, W).

        Raises:
            ValueError: For images of another type or size than it takes.
            RuntimeError: If the runtime below fails.
        """
        masks = self.masks(self.infer(self.prepare(torch.from_numpy(images))))
        return np.asarray(masks.cpu().numpy())

    def segment(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) on any device -> class ids (N, H, W) uint8 on this one's; errors as `__call__`."""
        return self.masks(self.infer(self.prepare(images.permute(0, 2, 3, 1))))

    def logits(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) on any device -> float32 logits (N, C, H, W) on this one's.

        Raises:
            ValueError: As `__call__`, and if the artifact returns masks.
        """
        if self.metadata["argmax"]:
            raise ValueError(f"{self.name} returns masks, not logits; export the network with argmax=False.")
        return self.infer(self.prepare(images.permute(0, 2, 3, 1)))

    def logits_at_stride(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) -> float32 logits (N, C, h, w), at the network's stride where the artifact has it."""
        return self.logits(images)

    def prepare(self, images: Tensor) -> Tensor:
        """First stage: check the images, bring them to the device and into the form that the artifact takes."""
        self.accepts.check(images, self.name)
        images = images.to(self.device, non_blocking=True)
        if self.metadata["preprocess"]:
            return images.contiguous()
        return self.spec.normalize(images.permute(0, 3, 1, 2)).contiguous()

    @abstractmethod
    def infer(self, inputs: Tensor) -> Tensor:
        """Second stage: run the artifact on what `prepare` returned."""

    def masks(self, outputs: Tensor) -> Tensor:
        """Third stage: class ids from what `infer` returned."""
        return outputs if self.metadata["argmax"] else to_mask(outputs).to(torch.uint8)

    def synchronize(self) -> None:
        """Wait until the device has done what this thread asked of it: the results of all stages are on its stream.

        Waiting for the whole device would break the CUDA graph that another thread may be recording.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


DEVICE_TYPES = ("cpu", "cuda", "mps")


def choose_device(device: str | torch.device = "auto", types: Sequence[str] = DEVICE_TYPES) -> torch.device:
    """Choose a torch device by name; the one rule for device="auto", in training too.

    "auto" is torch's current accelerator if there is one, otherwise the CPU. "cuda" without an index is torch's current
    GPU, and the index is filled in, because torch, TensorRT and ONNX Runtime differ in the GPU that they take then.

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
    check_choice("device", kind, ("auto", *types))
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
    """A network in torch, in its own precision; logits are brought to the images' size.

    Args:
        module: In eval mode; also one that was given to `torch.compile`. It is moved to the device.
        device: "auto": a CUDA GPU if there is one. None: where the module is.
        name: What errors call it; None: the network's name.
    """

    def __init__(self, module: nn.Module, device: str | torch.device | None = None, *, name: str | None = None) -> None:
        parameter = next(module.parameters(), None)
        where = choose_device(device or (parameter.device if parameter is not None else "cpu"))
        precision = parameter.dtype if parameter is not None else torch.float32
        self.module = module.to(where)
        spec = get_spec(module)
        facts = {"preprocess": False, "argmax": False, "precision": str(precision).removeprefix("torch.")}
        super().__init__(name or spec.name or type(module).__name__, spec, facts, where, Accepts())

    @torch.inference_mode()
    def infer(self, inputs: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) -> float32 logits (N, C, H, W) of the images' size."""
        return full_size_logits(self.module, inputs, self.spec.size_divisor)
