"""OpenMMLab's ``.pth`` files: what is inside, which network of the zoo it is, and how it gets its weights.

Such a file is a pickle. It is read by torch's restricted unpickler, and what the training framework left in it beside
weights (log buffers, NumPy numbers) becomes empty stand-ins: no code of the file or of those packages runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpkd_sdk.errors import listed
from bpkd_sdk.models.checkpoint import load_state
from bpkd_sdk.models.spec import Color, set_spec
from bpkd_sdk.models.zoo import ZOO, SegmentationNetwork, build

SUFFIXES = (".pth", ".pt")

WRAPPERS = ("module.", "architecture.", "student.", "model.")
DISTILLER = ("teacher.", "distiller.", "connectors.", "losses.", "distill_losses.", "align_modules.")
PREPROCESSOR = ("data_preprocessor.",)
AUXILIARY = ("auxiliary_head.",)


class _StandIn:
    """Takes the place of an object in a pickle that is of no interest here; keeps nothing and does nothing."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


_IGNORED_GLOBALS = (
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{function}" for core in ("core", "_core") for function in ("_reconstruct", "scalar")),
)


# Files for PASCAL Context 59 of early versions name the classes in another order than that of their logits, which has
# always been alphabetical: https://github.com/open-mmlab/mmsegmentation/blob/v0.11.0/mmseg/datasets/pascal_context.py
_EARLY_PASCAL_CONTEXT = ["aeroplane", "bicycle", "bird", "boat", "bottle"]


@dataclass(frozen=True)
class OpenMMLabCheckpoint:
    """What an OpenMMLab file holds.

    Attributes:
        state: Weights by OpenMMLab's own names, without a distiller's prefix.
        class_names: One per class; empty if the file does not say, or says another number of classes.
        palette: One RGB colour per class; likewise.
        left_out: Keys of the file that belong to no network: a distiller's teacher and losses, the preprocessor.
    """

    state: dict[str, Tensor]
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    left_out: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return len(self.state["decode_head.conv_seg.weight"])

    @property
    def has_aux_head(self) -> bool:
        """Whether the file has weights of an auxiliary head."""
        return any(key.startswith(AUXILIARY) for key in self.state)


