"""A video in, the same video with something drawn over each frame out: H.264 in MP4, which browsers and phones play.

Read and written by PyAV (FFmpeg) one frame at a time. Each frame keeps its own time, so that videos of phones, whose
frames come unevenly, keep their length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bpkd_sdk.errors import import_optional
from bpkd_sdk.images import LARGEST

# FFmpeg also reads play lists, which name further files and addresses; these containers hold all they need.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"


def annotate_video(
    source: str | Path,
    target: str | Path,
    draw: Callable[[np.ndarray], np.ndarray],
    *,
    most_pixels: int = LARGEST,
    most_frames: int | None = None,
) -> Iterator[float]:
    """Draw over a video frame by frame. Nothing happens until the result is iterated over.

    Args:
        source: A video of one of the `CONTAINERS`.
        target: Of the MP4 to write; it appears when the last frame is done, and not at all if the iteration stops.
        draw: Maps a frame, uint8 (H, W, 3) RGB, to the picture that takes its place, of the same size.
        most_pixels: Of a frame.
        most_frames: Of the video; None for any number.

    Yields:
        After each frame, the share (0..1) of the video that is done, as far as the file tells its length.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a video that can be read, or larger or longer than allowed.
        ImportError: If PyAV is missing.
    """
    target = Path(target)
    unfinished = target.with_name(f".{target.name}.part")
    with _open_video(source, most_pixels) as (container, stream), _open_output(unfinished) as output:
        encoder = None
        for number, frame in enumerate(container.decode(stream)):
            if number == most_frames:
                raise ValueError(f"Expected a video of at most {most_frames:,} frames, but got a longer one.")
            image = _upright(frame)
            if encoder is None:
                encoder = _encoder(output, stream, image)
            output.mux(encoder.encode(_timed(draw(image), frame)))
            yield _share_done(frame, container, stream)
        if encoder is None:
            raise ValueError(f"{Path(source).name} holds no frame that can be read.")
        output.mux(encoder.encode())
        output.close()
        os.replace(unfinished, target)


@contextmanager
def _open_video(source: str | Path, most_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    av = import_optional("av", "serve")
    if not Path(source).is_file():
        raise FileNotFoundError(f"There is no video at {source}.")
    try:
        with av.open(str(source), options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise ValueError(f"{Path(source).name} has no picture, only sound.")
            stream = container.streams.video[0]
            if (size := (stream.width, stream.height))[0] * size[1] > most_pixels:
                raise ValueError(f"Expected frames of at most {most_pixels:,} pixels, but got {size[0]} x {size[1]}.")
            stream.thread_type = "AUTO"
            # The size may grow on the way; FFmpeg then refuses before it decodes.
            stream.codec_context.options = {"max_pixels": str(most_pixels)}
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{Path(source).name} cannot be read as a video: {error.strerror}.") from error


@contextmanager
def _open_output(path: Path) -> Iterator[Any]:
    """An MP4 to write; what is left at that path in the end is removed."""
    try:
        with import_optional("av", "serve").open(
            str(path), "w", format="mp4", options={"movflags": "faststart"}
        ) as mp4:
            yield mp4
    finally:
        path.unlink(missing_ok=True)


def _upright(frame: Any) -> np.ndarray:
    """uint8 (H, W, 3) RGB, turned as the phone that took it says, with even sides as H.264 wants them."""
    image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encoder(output: Any, stream: Any, image: np.ndarray) -> Any:
    encoder = output.add_stream("libx264", rate=stream.average_rate or 25, options={"preset": "veryfast", "crf": "20"})
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt = "yuv420p"
    encoder.codec_context.time_base = stream.time_base
    return encoder


def _timed(picture: np.ndarray, like: Any) -> Any:
    frame = type(like).from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = like.pts, like.time_base
    return frame


def _share_done(frame: Any, container: Any, stream: Any) -> float:
    length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
    return min(1.0, (frame.time or 0.0) / float(length)) if length else 0.0
