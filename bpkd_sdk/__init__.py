"""Boundary-privileged knowledge distillation: a large segmentation teacher in, a small deployable student out.

Importing this package loads nothing but itself; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpkd_sdk.comparison import Comparison, compare
    from bpkd_sdk.data import SegmentationDataset, open_dataset
    from bpkd_sdk.evaluation import Metrics, evaluate
    from bpkd_sdk.evaluation.profile import Profile, profile
    from bpkd_sdk.models import NetworkSpec, create_model, list_models, load_model, save_model
    from bpkd_sdk.output import SegmentationOutput
    from bpkd_sdk.recipes import reproduce
    from bpkd_sdk.training.api import distill, train
    from bpkd_sdk.training.loop import TrainingResult

__version__ = "0.1.0"

# ONNX Runtime from 1.29 on would otherwise report to its makers which models are loaded, their files' names included.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Comparison",
    "Metrics",
    "NetworkSpec",
    "Profile",
    "SegmentationDataset",
    "SegmentationOutput",
    "TrainingResult",
    "compare",
    "create_model",
    "distill",
    "evaluate",
    "list_models",
    "load_model",
    "open_dataset",
    "profile",
    "reproduce",
    "save_model",
    "train",
]

_HOME = {
    "bpkd_sdk.comparison": ["Comparison", "compare"],
    "bpkd_sdk.data": ["SegmentationDataset", "open_dataset"],
    "bpkd_sdk.evaluation": ["Metrics", "evaluate"],
    "bpkd_sdk.evaluation.profile": ["Profile", "profile"],
    "bpkd_sdk.models": ["NetworkSpec", "create_model", "list_models", "load_model", "save_model"],
    "bpkd_sdk.output": ["SegmentationOutput"],
    "bpkd_sdk.recipes": ["reproduce"],
    "bpkd_sdk.training.api": ["distill", "train"],
    "bpkd_sdk.training.loop": ["TrainingResult"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
