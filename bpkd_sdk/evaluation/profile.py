"""Counts of a network's parameters and operations, also by the paper's convention and for every network of the zoo."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bpkd_sdk.features import eval_mode
from bpkd_sdk.models import get_spec
from bpkd_sdk.models.mask_classification import adapt_network
from bpkd_sdk.models.zoo import ZOO, build_network
from bpkd_sdk.output import as_output
from bpkd_sdk.sizes import check_size


@dataclass(frozen=True)
class Profile:
    """The size of a network and the cost of one forward pass of one image, in eval mode.

    Attributes:
        params: Number of parameters, including those of an auxiliary head.
        macs: Number of multiply-accumulates of convolutions, linear layers and matrix products, including those of
            attention.
        activations: Number of elements in the outputs of the operations that `macs` counts.
        activation_bytes: Number of bytes that all operations write to new memory. It is an upper bound of the memory
            that training keeps for the backward pass. It is not the peak of inference, which reuses memory.
        paper_macs: Number of MACs by the convention of the paper's FLOPs column: `macs`; 2 per input element of batch
            norm; 1 per input element of adaptive average pooling; 4 per output element of bilinear resizing, including
            the final resize of the logits to the input size, which is not part of the network.
        by_operator: Summands of `paper_macs` by operator.
        not_counted: Names of the operators that ran but are not part of `macs`, such as activations and normalisation.
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
        """Number of floating point operations: one multiplication and one addition for each of `macs`."""
        return 2 * self.macs


def profile(model: nn.Module, input_size: tuple[int, int] = (512, 512)) -> Profile:
    """Count parameters and the operations of one forward pass.

    Args:
        model: Network whose output `as_output` accepts, on any device. On the "meta" device only shapes are computed.
            It runs in eval mode, in which an auxiliary head is inactive; its own mode is restored afterwards.
        input_size: (height, width) of the image.

    Raises:
        TypeError: If the model returns no logits.
    """
    input_size = check_size("input_size", input_size)
    model = adapt_network(model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, get_spec(model).in_channels, *input_size, device=like.device, dtype=like.dtype)
    counter = FlopCounterMode(display=False)
    observer = _OperationCounter(counter)
    with eval_mode(model), _frozen(model), torch.no_grad(), observer, counter:
        logits = as_output(model(image)).logits
    products: Counter[str] = Counter()
    for operator, flops in counter.get_flop_counts().get("Global", {}).items():
        products["conv" if "conv" in str(operator) else "matmul"] += flops // 2
    final_resize = Counter(upsample_bilinear2d=4 * logits.shape[1] * image.shape[2] * image.shape[3])
    by_operator = products + observer.extra + final_resize
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=products.total(),
        activations=observer.activations,
        activation_bytes=observer.bytes,
        paper_macs=by_operator.total(),
        by_operator=dict(by_operator),
        not_counted=tuple(sorted(observer.not_counted)),
    )


def count_macs(model: nn.Module, input_size: tuple[int, int], size_divisor: int = 1) -> int | None:
    """Count the MACs of one image as `profile` does, by shapes alone; None if the network's code needs values.

    Args:
        model: Network, which is not changed.
        input_size: (height, width) of the image, which is padded to multiples of `size_divisor`.
        size_divisor: Number that both sides of the network's input are multiples of.
    """
    height, width = (side + -side % size_divisor for side in input_size)
    try:
        return profile(copy.deepcopy(model).to("meta"), (height, width)).macs
    except Exception:  # the network's own code may raise any error when tensors have no values
        return None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient within a ``with`` block; torch's counter fails for some views of them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class _OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that receives every operation of a forward pass, and sums up what torch's counter leaves out."""

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
        # Only the first result: further results of some kernels depend on the device.
        new = [leaf for leaf in _tensors(out)[:1] if leaf.numel() and leaf.untyped_storage()._cdata not in inputs]
        self.bytes += sum(leaf.nbytes for leaf in new)
        if func.overloadpacket in self.counted:
            self.activations += sum(leaf.numel() for leaf in new)
        elif new or func._schema.is_mutable:
            self.not_counted.add(name)
        self.extra += _paper_extra(name, args, out)
        return out


def _paper_extra(name: str, args: tuple[Any, ...], out: Any) -> Counter[str]:
    """Return the MACs of an operation that only the paper's convention counts."""
    if "batch_norm" in name:
        return Counter(batch_norm=2 * args[0].numel())
    # The dispatcher receives pooling to one cell as a mean over these dimensions.
    if "adaptive_avg_pool2d" in name or (name == "mean" and args[1:2] == ([-1, -2],)):
        return Counter(adaptive_avg_pool2d=args[0].numel())
    if name == "upsample_bilinear2d":
        return Counter(upsample_bilinear2d=4 * out.numel())
    return Counter()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class ZooProfile:
    """Counted cost of one network of the zoo beside the paper's figures.

    The setting is the paper's: 150 classes, images of 512x512, parameters including the auxiliary head.

    Attributes:
        name: Name of the network for `create_model`.
        params: Number of parameters.
        paper_params: Parameters stated in the paper, in millions; None for a network that is not in its table.
        paper_macs: Number of MACs by the paper's convention, see `Profile`.
        paper_gflops: FLOPs stated in the paper, in billions; None for a network that is not in its table.
        macs: Number of MACs of convolutions, linear layers and matrix products.
        stride: Ratio of the input size to the size of the logits.
    """

    name: str
    params: int
    paper_params: float | None
    paper_macs: int
    paper_gflops: float | None
    macs: int
    stride: int


def profile_zoo() -> Iterator[ZooProfile]:
    """Count the cost of every network of the zoo, on the "meta" device, which computes only shapes."""
    for entry in ZOO.values():
        with torch.device("meta"):
            network = build_network(entry.name, 150, aux_head=entry.has_aux_head)
        cost = profile(network)
        yield ZooProfile(
            name=entry.name,
            params=cost.params,
            paper_params=entry.paper_params,
            paper_macs=cost.paper_macs,
            paper_gflops=entry.paper_gflops,
            macs=cost.macs,
            stride=entry.stride,
        )
