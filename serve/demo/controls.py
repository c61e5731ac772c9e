"""The controls that all tabs of the demo share, and the options of their events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component

from bpkd_sdk.serve.networks import ModelSet

# Errors that a visitor's input or a network can cause. Their messages are shown on the page.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)

# Events that run a network wait for each other. Events that only draw run beside them.
NETWORK_EVENT: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", "api_visibility": "private"}
DRAWING_EVENT: dict[str, Any] = {"concurrency_limit": 4, "concurrency_id": "drawing", "api_visibility": "private"}


class Controls(NamedTuple):
    """Components above the tabs.

    Attributes:
        student: Name of the selected student.
        alpha: Opacity of the overlay, 0..1.
        width: Width of boundaries in pixels of the page; 0 for none.
        divider: Position of the dividers of all image sliders, 0..100; an alternative to dragging them.
    """

    student: gr.Dropdown
    alpha: gr.Slider
    width: gr.Slider
    divider: gr.Slider

    @property
    def drawing_inputs(self) -> list[Any]:
        """Components that determine the content of a picture: student, opacity and boundary width."""
        return [self.student, self.alpha, self.width]


def build_controls(models: ModelSet) -> Controls:
    """Create the controls in one row."""
    names = [student.name for student in models.students]
    with gr.Row(elem_classes="controls"):
        student = gr.Dropdown(
            names,
            value=names[0],
            label="Student" if models.teacher else "Network",
            interactive=len(names) > 1,
            min_width=200,
        )
        alpha = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", min_width=200)
        width = gr.Slider(0, 8, 2, step=1, label="Boundary width (pixels)", min_width=200)
        divider = gr.Slider(0, 100, 50, step=1, label="Divider position (%)", min_width=200)
    return Controls(student, alpha, width, divider)


class JobControls(NamedTuple):
    """Components that start and stop a long job of one network.

    Attributes:
        role: Network that runs the job; the value is its index in `ModelSet.pair`.
        start: Button that starts the job.
        stop: Button that stops the job.
    """

    role: gr.Radio
    start: gr.Button
    stop: gr.Button

    @classmethod
    def build(cls, models: ModelSet, label: str, elem_id: str) -> JobControls:
        """Create the components at the current position of the page.

        Args:
            models: Networks of the demo.
            label: Text of the start button.
            elem_id: HTML id of the start button.
        """
        roles = ["teacher", "student"] if models.teacher else ["network"]
        role = gr.Radio(roles, value=roles[-1], type="index", label="Network", visible=len(roles) > 1)
        with gr.Row():
            return cls(role, gr.Button(label, variant="primary", elem_id=elem_id), gr.Button("Stop"))

    def connect(self, job: Callable[..., Any], inputs: Sequence[Component], output: Component) -> None:
        """Let the start button run the job, and the stop button cancel it."""
        running = self.start.click(job, [*inputs], output, **NETWORK_EVENT)
        self.stop.click(None, cancels=running, api_visibility="private")


def show_warning(message: Exception | str) -> None:
    """Show a message on the page. Unlike a raised `gr.Error`, it does not clear the results."""
    gr.Warning(str(message))
