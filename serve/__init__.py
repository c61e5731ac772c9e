"""From an artifact to a picture, a page and a service: predicting masks, drawing them, showing and serving them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpkd_sdk.images import read_image
from bpkd_sdk.serve.overlay import draw_difference, draw_overlay, label_boundaries
from bpkd_sdk.serve.predictor import Prediction, Predictor, Timings
from bpkd_sdk.serve.video import annotate_video

if TYPE_CHECKING:
    from bpkd_sdk.serve.demo import build_demo
    from bpkd_sdk.serve.service.app import create_app

__all__ = [
    "Prediction",
    "Predictor",
    "Timings",
    "annotate_video",
    "build_demo",
    "create_app",
    "draw_difference",
    "draw_overlay",
    "label_boundaries",
    "read_image",
]

# These need optional packages, and are imported when they are first used.
_HOME = {"build_demo": "bpkd_sdk.serve.demo", "create_app": "bpkd_sdk.serve.service.app"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
