"""Files that go to the browser: in folders of their own, which Gradio removes when they are old."""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import numpy as np
from gradio.utils import get_upload_folder


def new_path(name: str) -> Path:
    """A path of this name that no other file has."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder)) / name


def write_picture(picture: np.ndarray, name: str = "picture.png") -> str:
    """Write uint8 (H, W, 3) RGB as a PNG, quickly rather than small."""
    path = new_path(name)
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return str(path)
