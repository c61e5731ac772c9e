"""Comparison of distillation methods on equal terms: `bpkd_sdk.compare`."""

from bpkd_sdk.comparison.api import compare
from bpkd_sdk.comparison.report import Comparison
from bpkd_sdk.comparison.statistics import Interval, paired_bootstrap

__all__ = ["Comparison", "Interval", "compare", "paired_bootstrap"]
