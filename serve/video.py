"""Reads the frames of a video, draws over them, and writes MP4 files with H.264, which browsers and phones play.

PyAV (FFmpeg) reads and writes one frame at a time. Each frame keeps its timestamp, so that videos with a variable frame
rate, for example from phones, keep their duration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bpkd_sdk.errors import import_optional
from bpkd_sdk.images import MAX_PIXELS
from bpkd_sdk.sizes import format_size

# FFmpeg also reads playlists, which can refer to other files and URLs. These containers refer to no other file.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"


def annotate_video(
    source: str | Path,
    path: str | Path,
    draw: Callable[[np.ndarray], np.ndarray],
    *,
    max_pixels: int = MAX_PIXELS,
    max_frames: int | None = None,
) -> Iterator[float]:
    """Draw over each frame of a video. The work is done while the returned iterator is consumed.

    Args:
        source: Video file in one of the `CONTAINERS`.
        path: Path of the MP4 file. The file is created after the last frame, and not at all if the iteration stops
            earlier.
        draw: Function from a frame, uint8 (H, W, 3) RGB, to the picture that replaces it, of the same size.
        max_pixels: Maximum number of pixels of a frame.
        max_frames: Maximum number of frames; None for no limit.

    Yields:
        After each frame, the share (0..1) of the video that is done; 0 if the file does not state its duration.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read as a video, or if the video exceeds a limit.
        ImportError: If PyAV is not installed.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.part")
    with _open_video(source, max_pixels) as (container, stream), _open_output(unfinished) as output:
        encoder = None
        for number, frame in enumerate(container.decode(stream)):
            if number == max_frames:
                raise ValueError(f"Expected a video of at most {max_frames:,} frames, but got a longer one.")
            picture = _pad_to_even(draw(_upright_image(frame)))
            if encoder is None:
                encoder = _create_encoder(output, stream, picture)
            output.mux(encoder.encode(_to_frame(picture, frame)))
            yield _progress(frame, container, stream)
        if encoder is None:
            raise ValueError(f"{Path(source).name} contains no frame that can be read.")
        output.mux(encoder.encode())
        output.close()
        os.replace(unfinished, path)


def read_video(source: str | Path, *, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """Read the frames of a video, for example for `Predictor`.

    Args:
        source: Video file in one of the `CONTAINERS`.
        max_pixels: Maximum number of pixels of a frame.

    Yields:
        Upright frames, uint8 (H, W, 3) RGB.

    It raises the errors of `annotate_video`.
    """
    with _open_video(source, max_pixels) as (container, stream):
        frame = None
        for frame in container.decode(stream):
            yield _upright_image(frame)
        if frame is None:
            raise ValueError(f"{Path(source).name} contains no frame that can be read.")


@contextmanager
def _open_video(source: str | Path, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """Open a video and yield the container and its first video stream."""
    av = import_optional("av", "serve")
    if not Path(source).is_file():
        raise FileNotFoundError(f"There is no video at {source}.")
    try:
        with av.open(str(source), options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise ValueError(f"{Path(source).name} contains no video stream, only audio.")
            stream = container.streams.video[0]
            size = stream.height, stream.width
            if size[0] * size[1] > max_pixels:
                raise ValueError(
                    f"Expected frames of at most {max_pixels:,} pixels, but got {format_size(size)} (height x width)."
                )
            stream.thread_type = "AUTO"
            # Later frames may be larger. With this option, FFmpeg rejects them before it decodes them.
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{Path(source).name} cannot be read as a video: {error.strerror}.") from error


@contextmanager
def _open_output(path: Path) -> Iterator[Any]:
    """Open an MP4 file for writing, and at the end remove the file at this path if it still exists."""
    try:
        with import_optional("av", "serve").open(
            str(path), "w", format="mp4", options={"movflags": "faststart"}
        ) as mp4:
            yield mp4
    finally:
        path.unlink(missing_ok=True)


def _upright_image(frame: Any) -> np.ndarray:
    """Convert a frame to uint8 (H, W, 3) RGB, and apply its rotation."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _pad_to_even(picture: np.ndarray) -> np.ndarray:
    """Repeat the last row and column of a picture where its sides are odd, because H.264 requires even sides."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _create_encoder(output: Any, stream: Any, image: np.ndarray) -> Any:
    encoder = output.add_stream("libx264", rate=stream.average_rate or 25, options={"preset": "veryfast", "crf": "20"})
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt = "yuv420p"
    encoder.codec_context.time_base = stream.time_base
    return encoder


def _to_frame(picture: np.ndarray, original: Any) -> Any:
    """Convert a picture, uint8 (H, W, 3) RGB, to a frame with the timestamp of the original frame."""
    frame = type(original).from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = original.pts, original.time_base
    return frame


def _progress(frame: Any, container: Any, stream: Any) -> float:
    duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
    return min(1.0, (frame.time or 0.0) / float(duration)) if duration else 0.0
