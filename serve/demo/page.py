"""The page as a whole: its parts from top to bottom, and how it looks."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from bpkd_sdk.data import shapes
from bpkd_sdk.data.dataset import Pair
from bpkd_sdk.serve.demo import tables
from bpkd_sdk.serve.demo.controls import build_controls
from bpkd_sdk.serve.demo.file_tabs import build_batch_tab, build_video_tab
from bpkd_sdk.serve.demo.image_tab import ImageTab
from bpkd_sdk.serve.demo.uploads import RestrictedBlocks, find_examples, generate_examples, read_labels, write_thumbnail
from bpkd_sdk.serve.networks import DemoModels, Network, Source
from bpkd_sdk.serve.service.limits import Limits

COUNTED = (512, 512)  # size for which MACs are counted until there is an image

# Gradio gives the pictures of examples no text for those who cannot see them.
_NAME_EXAMPLES = """() => document.querySelectorAll('#examples button').forEach(
    (button, index) => button.setAttribute('aria-label', `Example ${index + 1}`))"""

_HERE = Path(__file__).parent


def build_demo(
    teacher: Source | Network | None,
    students: Sequence[Source | Network],
    *,
    examples: str | Path | None = None,
    device: str | torch.device = "auto",
    title: str = "Teacher and student",
    limits: Limits | None = None,
) -> RestrictedBlocks:
    """Build the page. A network that cannot be opened is listed with the reason; the page works with the others.

    Args:
        teacher: As `Predictor` takes it, or a `Predictor`, or a `Network`; None to show students alone.
        students: To choose from. Their classes must be the teacher's.
        examples: A folder of images to start with; one with ``images`` and ``labels`` below it shows labels too. None:
            generated scenes, for networks that were trained on them.
        device: For networks that are not open yet.
        title: Of the page.
        limits: Of what visitors send; None: the defaults.

    Returns:
        A Gradio page. Its look is given where it is started: ``build_demo(...).launch(**page_options())``, or
        ``gradio.mount_gradio_app(app, build_demo(...), "/", **page_options())``.

    Raises:
        ValueError: If there is neither teacher nor student, or the examples' labels have other classes.
        FileNotFoundError: If there is no folder of examples, or no image in it.
    """
    lineup = DemoModels.open(teacher, students, device)
    scratch = tempfile.TemporaryDirectory(prefix="bpkd-examples-")
    pairs = _examples(lineup, examples, Path(scratch.name))
    thumbnails = [write_thumbnail(pair.image, Path(scratch.name)) for pair in pairs]
    limits = limits or Limits()
    demo = RestrictedBlocks(limits, title=title, fill_width=True)
    with demo:
        gr.HTML(tables.header(title, lineup), elem_id="header")
        cost = gr.HTML(tables.cost_table(lineup.networks, COUNTED), elem_id="cost", render=False)
        if lineup.students:
            controls = build_controls(lineup)
            with gr.Tabs():
                with gr.Tab("Image"):
                    ImageTab(lineup, controls, cost, pairs, thumbnails, limits)
                with gr.Tab("Many images"):
                    build_batch_tab(lineup, controls, limits)
                with gr.Tab("Video"):
                    build_video_tab(lineup, controls, limits)
        cost.render()  # type: ignore[no-untyped-call]
        demo.load(None, js=_NAME_EXAMPLES, api_visibility="private")
    weakref.finalize(demo, scratch.cleanup)  # the examples live as long as the page
    return demo


def page_options() -> dict[str, Any]:
    """How the page looks, for ``launch`` and ``mount_gradio_app``: system fonts, nothing from other hosts."""
    return {
        "theme": gr.themes.Base(
            primary_hue="teal",
            neutral_hue="slate",
            radius_size="md",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css_paths": _HERE / "page.css",
        "favicon_path": str(_HERE / "favicon.svg"),
        "footer_links": [],
        "enable_monitoring": False,
    }


def _examples(lineup: DemoModels, folder: str | Path | None, scratch: Path) -> list[Pair]:
    if folder is not None:
        pairs = find_examples(Path(folder))
        able = [network.predictor.runtime.spec for network in lineup.networks if network.predictor]
        return read_labels(pairs, Path(folder), able[0], scratch) if able else pairs
    knows_scenes = any(
        network.predictor and network.predictor.class_names == shapes.CLASS_NAMES for network in lineup.networks
    )
    return generate_examples(scratch) if knows_scenes else []
