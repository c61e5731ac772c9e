"""The tab for one image: overlays, boundaries, differences, classes, and errors against a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from bpkd_sdk.data.pairs import Pair
from bpkd_sdk.serve.demo import headline, tables
from bpkd_sdk.serve.demo.confidence import ExampleCheck
from bpkd_sdk.serve.demo.controls import DRAWING_EVENT, EXPECTED_ERRORS, NETWORK_EVENT, Controls, show_warning
from bpkd_sdk.serve.demo.scene import Scene
from bpkd_sdk.serve.demo.uploads import copy_file, new_file, upload_types, write_picture
from bpkd_sdk.serve.networks import ModelSet
from bpkd_sdk.serve.service.limits import Limits

_MOVE_DIVIDERS = "position => Array(3).fill({__type__: 'update', slider_position: position})"
# On a phone, the results are below the visible part of the page.
_SCROLL_TO_RESULTS = """() => innerWidth < 700 && setTimeout(
    () => document.querySelector('#results').scrollIntoView({behavior: 'smooth'}), 300)"""
_START_DOWNLOAD = "() => document.querySelector('#download').click()"

_Update = dict[Any, Any]


def _upload_path(payload: Any) -> str | None:
    """Return the path of the uploaded file itself. Gradio would decode the image and write it to another file."""
    return payload.path if payload else None


def _html(text: str) -> Any:
    """Return an update of a gr.HTML component, which takes no place on the page without text."""
    return gr.update(value=text, visible=bool(text))


class ImageTab:
    """The tab for one image, created at the current position of the page.

    Args:
        models: Networks of the demo.
        controls: Controls above the tabs.
        figures: Headline above the controls.
        cost: Table of costs, to which measured latencies are added.
        examples: Example images.
        thumbnails: Path of the thumbnail of each example.
        limits: Limits of uploaded images.
    """

    def __init__(
        self,
        models: ModelSet,
        controls: Controls,
        figures: gr.HTML,
        cost: gr.HTML,
        examples: Sequence[Pair],
        thumbnails: Sequence[str],
        limits: Limits,
    ) -> None:
        self.models, self.controls, self.examples, self.limits = models, controls, examples, limits
        self.figures, self.cost = figures, cost
        self.check = ExampleCheck(models, examples)
        self.first: Scene | None = None  # the first example with its predictions, the same for all visitors
        self.roles = ("teacher", "student") if models.teacher else ("network",)
        self.scene = gr.State()
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._build_inputs(thumbnails)
            with gr.Column(scale=5, min_width=300, elem_id="output"):
                self.welcome = gr.HTML(headline.LOADING if examples else headline.welcome(has_examples=False))
                with gr.Column(visible=False, elem_id="results") as self.results:
                    self._build_results()
        self._connect()

    def _build_inputs(self, thumbnails: Sequence[str]) -> None:
        pixels = self.models.pixels
        self.photo: gr.Image | gr.File
        if pixels.is_rgb8:
            sources: list[Any] = ["upload", "webcam", "clipboard"]
            self.photo = gr.Image(
                label="Image", type="filepath", sources=sources, height=300, buttons=["fullscreen"], elem_id="photo"
            )
        else:  # browsers cannot show these files
            types = upload_types(pixels)
            label = f"Image: {pixels} ({', '.join(types)})"
            self.photo = gr.File(label=label, file_types=types, height=160, elem_id="photo")
        # Replaced here because Gradio writes a .pyi file beside each module that subclasses a component.
        self.photo.preprocess = _upload_path  # type: ignore[method-assign]
        self.gallery = gr.Dataset(
            label="Example images",
            components=[gr.Image(type="filepath", render=False)],
            samples=[[path] for path in thumbnails],
            type="index",
            samples_per_page=len(thumbnails) or 1,
            visible=bool(thumbnails),
            elem_id="examples",
        )
        with gr.Accordion("Compare with a label", open=False):
            self.label = gr.File(
                label="Label: PNG file of class ids, 255 for void", file_types=[".png"], height=160, elem_id="label"
            )

    def _build_results(self) -> None:
        self.judgement = gr.HTML(elem_id="judgement", visible=False)
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
                    buttons=["download", "fullscreen"],  # the default includes a button that sends pictures elsewhere
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
        # The browser downloads a file only through a link to an existing file. The buttons above write the file, then
        # click this hidden button.
        self.download = gr.DownloadButton("Download", elem_id="download", elem_classes="hidden-button")

    def _connect(self) -> None:
        student, alpha, width, divider = self.controls
        inputs = self.controls.drawing_inputs
        self.outputs = outputs = [
            self.scene, self.welcome, self.results, self.overlay, self.boundaries, self.difference,
            self.difference_text, self.classes, self.errors_tab, self.errors, self.errors_text, self.caption,
            self.figures, self.judgement,
        ]  # fmt: skip
        uploads = [self.photo, self.label]
        chosen = [self.photo.input] if isinstance(self.photo, gr.Image) else [self.photo.upload, self.photo.clear]
        for event in (
            gr.on(chosen, self._open, [self.photo, *inputs], [*outputs, *uploads], **NETWORK_EVENT),
            self.gallery.click(self._open_example, [self.gallery, *inputs], [*outputs, *uploads], **NETWORK_EVENT),
            student.input(self._change_student, [self.scene, *inputs], outputs, **NETWORK_EVENT),
        ):
            event.success(None, js=_SCROLL_TO_RESULTS, api_visibility="private")
            self._measure_after(event)
        label_events = [self.label.upload, self.label.clear]
        label_inputs = [self.label, self.scene, *inputs]
        gr.on(label_events, self._set_label, label_inputs, [*outputs, self.label], **NETWORK_EVENT)
        redraw: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"} | DRAWING_EVENT
        gr.on([alpha.change, width.change], self._draw_overlay, [self.scene, *inputs], self.overlay, **redraw)
        width.change(self._draw_boundaries, [self.scene, student, width], self.boundaries, **redraw)
        sliders = [self.overlay, self.boundaries, self.errors]
        divider.input(None, divider, sliders, js=_MOVE_DIVIDERS, api_visibility="private")
        for kind, index, button in self.downloads:
            write = partial(self._write_download, kind, index)
            written = button.click(write, [self.scene, *inputs], self.download, **DRAWING_EVENT)
            written.success(None, js=_START_DOWNLOAD, api_visibility="private")

    def _measure_after(self, event: Any) -> None:
        """Measure the networks and judge the image after an event that has shown an image."""
        outputs = [self.figures, self.cost, self.judgement]
        event.success(
            self._measure, [self.scene, self.controls.student], outputs, show_progress="hidden", **NETWORK_EVENT
        )

    def open_first_example(self, page: gr.Blocks) -> None:
        """Let the page open with the first example, if there is one. The place for uploads stays empty."""
        if self.examples:
            inputs = self.controls.drawing_inputs
            self._measure_after(page.load(self._open_first, inputs, self.outputs, **NETWORK_EVENT))

    def _open_first(self, student: str, alpha: float, width: int) -> _Update:
        try:
            return self._show(self._example(0, student), student, alpha, width)
        except EXPECTED_ERRORS as error:
            show_warning(error)
            return self._close()

    def _open(self, path: str | None, student: str, alpha: float, width: int) -> _Update:
        if path is None:
            return self._close()
        try:
            return self._show(self._scene(Path(path)), student, alpha, width) | {self.label: None}
        except EXPECTED_ERRORS as error:
            show_warning(error)
            return {self.photo: None}

    def _close(self) -> _Update:
        """Return the updates that remove the results and state what to do."""
        welcome = gr.update(value=headline.welcome(bool(self.examples)), visible=True)
        return {
            self.scene: None,
            self.welcome: welcome,
            self.results: gr.update(visible=False),
            self.figures: _html(""),
        }

    def _scene(self, path: Path) -> Scene:
        return Scene.open(path, self.limits, self.models.pixels)

    def _open_example(self, index: int, student: str, alpha: float, width: int) -> Any:
        pair = self.examples[index]
        image, label = copy_file(pair.image), pair.label and copy_file(pair.label)
        try:
            update = self._show(self._example(index, student), student, alpha, width)
            return update | {self.photo: str(image), self.label: label and str(label)}
        except EXPECTED_ERRORS as error:
            show_warning(error)
            return gr.skip()

    def _example(self, index: int, student: str) -> Scene:
        """Return the scene of an example. That of the first has its predictions, because every visitor opens it."""
        if index == 0 and self.first is not None:
            return self.first
        pair = self.examples[index]
        scene = replace(self._scene(pair.image).with_label(pair.label, self._num_classes(student)), is_example=True)
        if index == 0:
            scene = self.first = scene.with_predictions(self.models.pair(student))
        return scene

    def _set_label(self, path: str | None, scene: Scene | None, student: str, alpha: float, width: int) -> Any:
        if scene is None:
            if path:
                show_warning("Choose the image of this label first.")
            return gr.skip()
        try:
            label = Path(path) if path else None
            return self._show(scene.with_label(label, self._num_classes(student)), student, alpha, width)
        except EXPECTED_ERRORS as error:
            show_warning(error)
            return {self.label: None}

    def _num_classes(self, student: str) -> int:
        return len(self.models.student(student).predictor.class_names)

    def _change_student(self, scene: Scene | None, student: str, alpha: float, width: int) -> Any:
        if scene is None:
            return gr.skip()
        try:
            return self._show(scene, student, alpha, width)
        except EXPECTED_ERRORS as error:
            show_warning(error)
            return gr.skip()

    def _show(self, scene: Scene, student: str, alpha: float, width: int) -> _Update:
        """Run the selected networks on a scene, and return the updates of all components that show results."""
        models = self.models.pair(student)
        scene = scene.with_predictions(models)
        predictions = {model.name: scene.predictions[model.name] for model in models}
        update = {
            self.scene: scene,
            self.welcome: gr.update(visible=False),
            self.results: gr.update(visible=True),
            self.overlay: self._draw_overlay(scene, student, alpha, width),
            self.boundaries: self._draw_boundaries(scene, student, width),
            self.classes: tables.classes_table(predictions),
            self.caption: tables.caption(predictions, scene.size, scene.pixels.picture_rule),
            self.errors_tab: gr.update(visible=scene.label is not None),
            self.figures: _html(headline.headline(self.models, student, scene)),
            self.judgement: _html(""),
        }
        if self.models.teacher is not None:
            picture, difference = scene.difference(self.models.teacher.name, student)
            update[self.difference] = write_picture(picture)
            update[self.difference_text] = tables.difference_text(difference)
        if scene.label is not None:
            update[self.errors] = self._update_slider(student, scene.errors)
            update[self.errors_text] = tables.errors_table(predictions, scene.label)
        return update

    def _draw_overlay(self, scene: Scene | None, student: str, alpha: float, width: int) -> Any:
        if scene is None:
            return gr.skip()
        return self._update_slider(student, lambda model: scene.overlay(model, alpha, width))

    def _draw_boundaries(self, scene: Scene | None, student: str, width: int) -> Any:
        if scene is None:
            return gr.skip()
        return self._update_slider(student, lambda model: scene.boundaries(model, width))

    def _update_slider(self, student: str, draw: Callable[[str | None], np.ndarray]) -> Any:
        """Return an update of an image slider: teacher and student, or the image and the only network.

        Args:
            student: Name of the student.
            draw: Function from the name of a network to its picture, and from None to the image alone.
        """
        sides = (self.models.teacher.name if self.models.teacher else None, student)
        label = " | ".join(side or "image" for side in sides)
        return gr.update(value=tuple(write_picture(draw(side)) for side in sides), label=label)

    def _measure(self, scene: Scene | None, student: str) -> Any:
        if scene is None:
            return gr.skip()
        image, judgement = scene.image, ""
        for model in self.models.available:
            try:
                model.measure(image)
            except EXPECTED_ERRORS as error:
                show_warning(f"{model.name} was not measured: {error}")
        try:
            if not scene.is_example:
                judgement = headline.judgement_text(self.check.judge(scene, student))
        except EXPECTED_ERRORS as error:
            show_warning(error)
        figures = headline.headline(self.models, student, scene, is_measured=True)
        return _html(figures), tables.cost_table(self.models, scene.size), _html(judgement)

    def _write_download(
        self, kind: str, index: int, scene: Scene | None, student: str, alpha: float, width: int
    ) -> str:
        """Write the mask or overlay of a network in the size of the image, and return the path.

        Args:
            kind: "mask" or "overlay".
            index: Index of the network in `ModelSet.pair`.
            scene: Scene on the page; None if the session has expired.
            student: Name of the selected student.
            alpha: Opacity of the overlay, 0..1.
            width: Width of boundaries in pixels of the page; 0 for none.
        """
        if scene is None:
            raise gr.Error("The session has expired. Choose the image again.", print_exception=False)
        model = self.models.pair(student)[index].name
        name = f"{scene.name}_{kind}_{self.roles[index]}.png"
        if kind == "overlay":
            return write_picture(scene.full_size_overlay(model, alpha, width), name)
        with new_file(name) as path:
            path.write_bytes(scene.predictions[model].png)
        return str(path)
