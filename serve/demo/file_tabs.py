"""Many images at once: a zip of their masks and overlays."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from bpkd_sdk.serve.demo.controls import PLAIN_ERRORS, Controls, Job, complain
from bpkd_sdk.serve.demo.scene import full_overlay
from bpkd_sdk.serve.demo.uploads import new_file
from bpkd_sdk.serve.networks import DemoModels
from bpkd_sdk.serve.overlay import picture_png
from bpkd_sdk.serve.predictor import Predictor
from bpkd_sdk.serve.service.limits import Limits, read_bounded, read_untrusted_image
from bpkd_sdk.serve.service.responses import mask_png
from bpkd_sdk.serve.video import annotate_video

_ABOUT = (
    "The zip holds, for each image, `masks/<name>.png` (a palette PNG whose values are the class ids) and "
    "`overlays/<name>.png`, and `classes.json` with the names and colours of the ids."
)


def build_batch_tab(lineup: DemoModels, controls: Controls, limits: Limits) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            files = gr.File(label="Images", file_count="multiple", file_types=["image"], elem_id="images")
            job = Job.build(lineup, "Segment all", "segment-all")
        with gr.Column(min_width=300):
            archive = gr.File(label="Masks and overlays", interactive=False, elem_id="archive")
            gr.Markdown(_ABOUT)

    def segment(
        paths: list[str] | None,
        role: int,
        student: str,
        alpha: float,
        width: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio finds it by its default)
    ) -> Iterator[Any]:
        if not paths:
            return complain("Choose the images first.")
        predictor = lineup.pair(student)[role].predictor
        assert predictor is not None  # noqa: S101  (only open networks are on offer)
        images = [Path(path) for path in paths]
        with new_file(f"{Path(student).stem}.zip") as target:
            for done, problem in enumerate(write_zip(target, images, predictor, alpha, width, limits)):
                progress((done + 1, len(paths)), unit="images")
                if problem:
                    complain(problem)
                yield gr.skip()
        yield str(target)

    job.connect(segment, [files, job.role, *controls.look], archive)


def write_zip(
    target: Path, images: Sequence[Path], predictor: Predictor, alpha: float, width: int, limits: Limits
) -> Iterator[str | None]:
    """Segment images into a zip; after each comes None, or why it was left out."""
    taken: set[str] = set()
    with zipfile.ZipFile(target, "w") as archive:  # PNGs do not get smaller
        facts = {"class_names": predictor.class_names, "palette": predictor.palette}
        archive.writestr("classes.json", json.dumps(facts, indent=1))
        for path in images:
            others = (f"{path.stem}_{number}" for number in itertools.count(1))
            name = next(name for name in itertools.chain([path.stem], others) if name not in taken)
            taken.add(name)
            try:
                image = read_untrusted_image(read_bounded(path, limits.body), limits)
                prediction = predictor(image)
            except PLAIN_ERRORS as error:
                yield f"{path.name} is left out: {error}"
                continue
            picture = full_overlay(image, prediction.mask, prediction.palette, alpha, width)
            archive.writestr(f"masks/{name}.png", mask_png(prediction))
            archive.writestr(f"overlays/{name}.png", picture_png(picture))
            yield None


_REPORT_EVERY = 5  # frames


def build_video_tab(lineup: DemoModels, controls: Controls, limits: Limits) -> None:
    """Lay the tab out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            video = gr.File(label="Video", file_types=["video"], elem_id="video")
            job = Job.build(lineup, "Segment the video", "segment-video")
        with gr.Column(min_width=300):
            result = gr.Video(label="With masks", interactive=False, buttons=["download"], elem_id="annotated")

    def segment(
        path: str | None,
        role: int,
        student: str,
        alpha: float,
        width: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio finds it by its default)
    ) -> Iterator[Any]:
        if not path:
            return complain("Choose a video first.")
        predictor = lineup.pair(student)[role].predictor
        assert predictor is not None  # noqa: S101  (only open networks are on offer)

        def draw(image: np.ndarray) -> np.ndarray:
            return full_overlay(image, predictor(image).mask, predictor.palette, alpha, width)

        bounds = {"most_pixels": limits.pixels, "most_frames": limits.frames}
        try:
            with new_file(f"{Path(path).stem}_masks.mp4") as target:
                for frame, share in enumerate(annotate_video(path, target, draw, **bounds)):
                    if frame % _REPORT_EVERY == 0:
                        progress(share, desc=f"frame {frame + 1}")
                        yield gr.skip()
        except PLAIN_ERRORS as error:
            return complain(error)
        yield str(target)

    job.connect(segment, [video, job.role, *controls.look], result)
