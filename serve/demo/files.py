"""Files that go to the browser: in folders of their own, which are removed when they are old."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gradio.utils import get_upload_folder

from bpkd_sdk.serve.overlay import picture_png

SECONDS = 900  # that files made for a visitor are kept; a picture is made for each move of a control

_made: deque[tuple[float, Path]] = deque()  # when each folder was finished, the oldest first
_removing = threading.Lock()


@contextmanager
def new_file(name: str) -> Iterator[Path]:
    """A path of this name that no other file has. What fails or is stopped leaves nothing behind."""
    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=uploads))
    try:
        yield folder / name
    except BaseException:
        shutil.rmtree(folder)
        raise
    _made.append((time.monotonic(), folder))
    remove_old(SECONDS)


@atexit.register
def remove_old(seconds: float = 0) -> None:
    """Remove what was made longer ago."""
    end = time.monotonic() - seconds
    with _removing:
        while _made and _made[0][0] <= end:
            shutil.rmtree(_made.popleft()[1], ignore_errors=True)


def copy_file(path: Path) -> Path:
    """Copy a file to where Gradio serves from."""
    with new_file(path.name) as copy:
        return shutil.copyfile(path, copy)


def write_picture(picture: np.ndarray, name: str = "picture.png") -> str:
    """Write uint8 (H, W, 3) RGB as a PNG."""
    with new_file(name) as path:
        path.write_bytes(picture_png(picture))
    return str(path)
