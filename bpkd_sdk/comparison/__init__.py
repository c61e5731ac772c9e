"""Methods side by side on equal terms: `bpkd_sdk.compare`."""

from bpkd_sdk.comparison.api import compare
from bpkd_sdk.comparison.bootstrap import Interval, paired_bootstrap
from bpkd_sdk.comparison.report import Comparison

__all__ = ["Comparison", "Interval", "compare", "paired_bootstrap"]