def read_openmmlab(path: str | Path) -> OpenMMLabCheckpoint:
    """Read a checkpoint of MMSegmentation 0.x or 1.x, of a distiller built on it, or a bare state dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is not a checkpoint, or asks for code to be run.
    """
    source = Path(path)
    content = _unpickle(source)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"Expected {source} to hold a dict with a 'state_dict', but it holds a {type(content).__name__}."
        )
    raw = content.get("state_dict", content)
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(key, str) for key in raw):
        raise ValueError(
            f"{source} has no weights: its state dict is not a mapping from names to tensors, or is empty."
        )
    strange = [f"{key}: {type(value).__name__}" for key, value in raw.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{source} has entries among its weights that are not tensors:\n{listed(strange)}")
    state, left_out = _unwrapped(dict(raw), str(source))
    meta = content.get("meta")
    class_names, palette = _classes(meta if isinstance(meta, Mapping) else {}, _num_classes(state, str(source)))
    return OpenMMLabCheckpoint(state, class_names, palette, left_out)


def identify(state: Mapping[str, Tensor], *, source: str = "The state dict") -> str:
    """The network of the zoo whose parameter names and shapes are nearest to a state dict's.

    Args:
        state: Weights by OpenMMLab's names; those of an auxiliary head play no part.
        source: What to call it in an error text.

    Raises:
        ValueError: If fewer than half of the entries fit the nearest.
    """
    num_classes = _num_classes(state, source)
    entries = {(key, value.shape) for key, value in state.items() if not key.startswith(AUXILIARY)}
    distances = {name: len(entries ^ _entries(name, num_classes)) for name in ZOO}
    nearest = min(distances, key=distances.__getitem__)
    if 2 * len(entries & _entries(nearest, num_classes)) < len(entries):
        raise ValueError(
            f"{source} belongs to no network of the zoo; the nearest, {nearest!r}, differs in "
            f"{distances[nearest]} names or shapes. Known are: {', '.join(ZOO)}."
        )
    return nearest


def load_openmmlab(
    path: str | Path, name: str | None = None, num_classes: int | None = None, *, aux_head: bool = False
) -> SegmentationNetwork:
    """Build the network that an OpenMMLab file belongs to and load its weights, every key accounted for; in eval mode.

    Args:
        path: The file; never executed.
        name: The expected network, or None to take what the file holds. Where the file holds a variant of it (such as
            ``pspnet_r18b`` for ``pspnet_r18``), the variant is built; `model.spec.name` says which.
        num_classes: The expected number of classes, or None to take the file's.
        aux_head: Keep the auxiliary head; without it, its keys are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is unreadable, hostile, of another network or number of classes, or does not fit.
    """
    checkpoint = read_openmmlab(path)
    found = identify(checkpoint.state, source=str(path))
    if name is not None and name not in (found, ZOO[found].variant_of):
        raise ValueError(f"{path} holds {found!r}, not {name!r}. Use create_model({found!r}, ...), or another file.")
    if num_classes is not None and num_classes != checkpoint.num_classes:
        raise ValueError(
            f"{path} is for {checkpoint.num_classes} classes (the channels of 'decode_head.conv_seg.weight'), but "
            f"num_classes={num_classes} was asked for. Pass num_classes={checkpoint.num_classes}."
        )
    model = build(found, checkpoint.num_classes, aux_head=aux_head)
    state = checkpoint.state if aux_head else _without(checkpoint.state, AUXILIARY)
    load_state(model, state, source=str(path))
    set_spec(model, replace(model.spec, class_names=checkpoint.class_names, palette=checkpoint.palette))
    return model.eval()


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    stand_ins = [(_StandIn, name) for name in _IGNORED_GLOBALS]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle makes torch's reader fail in any way: UnpicklingError, EOFError, KeyError, RuntimeError, ...
    except Exception as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is not None:
            raise ValueError(
                f"{path} was refused: its pickle asks for {wanted[1]!r}, which is neither a tensor nor plain data. "
                "Nothing was executed. If you trust the file, save its state dict alone where it was made."
            ) from error
        raise ValueError(
            f"{path} is not a readable PyTorch checkpoint ({type(error).__name__}). "
            "It may be truncated, of another format, or not plain data; nothing was executed. Fetch it again."
        ) from error


def _unwrapped(state: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    left_out: list[str] = []
    while prefix := next((wrapper for wrapper in WRAPPERS if any(key.startswith(wrapper) for key in state)), None):
        left_out += [key for key in state if key.startswith(DISTILLER)]
        state = _without(state, DISTILLER)
        twice = [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) in state]
        if twice:
            raise ValueError(f"{source} has these weights both with and without {prefix!r}:\n{listed(twice)}")
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    left_out += [key for key in state if key.startswith(PREPROCESSOR)]
    return _without(state, PREPROCESSOR), tuple(left_out)


def _without(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _num_classes(state: Mapping[str, Tensor], source: str) -> int:
    classifier = state.get("decode_head.conv_seg.weight")
    if classifier is None or classifier.ndim != 4 or not len(classifier):
        raise ValueError(
            f"{source} is no checkpoint of a segmentation network: it has no 'decode_head.conv_seg.weight' of shape "
            f"(classes, channels, 1, 1). It has:\n{listed(state, limit=5)}"
        )
    return len(classifier)


@cache
def _entries(name: str, num_classes: int) -> set[tuple[str, torch.Size]]:
    with torch.device("meta"):
        network = build(name, num_classes)
    return {(key, value.shape) for key, value in network.state_dict().items()}


def _classes(meta: Mapping[Any, Any], count: int) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    newer = meta.get("dataset_meta")
    facts = newer if isinstance(newer, Mapping) else {}
    names = _sequence(facts.get("classes", meta.get("CLASSES")))
    colors = [_sequence(color) for color in _sequence(facts.get("palette", meta.get("PALETTE")))]
    named = len(names) == count and all(isinstance(name, str) for name in names)
    if named and count == 59 and names[:5] == _EARLY_PASCAL_CONTEXT:
        names = sorted(names)
    colored = len(colors) == count and all(_is_color(color) for color in colors)
    return (
        tuple(names) if named else (),
        tuple((color[0], color[1], color[2]) for color in colors) if colored else (),
    )


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _is_color(value: list[Any]) -> bool:
    return len(value) == 3 and all(isinstance(channel, int) and 0 <= channel <= 255 for channel in value)
