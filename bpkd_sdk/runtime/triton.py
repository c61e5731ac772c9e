"""A model of a Triton Inference Server as a `Runtime`, over HTTP.

The server's configuration of the model, as `bpkd_sdk.export.to_triton` writes it, says all that has to be known.
tritonclient makes and reads the messages; urllib3 carries them, because its pool of connections may be used from any
thread, and tritonclient's own clients may not.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from bpkd_sdk.errors import check_choice, did_you_mean, import_optional
from bpkd_sdk.models.spec import NetworkSpec
from bpkd_sdk.runtime.base import Accepts, Range, Runtime
from bpkd_sdk.runtime.onnx import METADATA_KEY, parse_metadata

_PORT = 8000  # of Triton's HTTP, unless it is told otherwise
_HEADER = "Inference-Header-Content-Length"


class UnreachableError(RuntimeError):
    """The server cannot be reached, or does not answer in time."""


class TritonRuntime(Runtime):
    """A model that `bpkd_sdk.export.to_triton` wrote, on a server that answers.

    Batching is the server's: call from as many threads as there are images at hand.

    Args:
        url: "triton://host:port/model"; without a port, 8000.
        device: "auto" or "cpu": where the masks come to. The server chooses where the network runs.
        timeout: How long the server may take for an answer, in seconds.

    Raises:
        ImportError: If tritonclient is missing.
        ValueError: If the URL is of another form, or the server has no such model, or not one of ours.
        UnreachableError: If the server cannot be reached, or does not answer in time.
        RuntimeError: If it has not loaded the model.
    """

    def __init__(self, url: str, device: str | torch.device = "auto", *, timeout: float = 30.0) -> None:
        import_optional("tritonclient.http", "triton")
        check_choice("device", str(device), ("auto", "cpu"))
        host, port, self.model = split_url(url)
        self._address = f"http://{host}:{port}/v2"
        self._timeout = timeout
        self._pool = _open_pool(timeout)
        config = self._config()
        raw = config.get("parameters", {}).get(METADATA_KEY, {}).get("string_value")
        facts = parse_metadata(raw, url)
        self._output = config["output"][0]["name"]
        self._input = config["input"][0]["name"]
        accepts = _accepted(config, facts["preprocess"])
        super().__init__(url, NetworkSpec.from_dict(facts["network"]), facts, torch.device("cpu"), accepts)

    def infer(self, inputs: Tensor) -> Tensor:
        """What the model returns: uint8 masks (N, H, W), or float32 logits (N, C, H, W)."""
        from tritonclient.http import InferenceServerClient, InferInput

        tensor = InferInput(self._input, list(inputs.shape), "UINT8" if inputs.dtype == torch.uint8 else "FP32")
        tensor.set_data_from_numpy(inputs.numpy())
        body, length = InferenceServerClient.generate_request_body([tensor])
        status, answer, headers = self._ask("POST", f"models/{self.model}/infer", body, {_HEADER: str(length)})
        if status != 200:
            raise RuntimeError(f"{self.name} failed on images of shape {tuple(inputs.shape)}: {_problem(answer)}")
        result = InferenceServerClient.parse_response_body(answer, header_length=int(headers[_HEADER]))
        return torch.from_numpy(np.array(result.as_numpy(self._output)))

    def _config(self) -> dict[str, Any]:
        """The model's configuration, or the reason why the server has none."""
        status, config = self._ask_json("GET", f"models/{self.model}/config")
        if status == 200:
            return dict(config)
        models = {model["name"]: model for model in self._ask_json("POST", "repository/index", b"{}")[1]}
        if self.model not in models:
            names = ", ".join(models) or "none"
            raise ValueError(
                f"The Triton server at {self._address} has no model {self.model!r}; it has {names}."
                f"{did_you_mean(self.model, models)}"
            )
        found = models[self.model]
        state, reason = found.get("state", "not loaded"), found.get("reason", "no reason given")
        raise RuntimeError(f"The Triton server at {self._address} cannot run {self.model!r}: {state}, {reason}.")

    def _ask_json(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        status, answer, _ = self._ask(method, path, body)
        try:
            return status, json.loads(answer)
        except ValueError as error:
            raise RuntimeError(
                f"What answers at {self._address} is not Triton's HTTP service. Is this its port?"
            ) from error

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, Any]:
        """Status, body and headers of the server's answer; UnreachableError if there is none."""
        import urllib3

        try:
            answer = self._pool.request(method, f"{self._address}/{path}", body=body, headers=headers)
        except urllib3.exceptions.ReadTimeoutError as error:
            raise UnreachableError(
                f"The Triton server at {self._address} did not answer within {self._timeout} s. It may be overloaded: "
                "look at its queue in its metrics, give it more `instances`, or wait longer with `timeout`."
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise UnreachableError(
                f"The Triton server at {self._address} cannot be reached ({error}). Is it running, and is this the "
                "port of its HTTP service?"
            ) from error
        return answer.status, answer.data, answer.headers


def _open_pool(timeout: float) -> Any:
    import urllib3

    # As many connections are kept open as there may be threads; more are opened and closed again.
    return urllib3.PoolManager(
        maxsize=64, timeout=urllib3.Timeout(connect=min(5.0, timeout), read=timeout), retries=False
    )


def split_url(url: str) -> tuple[str, int, str]:
    """Host, port and model of triton://host:port/model; ValueError for anything else."""
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


def _accepted(config: dict[str, Any], preprocess: bool) -> Accepts:
    """The images that a model with this configuration takes."""
    dims = [int(length) for length in config["input"][0]["dims"]]
    height, width = dims[-3:-1] if preprocess else dims[-2:]
    return Accepts((1, max(1, int(config["max_batch_size"]))), _range(height), _range(width))


def _range(length: int) -> Range:
    return (1, None) if length == -1 else (length, length)


def _problem(answer: bytes) -> str:
    """The text of an error of the server's."""
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")
