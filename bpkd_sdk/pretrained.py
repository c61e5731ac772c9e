"""Writes a model folder, as the Hugging Face Hub expects it: checkpoint, ONNX file, pictures and model card."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from torch import nn

from bpkd_sdk.data.adapt import as_dataset_of
from bpkd_sdk.evaluation import EvaluationProtocol, evaluate
from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.export import to_onnx
from bpkd_sdk.features import unwrap
from bpkd_sdk.files import replaced_folder, write_atomically
from bpkd_sdk.hub import CARD_FILE, CHECKPOINT_FILE, ONNX_FILE, check_login, parse_address, upload
from bpkd_sdk.images import ImageSource
from bpkd_sdk.model_card import CardFacts, Scores, read_scores, render_card
from bpkd_sdk.models import get_spec, identify, load_model, save_model, set_spec
from bpkd_sdk.models.checkpoint import read_header
from bpkd_sdk.models.mask_classification import adapt_network
from bpkd_sdk.models.spec import get_provenance, set_provenance
from bpkd_sdk.models.weights import FILE_SUFFIXES
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.serve import Predictor
from bpkd_sdk.serve.overlay import picture_png
from bpkd_sdk.spec import NetworkSpec

PICTURES = "pictures"
LONGEST_SIDE = 1024  # pixels; larger pictures are shrunk for the card

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_ABSOLUTE = re.compile(r"~?/|[A-Za-z]:[\\/]|\\\\|\.{1,2}[\\/]")
_EMBEDDED = re.compile(r"(?<![\w/.:\\])(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\s'\",;]*[\\/][^\s'\",;]*")
_FILES = (*FILE_SUFFIXES, ".onnx", ".engine", ".plan")


def save_pretrained(
    source: nn.Module | str | Path,
    path: str | Path,
    *,
    input_size: tuple[int, int],
    license: str,
    dynamic_size: bool = False,
    data: Any = None,
    protocol: EvaluationProtocol = EvaluationProtocol(),  # noqa: B008  (frozen)
    examples: Sequence[ImageSource] = (),
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write a folder to share a network: ``model.safetensors``, ``model.onnx``, ``README.md`` and pictures.

    The folder is what the Hugging Face Hub expects of a repository. `load_model` and `Predictor` open it, and its
    address ``hf://user/name`` once it is uploaded. The model card states classes, scores, cost, training and the
    licences of the weights that the network is based on. Local paths in the network's provenance become names of
    files. The files contain no images but `examples`. The folder is complete or absent; a folder that this function
    wrote is replaced.

    Args:
        source: Network, which is not changed, or a checkpoint of one.
        path: Folder to write.
        input_size: (height, width) of the images of ``model.onnx``, as in `to_onnx`.
        license: Identifier of the licence of the weights on the Hub, such as "apache-2.0", "cc-by-nc-4.0" or "other".
        dynamic_size: Whether ``model.onnx`` accepts images of any size.
        data: Labelled data set to score the network on, of any library (see `as_dataset`). None: the card has the
            scores of the validation in training, if the network's provenance contains them.
        protocol: How the images of `data` become masks.
        examples: Images to publish with their overlays: paths, encoded bytes or arrays. They must be free to share.
        push_to_hub: Repository to upload to, ``user/name`` or ``user/name@branch``; it is created if it does not exist.
            The token is that of ``hf auth login`` or the variable HF_TOKEN.
        private: Whether the repository is private, if it is created.

    Returns:
        The folder.

    Raises:
        ValueError: If an argument is out of range, or the folder contains other files.
        RuntimeError: If the exported file disagrees with torch, or the Hub refuses the upload or cannot be reached.
    """
    folder = Path(path)
    _check_license(license)
    _check_target(folder)
    if isinstance(examples, (str, bytes, Path, np.ndarray)):
        raise TypeError(f"Expected `examples` to be a list of images, but got one {type(examples).__name__}.")
    repository = None
    if push_to_hub is not None:
        repository, _ = parse_address(push_to_hub)
        check_login(repository)
    elif private:
        raise ValueError("private=True applies to a repository on the Hub. Pass `push_to_hub`, or leave it out.")
    model = adapt_network(source) if isinstance(source, nn.Module) else load_model(source)
    network = _publishable_copy(model)
    scores = read_scores(get_provenance(network))
    if data is not None:
        scores = _measure(network, data, protocol)
    with replaced_folder(folder) as new:
        save_model(network, new / CHECKPOINT_FILE, training=get_provenance(network))
        report = to_onnx(network, new / ONNX_FILE, input_size=input_size, dynamic_size=dynamic_size)
        predictor = Predictor(OnnxRuntime(report.path, "cpu"))
        header = read_header(new / CHECKPOINT_FILE)
        facts = CardFacts(
            name=repository or folder.absolute().name,
            repository=repository,
            license=license,
            spec=predictor.runtime.spec,
            class_name=header["class"] if header["network"]["name"] is None else None,
            provenance=get_provenance(network),
            metadata=predictor.runtime.metadata,
            agreement=report.agreement,
            cost=profile(network, predictor.runtime.metadata["input_size"]),
            names=predictor.class_names,
            palette=predictor.palette,
            scores=scores,
            pictures=[_write_pictures(predictor, image, new, i) for i, image in enumerate(examples, start=1)],
        )
        write_atomically(new / CARD_FILE, render_card(facts).encode())
    if push_to_hub is not None:
        try:
            upload(folder, push_to_hub, private=private)
        except (RuntimeError, ValueError) as error:
            raise type(error)(
                f"{error}\nThe folder {folder} is complete: `hf upload {repository} {folder}`."
            ) from error
    return folder


