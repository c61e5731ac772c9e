"""A video through a network, frame by frame, and out again with the classes drawn over it.

make quickstart
python demos/segment_video.py                                  # a generated clip through the quickstart's student
python demos/segment_video.py street.mp4 segmented.mp4 --model student.onnx --device cuda
"""

import argparse
from pathlib import Path

import av
import numpy as np
from rich.progress import Progress

from bpkd_sdk.data import shapes
from bpkd_sdk.serve import Predictor, annotate_video, draw_overlay


def write_clip(path: Path, frames: int = 50, size: int = 128) -> Path:
    """A camera that moves over a generated scene."""
    image, _ = shapes.render(0, "val", 3, (size, 2 * size))
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("libx264", rate=25)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        for left in np.linspace(0, size, frames).astype(int):
            frame = np.ascontiguousarray(image[:, left : left + size])
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        clip.mux(stream.encode())
    return path


def main(arguments: list[str] | None = None) -> Path:
    """Segment a video; returns the path of the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, nargs="?", help="MP4, MOV, MKV, WebM or AVI")
    parser.add_argument("output", type=Path, nargs="?", default=Path("segmented.mp4"))
    parser.add_argument("--model", default="quickstart/student.onnx", help="a checkpoint, an ONNX file, an engine")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the colours")
    options = parser.parse_args(arguments)
    predictor = Predictor(options.model, options.device)
    source = options.video or write_clip(options.output.with_name("clip.mp4"))
    milliseconds = []

    def draw(image: np.ndarray) -> np.ndarray:
        prediction = predictor(image)
        milliseconds.append(prediction.latency_ms)
        return draw_overlay(image, prediction.mask, prediction.palette, alpha=options.alpha)

    with Progress() as progress:
        task = progress.add_task(source.name, total=1.0)
        for share in annotate_video(source, options.output, draw):
            progress.update(task, completed=share)
        progress.update(task, completed=1.0)
    median = np.median(milliseconds)
    print(f"{options.output}: {len(milliseconds)} frames, {median:.1f} ms each in the median")
    return options.output


if __name__ == "__main__":
    main()
