"""Work on a separate CUDA stream, and CUDA graphs that launch all kernels of such work at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from bpkd_sdk.runtime.device import SETTING_UP

_RUNS_BEFORE = 3  # libraries must create handles, choose kernels and grow memory pools before the recording

Work = Callable[[Tensor], Tensor]


def run_on(stream: torch.cuda.Stream, work: Work, inputs: Tensor) -> Tensor:
    """Run work on a stream, after all work on the caller's stream and before any work that the caller queues next.

    Args:
        stream: Stream to run on.
        work: Function from inputs to output, which uses the current stream.
        inputs: Argument of the function.
    """
    caller = torch.cuda.current_stream(stream.device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        output = work(inputs)
    caller.wait_stream(stream)
    inputs.record_stream(stream)
    output.record_stream(caller)
    return output


class Recording:
    """A CUDA graph of work for inputs of one shape, recorded once and then replayed; threads replay one at a time.

    Args:
        stream: Stream to record and to replay on.
        work: Function from inputs to output, which uses the current stream and does not wait for it.
        inputs: Example with the shape and type of all later inputs.

    Raises:
        RuntimeError: If the work cannot be recorded, for example because it waits for the device.
    """

    def __init__(self, stream: torch.cuda.Stream, work: Work, inputs: Tensor) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        caller = torch.cuda.current_stream(stream.device)
        # Calls outside inference mode cannot write to tensors that were made in it.
        with SETTING_UP, torch.inference_mode(False), torch.cuda.stream(stream):
            stream.wait_stream(caller)
            self._inputs = inputs.clone()
            for _ in range(_RUNS_BEFORE):
                work(self._inputs)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Thread-local mode lets other threads use the device during the recording.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._output = work(self._inputs)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Replay the work for new inputs, in the order of the caller's stream, and return the output."""
        with self._lock:
            return run_on(self._stream, self._replay, inputs)

    def _replay(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._output.clone()
