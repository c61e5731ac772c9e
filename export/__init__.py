"""From a trained network to files that run without it."""

from bpkd_sdk.export.onnx import ExportReport, to_onnx

__all__ = ["ExportReport", "to_onnx"]
