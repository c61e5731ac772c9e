"""Feature maps inside a network, by module path.

A path is the name of a module in `named_modules`. It refers to the output of the module, or with the suffix ``:input``
to its first input. For example, "decode_head.dropout:input" is the last feature map of a zoo network before dropout
and classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bpkd_sdk.errors import did_you_mean, format_list
from bpkd_sdk.sizes import check_size
from bpkd_sdk.views import ViewedNetwork

INPUT = ":input"

_HEADS = ("segmentation_head", "classifier")  # segmentation-models-pytorch; torchvision
_DROPOUT = (nn.Dropout, nn.Dropout2d)


class Capture:
    """Recorder of feature maps: it records every forward pass until `remove` or the end of a ``with`` block.

    For a compiled network, create it before the first forward pass: torch.compile ignores hooks that are added later.

    Args:
        module: Network; wrappers such as torch.compile and DistributedDataParallel are allowed.
        paths: Module paths, see the docstring of this file.

    Raises:
        ValueError: If a path does not exist; the error lists the existing ones.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> with Capture(network, ["1"]) as capture:
        ...     logits = network(torch.zeros(1, 3, 5, 5))
        ...     {path: tuple(feature.shape) for path, feature in capture.take().items()}
        {'1': (1, 8, 3, 3)}
    """

    def __init__(self, module: nn.Module, paths: Iterable[str]) -> None:
        self.paths = tuple(paths)
        self._recorded: dict[str, Any] = {}
        parts = [(path, find_module(module, path)) for path in self.paths]
        self._handles = [_hook(part, path, self._recorded.__setitem__) for path, part in parts]

    def take(self) -> dict[str, Tensor]:
        """Return the feature maps (N, D, h, w) of the last forward pass by path, and release them.

        Raises:
            RuntimeError: If a module did not run.
            TypeError: If a recorded value is not a feature map.
        """
        recorded = {path: self._recorded.pop(path, None) for path in self.paths}
        for path, value in recorded.items():
            if value is None:
                raise RuntimeError(f"The module at {path!r} did not run in this forward pass. Choose another path.")
            if not _is_map(value):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"Expected a feature map (N, D, h, w) at {path!r}, but got {got}. "
                    "`list_features` lists the modules that return one."
                )
        return recorded

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for handle in self._handles:
            handle.remove()
        self._recorded.clear()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _hook(module: nn.Module, path: str, record: Callable[[str, Any], None]) -> torch.utils.hooks.RemovableHandle:
    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        record(path, inputs[0] if inputs else None)

    def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        record(path, output)

    return module.register_forward_pre_hook(before) if path.endswith(INPUT) else module.register_forward_hook(after)


def find_module(module: nn.Module, path: str) -> nn.Module:
    """Return the module at a path inside a network; wrappers around the network are not part of the path.

    Raises:
        ValueError: If the path does not exist; the error states the nearest path and lists those on the same level.
    """
    modules: dict[str, nn.Module] = dict(unwrap(module).named_modules())
    name = path.removesuffix(INPUT)
    if name and name in modules:
        return modules[name]
    existing = [key for key in modules if key]
    parent = name
    while parent and parent not in modules:
        parent = parent.rpartition(".")[0]
    below = [f"{parent}.{child}" if parent else child for child, _ in modules[parent].named_children()]
    raise ValueError(
        f"The network has no module at {path!r}.{did_you_mean(name, existing)} "
        f"The modules in {repr(parent) if parent else 'the network'} are:\n{format_list(below, limit=30)}"
    )


def unwrap(module: nn.Module) -> nn.Module:
    """Return the network inside wrappers: torch.compile, DistributedDataParallel, DataParallel, `ViewedNetwork`."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
        elif isinstance(module, ViewedNetwork):
            module = module.network
        elif isinstance(original := getattr(module, "_orig_mod", None), nn.Module):
            module = original
        else:
            return module


def feature_path(module: nn.Module) -> str:
    """Return the path of the last feature map before the classifier, and before the classifier's dropout.

    The heads of the zoo (every network with a `decode_head.dropout`), of segmentation-models-pytorch and of torchvision
    are found by name. For any other network the path is the input of the last convolution that was registered outside
    an auxiliary head.

    Raises:
        ValueError: If no such convolution exists.

    Examples:
        >>> feature_path(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 2, 1)))
        '2:input'
    """
    network = unwrap(module)
    modules = dict(network.named_modules())
    if isinstance(modules.get("decode_head.dropout"), _DROPOUT):
        return f"decode_head.dropout{INPUT}"
    for head in (*_HEADS, ""):
        convolutions = [
            name
            for name, part in modules.items()
            if isinstance(part, nn.Conv2d) and f"{name}.".startswith(f"{head}." if head else "") and name[:3] != "aux"
        ]
        if convolutions:
            return _before_dropout(modules, convolutions[-1]) + INPUT
    raise ValueError(
        f"Found no convolution in {type(network).__name__} that could compute its logits, so that its last feature map "
        f"is unknown. Pass its path. The modules are:\n{format_list((name for name in modules if name), limit=30)}"
    )


def _before_dropout(modules: dict[str, nn.Module], name: str) -> str:
    """Return the path of the dropout directly before a module of an nn.Sequential, or the module's own path."""
    parent, _, last = name.rpartition(".")
    if not isinstance(modules[parent], nn.Sequential):
        return name
    siblings = [child for child, _ in modules[parent].named_children()]
    position = siblings.index(last)
    while position and isinstance(modules[parent].get_submodule(siblings[position - 1]), _DROPOUT):
        position -= 1
    return f"{parent}.{siblings[position]}" if parent else siblings[position]


class FeatureRow(NamedTuple):
    """One row of `list_features`.

    Attributes:
        path: Module path.
        shape: Shape of the feature map for one image, (1, D, h, w).
        is_default: Whether methods use this feature map if no path is specified.
    """

    path: str
    shape: tuple[int, ...]
    is_default: bool


def list_features(module: nn.Module, input_size: tuple[int, int] = (512, 512)) -> list[FeatureRow]:
    """List the modules whose output is a feature map, in the order of their first run, with shapes for one image.

    The list also contains the path that `feature_path` returns, which may be the input of a module.

    Args:
        module: Network on any device. It runs once in eval mode; afterwards its modules have their previous modes.
        input_size: Height and width of the image in pixels.
    """
    input_size = check_size("input_size", input_size)
    network = unwrap(module)
    default = _default_path(network)
    rows: dict[str, FeatureRow] = {}

    def record(path: str, value: Any) -> None:
        if _is_map(value):
            rows.setdefault(path, FeatureRow(path, tuple(value.shape), path == default))

    paths = [path for path, _ in network.named_modules() if path]
    if default is not None:
        paths.insert(0, default)
    handles = [_hook(find_module(network, path), path, record) for path in paths]
    reference = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with eval_mode(network), torch.no_grad():
            channels = getattr(getattr(network, "spec", None), "in_channels", 3)
            network(torch.zeros(1, channels, *input_size, device=reference.device, dtype=reference.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return list(rows.values())


def _default_path(network: nn.Module) -> str | None:
    try:
        return feature_path(network)
    except ValueError:
        return None


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set a module to eval mode within a ``with`` block; afterwards every submodule has its previous mode."""
    was_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in was_training:
            part.training = True
