"""Checkpoints of this package: safetensors files with a JSON header that describes the network.

`bpkd_sdk.models.load_model` opens these files and OpenMMLab's. Pickles are never loaded here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from bpkd_sdk.errors import format_list
from bpkd_sdk.features import unwrap
from bpkd_sdk.files import CHECKPOINT_SUFFIX, write_atomically
from bpkd_sdk.models.mask_classification import adapt_network
from bpkd_sdk.models.spec import set_provenance, set_spec
from bpkd_sdk.spec import NetworkSpec

FORMAT = "bpkd-sdk/1"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON header to one safetensors file, atomically.

    Args:
        path: File to write.
        tensors: Tensors by name, on any device.
        header: Plain JSON values.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"bpkd": json.dumps(dict(header))}))


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file of this package.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is truncated, is not a safetensors file, or has no header of this package.
    """
    return _open(Path(path), tensors=False)[0]


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors (on the CPU) of a safetensors file of this package.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is truncated, is not a safetensors file, or has no header of this package.
    """
    return _open(Path(path), tensors=True)


def _open(path: Path, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint exists at {path}.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {}).get("bpkd", "null"))
            content = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). It may be truncated, or of another format: "
            "checkpoints of other libraries that are pickles (.pt, .pth) are not loaded here."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"{path} contains tensors but no bpkd-sdk header of format {FORMAT!r}, so that its network is unknown. "
            "Build the network yourself, load the tensors into it, then call `save_model(model, path)`."
        )
    return header, content


def save_model(model: nn.Module, path: str | Path, *, training: Mapping[str, Any] | None = None) -> None:
    """Save the weights of a network together with the facts that `load_model` needs to build it again.

    Args:
        model: Network of `create_model`, or any module; a module of your own class can have a `NetworkSpec` as
            `model.spec`. If torch.compile or DistributedDataParallel wraps the network, the network inside is saved.
        path: File to write, ending in ``.safetensors``. It is written under a temporary name, then renamed.
        training: Settings of the training run (plain JSON values), stored in the header.

    Raises:
        ValueError: If `path` has another suffix.
    """
    from bpkd_sdk.models.library import identify

    target = Path(path)
    if target.suffix != CHECKPOINT_SUFFIX:
        raise ValueError(f"Expected a path that ends in {CHECKPOINT_SUFFIX!r}, but got {str(path)!r}.")
    network = adapt_network(unwrap(model))
    state = network.state_dict()
    header = {
        "format": FORMAT,
        "network": identify(model).to_dict(),
        "class": f"{type(network).__module__}.{type(network).__qualname__}",
        "training": dict(training or {}),
        "versions": {package: version(package) for package in ("torch", "bpkd-sdk")},
        "sha256": content_hash(state),
    }
    write_tensors(target, state, header)


def content_hash(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 over names, dtypes, shapes and bytes of a state dict, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", *, model: nn.Module | None = None
) -> nn.Module:
    """Build the network that a ``.safetensors`` checkpoint describes, load its weights, and set it to eval mode.

    `model.provenance` then contains the settings of the training run (plain JSON values).

    Args:
        path: File written by `save_model`, `train` or `distill`.
        device: Device that the network is moved to.
        model: Instance to load the weights into, for a network class that `create_model` cannot build.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a checkpoint of this package, has been altered, or does not fit the network.
    """
    from bpkd_sdk.models.library import build_from_spec

    header, state = read_tensors(path)
    if "network" not in header:
        raise ValueError(
            f"{path} contains the state of a training run, not a network. Load 'last{CHECKPOINT_SUFFIX}' beside it."
        )
    if content_hash(state) != header.get("sha256"):
        raise ValueError(
            f"The weights in {path} do not match the hash in its header: the file has been altered. Get it again."
        )
    try:
        spec = NetworkSpec.from_dict(header["network"], f"The header of {path}")
    except ValueError as error:
        raise ValueError(f"{error}\nGet the file again, or update bpkd-sdk if a newer version wrote it.") from error
    if model is None:
        model = build_from_spec(spec)
        if model is None:
            raise ValueError(
                f"{path} contains a {header.get('class', 'network')}, which create_model cannot build. "
                "Create an instance and pass it: load_model(path, model=...)."
            )
    load_state(model, state, source=str(path))
    set_spec(model, spec)
    set_provenance(model, header.get("training", {}))
    return model.to(device).eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict into a model; all keys and shapes must match.

    Args:
        model: Model to load into.
        state: Tensors by name.
        source: File or library that the tensors come from, for the error message.

    Raises:
        ValueError: If a key is missing or unexpected, or a tensor has another shape; the error lists them, and the
            model is unchanged.
    """
    own = model.state_dict()
    shared = own.keys() & state.keys()
    problems = [
        *_problems("missing", own.keys() - state.keys()),
        *_problems("unexpected", state.keys() - own.keys()),
        *(
            f"misshapen: {key} is {tuple(state[key].shape)}, the network has {tuple(own[key].shape)}"
            for key in sorted(shared)
            if state[key].shape != own[key].shape
        ),
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}:\n{format_list(problems, limit=20)}")
    model.load_state_dict(dict(state))


def _problems(kind: str, keys: Iterable[str]) -> list[str]:
    return [f"{kind}: {key}" for key in sorted(keys)]
