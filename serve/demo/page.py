"""The layout of the whole demo page, from top to bottom, and its theme."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from bpkd_sdk.serve.demo import headline, tables
from bpkd_sdk.serve.demo.controls import build_controls
from bpkd_sdk.serve.demo.examples import collect_examples, write_thumbnail
from bpkd_sdk.serve.demo.file_tabs import build_batch_tab, build_video_tab
from bpkd_sdk.serve.demo.image_tab import ImageTab
from bpkd_sdk.serve.demo.uploads import RestrictedBlocks
from bpkd_sdk.serve.networks import ModelSet, check_models, reorder_models
from bpkd_sdk.serve.service.limits import Limits

INITIAL_SIZE = (512, 512)  # height and width for which MACs are counted until a visitor opens an image

# Gradio sets no accessible name for the images of a gr.Dataset.
_NAME_EXAMPLES = """() => document.querySelectorAll('#examples button').forEach(
    (button, index) => button.setAttribute('aria-label', `Example ${index + 1}`))"""

_HERE = Path(__file__).parent


def build_demo(
    models: ModelSet,
    *,
    examples: str | Path | None = None,
    title: str | None = None,
    limits: Limits | None = None,
) -> RestrictedBlocks:
    """Build the demo page.

    The cost table lists networks that are unavailable with the reason; the page works with the others.

    Args:
        models: Networks to show, from `open_models`. Students must have the classes of the teacher. Without a
            teacher, each student is shown alone; without a student, the teacher is shown alone.
        examples: Folder of example images. Labels are shown too if the folder contains ``images`` and ``labels``.
            None generates scenes if a network was trained on them, and otherwise shows no examples.
        title: Title of the page; None for the names of the networks.
        limits: Limits of the images and videos that visitors send; None for the defaults.

    Returns:
        Gradio page. Theme and style are set when it is started: ``build_demo(...).launch(**page_options())`` or
        ``gradio.mount_gradio_app(app, build_demo(...), "/", **page_options())``.

    Raises:
        ValueError: If the labels of the examples have other classes than the networks.
        FileNotFoundError: If the folder of examples does not exist or contains no image.
    """
    check_models(models)
    models = _displayed(models)
    temporary = tempfile.TemporaryDirectory(prefix="bpkd-examples-")
    pairs = collect_examples(models, examples, Path(temporary.name))
    thumbnails = [write_thumbnail(pair.image, Path(temporary.name), models.pixels) for pair in pairs]
    limits = limits or Limits()
    title = title or headline.title(models)
    demo = RestrictedBlocks(limits, title=title, fill_width=True)
    with demo:
        gr.HTML(headline.header(title, models), elem_id="header")
        figures = gr.HTML(elem_id="headline", visible=False)
        cost = gr.HTML(tables.cost_table(models, INITIAL_SIZE), elem_id="cost", render=False)
        if models.students:
            controls = build_controls(models)
            with gr.Tabs():
                with gr.Tab("Image"):
                    image_tab = ImageTab(models, controls, figures, cost, pairs, thumbnails, limits)
                with gr.Tab("Many images"):
                    build_batch_tab(models, controls, limits)
                with gr.Tab("Video"):
                    build_video_tab(models, controls, limits)
        cost.render()  # type: ignore[no-untyped-call]
        if models.students:
            image_tab.open_first_example(demo)
        demo.load(None, js=_NAME_EXAMPLES, api_visibility="private")
    weakref.finalize(demo, temporary.cleanup)  # the examples must exist as long as the page
    return demo


def _displayed(models: ModelSet) -> ModelSet:
    """Return the networks in the order of the teacher's classes, what can be deployed first.

    A teacher without students takes their place.
    """
    students = sorted(models.students, key=lambda model: not model.is_deployable)
    models = reorder_models(replace(models, students=tuple(students)))
    if models.teacher is None or models.students:
        return models
    return ModelSet(None, (models.teacher,), models.unavailable)


def page_options() -> dict[str, Any]:
    """Return theme and style for ``launch`` and ``mount_gradio_app``. They load nothing from other hosts."""
    return {
        "theme": gr.themes.Base(
            primary_hue="teal",
            neutral_hue="slate",
            radius_size="md",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(body_text_color_subdued="*neutral_600"),  # a contrast of 7; the theme's own is 2.6
        "css_paths": _HERE / "page.css",
        "favicon_path": str(_HERE / "favicon.svg"),
        "footer_links": [],
        "enable_monitoring": False,
    }
