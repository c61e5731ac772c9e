"""Model of Triton's python backend: ONNX Runtime runs the ONNX file beside this file.

This file is copied into the model repository as ``model.py``. The server's Python must have numpy and onnxruntime; it
uses the packages of the environment of the first ``python3`` on the server's PATH.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import of onnxruntime, which would send telemetry

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the ONNX file of this version on the device of this instance."""
        config = json.loads(args["model_config"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Without it, sums of products of int8 files overflow silently on x86 processors that lack VNNI instructions.
        options.add_session_config_entry("session.x64quantprecision", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            onnxruntime.preload_dlls()
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(args["model_instance_device_id"])}))
        else:
            # Each instance would otherwise start one thread per core.
            options.intra_op_num_threads = max(1, (os.cpu_count() or 1) // config["instance_group"][0]["count"])
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request of a batch of the dynamic batcher; all images have the same size."""
        # DLPack in both directions: servers up to 24.10 treat arrays of numpy 2 as empty.
        images = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, self.input)) for request in requests]
        try:
            (outputs,) = self.session.run([self.output], {self.input: np.concatenate(images)})
        except Exception as error:  # ONNX Runtime's own errors share no base class
            problem = f"ONNX Runtime failed on images of shape {images[0].shape}: {error}"
            # One error object per response: the server crashes if two responses share one.
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(problem)) for _ in requests]
        parts = np.split(outputs, np.cumsum([len(part) for part in images[:-1]]))
        return [pb_utils.InferenceResponse([self._to_tensor(part)]) for part in parts]

    def _to_tensor(self, part: np.ndarray) -> Any:
        # In memory of ONNX Runtime, because the server reads it after `execute` has returned.
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(part.shape, part.dtype)
        value.update_inplace(part)
        return pb_utils.Tensor.from_dlpack(self.output, value)
