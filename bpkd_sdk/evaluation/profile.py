"""How large a network is and how much one image costs it, in plain counts and in the paper's convention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bpkd_sdk.features import eval_mode
from bpkd_sdk.output import as_output


@dataclass(frozen=True)
class Profile:
    """The size of a network and the cost of one forward pass of one image, in eval mode.

    Attributes:
        params: All parameters, with those of an auxiliary head.
        macs: Multiply-accumulates of convolutions, linear layers and matrix products (attention's included).
        activations: Elements that those operations put out.
        activation_bytes: What all operations together write into new memory: an upper bound of what training keeps
            for the backward pass, not the peak of inference, which reuses memory.
        paper_macs: MACs as the paper's FLOPs column counts them: `macs`, and per batch norm 2 and per adaptive average
            pooling 1 for every input element, per bilinear resize 4 for every output element, with a last resize of
            the logits to the input size that the network itself leaves to its caller.
        by_operator: The terms of `paper_macs` by operator.
        not_counted: Operators that ran and that `macs` leaves out, such as activations and normalisation.
    """

    params: int
    macs: int
    activations: int
    activation_bytes: int
    paper_macs: int
    by_operator: Mapping[str, int]
    not_counted: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Floating point operations: a multiplication and an addition for each of `macs`."""
        return 2 * self.macs


def profile(model: nn.Module, input_size: tuple[int, int] = (512, 512)) -> Profile:
    """Count parameters and the operations of one forward pass.

    Args:
        model: Any network whose output `as_output` understands, on any device; on "meta" nothing is computed. It runs
            in eval mode, where an auxiliary head is idle, and is left as it was.
        input_size: Height and width of the image.

    Raises:
        TypeError: If the model returns no logits.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, 3, *input_size, device=like.device, dtype=like.dtype)
    counter = FlopCounterMode(display=False)
    watch = _Watch(counter)
    with eval_mode(model), torch.no_grad(), watch, counter:
        logits = as_output(model(image)).logits
    products: Counter[str] = Counter()
    for operator, flops in counter.get_flop_counts().get("Global", {}).items():
        products["conv" if "conv" in str(operator) else "matmul"] += flops // 2
    final_resize = Counter(upsample_bilinear2d=4 * logits.shape[1] * image.shape[2] * image.shape[3])
    by_operator = products + watch.extra + final_resize
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=products.total(),
        activations=watch.activations,
        activation_bytes=watch.bytes,
        paper_macs=by_operator.total(),
        by_operator=dict(by_operator),
        not_counted=tuple(sorted(watch.not_counted)),
    )


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a forward pass and sums up what the flop counter does not."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = counter.flop_registry
        self.extra: Counter[str] = Counter()
        self.not_counted: set[str] = set()
        self.activations = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = {leaf.untyped_storage()._cdata for leaf in _tensors(args)}
        # The first result only: what some kernels return beside it depends on the device.
        new = [leaf for leaf in _tensors(out)[:1] if leaf.numel() and leaf.untyped_storage()._cdata not in inputs]
        self.bytes += sum(leaf.nbytes for leaf in new)
        if func.overloadpacket in self.counted:
            self.activations += sum(leaf.numel() for leaf in new)
        elif new or func._schema.is_mutable:
            self.not_counted.add(name)
        self.extra += _extra(name, args, out)
        return out


def _extra(name: str, args: tuple[Any, ...], out: Any) -> Counter[str]:
    if "batch_norm" in name:
        return Counter(batch_norm=2 * args[0].numel())
    # Pooling to one cell reaches the dispatcher as a mean over exactly these dimensions.
    if "adaptive_avg_pool2d" in name or (name == "mean" and args[1:2] == ([-1, -2],)):
        return Counter(adaptive_avg_pool2d=args[0].numel())
    if name == "upsample_bilinear2d":
        return Counter(upsample_bilinear2d=4 * out.numel())
    return Counter()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
