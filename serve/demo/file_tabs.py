"""The tabs that read uploaded files and offer a file for download: many images as a zip file, and a video."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from bpkd_sdk.serve.demo.controls import EXPECTED_ERRORS, Controls, JobControls, show_warning
from bpkd_sdk.serve.demo.scene import draw_full_size
from bpkd_sdk.serve.demo.uploads import new_file, upload_types
from bpkd_sdk.serve.networks import ModelSet
from bpkd_sdk.serve.overlay import picture_png
from bpkd_sdk.serve.predictor import Predictor
from bpkd_sdk.serve.service.limits import Limits, read_bounded, read_untrusted_image
from bpkd_sdk.serve.video import annotate_video

_ZIP_DESCRIPTION = (
    "The zip file contains `masks/<name>.png` (a palette PNG whose pixel values are class ids) and "
    "`overlays/<name>.png` for each image, and `classes.json` with the class names and colours."
)
_PROGRESS_INTERVAL = 5  # frames between two updates of the progress bar


def build_batch_tab(models: ModelSet, controls: Controls, limits: Limits) -> None:
    """Create the tab for many images and connect its events."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            files = gr.File(
                label="Images", file_count="multiple", file_types=upload_types(models.pixels), elem_id="images"
            )
            job_controls = JobControls.build(models, "Segment all images", "segment-all")
        with gr.Column(min_width=300):
            archive = gr.File(label="Masks and overlays", interactive=False, elem_id="archive")
            gr.Markdown(_ZIP_DESCRIPTION)

    def segment_images(
        paths: list[str] | None,
        role: int,
        student: str,
        alpha: float,
        width: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio detects the parameter by this default)
    ) -> Iterator[Any]:
        if not paths:
            return show_warning("Upload images first.")
        predictor = models.pair(student)[role].predictor
        images = [Path(path) for path in paths]
        with new_file(f"{Path(student).stem}.zip") as zip_path:
            for index, problem in enumerate(write_zip(zip_path, images, predictor, alpha, width, limits)):
                progress((index + 1, len(paths)), unit="images")
                if problem:
                    show_warning(problem)
                yield gr.skip()
        yield str(zip_path)

    job_controls.connect(segment_images, [files, job_controls.role, *controls.drawing_inputs], archive)


def write_zip(
    path: Path, images: Sequence[Path], predictor: Predictor, alpha: float, width: int, limits: Limits
) -> Iterator[str | None]:
    """Write the masks and overlays of images into a zip file.

    Args:
        path: Path of the zip file.
        images: Paths of the images.
        predictor: Predictor of the network.
        alpha: Opacity of the overlays, 0..1.
        width: Width of boundaries in pixels of the page; 0 for none.
        limits: Limits of each image.

    Yields:
        After each image, None if it was written, otherwise a message with the reason why it was skipped.
    """
    names: set[str] = set()
    with zipfile.ZipFile(path, "w") as archive:  # without compression, which does not make PNG files smaller
        classes = {"class_names": predictor.class_names, "palette": predictor.palette}
        archive.writestr("classes.json", json.dumps(classes, indent=1))
        for image_path in images:
            numbered = (f"{image_path.stem}_{number}" for number in itertools.count(1))
            name = next(name for name in itertools.chain([image_path.stem], numbered) if name not in names)
            names.add(name)
            try:
                content = read_bounded(image_path, limits.max_upload_bytes)
                image = read_untrusted_image(content, limits, predictor.pixels)
                prediction = predictor(image)
            except EXPECTED_ERRORS as error:
                yield f"{image_path.name} was skipped: {error}"
                continue
            overlay = draw_full_size(prediction.picture, prediction.mask, prediction.palette, alpha, width)
            archive.writestr(f"masks/{name}.png", prediction.mask_png())
            archive.writestr(f"overlays/{name}.png", picture_png(overlay))
            yield None


def build_video_tab(models: ModelSet, controls: Controls, limits: Limits) -> None:
    """Create the tab for a video and connect its events; or state why networks of other images take no video."""
    if not models.pixels.is_rgb8:
        gr.Markdown(f"A video has three channels of 8 bits, and these networks take images of {models.pixels}.")
        return
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            video = gr.File(label="Video", file_types=["video"], elem_id="video")
            job_controls = JobControls.build(models, "Segment the video", "segment-video")
        with gr.Column(min_width=300):
            result = gr.Video(label="Video with masks", interactive=False, buttons=["download"], elem_id="annotated")

    def segment_video(
        path: str | None,
        role: int,
        student: str,
        alpha: float,
        width: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio detects the parameter by this default)
    ) -> Iterator[Any]:
        if not path:
            return show_warning("Upload a video first.")
        predictor = models.pair(student)[role].predictor

        def draw(image: np.ndarray) -> np.ndarray:
            return draw_full_size(image, predictor(image).mask, predictor.palette, alpha, width)

        bounds = {"max_pixels": limits.max_pixels, "max_frames": limits.max_frames}
        try:
            with new_file(f"{Path(path).stem}_masks.mp4") as video_path:
                for frame, share in enumerate(annotate_video(path, video_path, draw, **bounds)):
                    if frame % _PROGRESS_INTERVAL == 0:
                        progress(share, desc=f"frame {frame + 1}")
                        yield gr.skip()
        except EXPECTED_ERRORS as error:
            return show_warning(error)
        yield str(video_path)

    job_controls.connect(segment_video, [video, job_controls.role, *controls.drawing_inputs], result)
