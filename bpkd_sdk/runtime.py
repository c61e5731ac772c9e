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
_NEEDED = ("network", "input_size", "dynamic_batch", "preprocess", "argmax")


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
    """An ONNX file of `bpkd_sdk.export`: uint8 images in, masks out, on the CPU.

    What the file leaves out, normalisation or argmax, is done here.

    Args:
        path: The file.
        threads: Of ONNX Runtime; None: its own choice.

    Attributes:
        spec: The network's facts, from the file's metadata.
        metadata: All that the file says about itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a readable ONNX file with metadata of ours.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self.session = _open_session(self.path, threads)
        self.metadata = _read_metadata(self.session, self.path)
        self.spec = NetworkSpec.from_dict(self.metadata["network"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB (N, H, W, 3) -> uint8 masks (N, H, W); errors as `run`."""
        from bpkd_sdk.evaluation.inference import to_mask  # which imports this module

        output = self.run(images)
        return output if self.metadata["argmax"] else to_mask(torch.from_numpy(output)).to(torch.uint8).numpy()

    def run(self, images: np.ndarray) -> np.ndarray:
        """What the file itself returns.

        Args:
            images: uint8 RGB (N, H, W, 3).

        Returns:
            uint8 masks (N, H, W), or float32 logits (N, C, H, W) from a file that was exported without argmax.

        Raises:
            ValueError: For images of another type or size than the file takes.
            RuntimeError: If ONNX Runtime fails.
        """
        self._check(images)
        if not self.metadata["preprocess"]:
            images = self.spec.normalize(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        try:
            (output,) = self.session.run(None, {self.session.get_inputs()[0].name: images})
        except Exception as error:  # ONNX Runtime's own errors share no base class
            raise RuntimeError(f"{self.path} failed on images of shape {images.shape}: {error}") from error
        return np.asarray(output)

    def segment(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) on the CPU -> class ids (N, H, W) uint8."""
        return torch.from_numpy(self(images.permute(0, 2, 3, 1).contiguous().numpy()))

    def _check(self, images: np.ndarray) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"Expected images uint8 (N, H, W, 3), but got {images.dtype} {images.shape}.")
        size, expected = list(images.shape[1:3]), list(self.metadata["input_size"])
        if size != expected and not self.metadata.get("dynamic_size", False):
            raise ValueError(
                f"{self.path} takes images of {expected}, but got {size}. "
                f"Resize the images, or export with input_size={tuple(size)} or dynamic_size=True."
            )
        if len(images) != 1 and not self.metadata["dynamic_batch"]:
            raise ValueError(
                f"{self.path} takes one image at a time, but got {len(images)}. Export with dynamic_batch=True."
            )


def _read_metadata(session: InferenceSession, path: Path) -> dict[str, Any]:
    raw = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if raw is None:
        raise ValueError(f"{path} has no metadata of bpkd-sdk; export the network with bpkd_sdk.export.to_onnx.")
    try:
        facts: dict[str, Any] = json.loads(raw)
        missing = [key for key in _NEEDED if key not in facts]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"The metadata of bpkd-sdk in {path} is not readable ({error}); export it again.") from error
    if missing:
        raise ValueError(f"The metadata of bpkd-sdk in {path} lacks {', '.join(missing)}; export it again.")
    return facts


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
