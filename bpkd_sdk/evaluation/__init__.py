"""Evaluation of networks: scores, evaluation protocols, and the cost of a network."""

from bpkd_sdk.evaluation.evaluate import evaluate
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.evaluation.protocol import EvaluationProtocol

__all__ = ["EvaluationProtocol", "MetricCounts", "Metrics", "evaluate"]
