"""A model repository of the Triton Inference Server, written so that the server never finds a part of a version.

<repository>/<name>/config.pbtxt       what the model takes and returns, how it is batched and placed
                   /labels.txt         class names, one per line
                   /warmup/image       an image that the server segments before it says that it is ready
                   /<version>/model.*  the artifact
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bpkd_sdk.models.checkpoint import write_atomically

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG, LABELS, IMAGE = "config.pbtxt", "labels.txt", "image"


def next_version(model: Path, config: ModelConfig) -> int:
    """1, or the number after the newest of a model that takes and returns the same.

    Raises:
        ValueError: If the folder holds something else.
    """
    if not model.exists():
        return 1
    earlier = _read(model / CONFIG)
    for field in ("backend", "input", "output"):
        before, now = getattr(earlier, field), getattr(config, field)
        if before != now:
            raise ValueError(
                f"The versions of {model} have another {field} than this artifact:\n{before}\ninstead of\n{now}\n"
                "Clients rely on it: choose another `name`, or remove that folder."
            )
    return 1 + max((int(folder.name) for folder in model.iterdir() if folder.name.isdigit()), default=0)


def _read(path: Path) -> ModelConfig:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        config: ModelConfig = text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ValueError(
            f"{path.parent} is there and holds no model that can be read ({error}). "
            "Choose another `name`, or remove that folder."
        ) from error
    return config


def write_version(
    model: Path, version: int, files: Mapping[str, bytes], config: ModelConfig, labels: Sequence[str], image: bytes
) -> None:
    """Write a version of a model, and what lies around the versions.

    All is written beside its place first, where the disk may be full. A new model then appears by one rename. For a
    further version the configuration is replaced, which fits the earlier versions as well, and what belongs to it; the
    version itself appears last, so that none is served by a configuration that was not made for it.

    Args:
        model: The model's folder.
        version: Its number, from 1.
        files: What the version's folder holds.
        config: Triton's message.
        labels: Class names; none where they are not known.
        image: The input to warm up with.
    """
    from google.protobuf import text_format

    around = {CONFIG: text_format.MessageToString(config).encode(), f"warmup/{IMAGE}": image}
    if labels:
        around[LABELS] = "".join(f"{name}\n" for name in labels).encode()
    own = {f"{version}/{name}": content for name, content in files.items()}
    draft = model.with_name(f".{model.name}.{os.getpid()}.tmp")
    try:
        for name, content in (around | own).items():
            write_atomically(draft / name, content)
        if not model.exists():
            draft.rename(model)
            return
        (model / "warmup").mkdir(exist_ok=True)
        for name in around:
            (draft / name).replace(model / name)
        (draft / str(version)).rename(model / str(version))
    finally:
        shutil.rmtree(draft, ignore_errors=True)
