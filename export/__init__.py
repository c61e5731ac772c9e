"""Export of trained networks: ONNX files, INT8, TensorRT engines, Triton repositories, verification, benchmark."""

from bpkd_sdk.export.benchmark import BenchmarkReport, BenchmarkRow, benchmark
from bpkd_sdk.export.onnx import ExportReport, to_onnx
from bpkd_sdk.export.quantize import QuantizationReport, quantize
from bpkd_sdk.export.tensorrt import EngineReport, to_tensorrt
from bpkd_sdk.export.triton import TritonReport, to_triton
from bpkd_sdk.export.verify import VerificationReport, VerificationRun, verify

__all__ = [
    "BenchmarkReport",
    "BenchmarkRow",
    "EngineReport",
    "ExportReport",
    "QuantizationReport",
    "TritonReport",
    "VerificationReport",
    "VerificationRun",
    "benchmark",
    "quantize",
    "to_onnx",
    "to_tensorrt",
    "to_triton",
    "verify",
]
