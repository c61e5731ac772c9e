"""Compilation of one network by TensorRT: parse, state shapes and GPUs, build, inspect.

`tensorrt` (10 and 11) and `tensorrt_rtx` have the same Python interface, so one class serves both packages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpkd_sdk.errors import check_choice, format_list
from bpkd_sdk.export.audit import check_engine_layers, engine_layers, network_types
from bpkd_sdk.progress import working
from bpkd_sdk.runtime.manifest import capability, supports, trt_log

Size = tuple[int, int]


class Compilation:
    """Compilation of one network.

    Args:
        name: Name of the compiler's package.
        trt: The imported package.

    Attributes:
        name: Name of the compiler's package.
        trt: The imported package.
        network: The network, after `parse`.

    Raises:
        RuntimeError: If the compiler is TensorRT and torch sees no GPU.
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
        # TensorRT 10 requires this flag; TensorRT 11 still accepts it.
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    def parse(self, content: bytes, source: str) -> None:
        """Parse an ONNX file; raise RuntimeError with every error and its node.

        Args:
            content: Bytes of the file.
            source: Name of the file in error messages.
        """
        parser = self.trt.OnnxParser(self.network, self.log)
        if parser.parse(content):
            return
        errors = [_format_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise RuntimeError(
            f"{self.name} {self.trt.__version__} cannot compile {source}:\n{format_list(errors, len(errors))}\n"
            "Replace these operators in the network, or export it with another opset."
        )

    def add_profile(
        self, height_axis: int, batch_sizes: tuple[int, int, int] | None, sizes: tuple[Size, Size, Size] | None
    ) -> dict[str, dict[str, Any]]:
        """State the shapes that the engine accepts, and return them as the manifest contains them.

        Args:
            height_axis: Axis of the image's height in the input.
            batch_sizes: Smallest, best and largest number of images; None: (1, 1, 8), or the number that the file
                fixes.
            sizes: Smallest, best and largest (height, width); None: the size that the file fixes.

        Raises:
            ValueError: If the shapes are not in order, or not those that the file fixes.
        """
        heights, widths = zip(*sizes, strict=True) if sizes else (None, None)
        requested = {0: ("batch", batch_sizes), height_axis: ("height", heights), height_axis + 1: ("width", widths)}
        profile = self.builder.create_optimization_profile()
        inputs = {}
        for tensor in (self.network.get_input(index) for index in range(self.network.num_inputs)):
            ranges = [
                _length_range(length, *requested.get(axis, ("length", None)))
                for axis, length in enumerate(tensor.shape)
            ]
            shapes = [list(shape) for shape in zip(*ranges, strict=True)]
            profile.set_shape(tensor.name, *shapes)
            inputs[tensor.name] = {"dtype": tensor.dtype.name, **dict(zip(("min", "opt", "max"), shapes, strict=True))}
        self.config.add_optimization_profile(profile)
        return inputs

    def select_hardware(self, hardware: Sequence[str]) -> tuple[str, ...]:
        """Select the GPUs to compile for, and return them as the manifest names them.

        Args:
            hardware: Names of GPUs or of a compatibility level; empty: the compiler's default.

        Raises:
            ValueError: If the compiler does not support a name.
        """
        if self.name == "tensorrt_rtx":
            return self._select_capabilities(hardware)
        levels = {name.lower(): value for name, value in self.trt.HardwareCompatibilityLevel.__members__.items()}
        level = ", ".join(hardware) if hardware else "none"
        if level not in levels:
            raise ValueError(
                f"TensorRT builds on the GPU here; its `hardware` is one of {', '.join(levels)}, but got {level}. "
                "For GPUs by name, compile with backend='tensorrt_rtx'."
            )
        self.config.hardware_compatibility_level = levels[level]
        return ("sm80+",) if level == "ampere_plus" else (str(capability()),)

    def _select_capabilities(self, hardware: Sequence[str]) -> tuple[str, ...]:
        """Select the GPUs of TensorRT for RTX by compute capability."""
        if not hardware:
            return ("sm80+",)
        known = {name.lower(): value for name, value in self.trt.ComputeCapability.__members__.items()}
        here, names = capability(), [name for name in known if name.startswith("sm")]
        if "current" in hardware and here is not None and not supports(self.trt, here):
            raise ValueError(
                f"hardware='current' is {here} here, a GPU that TensorRT for RTX {self.trt.__version__} has no engines "
                f"for: only for {', '.join(names)}. Name one of those, or build with backend='tensorrt'."
            )
        choices = [*names, *(["current"] if here is not None else [])]
        self.config.num_compute_capabilities = len(hardware)
        for index, name in enumerate(hardware):
            check_choice("hardware", name, choices)
            self.config.set_compute_capability(known[name], index)
        return tuple(str(here) if name == "current" else name for name in hardware)

    def configure(self, workspace_mb: int | None, version_compatible: bool, timing_cache: str | Path | None) -> None:
        """Set the builder's other options; the arguments are those of `to_tensorrt`."""
        if self.name == "tensorrt_rtx" and (version_compatible or timing_cache is not None):
            raise ValueError(
                "TensorRT for RTX has neither version-compatible plans (it has no lean runtime) nor a timing cache (it "
                "times nothing): omit `version_compatible` and `timing_cache`, or pass backend='tensorrt'."
            )
        if workspace_mb is not None:
            self.config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
        if version_compatible:
            self.config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
        if timing_cache is not None:
            self._load_timings(Path(timing_cache))

    def _load_timings(self, path: Path) -> None:
        timings = self.config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not self.config.set_timing_cache(timings, False):
            raise ValueError(
                f"{path} contains timings of another GPU or build of TensorRT: delete it or name another file."
            )

    def timings(self) -> bytes:
        """Return the timing cache after a build."""
        return bytes(self.config.get_timing_cache().serialize())

    def build(self, source: str) -> tuple[bytes, float]:
        """Compile, and return the plan and the seconds that it took.

        Args:
            source: Name of the ONNX file in error messages.

        Raises:
            RuntimeError: If the compiler fails; the message contains the compiler's messages.
        """
        start = time.perf_counter()
        with working(f"Compiling the engine with {self.name}"):
            plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            raise RuntimeError(
                f"{self.name} {self.trt.__version__} could not compile {source}:\n{self._format_messages()}"
            )
        return bytes(plan), time.perf_counter() - start

    def inspect(self, plan: bytes, precision: str) -> dict[str, str]:
        """Load the plan on this machine's GPU, read the types of its layers, and check them against the precision.

        Returns:
            Type (INT8, HALF or FLOAT) of each layer that the engine inspector names.
        """
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = True  # this process has just built the code of a version-compatible plan
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise RuntimeError(
                f"{self.name} {self.trt.__version__} cannot load the engine that it has built for this GPU, so its "
                f"precision could not be checked; no engine was written:\n{self._format_messages()}"
            )
        text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        parsed = network_types(self.network)
        inspected = engine_layers(text, parsed)
        if inspected or self.name == "tensorrt":  # TensorRT for RTX makes its kernels later, and may name none
            check_engine_layers(inspected, parsed, precision)
        return inspected

    def output_tensors(self) -> list[Any]:
        """Return the network's output tensors."""
        return [self.network.get_output(index) for index in range(self.network.num_outputs)]

    def _format_messages(self) -> str:
        """List the warnings and errors that TensorRT has logged."""
        return format_list(self.log.messages, len(self.log.messages))


def _length_range(length: int, name: str, requested: Sequence[int] | None) -> tuple[int, int, int]:
    """Return the smallest, the best and the largest length of one axis.

    Args:
        length: Length in the ONNX file; -1 if the file accepts any.
        name: Name of the axis in error messages.
        requested: Smallest, best and largest length; None: the default.
    """
    if length != -1:
        if requested is not None and set(requested) != {length}:
            raise ValueError(
                f"The file takes a {name} of {length} only, but got {tuple(requested)}. Omit it, "
                "or export the network with dynamic_batch=True or dynamic_size=True."
            )
        return length, length, length
    if requested is None and name != "batch":
        raise ValueError(
            "The file takes images of any size, but an engine needs a range: pass `input_sizes`, the smallest, best "
            "and largest (height, width), for example input_sizes=((256, 512), (512, 1024), (1024, 2048))."
        )
    smallest, best, largest = requested or (1, 1, 8)
    if not 1 <= smallest <= best <= largest:
        raise ValueError(f"Expected a {name} of 1 <= smallest <= best <= largest, but got {(smallest, best, largest)}.")
    return smallest, best, largest


def _format_error(error: Any) -> str:
    """Return the text of a parser error, with its node and its place in the parser."""
    node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()})"
    return f"{node}: {error.desc()} [{error.code().name}, {error.func()} in {error.file()}:{error.line()}]"
