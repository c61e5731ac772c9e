"""One image: teacher and student under one slider, where they differ, what they see, how far both are from a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from bpkd_sdk.data.dataset import Pair
from bpkd_sdk.serve.demo import tables
from bpkd_sdk.serve.demo.controls import DRAWS, PLAIN_ERRORS, RUNS_NETWORK, Controls, complain
from bpkd_sdk.serve.demo.scene import Scene
from bpkd_sdk.serve.demo.uploads import copy_file, new_file, write_picture
from bpkd_sdk.serve.networks import DemoModels
from bpkd_sdk.serve.service.limits import Limits

_MOVE_DIVIDERS = "position => Array(3).fill({__type__: 'update', slider_position: position})"
# On a phone the results lie below the screen.
_SHOW_RESULTS = """() => innerWidth < 700 && setTimeout(
    () => document.querySelector('#results').scrollIntoView({behavior: 'smooth'}), 300)"""
_START_DOWNLOAD = "() => document.querySelector('#download').click()"

_Update = dict[Any, Any]


def _file_as_sent(payload: Any) -> str | None:
    """The path of an upload as it is; Gradio would decode the file, and write it again."""
    return payload.path if payload else None


class ImageTab:
    """Lays the tab out and connects it.

    Args:
        lineup: The networks.
        controls: Above the tabs.
        cost: The table of costs, which latencies join as they are measured.
        examples: Images to start with.
        thumbnails: A small picture of each.
        limits: Of what visitors send.
    """

    def __init__(
        self,
        lineup: DemoModels,
        controls: Controls,
        cost: gr.HTML,
        examples: Sequence[Pair],
        thumbnails: Sequence[str],
        limits: Limits,
    ) -> None:
        self.lineup, self.controls, self.cost, self.examples, self.limits = lineup, controls, cost, examples, limits
        self.roles = ("teacher", "student") if lineup.teacher else ("network",)
        self.scene = gr.State()
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._build_inputs(thumbnails)
            with gr.Column(scale=5, min_width=300):
                self.welcome = gr.HTML(tables.WELCOME)
                with gr.Column(visible=False, elem_id="results") as self.results:
                    self._build_results()
        self._connect()

    def _build_inputs(self, thumbnails: Sequence[str]) -> None:
        sources: list[Any] = ["upload", "webcam", "clipboard"]
        self.photo = gr.Image(
            label="Image", type="filepath", sources=sources, height=300, buttons=["fullscreen"], elem_id="photo"
        )
        # Not a subclass: Gradio would write a .pyi file for it beside this one.
        self.photo.preprocess = _file_as_sent  # type: ignore[method-assign]
        self.gallery = gr.Dataset(
            label="Or start with one of these",
            components=[gr.Image(type="filepath", render=False)],
            samples=[[path] for path in thumbnails],
            type="index",
            samples_per_page=len(thumbnails) or 1,
            visible=bool(thumbnails),
            elem_id="examples",
        )
        with gr.Accordion("Compare with a label", open=False):
            self.label = gr.File(
                label="PNG of class ids; 255: not known", file_types=[".png"], height=160, elem_id="label"
            )

    def _build_results(self) -> None:
        slider: dict[str, Any] = {"format": "png", "max_height": 720, "interactive": False}
        with gr.Tabs():
            with gr.Tab("Overlay"):
                self.overlay = gr.ImageSlider(label="Overlay", elem_id="overlay", **slider)
            with gr.Tab("Boundaries"):
                self.boundaries = gr.ImageSlider(label="Boundaries", elem_id="boundaries", **slider)
            with gr.Tab("Difference", visible=len(self.roles) == 2):
                self.difference = gr.Image(
                    label="Difference",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],  # the default has one that sends pictures to another host
                    elem_id="difference",
                )
                self.difference_text = gr.HTML()
            with gr.Tab("Classes"):
                self.classes = gr.HTML()
            with gr.Tab("Errors", visible=False) as self.errors_tab:
                self.errors = gr.ImageSlider(label="Errors", elem_id="errors", **slider)
                self.errors_text = gr.HTML()
        self.caption = gr.HTML(elem_id="caption")
        with gr.Row():
            self.downloads = [
                (kind, index, gr.Button(f"↓ {role} {kind}", size="sm", min_width=140))
                for index, role in enumerate(self.roles)
                for kind in ("mask", "overlay")
            ]
        # A browser takes a file by a link only, and a link needs the file first: the buttons make it, then press this.
        self.download = gr.DownloadButton("Download", elem_id="download", elem_classes="unseen")

    def _connect(self) -> None:
        student, alpha, width, divider = self.controls
        look = self.controls.look
        shown = [
            self.scene, self.welcome, self.results, self.overlay, self.boundaries, self.difference,
            self.difference_text, self.classes, self.errors_tab, self.errors, self.errors_text, self.caption,
        ]  # fmt: skip
        opened = [
            self.photo.input(self._open, [self.photo, *look], [*shown, self.photo, self.label], **RUNS_NETWORK),
            self.gallery.click(
                self._open_example, [self.gallery, *look], [*shown, self.photo, self.label], **RUNS_NETWORK
            ),
            student.input(self._change_student, [self.scene, *look], shown, **RUNS_NETWORK),
        ]
        for event in opened:
            event.success(None, js=_SHOW_RESULTS, api_visibility="private")
            event.success(self._measure, [self.scene, student], self.cost, show_progress="hidden", **RUNS_NETWORK)
        labelled = [self.label.upload, self.label.clear]
        gr.on(labelled, self._set_label, [self.label, self.scene, *look], [*shown, self.label], **RUNS_NETWORK)
        redraw: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"} | DRAWS
        gr.on([alpha.change, width.change], self._draw_overlay, [self.scene, *look], self.overlay, **redraw)
        width.change(self._draw_boundaries, [self.scene, student, width], self.boundaries, **redraw)
        sliders = [self.overlay, self.boundaries, self.errors]
        divider.input(None, divider, sliders, js=_MOVE_DIVIDERS, api_visibility="private")
        for kind, index, button in self.downloads:
            written = button.click(partial(self._write, kind, index), [self.scene, *look], self.download, **DRAWS)
            written.success(None, js=_START_DOWNLOAD, api_visibility="private")

    def _open(self, path: str | None, student: str, alpha: float, width: int) -> _Update:
        nothing = {self.scene: None, self.welcome: gr.update(visible=True), self.results: gr.update(visible=False)}
        if path is None:
            return nothing
        try:
            return self._see(Scene.open(Path(path), self.limits), student, alpha, width) | {self.label: None}
        except PLAIN_ERRORS as error:
            complain(error)
            return nothing | {self.photo: None}

    def _open_example(self, index: int, student: str, alpha: float, width: int) -> Any:
        pair = self.examples[index]
        # The page gets copies: Gradio serves only what lies in its own folder.
        image, label = copy_file(pair.image), pair.label and copy_file(pair.label)
        try:
            scene = Scene.open(image, self.limits).with_label(label, self._classes(student))
            update = self._see(scene, student, alpha, width)
            return update | {self.photo: str(image), self.label: label and str(label)}
        except PLAIN_ERRORS as error:
            complain(error)
            return gr.skip()

    def _set_label(self, path: str | None, scene: Scene | None, student: str, alpha: float, width: int) -> Any:
        if scene is None:
            if path:
                complain("Choose the image of this label first.")
            return gr.skip()
        try:
            label = Path(path) if path else None
            return self._see(scene.with_label(label, self._classes(student)), student, alpha, width)
        except PLAIN_ERRORS as error:
            complain(error)
            return {self.label: None}

    def _classes(self, student: str) -> int:
        predictor = self.lineup.students[student].predictor
        assert predictor is not None  # noqa: S101  (only open networks are on offer)
        return len(predictor.class_names)

    def _change_student(self, scene: Scene | None, student: str, alpha: float, width: int) -> Any:
        if scene is None:
            return gr.skip()
        try:
            return self._see(scene, student, alpha, width)
        except PLAIN_ERRORS as error:
            complain(error)
            return gr.skip()

    def _see(self, scene: Scene, student: str, alpha: float, width: int) -> _Update:
        """Everything about a scene, seen by the networks chosen."""
        networks = self.lineup.pair(student)
        scene = scene.seen_by(networks)
        names = [network.name for network in networks]
        update = {
            self.scene: scene,
            self.welcome: gr.update(visible=False),
            self.results: gr.update(visible=True),
            self.overlay: self._draw_overlay(scene, student, alpha, width),
            self.boundaries: self._draw_boundaries(scene, student, width),
            self.classes: tables.classes_table(scene, names),
            self.caption: tables.caption(scene, names),
            self.errors_tab: gr.update(visible=scene.label is not None),
        }
        if len(names) == 2:
            picture, difference = scene.difference(*names)
            update[self.difference] = write_picture(picture)
            update[self.difference_text] = tables.difference_text(difference)
        if scene.label is not None:
            update[self.errors] = self._beside(student, scene.errors)
            update[self.errors_text] = tables.errors_table(scene, names)
        return update

    def _draw_overlay(self, scene: Scene | None, student: str, alpha: float, width: int) -> Any:
        return self._beside(student, lambda side: scene.overlay(side, alpha, width)) if scene else gr.skip()

    def _draw_boundaries(self, scene: Scene | None, student: str, width: int) -> Any:
        return self._beside(student, lambda side: scene.boundaries(side, width)) if scene else gr.skip()

    def _beside(self, student: str, draw: Callable[[str | None], np.ndarray]) -> Any:
        """The pictures of teacher and student, or of the image and the only network, for a slider."""
        sides = (self.lineup.teacher.name if self.lineup.teacher else None, student)
        label = " | ".join(side or "image" for side in sides)
        return gr.update(value=tuple(write_picture(draw(side)) for side in sides), label=label)

    def _measure(self, scene: Scene | None, student: str) -> Any:
        if scene is None:
            return gr.skip()
        for network in self.lineup.pair(student):
            network.measure(scene.image)
        return tables.cost_table(self.lineup.networks, scene.size)

    def _write(self, kind: str, index: int, scene: Scene | None, student: str, alpha: float, width: int) -> str:
        """The file of a mask or an overlay, at the image's own size."""
        if scene is None:
            raise gr.Error("The session has ended. Choose the image again.", print_exception=False)
        network = self.lineup.pair(student)[index].name
        name = f"{scene.name}_{kind}_{self.roles[index]}.png"
        if kind == "overlay":
            return write_picture(scene.full_overlay(network, alpha, width), name)
        with new_file(name) as path:
            path.write_bytes(scene.seen[network].png)
        return str(path)
