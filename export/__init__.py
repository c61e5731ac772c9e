"""Export of trained networks: ONNX files, INT8, TensorRT, Triton repositories, web sites, verification, benchmark.

The benchmark needs no torch. Everything else is imported when it is first used.
"""

from typing import TYPE_CHECKING

from bpkd_sdk.errors import lazy_names
from bpkd_sdk.export.benchmark import BenchmarkReport, BenchmarkRow, benchmark

if TYPE_CHECKING:
    from bpkd_sdk.export.onnx import ExportReport, to_onnx
    from bpkd_sdk.export.quantization import QuantizationReport, quantize
    from bpkd_sdk.export.tensorrt import EngineReport, to_tensorrt
    from bpkd_sdk.export.triton import TritonReport, to_triton
    from bpkd_sdk.export.verification import VerificationReport, VerificationRun, verify
    from bpkd_sdk.export.web import WebReport, to_web

__all__ = [
    "BenchmarkReport",
    "BenchmarkRow",
    "EngineReport",
    "ExportReport",
    "QuantizationReport",
    "TritonReport",
    "VerificationReport",
    "VerificationRun",
    "WebReport",
    "benchmark",
    "quantize",
    "to_onnx",
    "to_tensorrt",
    "to_triton",
    "to_web",
    "verify",
]

__getattr__ = lazy_names(
    __name__,
    {
        "bpkd_sdk.export.onnx": ("ExportReport", "to_onnx"),
        "bpkd_sdk.export.quantization": ("QuantizationReport", "quantize"),
        "bpkd_sdk.export.tensorrt": ("EngineReport", "to_tensorrt"),
        "bpkd_sdk.export.triton": ("TritonReport", "to_triton"),
        "bpkd_sdk.export.verification": ("VerificationReport", "VerificationRun", "verify"),
        "bpkd_sdk.export.web": ("WebReport", "to_web"),
    },
    extra="export",
)
