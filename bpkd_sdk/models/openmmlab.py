"""Import of OpenMMLab's ``.pth`` checkpoints: read the file, identify the network of the zoo, load the weights.

The files are pickles. They are read by torch's restricted unpickler. Other objects that the training framework stored
beside the weights (log buffers, NumPy numbers) are replaced by empty placeholders, so that no code of the file or of
those packages runs.
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

from bpkd_sdk.errors import format_list
from bpkd_sdk.models.checkpoint import load_state
from bpkd_sdk.models.spec import set_spec
from bpkd_sdk.models.zoo import ZOO, SegmentationNetwork, build_network
from bpkd_sdk.spec import Color

# Prefixes of parameter names: of wrappers around the network, of a distiller's other parts, of the preprocessor, and of
# the auxiliary head.
_WRAPPERS = ("module.", "architecture.", "student.", "model.")
_DISTILLER = ("teacher.", "distiller.", "connectors.", "losses.", "distill_losses.", "align_modules.")
_PREPROCESSOR = ("data_preprocessor.",)
_AUXILIARY = ("auxiliary_head.",)

# Objects of these types are replaced by placeholders.
_IGNORED_GLOBALS = (
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{function}" for core in ("core", "_core") for function in ("_reconstruct", "scalar")),
)


# Early files for PASCAL Context 59 list the class names in another order than their logits, which always have
# alphabetical order: https://github.com/open-mmlab/mmsegmentation/blob/v0.11.0/mmseg/datasets/pascal_context.py
_EARLY_PASCAL_CONTEXT = ["aeroplane", "bicycle", "bird", "boat", "bottle"]


@dataclass(frozen=True)
class OpenMMLabCheckpoint:
    """Content of an OpenMMLab checkpoint.

    Attributes:
        state: Weights by OpenMMLab's names, without the prefix of a wrapper or distiller.
        class_names: One name per class; empty if the file has none, or has another number of them.
        palette: One RGB colour (0..255) per class; empty if the file has none, or has another number of them.
        left_out: Keys of the file that do not belong to the network: a distiller's teacher and losses, and the
            preprocessor.
    """

    state: dict[str, Tensor]
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    left_out: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """C, the number of channels of the logits."""
        return len(self.state["decode_head.conv_seg.weight"])

    @property
    def has_aux_head(self) -> bool:
        """Whether the file contains weights of an auxiliary head."""
        return any(key.startswith(_AUXILIARY) for key in self.state)


def read_openmmlab(path: str | Path) -> OpenMMLabCheckpoint:
    """Read a checkpoint of MMSegmentation 0.x or 1.x, of a distiller based on it, or a plain state dict.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is truncated, is not a checkpoint, or contains objects that would run code.
    """
    source = Path(path)
    content = _unpickle(source)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"Expected {source} to contain a dict with a 'state_dict', but it contains a {type(content).__name__}."
        )
    raw = content.get("state_dict", content)
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(key, str) for key in raw):
        raise ValueError(
            f"{source} has no weights: its state dict is empty, or is not a mapping from names to tensors."
        )
    others = [f"{key}: {type(value).__name__}" for key, value in raw.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{source} has entries among its weights that are not tensors:\n{format_list(others)}")
    state, left_out = _without_prefixes(dict(raw), str(source))
    meta = content.get("meta")
    class_names, palette = _classes(meta if isinstance(meta, Mapping) else {}, _num_classes(state, str(source)))
    return OpenMMLabCheckpoint(state, class_names, palette, left_out)


def identify(state: Mapping[str, Tensor], *, source: str = "The state dict") -> str:
    """Return the name of the network of the zoo whose parameter names and shapes are the most similar.

    Args:
        state: Weights by OpenMMLab's names; weights of an auxiliary head are ignored.
        source: Name of the file, for the error message.

    Raises:
        ValueError: If fewer than half of the entries fit the most similar network.
    """
    num_classes = _num_classes(state, source)
    entries = {(key, value.shape) for key, value in state.items() if not key.startswith(_AUXILIARY)}
    distances = {name: len(entries ^ _entries(name, num_classes)) for name in ZOO}
    nearest = min(distances, key=distances.__getitem__)
    if 2 * len(entries & _entries(nearest, num_classes)) < len(entries):
        raise ValueError(
            f"{source} does not fit any network of the zoo; the nearest, {nearest!r}, differs in "
            f"{distances[nearest]} names or shapes. The networks are: {', '.join(ZOO)}."
        )
    return nearest


def load_openmmlab(
    path: str | Path, name: str | None = None, num_classes: int | None = None, *, aux_head: bool = False
) -> SegmentationNetwork:
    """Build the network that an OpenMMLab checkpoint belongs to, load its weights, and set it to eval mode.

    Args:
        path: Checkpoint; no code in it is executed.
        name: Expected network, or None to accept any network of the zoo. If the file contains a variant of `name` (such
            as ``pspnet_r18b`` for ``pspnet_r18``), that variant is built, and `model.spec.name` is its name.
        num_classes: Expected number of classes, or None to accept any.
        aux_head: Whether to build the auxiliary head; otherwise its weights are left out.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is unreadable, contains objects that would run code, is for another network or number of
            classes, or has missing or unexpected weights.
    """
    checkpoint = read_openmmlab(path)
    identified = identify(checkpoint.state, source=str(path))
    if name is not None and name not in (identified, ZOO[identified].variant_of):
        raise ValueError(
            f"{path} contains {identified!r}, not {name!r}. Call create_model({identified!r}, ...) or use another file."
        )
    if num_classes is not None and num_classes != checkpoint.num_classes:
        raise ValueError(
            f"Expected {path} to have {num_classes} classes (num_classes), but its 'decode_head.conv_seg.weight' has "
            f"{checkpoint.num_classes}. Pass num_classes={checkpoint.num_classes}."
        )
    model = build_network(identified, checkpoint.num_classes, aux_head=aux_head)
    state = checkpoint.state if aux_head else _without(checkpoint.state, _AUXILIARY)
    load_state(model, state, source=str(path))
    set_spec(model, replace(model.spec, class_names=checkpoint.class_names, palette=checkpoint.palette))
    return model.eval()


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint exists at {path}.")
    placeholders = [(_Placeholder, name) for name in _IGNORED_GLOBALS]
    try:
        with torch.serialization.safe_globals(placeholders):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can raise any error in torch's reader: UnpicklingError, EOFError, KeyError, RuntimeError, ...
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is not None:
            raise ValueError(
                f"{path} was refused: its pickle refers to {refused[1]!r}, which is neither a tensor nor plain data. "
                "Nothing was executed. If you trust the file, save only its state dict on the machine that made it."
            ) from error
        raise ValueError(
            f"{path} is not a readable PyTorch checkpoint ({type(error).__name__}). "
            "It may be truncated, of another format, or not plain data; nothing was executed. Get it again."
        ) from error


class _Placeholder:
    """Replacement for an object in a pickle that is not needed; it stores nothing and does nothing."""

    def __new__(cls, *_: object) -> _Placeholder:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


def _without_prefixes(state: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    left_out: list[str] = []
    while prefix := next((wrapper for wrapper in _WRAPPERS if any(key.startswith(wrapper) for key in state)), None):
        left_out += [key for key in state if key.startswith(_DISTILLER)]
        state = _without(state, _DISTILLER)
        twice = [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) in state]
        if twice:
            raise ValueError(f"{source} has weights both with and without the prefix {prefix!r}:\n{format_list(twice)}")
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    left_out += [key for key in state if key.startswith(_PREPROCESSOR)]
    return _without(state, _PREPROCESSOR), tuple(left_out)


def _without(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _num_classes(state: Mapping[str, Tensor], source: str) -> int:
    classifier = state.get("decode_head.conv_seg.weight")
    if classifier is None or classifier.ndim != 4 or not len(classifier):
        raise ValueError(
            f"{source} is not a checkpoint of a segmentation network: it has no 'decode_head.conv_seg.weight' of shape "
            f"(classes, channels, 1, 1). Its weights are:\n{format_list(state, limit=5)}"
        )
    return len(classifier)


@cache
def _entries(name: str, num_classes: int) -> set[tuple[str, torch.Size]]:
    """Return the parameter names and shapes of a network of the zoo."""
    with torch.device("meta"):
        network = build_network(name, num_classes)
    return {(key, value.shape) for key, value in network.state_dict().items()}


def _classes(meta: Mapping[Any, Any], count: int) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Return class names and palette from the metadata of MMSegmentation 1.x ("dataset_meta") or 0.x ("CLASSES")."""
    dataset_meta = meta.get("dataset_meta")
    facts = dataset_meta if isinstance(dataset_meta, Mapping) else {}
    names = _sequence(facts.get("classes", meta.get("CLASSES")))
    colors = [_sequence(color) for color in _sequence(facts.get("palette", meta.get("PALETTE")))]
    counts = (count, 2) if count == 1 else (count,)  # one logit separates two classes
    named = len(names) in counts and all(isinstance(name, str) for name in names)
    if named and count == 59 and names[:5] == _EARLY_PASCAL_CONTEXT:
        names = sorted(names)
    colored = len(colors) in counts and all(_is_color(color) for color in colors)
    return (
        tuple(names) if named else (),
        tuple((color[0], color[1], color[2]) for color in colors) if colored else (),
    )


def _sequence(value: Any) -> list[Any]:
    """Return a list or tuple as a list, and an empty list for any other value."""
    return list(value) if isinstance(value, (list, tuple)) else []


def _is_color(value: list[Any]) -> bool:
    return len(value) == 3 and all(isinstance(channel, int) and 0 <= channel <= 255 for channel in value)
