"""The files of the demo's visitors: only uploaded files are read, and generated files are removed after some time.

Gradio checks the paths that a browser sends only if the page was started with `launch`, and only in components that
request the check. It also downloads URLs. Here, every path in every request must be in Gradio's upload folder.
"""

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
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.serve.overlay import picture_png
from bpkd_sdk.serve.service.limits import Limits, upload_formats

STATE_MEMORY = 2_000_000_000  # bytes for the images and masks of all visitors
RETENTION_SECONDS = 900  # lifetime of generated files; every move of a control generates a picture
_FORM_BYTES = 65_536  # bytes of an upload request in addition to its file


class RestrictedBlocks(gr.Blocks):
    """A `gradio.Blocks` that reads only uploaded files and bounds its memory and queue.

    The restrictions apply with both `launch` and `mount_gradio_app`.

    Args:
        limits: Limits of the requests of visitors.
        options: Options of `gradio.Blocks`.
    """

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(analytics_enabled=False, delete_cache=(RETENTION_SECONDS // 4, RETENTION_SECONDS), **options)
        self.limits = limits
        self.has_launched = True  # Gradio checks the paths of outputs only if this is set
        # The file, label and mask of a visitor's image, and two pictures in the size of the page.
        session_bytes = limits.max_upload_bytes + 2 * limits.max_pixels + 10_000_000
        self.state_session_capacity = max(2, STATE_MEMORY // session_bytes)
        self.queue(max_size=limits.max_requests)

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        """Reject requests with a path or URL that is not an uploaded file, in any component."""
        if not all(map(_was_uploaded, _find_paths(inputs))):
            raise gr.Error("Only files that were uploaded to this page are read.", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *rest, **options)

    def launch(self, *arguments: Any, **options: Any) -> Any:
        """Start the page as `gradio.Blocks.launch` does, but keep the session capacity and the file size limit."""
        kept = {"state_session_capacity": self.state_session_capacity, "max_file_size": self.max_file_bytes}
        return super().launch(*arguments, **(kept | options))

    @property
    def max_file_bytes(self) -> int:
        """Maximum size of an uploaded file in bytes, so that its whole request stays within the limit."""
        return max(1, self.limits.max_request_bytes - _FORM_BYTES)


def _find_paths(data: Any) -> Iterator[Any]:
    """Yield every value that the data of a request contains as a file path."""
    if isinstance(data, dict):
        if data.get("path") is not None:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from _find_paths(part)


def _was_uploaded(path: Any) -> bool:
    return isinstance(path, str) and Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())


_generated: deque[tuple[float, Path]] = deque()  # time of completion and folder of each generated file, oldest first
_removal_lock = threading.Lock()


@contextmanager
def new_file(name: str) -> Iterator[Path]:
    """Yield a new path with this file name in the upload folder. The file is removed if writing fails or is stopped."""
    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=uploads))
    try:
        yield folder / name
    except BaseException:
        shutil.rmtree(folder)
        raise
    _generated.append((time.monotonic(), folder))
    remove_old_files(RETENTION_SECONDS)


@atexit.register
def remove_old_files(seconds: float = 0) -> None:
    """Remove generated files that are older than this number of seconds."""
    end = time.monotonic() - seconds
    with _removal_lock:
        while _generated and _generated[0][0] <= end:
            shutil.rmtree(_generated.popleft()[1], ignore_errors=True)


def upload_types(pixels: PixelFormat) -> list[str]:
    """Return the types of files that a visitor can choose, as Gradio names them."""
    if pixels.is_rgb8:
        return ["image"]
    suffixes = {"TIFF": [".tif", ".tiff"], "JPEG": [".jpg", ".jpeg"]}
    return [suffix for name in upload_formats(pixels) for suffix in suffixes.get(name, [f".{name.lower()}"])]


def copy_file(source: Path) -> Path:
    """Copy a file into the upload folder, the only folder from which Gradio serves files."""
    with new_file(source.name) as path:
        return shutil.copyfile(source, path)


def write_picture(picture: np.ndarray, name: str = "picture.png") -> str:
    """Write a picture, uint8 (H, W, 3) RGB, as a PNG file and return its path."""
    with new_file(name) as path:
        path.write_bytes(picture_png(picture))
    return str(path)
