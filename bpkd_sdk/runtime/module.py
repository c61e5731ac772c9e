"""The `Runtime` of torch modules, and the logits of a module for images of any size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.arrays import as_tensor, resize_bilinear
from bpkd_sdk.errors import no_network
from bpkd_sdk.models import load_model
from bpkd_sdk.models.mask_classification import adapt_network
from bpkd_sdk.models.spec import get_spec
from bpkd_sdk.output import as_output
from bpkd_sdk.runtime.base import AcceptedImages, Runtime
from bpkd_sdk.runtime.device import choose_device


class TorchRuntime(Runtime):
    """A torch module, run in its own precision; its logits are resized to the images' size.

    Args:
        module: Network in eval mode, which is moved to the device; the result of `torch.compile` is allowed.
        device: Device name of `choose_device`; None: the module's device.
        name: Name in error messages; None: the network's name.
    """

    is_module = True

    def __init__(self, module: nn.Module, device: str | torch.device | None = None, *, name: str | None = None) -> None:
        parameter = next(module.parameters(), None)
        chosen = choose_device(device or (parameter.device if parameter is not None else "cpu"))
        precision = parameter.dtype if parameter is not None else torch.float32
        self.module = adapt_network(module).to(chosen)
        spec = get_spec(module)
        metadata = {"preprocess": False, "argmax": False, "precision": str(precision).removeprefix("torch.")}
        super().__init__(name or spec.name or type(module).__name__, spec, metadata, chosen, AcceptedImages())

    def prepare(self, images: Any) -> Any:
        """Check images (N, H, W, channels), and return them normalised as a tensor on the device."""
        return super().prepare(as_tensor(images))

    @torch.inference_mode()
    def infer(self, inputs: Tensor) -> Tensor:
        """Compute float32 logits (N, C, H, W) of the images' size from normalised images (N, channels, H, W)."""
        return full_size_logits(self.module, inputs, self.spec.size_divisor)


def open_module(module: nn.Module, device: str | torch.device) -> TorchRuntime:
    """Open a module; raise TypeError if it is none, and ValueError if it is in training mode."""
    if not isinstance(module, nn.Module):
        raise no_network(module, "a path, a URL, the name of a network, a torch module or a runtime")
    if any(part.training for part in module.modules()):
        raise ValueError("The network is in training mode. Call model.eval() first.")
    return TorchRuntime(module, device)


def open_torch_runtime(path: str, device: str | torch.device) -> TorchRuntime:
    """Open a checkpoint of bpkd-sdk or of OpenMMLab (``.pth``), or a network by name, with `load_model`."""
    return TorchRuntime(load_model(path), device, name=path)


def whole_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Compute the logits of whole images, at the images' size.

    Args:
        model: A segmentation network in eval mode.
        images: (N, channels, H, W) in the range of the network's images, on the network's device.

    Returns:
        (N, C, H, W) float32.
    """
    spec = get_spec(model)
    return full_size_logits(model, spec.normalize(images), spec.size_divisor)


def full_size_logits(model: nn.Module, inputs: Tensor, divisor: int) -> Tensor:
    """Run a network on normalised images of any size, and resize its logits to that size.

    The images are padded at the right and bottom to multiples of `divisor` and converted to the network's precision.
    The logits are resized bilinearly (align_corners False) to the padded size and then cropped.

    Args:
        model: A segmentation network in eval mode.
        inputs: (N, channels, H, W) float32, normalised.
        divisor: Number that both sides of the network's input must be multiples of.

    Returns:
        (N, C, H, W) float32.
    """
    height, width = inputs.shape[2:]
    padded = pad_to_multiple(inputs, divisor)
    precision = next((parameter.dtype for parameter in model.parameters()), inputs.dtype)
    logits = as_output(model(padded.to(precision))).logits.float()
    if logits.shape[2:] != padded.shape[2:]:
        logits = resize_bilinear(logits, padded.shape[2:])
    return logits[:, :, :height, :width]


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Append zeros at the right and bottom until both sides are multiples of `divisor`."""
    height, width = images.shape[2:]
    if height % divisor == 0 and width % divisor == 0:
        return images
    return F.pad(images, (0, -width % divisor, 0, -height % divisor))
