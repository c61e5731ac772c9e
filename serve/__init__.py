"""Serving of trained networks: prediction of masks, drawing, videos, the web demo and the HTTP service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpkd_sdk.errors import lazy_names
from bpkd_sdk.images import read_image
from bpkd_sdk.serve.overlay import draw_difference, draw_overlay, label_boundaries
from bpkd_sdk.serve.predictor import Prediction, Predictor, Timings
from bpkd_sdk.serve.video import annotate_video, read_video

if TYPE_CHECKING:
    from bpkd_sdk.serve.demo import build_demo
    from bpkd_sdk.serve.input_files import find_files
    from bpkd_sdk.serve.mask_folder import segment_files
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
    "find_files",
    "label_boundaries",
    "open_models",
    "read_image",
    "read_video",
    "segment_files",
]

# Imported when first used, because they need optional packages or are slow to import.
__getattr__ = lazy_names(
    __name__,
    {
        "bpkd_sdk.serve.demo": ("build_demo",),
        "bpkd_sdk.serve.input_files": ("find_files",),
        "bpkd_sdk.serve.mask_folder": ("segment_files",),
        "bpkd_sdk.serve.networks": ("open_models",),
        "bpkd_sdk.serve.service.app": ("create_app",),
    },
)
