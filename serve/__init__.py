"""Serving of trained networks: prediction of masks, drawing, videos, the web demo and the HTTP service."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpkd_sdk.images import read_image
from bpkd_sdk.serve.overlay import draw_difference, draw_overlay, label_boundaries
from bpkd_sdk.serve.predictor import Prediction, Predictor, Timings
from bpkd_sdk.serve.video import annotate_video

if TYPE_CHECKING:
    from bpkd_sdk.serve.demo import build_demo
    from bpkd_sdk.serve.networks import open_models
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
    "open_models",
    "read_image",
]

# The modules of these names are imported at first use, because they need optional packages or are slow to import.
_LAZY_MODULES = {
    "build_demo": "bpkd_sdk.serve.demo",
    "create_app": "bpkd_sdk.serve.service.app",
    "open_models": "bpkd_sdk.serve.networks",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_MODULES[name]), name)
