"""The `Runtime` of models on a Triton Inference Server, over HTTP.

The model's configuration on the server, written by `bpkd_sdk.export.to_triton`, contains all facts about the model.
tritonclient encodes and decodes the messages; urllib3 sends them, because any thread may use its pool of connections,
whereas tritonclient's own clients are bound to one thread.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from bpkd_sdk.arrays import Array, array_namespace, to_numpy
from bpkd_sdk.errors import check_choice, did_you_mean, import_optional
from bpkd_sdk.runtime.base import AcceptedImages, Range, Runtime
from bpkd_sdk.runtime.onnx_file import METADATA_KEY, parse_metadata
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    import torch

_PORT = 8000  # default port of Triton's HTTP service
_HEADER = "Inference-Header-Content-Length"


class UnreachableError(RuntimeError):
    """Error for a server that cannot be reached or does not respond in time."""


class TritonRuntime(Runtime):
    """A model that `bpkd_sdk.export.to_triton` wrote, on a running server.

    The server forms batches, so several threads should call the runtime at the same time, one for each image.

    Args:
        url: "triton://host:port/model"; the default port is 8000.
        device: "auto" or "cpu": device of the masks. The server chooses the device of the network.
        timeout: Largest time for a response of the server, in seconds.

    Raises:
        ImportError: If tritonclient is missing.
        ValueError: If the URL has another form, or the server has no model of this name that bpkd-sdk wrote.
        UnreachableError: If the server cannot be reached or does not respond in time.
        RuntimeError: If the server has not loaded the model.
    """

    def __init__(self, url: str, device: str | torch.device = "auto", *, timeout: float = 30.0) -> None:
        import_optional("tritonclient.http", "triton")
        check_choice("device", str(device), ("auto", "cpu"))
        host, port, self.model = split_url(url)
        self._address = f"http://{host}:{port}/v2"
        self._timeout = timeout
        self._pool = _open_pool(timeout)
        config = self._read_config()
        text = config.get("parameters", {}).get(METADATA_KEY, {}).get("string_value")
        metadata = parse_metadata(text, url)
        self._output = config["output"][0]["name"]
        self._input = config["input"][0]["name"]
        accepts = _accepted_images(config, metadata["preprocess"])
        super().__init__(url, NetworkSpec.from_dict(metadata["network"]), metadata, "cpu", accepts)

    def infer(self, inputs: Array) -> Array:
        """Return the model's output: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        from tritonclient.http import InferenceServerClient, InferInput

        array = to_numpy(inputs)
        tensor = InferInput(self._input, list(array.shape), "UINT8" if array.dtype == np.uint8 else "FP32")
        tensor.set_data_from_numpy(array)
        body, length = InferenceServerClient.generate_request_body([tensor])
        status, content, headers = self._request("POST", f"models/{self.model}/infer", body, {_HEADER: str(length)})
        if status != 200:
            raise RuntimeError(f"{self.name} failed on images of shape {tuple(inputs.shape)}: {_error_text(content)}")
        result = InferenceServerClient.parse_response_body(content, header_length=int(headers[_HEADER]))
        outputs: Array = array_namespace(inputs).asarray(np.array(result.as_numpy(self._output)))
        return outputs

    def _read_config(self) -> dict[str, Any]:
        """Return the model's configuration; raise ValueError or RuntimeError with the reason if there is none."""
        status, config = self._request_json("GET", f"models/{self.model}/config")
        if status == 200:
            return dict(config)
        models = {model["name"]: model for model in self._request_json("POST", "repository/index", b"{}")[1]}
        if self.model not in models:
            names = ", ".join(models) or "none"
            raise ValueError(
                f"The Triton server at {self._address} has no model {self.model!r}; it has {names}."
                f"{did_you_mean(self.model, models)}"
            )
        entry = models[self.model]
        state, reason = entry.get("state", "not loaded"), entry.get("reason", "no reason given")
        raise RuntimeError(f"The Triton server at {self._address} cannot run {self.model!r}: {state}, {reason}.")

    def _request_json(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Return status and parsed body of the server's response."""
        status, content, _ = self._request(method, path, body)
        try:
            return status, json.loads(content)
        except ValueError as error:
            raise RuntimeError(
                f"The service at {self._address} is not Triton's HTTP service. Check the port in the URL."
            ) from error

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, Any]:
        """Return status, body and headers of the server's response; raise UnreachableError if there is none."""
        import urllib3

        try:
            response = self._pool.request(method, f"{self._address}/{path}", body=body, headers=headers)
        except urllib3.exceptions.ReadTimeoutError as error:
            raise UnreachableError(
                f"The Triton server at {self._address} did not answer within {self._timeout} s. It may be overloaded: "
                "check the queue in its metrics, give the model more `instances`, or wait longer with `timeout`."
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise UnreachableError(
                f"The Triton server at {self._address} cannot be reached ({error}). Check that it is running, "
                "and that the port in the URL is that of its HTTP service."
            ) from error
        return response.status, response.data, response.headers


def _open_pool(timeout: float) -> Any:
    import urllib3

    # Up to 64 threads keep a connection open each; further connections are opened and closed again.
    return urllib3.PoolManager(
        maxsize=64, timeout=urllib3.Timeout(connect=min(5.0, timeout), read=timeout), retries=False
    )


def split_url(url: str) -> tuple[str, int, str]:
    """Return host, port and model of triton://host:port/model; raise ValueError for any other URL."""
    parts = urlsplit(url)
    model = parts.path.strip("/")
    try:
        port = parts.port or _PORT
    except ValueError:
        port = 0
    if parts.scheme != "triton" or not parts.hostname or not port or not model or "/" in model:
        raise ValueError(f"Expected a URL like triton://host:8000/model, but got {url!r}.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return host, port, model


def _accepted_images(config: dict[str, Any], preprocess: bool) -> AcceptedImages:
    """Return the images that a model with this configuration accepts."""
    dims = [int(length) for length in config["input"][0]["dims"]]
    height, width = dims[-3:-1] if preprocess else dims[-2:]
    return AcceptedImages((1, max(1, int(config["max_batch_size"]))), _range(height), _range(width))


def _range(length: int) -> Range:
    return (1, None) if length == -1 else (length, length)


def _error_text(content: bytes) -> str:
    """Return the text of an error response of the server."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
