"""Weights that an encoder starts from: files of them, the downloads of other libraries, and their origin."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bpkd_sdk.errors import check_choice
from bpkd_sdk.files import file_sha256
from bpkd_sdk.hub import CONNECTION_SECONDS, without_retries
from bpkd_sdk.models.checkpoint import load_state

NONE, IMAGENET = "none", "imagenet"
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

_NO_DOWNLOAD = (ValueError, TypeError, KeyError, AssertionError, AttributeError)
_PREFIXES = ("module.", "backbone.", "encoder.", "model.", "features.")  # of encoders inside networks and wrappers


def check_backbone_weights(weights: object) -> str:
    """Return the value of `backbone_weights` as a string.

    Raises:
        TypeError: If it is neither a name nor a path.
        FileNotFoundError: If it is the path of a file that does not exist.
    """
    if not isinstance(weights, (str, Path)):
        raise TypeError(
            f"Expected `backbone_weights` to be {IMAGENET!r}, {NONE!r} or the path of a file, but got {weights!r}."
        )
    if is_file(weights) and not Path(weights).is_file():
        raise FileNotFoundError(
            f"There is no file {weights}. Pass backbone_weights=<an existing file>, {IMAGENET!r} or {NONE!r}."
        )
    return str(weights)


def is_file(weights: str | Path) -> bool:
    """Return whether `backbone_weights` is the path of a file, and not the name of weights that a library has."""
    return Path(weights).suffix.lower() in FILE_SUFFIXES


def check_known_weights(weights: str) -> None:
    """Raise ValueError unless `backbone_weights` is "none", "imagenet" or the path of a file."""
    if not is_file(weights):
        check_choice("backbone_weights", weights, (NONE, IMAGENET))


@contextmanager
def explained_download(weights: str, network: str, cache: str | None = None) -> Iterator[None]:
    """Turn the errors of a download into one RuntimeError that states what to do without a connection.

    Without a connection the download fails within seconds. Errors of the network's own code (ValueError, TypeError,
    ...) pass unchanged.

    Args:
        weights: Value of `backbone_weights`.
        network: Name of the network.
        cache: Folder in which the library looks for files before it downloads them. None: the cache of the Hugging
            Face Hub, from which it downloads them.
    """
    reason = None
    try:
        with without_retries() if cache is None else _limited_waiting() as reason:
            yield
    # The hub's client also raises the errors of its HTTP library, which have no common base class.
    except Exception as error:
        if isinstance(error, _NO_DOWNLOAD) and not isinstance(error, OSError):
            raise
        raise RuntimeError(
            f"The {weights!r} weights for the encoder of {network!r} are neither in the cache {cache or hub_cache()} "
            f"nor could they be downloaded: {reason or f'{type(error).__name__}: {error}'}\n"
            "Connect to the internet once, or copy that folder from a machine that has them. Or pass "
            f"backbone_weights={NONE!r} for random weights, or the path of a file with the encoder's weights."
        ) from error


@contextmanager
def _limited_waiting() -> Iterator[None]:
    """Limit the time in which a connection of Python's own client must answer within a ``with`` block."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before or CONNECTION_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hub_cache() -> str:
    """Return the folder in which the Hugging Face hub's client keeps its files."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def load_encoder_file(
    encoder: nn.Module, path: str | Path, *, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> dict[str, str]:
    """Load the weights of an encoder from a file, in place; weights of a classifier or a decoder are left out.

    The file contains a state dict of the encoder, of a classifier or of a network with this encoder. Prefixes such as
    ``backbone.`` are removed. Pickles are read without executing code.

    Args:
        encoder: Encoder to load the weights into.
        path: ``.safetensors``, or a file of `torch.save`.
        rename: Conversion of a state dict with another library's names, used if more names fit after it.

    Returns:
        The origin of the weights: the file and its SHA-256.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, lacks weights of the encoder, or has more layers than the encoder.
    """
    state = _read_state(Path(path))
    own = encoder.state_dict()
    names = {_without_prefix(key): key for key in own}
    content = _fit(state, names)
    if rename is not None:
        content = max(content, rename(content), key=lambda fitted: len(names.keys() & fitted.keys()))
    tops = {name.partition(".")[0] for name in names}
    if deeper := sorted(key for key in content.keys() - names.keys() if key.partition(".")[0] in tops):
        raise ValueError(
            f"{path} belongs to another encoder: it also contains {deeper[0]!r} and {len(deeper) - 1} more weights, "
            f"which {type(encoder).__name__} does not have. Pass the weights of this encoder."
        )
    # Old files lack the batch counters of batch norm, which do not influence the result.
    loaded = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    loaded |= {key: _adapt_channels(content[name], own[key]) for name, key in names.items() if name in content}
    load_state(encoder, loaded, source=str(path))
    return {"file": str(path), "sha256": file_sha256(path)}


def _adapt_channels(weight: Tensor, own: Tensor) -> Tensor:
    """Adapt the weights of a first layer of three channels to another number of channels, as timm does."""
    channels = own.shape[1] if own.ndim == 4 and weight.ndim == 4 else 3
    if weight.shape[1:2] != (3,) or channels == 3:
        return weight
    import timm

    adapted: Tensor = timm.models.adapt_input_conv(channels, weight)
    return adapted


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with the weights of an encoder.")
    try:
        if path.suffix.lower() == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Get it again.") from error
    except Exception as error:  # torch raises many kinds of errors for damaged pickles
        raise ValueError(
            f"{path} is not a readable PyTorch checkpoint of plain tensors ({type(error).__name__}). Get it again."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        content = {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(key: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), ""):
        key = key.removeprefix(prefix)
    return key


def _fit(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a state dict without prefixes, and with timm's names of flattened stages where the encoder has them."""
    tops = {name.partition(".")[0] for name in names}
    fitted = {}
    for key, value in state.items():
        name = _without_prefix(key)
        flat = name.replace(".", "_", 1)  # "stages.0.blocks" of a classifier is "stages_0.blocks" of timm's features
        fitted[flat if flat.partition(".")[0] in tops else name] = value
    return fitted
