"""What all tabs share: which student, how to draw, the device that works for one visitor at a time, plain errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component

from bpkd_sdk.serve.networks import DemoModels

# What a visitor or a network can get wrong; the messages are written for people.
PLAIN_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)

# Events that run a network wait for each other; those that only draw do not wait for them.
RUNS_NETWORK: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", "api_visibility": "private"}
DRAWS: dict[str, Any] = {"concurrency_limit": 4, "concurrency_id": "drawing", "api_visibility": "private"}


class Controls(NamedTuple):
    """Components above the tabs; `divider` is for those who cannot drag the one in a picture."""

    student: gr.Dropdown
    alpha: gr.Slider
    width: gr.Slider
    divider: gr.Slider

    @property
    def look(self) -> list[Any]:
        """Those that say what is drawn, and how."""
        return [self.student, self.alpha, self.width]


def build_controls(lineup: DemoModels) -> Controls:
    """Lay the controls out in one row."""
    names = list(lineup.students)
    with gr.Row(elem_classes="controls"):
        student = gr.Dropdown(
            names,
            value=names[0],
            label="Student" if lineup.teacher else "Network",
            interactive=len(names) > 1,
            min_width=200,
        )
        alpha = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", min_width=200)
        width = gr.Slider(0, 8, 2, step=1, label="Boundary width, pixels", min_width=200)
        divider = gr.Slider(0, 100, 50, step=1, label="Divider", min_width=200)
    return Controls(student, alpha, width, divider)


class Job(NamedTuple):
    """Long work of one network, which can be stopped.

    Attributes:
        role: Which network of the pair works; its value is the index.
        start: Button.
        stop: Button.
    """

    role: gr.Radio
    start: gr.Button
    stop: gr.Button

    @classmethod
    def build(cls, lineup: DemoModels, label: str, elem_id: str) -> Job:
        """Lay it out where the caller is."""
        roles = ["teacher", "student"] if lineup.teacher else ["network"]
        role = gr.Radio(roles, value=roles[-1], type="index", label="Network", visible=len(roles) > 1)
        with gr.Row():
            return cls(role, gr.Button(label, variant="primary", elem_id=elem_id), gr.Button("Stop"))

    def connect(self, work: Callable[..., Any], inputs: Sequence[Component], output: Component) -> None:
        """Start the work by one button, and stop it by the other."""
        running = self.start.click(work, [*inputs], output, **RUNS_NETWORK)
        self.stop.click(None, cancels=running, api_visibility="private")


def complain(error: Exception | str) -> None:
    """Tell in a toast what cannot be done. Unlike a raised `gr.Error` it leaves the results where they are."""
    gr.Warning(str(error))
