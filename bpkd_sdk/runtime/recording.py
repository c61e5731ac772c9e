"""Work on a CUDA stream of its own, and all its kernels launched at once: recorded as a CUDA graph, then replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

# Held while an engine is loaded, a context is made or a graph is recorded: the first two may, and the last does, wait
# for the whole device, which breaks a recording that is under way; and torch records one graph at a time.
SETTING_UP = threading.Lock()
_RUNS_BEFORE = 3  # what sets up handles, picks kernels or grows a memory pool must not do so while it is recorded

Work = Callable[[Tensor], Tensor]


def run_on(stream: torch.cuda.Stream, work: Work, inputs: Tensor) -> Tensor:
    """Queue work behind the caller's stream; what the caller queues next waits for the result."""
    caller = torch.cuda.current_stream(stream.device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        output = work(inputs)
    caller.wait_stream(stream)
    inputs.record_stream(stream)
    output.record_stream(caller)
    return output


class Recording:
    """Work for inputs of one shape, recorded once and replayed from then on; threads take turns.

    Args:
        stream: To record and to replay on.
        work: From inputs to output, on the current stream, without waiting for it.
        inputs: Of the shape and type of all that will come.

    Raises:
        RuntimeError: If the work does what cannot be recorded, such as waiting for the device.
    """

    def __init__(self, stream: torch.cuda.Stream, work: Work, inputs: Tensor) -> None:
        self._stream = stream
        self._turn = threading.Lock()
        caller = torch.cuda.current_stream(stream.device)
        # Tensors made in inference mode could not be written to by calls outside of it.
        with SETTING_UP, torch.inference_mode(False), torch.cuda.stream(stream):
            stream.wait_stream(caller)
            self._inputs = inputs.clone()
            for _ in range(_RUNS_BEFORE):
                work(self._inputs)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._output = work(self._inputs)

    def __call__(self, inputs: Tensor) -> Tensor:
        """As `run_on`."""
        with self._turn:
            return run_on(self._stream, self._replay, inputs)

    def _replay(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._output.clone()
