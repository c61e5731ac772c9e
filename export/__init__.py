"""From a trained network to files that run without it."""

from bpkd_sdk.export.onnx import ExportReport, to_onnx
from bpkd_sdk.export.quantize import QuantizationReport, quantize
from bpkd_sdk.export.tensorrt import EngineReport, to_tensorrt
from bpkd_sdk.export.verify import Agreement, VerificationReport, verify

__all__ = [
    "Agreement",
    "EngineReport",
    "ExportReport",
    "QuantizationReport",
    "VerificationReport",
    "quantize",
    "to_onnx",
    "to_tensorrt",
    "verify",
]
