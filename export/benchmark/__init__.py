"""Benchmark of artifacts of all formats side by side: cost, latency, memory, precision and accuracy."""

from bpkd_sdk.export.benchmark.api import benchmark
from bpkd_sdk.export.benchmark.environment import Environment
from bpkd_sdk.export.benchmark.report import BenchmarkReport, BenchmarkRow, Percentiles

__all__ = ["BenchmarkReport", "BenchmarkRow", "Environment", "Percentiles", "benchmark"]
