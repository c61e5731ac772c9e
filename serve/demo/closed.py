"""Gradio's page, closed where Gradio is open: it reads only what was uploaded to it, and keeps what it has room for.

Gradio checks the paths that a browser sends only when `launch` has started the page, only in components that ask for
it, and fetches what an address names. Here whatever names a file must name one in the folder of uploads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from bpkd_sdk.serve.demo.files import SECONDS
from bpkd_sdk.serve.limits import Limits

MEMORY = 2_000_000_000  # bytes for the images and masks of all visitors
_FORM = 65_536  # bytes of an upload beside its file


class ClosedBlocks(gr.Blocks):
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
