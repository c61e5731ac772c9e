"""The teacher: images in, what the method learns from out, without a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bpkd_sdk.features import Capture
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.runtime import Runtime
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.objective import network_input, runner

Guide = nn.Module | Runtime
Teacher = Callable[[Tensor], SegmentationOutput]  # from uint8 images (N, 3, h, w) on the device


def create_teacher(
    guide: Guide, capture: Capture, config: TrainingConfig, device: torch.device, dtype: torch.dtype
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
        return lambda images: SegmentationOutput(ask(guide, images))
    return ModuleTeacher(guide, capture, config, device, dtype)


def ask(runtime: Runtime, images: Tensor) -> Tensor:
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
