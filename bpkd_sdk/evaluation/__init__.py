"""Evaluation of networks: scores, evaluation protocols, and the cost of a network."""

from typing import TYPE_CHECKING

from bpkd_sdk.errors import lazy_names

if TYPE_CHECKING:
    from bpkd_sdk.evaluation.api import evaluate
    from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
    from bpkd_sdk.evaluation.protocol import EvaluationProtocol

__all__ = ["EvaluationProtocol", "MetricCounts", "Metrics", "evaluate"]

# Scores need no torch, unlike the evaluation of networks on data.
__getattr__ = lazy_names(
    __name__,
    {
        "bpkd_sdk.evaluation.api": ("evaluate",),
        "bpkd_sdk.evaluation.metrics": ("MetricCounts", "Metrics"),
        "bpkd_sdk.evaluation.protocol": ("EvaluationProtocol",),
    },
)
