"""What a Triton server runs for a model of the python backend: the ONNX file beside this one, by ONNX Runtime.

This file is copied into the model repository as ``model.py``. The server's Python must have numpy and onnxruntime; it
takes its packages from the environment of the ``python3`` that comes first on the server's PATH.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it is imported; nothing is told to anybody

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the ONNX file of this version, on the device of this instance."""
        config = json.loads(args["model_config"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            onnxruntime.preload_dlls()
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(args["model_instance_device_id"])}))
        else:
            # Each instance would otherwise start a thread for every core.
            options.intra_op_num_threads = max(1, (os.cpu_count() or 1) // config["instance_group"][0]["count"])
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that the dynamic batcher put together; their images are of one size."""
        # By DLPack both ways: servers up to 24.10 take the arrays of numpy 2 for empty.
        images = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, self.input)) for request in requests]
        try:
            (outputs,) = self.session.run([self.output], {self.input: np.concatenate(images)})
        except Exception as error:  # ONNX Runtime's own errors share no base class
            problem = f"ONNX Runtime failed on images of shape {images[0].shape}: {error}"
            # An error object each: the server crashes on one that is in two responses.
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(problem)) for _ in requests]
        parts = np.split(outputs, np.cumsum([len(part) for part in images[:-1]]))
        return [pb_utils.InferenceResponse([self._tensor(part)]) for part in parts]

    def _tensor(self, part: np.ndarray) -> Any:
        # In memory of ONNX Runtime's: the server reads it after `execute` has returned.
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(part.shape, part.dtype)
        value.update_inplace(part)
        return pb_utils.Tensor.from_dlpack(self.output, value)
