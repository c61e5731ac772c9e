"""A torch module as a `Runtime`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpkd_sdk.models.spec import get_spec
from bpkd_sdk.runtime.base import Accepts, Runtime
from bpkd_sdk.runtime.device import choose_device
from bpkd_sdk.runtime.inference import full_size_logits


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
