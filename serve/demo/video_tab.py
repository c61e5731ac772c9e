"""A video, and the same video with its masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from bpkd_sdk.serve.demo.controls import PLAIN_ERRORS, Controls, Job, complain
from bpkd_sdk.serve.demo.files import new_file
from bpkd_sdk.serve.demo.lineup import Lineup
from bpkd_sdk.serve.demo.scene import full_overlay
from bpkd_sdk.serve.limits import Limits
from bpkd_sdk.serve.video import annotate_video

_REPORT_EVERY = 5  # frames


def build_video_tab(lineup: Lineup, controls: Controls, limits: Limits) -> None:
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
