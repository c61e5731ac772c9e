"""One network on its way through TensorRT: parsed, aimed at GPUs, compiled.

`tensorrt` (10 and 11) and `tensorrt_rtx` share one Python interface, so that one class serves them all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpkd_sdk.errors import check_choice, listed
from bpkd_sdk.export.audit import check_engine_layers, engine_layers, network_types
from bpkd_sdk.runtime.manifest import capability, supports, trt_log

Size = tuple[int, int]


class Compilation:
    """One network on its way through the compiler.

    Attributes:
        name: Of the compiler's package.
        trt: That package.
        network: The network, once parsed.
    """

    def __init__(self, name: str, trt: Any) -> None:
        if name == "tensorrt" and capability() is None:
            raise RuntimeError(
                "TensorRT builds on the GPU that will run the engine, and torch sees none here. Build it there, or "
                "compile without a GPU: to_tensorrt(..., backend='tensorrt_rtx', hardware=['sm86', ...])."
            )
        self.name = name
        self.trt = trt
        self.log = trt_log(trt)
        self.log.messages.clear()
        self.builder = trt.Builder(self.log)
        # The one flag that TensorRT 10 must be given and 11 knows.
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    def parse(self, raw: bytes, source: str) -> None:
        """Read the ONNX file; RuntimeError with every error and its node."""
        parser = self.trt.OnnxParser(self.network, self.log)
        if parser.parse(raw):
            return
        errors = [_told(parser.get_error(index)) for index in range(parser.num_errors)]
        raise RuntimeError(
            f"{self.name} {self.trt.__version__} cannot compile {source}:\n{listed(errors, len(errors))}\n"
            "Replace these operators in the network, or export it with another opset."
        )

    def add_profile(
        self, row: int, batch: tuple[int, int, int] | None, size: tuple[Size, Size, Size] | None
    ) -> dict[str, dict[str, Any]]:
        """State the shapes that the engine takes; `row` is the axis of the image's height."""
        heights, widths = zip(*size, strict=True) if size else (None, None)
        asked = {0: ("batch", batch), row: ("height", heights), row + 1: ("width", widths)}
        profile = self.builder.create_optimization_profile()
        inputs = {}
        for tensor in (self.network.get_input(index) for index in range(self.network.num_inputs)):
            ranges = [_range(length, *asked.get(axis, ("", None))) for axis, length in enumerate(tensor.shape)]
            shapes = [list(shape) for shape in zip(*ranges, strict=True)]
            profile.set_shape(tensor.name, *shapes)
            inputs[tensor.name] = {"dtype": tensor.dtype.name, **dict(zip(("min", "opt", "max"), shapes, strict=True))}
        self.config.add_optimization_profile(profile)
        return inputs

    def select_hardware(self, hardware: Sequence[str]) -> tuple[str, ...]:
        """Choose the GPUs (none named: the compiler's own default); returned as the manifest names them."""
        if self.name == "tensorrt_rtx":
            return self._aim_rtx(hardware)
        levels = {name.lower(): value for name, value in self.trt.HardwareCompatibilityLevel.__members__.items()}
        level = ", ".join(hardware) if hardware else "none"
        if level not in levels:
            raise ValueError(
                f"TensorRT builds on the GPU here; its `hardware` is one of {', '.join(levels)}, but got {level}. "
                "For GPUs by name, compile with backend='tensorrt_rtx'."
            )
        self.config.hardware_compatibility_level = levels[level]
        return ("sm80+",) if level == "ampere_plus" else (str(capability()),)

    def _aim_rtx(self, hardware: Sequence[str]) -> tuple[str, ...]:
        if not hardware:
            return ("sm80+",)
        known = {name.lower(): value for name, value in self.trt.ComputeCapability.__members__.items()}
        here, named = capability(), [name for name in known if name.startswith("sm")]
        if "current" in hardware and here is not None and not supports(self.trt, here):
            raise ValueError(
                f"hardware='current' is {here} here, a GPU that TensorRT for RTX {self.trt.__version__} has no engines "
                f"for: only for {', '.join(named)}. Name one of those, or build with backend='tensorrt'."
            )
        choices = [*named, *(["current"] if here is not None else [])]
        self.config.num_compute_capabilities = len(hardware)
        for index, name in enumerate(hardware):
            check_choice("hardware", name, choices)
            self.config.set_compute_capability(known[name], index)
        return tuple(str(here) if name == "current" else name for name in hardware)

    def configure(self, workspace_mb: int | None, version_compatible: bool, timing_cache: str | Path | None) -> None:
        """Set the rest of the builder's options."""
        if self.name == "tensorrt_rtx" and (version_compatible or timing_cache is not None):
            raise ValueError(
                "TensorRT for RTX has neither version-compatible plans (it ships no lean runtime) nor a timing cache "
                "(it times nothing): leave `version_compatible` and `timing_cache` out, or pass backend='tensorrt'."
            )
        if workspace_mb is not None:
            self.config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
        if version_compatible:
            self.config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
        if timing_cache is not None:
            self._use_timings(Path(timing_cache))

    def _use_timings(self, path: Path) -> None:
        timings = self.config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not self.config.set_timing_cache(timings, False):
            raise ValueError(
                f"{path} holds timings of another GPU or build of TensorRT: delete it or name another file."
            )

    def timings(self) -> bytes:
        """The timing cache after a build."""
        return bytes(self.config.get_timing_cache().serialize())

    def build(self, source: str) -> tuple[bytes, float]:
        """Compile: the plan, and the seconds it took. RuntimeError with all that the compiler said."""
        start = time.perf_counter()
        plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            told = listed(self.log.messages, len(self.log.messages))
            raise RuntimeError(f"{self.name} {self.trt.__version__} could not compile {source}:\n{told}")
        return bytes(plan), time.perf_counter() - start

    def inspect(self, plan: bytes, precision: str) -> dict[str, str]:
        """Load the plan on this machine's GPU, read the types of its layers, and check them."""
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = True  # what a version-compatible plan carries was built here just now
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            told = listed(self.log.messages, len(self.log.messages))
            raise RuntimeError(
                f"{self.name} {self.trt.__version__} cannot load the engine that it has built for this GPU, so its "
                f"precision could not be checked; no engine was written:\n{told}"
            )
        text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        parsed = network_types(self.network)
        found = engine_layers(text, parsed)
        if found or self.name == "tensorrt":  # TensorRT for RTX makes its kernels later, and need not name any
            check_engine_layers(found, parsed, precision)
        return found

    def outputs(self) -> list[Any]:
        """The network's output tensors."""
        return [self.network.get_output(index) for index in range(self.network.num_outputs)]


def _range(length: int, what: str, asked: Sequence[int] | None) -> tuple[int, int, int]:
    """Least, best and largest length of one axis; `length` is the file's, -1 where it takes any."""
    if length != -1:
        if asked is not None and set(asked) != {length}:
            raise ValueError(
                f"The file takes a {what} of {length} only, but got {tuple(asked)}. Leave it out, "
                "or export the network with dynamic_batch=True or dynamic_size=True."
            )
        return length, length, length
    if asked is None and what != "batch":
        raise ValueError(
            "The file takes images of any size, but an engine needs a range: pass `size`, the least, best and largest "
            "(height, width), for example size=((256, 512), (512, 1024), (1024, 2048))."
        )
    least, best, largest = asked or (1, 1, 8)
    if not 1 <= least <= best <= largest:
        raise ValueError(f"Expected a {what} of 1 <= least <= best <= largest, but got {(least, best, largest)}.")
    return least, best, largest


def _told(error: Any) -> str:
    node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()})"
    return f"{node}: {error.desc()} [{error.code().name}, {error.func()} in {error.file()}:{error.line()}]"
