"""Segment a video frame by frame, and write a video with the class colours over each frame.

The first command segments a generated video with the student of the quickstart; the second, a video file.

    make quickstart; python demos/segment_video.py
    python demos/segment_video.py street.mp4 segmented.mp4 --model student.onnx --device cuda
"""

import argparse
from pathlib import Path

import av
import numpy as np
from rich.progress import Progress

from bpkd_sdk.data import shapes
from bpkd_sdk.serve import Predictor, annotate_video


def write_video(path: Path, frames: int = 50, size: int = 128) -> Path:
    """Write a video of a camera that moves over a generated scene."""
    image, _ = shapes.render(0, "val", 3, (size, 2 * size))
    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", rate=25)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        for left in np.linspace(0, size, frames).astype(int):
            frame = np.ascontiguousarray(image[:, left : left + size])
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())
    return path


def main(arguments: list[str] | None = None) -> Path:
    """Segment a video and return the path of the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, nargs="?", help="MP4, MOV, MKV, WebM or AVI file")
    parser.add_argument("output", type=Path, nargs="?", default=Path("segmented.mp4"), help="path of the MP4 file")
    parser.add_argument("--model", default="quickstart/student.onnx", help="checkpoint, ONNX file or engine")
    parser.add_argument("--device", default="auto", help="device: auto, cpu, cuda, ...")
    parser.add_argument("--alpha", type=float, default=0.5, help="opacity of the class colours, 0 to 1")
    options = parser.parse_args(arguments)
    predictor = Predictor(options.model, options.device)
    source = options.video or write_video(options.output.with_name("clip.mp4"))
    milliseconds = []

    def draw(image: np.ndarray) -> np.ndarray:
        prediction = predictor(image)
        milliseconds.append(prediction.latency_ms)
        return prediction.overlay(alpha=options.alpha)

    with Progress() as progress:
        task = progress.add_task(source.name, total=1.0)
        for share in annotate_video(source, options.output, draw):
            progress.update(task, completed=share)
        progress.update(task, completed=1.0)
    print(f"{options.output}: {len(milliseconds)} frames, median latency {np.median(milliseconds):.1f} ms per frame")
    return options.output


if __name__ == "__main__":
    main()
