"""Artifacts of all formats side by side: what they cost, how fast they are, how good they still are."""

from bpkd_sdk.export.benchmark.api import benchmark
from bpkd_sdk.export.benchmark.facts import Environment
from bpkd_sdk.export.benchmark.report import BenchmarkReport, BenchmarkRow, Percentiles

__all__ = ["BenchmarkReport", "BenchmarkRow", "Environment", "Percentiles", "benchmark"]
