"""Gradio's page, closed where Gradio is open: it reads only what was uploaded to it, and keeps what it has room for.

Gradio checks the paths that a browser sends only when `launch` has started the page, only in components that ask for
it, and fetches what an address names. Here whatever names a file must name one in the folder of uploads.
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

import cv2
import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from bpkd_sdk.classes import class_order, reorder_labels
from bpkd_sdk.data import shapes
from bpkd_sdk.data.classes_file import CLASSES_FILE
from bpkd_sdk.data.dataset import Pair, pair_files
from bpkd_sdk.data.folder import FolderDataset, find_classes
from bpkd_sdk.images import read_image
from bpkd_sdk.models.spec import NetworkSpec
from bpkd_sdk.serve.overlay import picture_png
from bpkd_sdk.serve.service.limits import Limits

MEMORY = 2_000_000_000  # bytes for the images and masks of all visitors
_FORM = 65_536  # bytes of an upload beside its file


class RestrictedBlocks(gr.Blocks):
    """As `gradio.Blocks`, with bounds that hold for `launch` and `mount_gradio_app` alike.

    Args:
        limits: Of what visitors send.
        options: Of `gradio.Blocks`.
    """

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(analytics_enabled=False, delete_cache=(SECONDS // 4, SECONDS), **options)
        self.limits = limits
        self.has_launched = True  # what Gradio asks before it checks the paths of what goes out
        # The file, label and mask of a visitor's image, and two pictures of the page's size.
        each = limits.body + 2 * limits.pixels + 10_000_000
        self.state_session_capacity = max(2, MEMORY // each)
        self.queue(max_size=limits.requests)

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        """Refuse paths and addresses that are not those of uploads, whichever component they are meant for."""
        if not all(map(_was_uploaded, _paths(inputs))):
            raise gr.Error("Only files that were uploaded to this page are read.", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *rest, **options)

    def launch(self, *arguments: Any, **options: Any) -> Any:
        """As `gradio.Blocks.launch`, which would set these two back otherwise."""
        own = {"state_session_capacity": self.state_session_capacity, "max_file_size": self.largest_file}
        return super().launch(*arguments, **(own | options))

    @property
    def largest_file(self) -> int:
        """Most bytes of an uploaded file, such that the request around it stays within the limit."""
        return max(1, self.limits.any_body - _FORM)


def _paths(data: Any) -> Iterator[Any]:
    """All that data of a browser names as the path of a file."""
    if isinstance(data, dict):
        if data.get("path") is not None:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from _paths(part)


def _was_uploaded(path: Any) -> bool:
    return isinstance(path, str) and Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())


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


MOST = 12
_THUMBNAIL = 192  # pixels of the longer side


def find_examples(folder: Path) -> list[Pair]:
    """At most `MOST` images, evenly spread over a folder.

    Args:
        folder: Of images; or with ``images`` and ``labels`` (PNGs of the same names) below it.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
        ValueError: If an image has no label where there are labels.
    """
    images, labels = folder / "images", folder / "labels"
    pairs = pair_files(images, labels if labels.is_dir() else None) if images.is_dir() else pair_files(folder, None)
    return pairs[:: -(-len(pairs) // MOST)]


def read_labels(pairs: list[Pair], folder: Path, network: NetworkSpec, target: Path) -> list[Pair]:
    """Write the labels of examples as PNGs of the network's class ids, as ``classes.json`` defines them.

    Args:
        pairs: Images and labels below the folder.
        folder: The folder with ``classes.json``; without that file, labels are ids of the network's classes already.
        network: Classes of the networks on show.
        target: Folder to write to.

    Returns:
        The images with the labels that were written; 255 is void.

    Raises:
        ValueError: If a label cannot be read, or the classes are not the network's.
    """
    if not (folder / CLASSES_FILE).is_file() or any(pair.label is None for pair in pairs):
        return pairs
    data = FolderDataset(folder, "examples", pairs, find_classes(folder))
    data.check_classes()
    order = class_order(network, data, network_name="the network", data_name=str(folder))
    written = []
    for index, pair in enumerate(pairs):
        label = reorder_labels(data[index][1].long(), order, data.ignore_index).numpy()
        path = target / f"{index}_label.png"
        cv2.imwrite(str(path), np.where(label == data.ignore_index, 255, label).astype(np.uint8))
        written.append(Pair(pair.image, path))
    return written


def generate_examples(folder: Path) -> list[Pair]:
    """Scenes of the embedded data set, with labels, written into a folder."""
    pairs = []
    for index in range(MOST):
        pair = Pair(folder / f"scene_{index + 1}.png", folder / f"scene_{index + 1}_label.png")
        image, label = shapes.render(0, "val", index)
        cv2.imwrite(str(pair.image), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        cv2.imwrite(str(pair.label), label)
        pairs.append(pair)
    return pairs


def write_thumbnail(path: Path, folder: Path) -> str:
    """Write a small picture of an image into a folder, and return its path."""
    image = read_image(path)
    scale = _THUMBNAIL / max(image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=way)
    target = folder / f"{path.stem}.thumbnail.jpg"
    cv2.imwrite(str(target), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    return str(target)
