"""Writes an artifact as a model of the Triton Inference Server, into the server's model repository.

The configuration is built as Triton's protobuf message, so it always follows Triton's schema. It contains the
artifact's metadata, so a client needs only the URL.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from bpkd_sdk.data.shapes import render
from bpkd_sdk.errors import check_choice, import_optional, warn
from bpkd_sdk.files import ENGINE_SUFFIXES, exported_path, write_atomically
from bpkd_sdk.runtime.base import AcceptedImages
from bpkd_sdk.runtime.engine import accepted_images
from bpkd_sdk.runtime.manifest import check_plan, load_manifest, manifest_path
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.runtime.onnx_file import METADATA_KEY
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

TritonBackend = Literal["onnxruntime", "tensorrt", "python"]
TritonDevice = Literal["auto", "cpu", "gpu"]

DEFAULT_BATCH_SIZE = 8  # largest batch of an artifact that accepts any number of images
CONFIG, LABELS, IMAGE = "config.pbtxt", "labels.txt", "image"


@dataclass(frozen=True)
class TritonReport:
    """Result of `to_triton`.

    Attributes:
        path: Folder of the model; its name is the model's.
        version: Version of the model that was written; the server serves the newest.
        config: Triton's protobuf message, the content of ``config.pbtxt``.
    """

    path: Path
    version: int
    config: ModelConfig


@dataclass(frozen=True)
class _Artifact:
    """Facts of an artifact of any format that the configuration depends on.

    Attributes:
        files: Content of each file in a version's folder, by name.
        metadata: Metadata of the artifact.
        accepts: Images that the artifact accepts.
        input: Name of the input.
        output: Name of the output.
        batch_size: Number of images that the artifact is fastest with; 1 if it is not known.
        size: (height, width) of the image to warm up with.
    """

    files: Mapping[str, bytes]
    metadata: Mapping[str, Any]
    accepts: AcceptedImages
    input: str
    output: str
    batch_size: int
    size: tuple[int, int]

    @property
    def spec(self) -> NetworkSpec:
        return NetworkSpec.from_dict(self.metadata["network"])

    @property
    def takes_bytes(self) -> bool:
        """Whether the input is uint8; otherwise it is float32."""
        return bool(self.metadata["preprocess"]) and self.spec.pixels.is_uint8

    def input_dims(self, height: int, width: int) -> list[int]:
        """Return the input's shape in Triton's terms, which include the batch only if its size is fixed."""
        batch, channels = [] if self.metadata["dynamic_batch"] else [1], self.spec.in_channels
        return [*batch, *([height, width, channels] if self.metadata["preprocess"] else [channels, height, width])]

    def output_dims(self, height: int, width: int) -> list[int]:
        """Return the output's shape in Triton's terms."""
        batch = [] if self.metadata["dynamic_batch"] else [1]
        return [*batch, *([] if self.metadata["argmax"] else [self.spec.num_classes or -1]), height, width]


def to_triton(
    source: str | Path,
    path: str | Path,
    *,
    name: str | None = None,
    backend: TritonBackend | None = None,
    max_batch_size: int | None = None,
    preferred_batch_sizes: Sequence[int] | None = None,
    max_queue_delay_us: int = 1000,
    instances: int = 1,
    device: TritonDevice = "auto",
) -> TritonReport:
    """Write an artifact into a Triton model repository, as a new model or as the next version of a model.

    The server finds either the complete version or no part of it: the version is written to a temporary folder and then
    renamed.

    Args:
        source: ONNX file of `to_onnx` or `quantize`, or engine of `to_tensorrt` for TensorRT. The server loads an
            engine only with exactly the TensorRT that built it; a version-compatible plan needs the server option
            ``--backend-config=tensorrt,version-compatible=true``. Engines have not yet been executed.
        path: Model repository, the folder of all models; it is created if it does not exist.
        name: Name of the model; None: the name of the source without its suffix.
        backend: Backend of the server that runs the model. None: "onnxruntime" for an ONNX file, "tensorrt" for an
            engine. "python" runs an ONNX file in any server whose Python has numpy and onnxruntime.
        max_batch_size: Largest batch that the server forms; None: 8, or the largest that the engine accepts.
        preferred_batch_sizes: Sizes of batches that the server runs without waiting for more images. None: for an
            engine the size that it was optimised for and the largest one, for an ONNX file no sizes.
        max_queue_delay_us: Time that an image waits to be batched with others, in microseconds.
        instances: Number of copies of the model that run at the same time on each device.
        device: "auto" (the server's GPUs if it has any, otherwise its CPU), "cpu" or "gpu". For "cpu" the repository
            contains the graph that `OnnxRuntime` runs on a CPU, with the same values as the file.

    Raises:
        FileNotFoundError: If the source does not exist.
        ImportError: If tritonclient is missing, or for an ONNX file onnxruntime.
        ValueError: If an argument is out of range, the source is not an artifact of bpkd-sdk that Triton can run, or
            the model's earlier versions have another input or output.
    """
    import_optional("tritonclient.grpc", "triton")
    artifact_path = exported_path(source)
    backend = _choose_backend(artifact_path, backend)
    if artifact_path.suffix.lower() == ".onnx":
        artifact = _read_onnx_artifact(artifact_path, backend, device)
    else:
        artifact = _read_engine_artifact(artifact_path)
    model = Path(path) / _check_name(name or artifact_path.stem)
    config = _describe_model(model.name, backend, artifact)
    _set_instances(config, instances, device)
    _set_batching(config, artifact, max_batch_size, preferred_batch_sizes, max_queue_delay_us)
    _add_warm_up(config, artifact)
    version = _next_version(model, config)
    _write_version(model, version, config, artifact)
    return TritonReport(model, version, config)


def _choose_backend(source: Path, backend: TritonBackend | None) -> TritonBackend:
    backends: dict[str, tuple[TritonBackend, ...]] = {".onnx": ("onnxruntime", "python")}
    backends |= dict.fromkeys(ENGINE_SUFFIXES, ("tensorrt",))
    if source.suffix.lower() not in backends:
        raise ValueError(
            f"Expected an ONNX file (.onnx) or an engine ({', '.join(ENGINE_SUFFIXES)}) for Triton, but got "
            f"{str(source)!r}. Export a checkpoint with bpkd_sdk.export.to_onnx first."
        )
    if backend is None:
        return backends[source.suffix.lower()][0]
    check_choice("backend", backend, get_args(TritonBackend))
    if backend not in backends[source.suffix.lower()]:
        required = "an engine of bpkd_sdk.export.to_tensorrt" if backend == "tensorrt" else "the ONNX file"
        raise ValueError(f"Triton's {backend} backend runs no {source.suffix} file such as {source}; pass {required}.")
    return backend


def _check_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(
            f"Expected `name` to be letters, digits, '_', '-' and '.', because it is part of a URL, but got {name!r}."
        )
    return name


def _read_onnx_artifact(path: Path, backend: TritonBackend, device: TritonDevice) -> _Artifact:
    runtime = OnnxRuntime(path, "cpu")
    if runtime.metadata["precision"] == "int8" and backend == "onnxruntime" and device != "gpu":
        warn(
            "On x86 processors without VNNI, sums of int8 products overflow in Triton's onnxruntime backend, silently. "
            "For such a server pass backend='python', which prevents it."
        )
    files = {"model.onnx": runtime.model() if device == "cpu" else path.read_bytes()}
    if backend == "python":
        files["model.py"] = Path(__file__).with_name("triton_model.py").read_bytes()
    (input_,), (output,) = runtime.session.get_inputs(), runtime.session.get_outputs()
    size = tuple(runtime.metadata["input_size"])
    return _Artifact(files, runtime.metadata, runtime.accepts, input_.name, output.name, 1, size)


def _read_engine_artifact(path: Path) -> _Artifact:
    manifest = load_manifest(path)
    check_plan(path, manifest)
    if manifest.backend != "tensorrt":
        raise ValueError(
            f"{path} was compiled by {manifest.backend}, and Triton's tensorrt backend loads plans of TensorRT only. "
            "Build it with to_tensorrt(..., backend='tensorrt') on the server's GPU, or pass the ONNX file."
        )
    ((input_name, shapes),) = manifest.inputs.items()
    (output_name,) = manifest.outputs
    if shapes["min"][0] > 1:
        raise ValueError(
            f"{path} takes at least {shapes['min'][0]} images at a time, and Triton also runs single images. "
            "Build it with batch_sizes=(1, ...)."
        )
    batch_size, *sides = shapes["opt"]
    size = tuple(sides[:2] if manifest.facts["preprocess"] else sides[1:])
    files = {"model.plan": path.read_bytes(), manifest_path("model.plan").name: manifest.to_json().encode()}
    return _Artifact(files, manifest.facts, accepted_images(manifest), input_name, output_name, batch_size, size)


def _describe_model(name: str, backend: TritonBackend, artifact: _Artifact) -> ModelConfig:
    """Return a configuration with name, backend, input, output, labels and metadata."""
    from tritonclient.grpc import model_config_pb2 as schema

    limits = artifact.accepts.height, artifact.accepts.width
    height, width = (least if least == most else -1 for least, most in limits)
    input_ = schema.ModelInput(
        name=artifact.input,
        data_type=schema.TYPE_UINT8 if artifact.takes_bytes else schema.TYPE_FP32,
        dims=artifact.input_dims(height, width),
    )
    output = schema.ModelOutput(
        name=artifact.output,
        data_type=schema.TYPE_UINT8 if artifact.metadata["argmax"] else schema.TYPE_FP32,
        dims=artifact.output_dims(height, width),
        label_filename=LABELS if artifact.spec.class_names else "",
    )
    metadata = schema.ModelParameter(string_value=json.dumps(dict(artifact.metadata)))
    return schema.ModelConfig(
        name=name, backend=backend, input=[input_], output=[output], parameters={METADATA_KEY: metadata}
    )


def _set_instances(config: ModelConfig, instances: int, device: TritonDevice) -> None:
    check_choice("device", device, get_args(TritonDevice))
    if instances < 1:
        raise ValueError(f"Expected `instances` to be at least 1, but got {instances}.")
    if config.backend == "tensorrt" and device == "cpu":
        raise ValueError("An engine runs on GPUs only, but got device='cpu'. Pass the ONNX file.")
    kind = "gpu" if config.backend == "tensorrt" else device
    config.instance_group.add(count=instances, kind=f"KIND_{kind.upper()}")


def _set_batching(
    config: ModelConfig, artifact: _Artifact, most: int | None, preferred: Sequence[int] | None, delay_us: int
) -> None:
    """Set the largest batch and the dynamic batcher; `most`, `preferred` and `delay_us` as in `to_triton`."""
    if not artifact.metadata["dynamic_batch"]:
        if (most or 1) != 1 or preferred:
            raise ValueError(
                f"The artifact takes one image at a time, but got max_batch_size={most} and "
                f"preferred_batch_sizes={preferred}. Export it with dynamic_batch=True."
            )
        return
    limit = artifact.accepts.batch_sizes[1]
    most = (limit or DEFAULT_BATCH_SIZE) if most is None else most
    if most < 1 or (limit is not None and most > limit):
        allowed = "at least 1" if limit is None else f"1 to {limit}, which the engine takes"
        raise ValueError(f"Expected `max_batch_size` to be {allowed}, but got {most}.")
    config.max_batch_size = most
    if preferred is None:
        # A preferred size of 1 would make the server run every image alone.
        preferred = (min(artifact.batch_size, most), most) if artifact.batch_size > 1 else ()
    sizes = sorted({*preferred})
    if any(not 1 <= size <= most for size in sizes):
        raise ValueError(f"Expected `preferred_batch_sizes` to be 1 to {most} (max_batch_size), but got {preferred}.")
    if delay_us < 0:
        raise ValueError(f"Expected `max_queue_delay_us` to be at least 0, but got {delay_us}.")
    if most > 1:
        config.dynamic_batching.max_queue_delay_microseconds = delay_us
        config.dynamic_batching.preferred_batch_size.extend(sizes)


def _add_warm_up(config: ModelConfig, artifact: _Artifact) -> None:
    """Add a warm-up request for each frequent batch size, because the first run of a size is slow."""
    from tritonclient.grpc import model_config_pb2 as schema

    (input_,) = config.input
    dims = artifact.input_dims(*artifact.size)
    image = schema.ModelWarmup.Input(data_type=input_.data_type, dims=dims, input_data_file=IMAGE)
    for size in sorted({1, *config.dynamic_batching.preferred_batch_size, config.max_batch_size or 1}):
        config.model_warmup.add(name=f"batch of {size}", batch_size=size, inputs={input_.name: image})


def _warm_up_image(artifact: _Artifact) -> bytes:
    """Return the bytes of the input to warm up with."""
    scene = torch.from_numpy(render(0, "warmup", 0, artifact.size)[0]).permute(2, 0, 1)[None]
    image = artifact.spec.imitate(scene)
    image = image.permute(0, 2, 3, 1) if artifact.metadata["preprocess"] else artifact.spec.normalize(image)
    return image.contiguous().numpy().tobytes()


def _next_version(model: Path, config: ModelConfig) -> int:
    """Return 1 for a new model, or the number after the newest version of a model with the same input and output.

    Raises:
        ValueError: If the model's folder contains something else.
    """
    if not model.exists():
        return 1
    earlier = _read_config(model / CONFIG)
    for field in ("backend", "input", "output"):
        before, now = getattr(earlier, field), getattr(config, field)
        if before != now:
            raise ValueError(
                f"The versions of {model} have another {field} than this artifact:\n{before}\ninstead of\n{now}\n"
                "Clients depend on it: choose another `name`, or remove that folder."
            )
    return 1 + max((int(folder.name) for folder in model.iterdir() if folder.name.isdigit()), default=0)


def _read_config(path: Path) -> ModelConfig:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        config: ModelConfig = text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ValueError(
            f"{path.parent} exists and contains no model that can be read ({error}). "
            "Choose another `name`, or remove that folder."
        ) from error
    return config


def _write_version(model: Path, version: int, config: ModelConfig, artifact: _Artifact) -> None:
    """Write a version of a model, and the files that all versions share.

    All files are first written to a temporary folder, which fails if the disk is full. A new model then appears by one
    rename. For a further version, the shared files are replaced first (they are valid for earlier versions too) and the
    version's folder appears last, so that the server never serves a version with an older configuration.
    """
    from google.protobuf import text_format

    shared = {CONFIG: text_format.MessageToString(config).encode(), f"warmup/{IMAGE}": _warm_up_image(artifact)}
    if artifact.spec.class_names:
        names = artifact.spec.mask_names if artifact.metadata["argmax"] else artifact.spec.class_names
        shared[LABELS] = "".join(f"{name}\n" for name in names).encode()
    files = {f"{version}/{name}": content for name, content in artifact.files.items()}
    draft = model.with_name(f".{model.name}.{os.getpid()}.tmp")
    try:
        for name, content in (shared | files).items():
            write_atomically(draft / name, content)
        if not model.exists():
            draft.rename(model)
            return
        (model / "warmup").mkdir(exist_ok=True)
        for name in shared:
            (draft / name).replace(model / name)
        (draft / str(version)).rename(model / str(version))
    finally:
        shutil.rmtree(draft, ignore_errors=True)
