"""Checkpoints: safetensors with a JSON header that says how to build the network. Pickles are never loaded."""

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

from bpkd_sdk.errors import listed
from bpkd_sdk.features import unwrapped
from bpkd_sdk.files import write_atomically
from bpkd_sdk.models.spec import NetworkSpec, get_spec, set_spec

FORMAT = "bpkd-sdk/1"
SUFFIX = ".safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON header to one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"bpkd": json.dumps(dict(header))}))


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of one of our safetensors files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, not safetensors, or has no header of ours.
    """
    return _open(Path(path), tensors=False)[0]


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors (on the CPU) of one of our safetensors files; errors as `read_header`."""
    return _open(Path(path), tensors=True)


def _open(path: Path, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
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
            f"{path} holds tensors but no bpkd-sdk header of format {FORMAT!r}, so it does not say which network it "
            "belongs to. Build the network yourself, load the tensors into it, then `save_model(model, path)`."
        )
    return header, content


def save_model(model: nn.Module, path: str | Path, *, training: Mapping[str, Any] | None = None) -> None:
    """Save weights together with all that `load_model` needs to build the network again.

    Args:
        model: A network of `create_model`, or any module; one of your own may carry a `NetworkSpec` as `model.spec`. Of
            one that torch.compile or DistributedDataParallel wraps, what is inside.
        path: Ends in ``.safetensors``. Written to a temporary name first, then renamed.
        training: How it was trained (plain JSON values), kept in the header.

    Raises:
        ValueError: If `path` has another suffix.
    """
    target = Path(path)
    if target.suffix != SUFFIX:
        raise ValueError(f"Expected a path that ends in {SUFFIX!r}, but got {str(path)!r}.")
    network = unwrapped(model)
    state = network.state_dict()
    header = {
        "format": FORMAT,
        "network": get_spec(model).to_dict(),
        "class": f"{type(network).__module__}.{type(network).__qualname__}",
        "training": dict(training or {}),
        "versions": {package: version(package) for package in ("torch", "bpkd-sdk")},
        "sha256": content_hash(state),
    }
    write_tensors(target, state, header)


def content_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", *, model: nn.Module | None = None
) -> nn.Module:
    """Build the network that a checkpoint of ours describes, load its weights, and set it to eval mode.

    How it was trained is then in `model.provenance`, plain JSON values that `to_onnx` hands on.

    Args:
        path: A file written by `save_model`, `train` or `distill`.
        device: Where the network goes.
        model: Only for a network that `create_model` cannot build (your own class): an instance to load into.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint of ours, has been altered, or does not fit the network.
    """
    from bpkd_sdk.models import create_model

    header, state = read_tensors(path)
    if "network" not in header:
        raise ValueError(f"{path} holds the state of a training run, not a network; load 'last{SUFFIX}' beside it.")
    if content_hash(state) != header.get("sha256"):
        raise ValueError(f"The weights in {path} do not match the hash in its header: the file has been altered.")
    try:
        spec = NetworkSpec.from_dict(header["network"], f"The header of {path}")
    except ValueError as error:
        raise ValueError(f"{error}\nGet the file again, or update bpkd-sdk if a newer version wrote it.") from error
    if model is None:
        if spec.name is None:
            raise ValueError(
                f"{path} holds a {header.get('class', 'network')}, which create_model cannot build. "
                "Make one yourself and pass it: load_model(path, model=...)."
            )
        model = create_model(spec.name, spec.num_classes, aux_head=spec.aux_head)
    load_state(model, state, source=str(path))
    set_spec(model, spec)
    model.provenance = header.get("training", {})
    return model.to(device).eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict, every key accounted for.

    Raises:
        ValueError: Names what is missing, unexpected or misshapen; the model is then unchanged.
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
        raise ValueError(f"{source} does not fit {type(model).__name__}:\n{listed(problems, limit=20)}")
    model.load_state_dict(dict(state))


def _problems(kind: str, keys: Iterable[str]) -> list[str]:
    return [f"{kind}: {key}" for key in sorted(keys)]
