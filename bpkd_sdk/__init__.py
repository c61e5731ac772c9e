"""Distillation of large semantic-segmentation networks into small ones (BPKD), and their export and deployment.

Importing this package imports no other module of it and no other package; each name below is imported when it is first
used. A name that needs a package that is not installed then raises ImportError, which states the extra to install.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpkd_sdk.comparison import Comparison, compare
    from bpkd_sdk.data import SegmentationDataset, as_dataset, open_dataset
    from bpkd_sdk.evaluation import EvaluationProtocol, Metrics, evaluate
    from bpkd_sdk.evaluation.profile import Profile, profile
    from bpkd_sdk.export import benchmark, quantize, to_onnx, to_tensorrt, to_triton, to_web, verify
    from bpkd_sdk.losses import BPKDLoss, CanonicalKDLoss, CIRKDLoss, CWDLoss, DISTLoss, IFVDLoss, SKDSLoss
    from bpkd_sdk.models import create_model, list_models, load_model, save_model
    from bpkd_sdk.output import SegmentationOutput
    from bpkd_sdk.pretrained import save_pretrained
    from bpkd_sdk.recipes import reproduce
    from bpkd_sdk.serve import Prediction, Predictor
    from bpkd_sdk.spec import NetworkSpec
    from bpkd_sdk.training.api import distill, teach, train
    from bpkd_sdk.training.config import TrainingConfig
    from bpkd_sdk.training.loop import TrainingResult

__version__ = "0.2.0"

# ONNX Runtime 1.29 and later otherwise sends telemetry, which includes the names of model files.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "bpkd_sdk.comparison": ("Comparison", "compare"),
    "bpkd_sdk.data": ("SegmentationDataset", "as_dataset", "open_dataset"),
    "bpkd_sdk.evaluation": ("EvaluationProtocol", "Metrics", "evaluate"),
    "bpkd_sdk.evaluation.profile": ("Profile", "profile"),
    "bpkd_sdk.export": ("benchmark", "quantize", "to_onnx", "to_tensorrt", "to_triton", "to_web", "verify"),
    "bpkd_sdk.losses": ("BPKDLoss", "CIRKDLoss", "CWDLoss", "CanonicalKDLoss", "DISTLoss", "IFVDLoss", "SKDSLoss"),
    "bpkd_sdk.models": ("create_model", "list_models", "load_model", "save_model"),
    "bpkd_sdk.output": ("SegmentationOutput",),
    "bpkd_sdk.pretrained": ("save_pretrained",),
    "bpkd_sdk.recipes": ("reproduce",),
    "bpkd_sdk.serve": ("Prediction", "Predictor"),
    "bpkd_sdk.spec": ("NetworkSpec",),
    "bpkd_sdk.training.api": ("distill", "teach", "train"),
    "bpkd_sdk.training.config": ("TrainingConfig",),
    "bpkd_sdk.training.loop": ("TrainingResult",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BPKDLoss",
    "CIRKDLoss",
    "CWDLoss",
    "CanonicalKDLoss",
    "Comparison",
    "DISTLoss",
    "EvaluationProtocol",
    "IFVDLoss",
    "Metrics",
    "NetworkSpec",
    "Prediction",
    "Predictor",
    "Profile",
    "SKDSLoss",
    "SegmentationDataset",
    "SegmentationOutput",
    "TrainingConfig",
    "TrainingResult",
    "as_dataset",
    "benchmark",
    "compare",
    "create_model",
    "distill",
    "evaluate",
    "list_models",
    "load_model",
    "open_dataset",
    "profile",
    "quantize",
    "reproduce",
    "save_model",
    "save_pretrained",
    "teach",
    "to_onnx",
    "to_tensorrt",
    "to_triton",
    "to_web",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bpkd_sdk.errors import import_optional

    return getattr(import_optional(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