def _check_license(license_: str) -> None:
    if not isinstance(license_, str) or not _LICENSE.fullmatch(license_):
        raise ValueError(
            "Expected `license` to be an identifier of the Hub in lower case, such as 'apache-2.0', 'mit', "
            f"'cc-by-nc-4.0' or 'other', but got {license_!r}."
        )


def _check_target(folder: Path) -> None:
    """Raise ValueError unless a folder is absent, empty, or one that `save_pretrained` wrote and nothing else is in."""
    if not folder.exists():
        return
    advice = "Pass the path of a new folder."
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file. {advice}")
    own = {CHECKPOINT_FILE, ONNX_FILE, CARD_FILE, PICTURES}
    entries = sorted(entry.name for entry in folder.iterdir())
    if foreign := [name for name in entries if name not in own]:
        raise ValueError(f"{folder} contains {foreign[0]}, which save_pretrained did not write. {advice}")
    if entries:
        try:
            read_header(folder / CHECKPOINT_FILE)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{folder} contains files that save_pretrained did not write. {advice}") from error


def _publishable_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network on the CPU, in eval mode, whose spec and provenance contain no local paths."""
    spec = identify(model)
    network = copy.deepcopy(unwrap(model)).cpu().eval()
    config = None if spec.config is None else remove_paths(spec.config)
    set_spec(network, NetworkSpec.from_dict(spec.to_dict() | {"config": config}))
    set_provenance(network, remove_paths(get_provenance(unwrap(model))))
    return network


def remove_paths(values: Any, key: str = "") -> Any:
    """Return plain JSON values in which paths are the names of their files, and URLs contain no secrets.

    Class names are unchanged. A server's URL becomes its last part, and of an HTTP URL the user and the query are
    removed.

    Args:
        values: Plain JSON values.
        key: Key of the values in their mapping.

    Examples:
        >>> remove_paths({"file": "/home/jane/runs/teacher.pth", "source": "timm/resnet18.a1_in1k"})
        {'file': 'teacher.pth', 'source': 'timm/resnet18.a1_in1k'}
    """
    if isinstance(values, Mapping):
        return {name: remove_paths(value, name) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return list(values) if key == "class_names" else [remove_paths(value) for value in values]
    return _remove_path(values) if isinstance(values, str) else values


def _remove_path(text: str) -> str:
    if "://" in text:
        parts = urlsplit(text)
        if parts.scheme == "hf":
            return text
        if parts.scheme in ("http", "https"):
            return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        return _last_part(text)
    is_relative = re.search(r"[\\/]", text) is not None and (text.endswith(_FILES) or Path(text).exists())
    if _ABSOLUTE.match(text) or is_relative:
        return _last_part(text)
    return _EMBEDDED.sub(lambda match: _last_part(match[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _measure(network: nn.Module, data: Any, protocol: EvaluationProtocol) -> Scores:
    dataset = as_dataset_of(data, get_spec(network).class_names)
    metrics = evaluate(network, dataset, protocol=protocol)
    return Scores(metrics=metrics.to_dict(), data=remove_paths(dataset.name), protocol=protocol, is_measured_here=True)


def _write_pictures(predictor: Predictor, image: ImageSource, folder: Path, number: int) -> dict[str, str]:
    """Segment an image, and write it and its overlay with a legend; return their paths in the folder."""
    prediction = predictor(image)
    pictures = {"image": prediction.picture, "overlay": prediction.overlay(legend=True)}
    paths = {kind: f"{PICTURES}/{number}-{kind}.png" for kind in pictures}
    for kind, picture in pictures.items():
        write_atomically(folder / paths[kind], picture_png(_shrink(picture)))
    return paths


def _shrink(picture: np.ndarray) -> np.ndarray:
    factor = LONGEST_SIDE / max(picture.shape[:2])
    if factor >= 1:
        return picture
    return np.asarray(cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
