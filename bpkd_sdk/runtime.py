"""Artifacts as things that segment images: a checkpoint as a torch module, an ONNX file through ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bpkd_sdk.errors import check_choice, import_optional
from bpkd_sdk.models import CHECKPOINT_SUFFIXES, NetworkSpec, open_checkpoint

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

METADATA_KEY = "bpkd"


def open_artifact(path: str | Path) -> nn.Module | OnnxSegmenter:
    """Open a checkpoint (ours, or an OpenMMLab ``.pth``) or an exported ONNX file by its suffix.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For another suffix, or a file that is not what its suffix says.
    """
    suffix = Path(path).suffix
    check_choice("the file's suffix", suffix, (*CHECKPOINT_SUFFIXES, ".onnx"))
    return OnnxSegmenter(path) if suffix == ".onnx" else open_checkpoint(path)


class OnnxSegmenter:
    """An ONNX file written by `bpkd_sdk.export.to_onnx`: uint8 images in, masks out, on the CPU.

    Args:
        path: The file.
        threads: Of ONNX Runtime; None: its own choice.

    Attributes:
        spec: The network's facts, from the file's metadata.
        metadata: All that the file says about itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a readable ONNX file with metadata of ours, or takes or returns something else.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self.session = _open_session(self.path, threads)
        raw = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if raw is None:
            raise ValueError(f"{path} has no metadata of bpkd-sdk; export the network with bpkd_sdk.export.to_onnx.")
        self.metadata: dict[str, Any] = json.loads(raw)
        if not (self.metadata["preprocess"] and self.metadata["argmax"]):
            raise ValueError(
                f"{path} was exported without preprocess=True and argmax=True, so it maps no image to a mask."
            )
        self.spec = NetworkSpec.from_dict(self.metadata["network"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB (N, H, W, 3) -> uint8 masks (N, H, W)."""
        expected = list(self.metadata["input_size"])
        if list(images.shape[1:3]) != expected:
            raise ValueError(
                f"{self.path} takes images of {expected}, but got {list(images.shape[1:3])}. "
                f"Resize the images, or export with input_size={tuple(images.shape[1:3])}."
            )
        (mask,) = self.session.run(None, {self.session.get_inputs()[0].name: images})
        return np.asarray(mask)

    def segment(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) on the CPU -> class ids (N, H, W) uint8."""
        return torch.from_numpy(self(images.permute(0, 2, 3, 1).contiguous().numpy()))


def _open_session(path: Path, threads: int | None) -> InferenceSession:
    onnxruntime = import_optional("onnxruntime", "export")
    if not path.is_file():
        raise FileNotFoundError(f"There is no ONNX file at {path}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors share no base class
        raise ValueError(f"{path} is not an ONNX file that ONNX Runtime can load ({error}).") from error
