"""An artifact as a model of the Triton Inference Server: the road past one machine.

The configuration is built as Triton's own protobuf message, so that it cannot leave Triton's schema. It carries the
artifact's metadata: a client needs nothing but the URL.
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
from bpkd_sdk.errors import check_choice, import_optional
from bpkd_sdk.files import write_atomically
from bpkd_sdk.models import NetworkSpec
from bpkd_sdk.runtime.base import Accepts
from bpkd_sdk.runtime.engine import accepted
from bpkd_sdk.runtime.formats import ENGINE_SUFFIXES
from bpkd_sdk.runtime.manifest import check_plan, load_manifest, manifest_path
from bpkd_sdk.runtime.onnx import METADATA_KEY, OnnxRuntime

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


CONFIG, LABELS, IMAGE = "config.pbtxt", "labels.txt", "image"


def next_version(model: Path, config: ModelConfig) -> int:
    """1, or the number after the newest of a model that takes and returns the same.

    Raises:
        ValueError: If the folder holds something else.
    """
    if not model.exists():
        return 1
    earlier = _read(model / CONFIG)
    for field in ("backend", "input", "output"):
        before, now = getattr(earlier, field), getattr(config, field)
        if before != now:
            raise ValueError(
                f"The versions of {model} have another {field} than this artifact:\n{before}\ninstead of\n{now}\n"
                "Clients rely on it: choose another `name`, or remove that folder."
            )
    return 1 + max((int(folder.name) for folder in model.iterdir() if folder.name.isdigit()), default=0)


def _read(path: Path) -> ModelConfig:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        config: ModelConfig = text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ValueError(
            f"{path.parent} is there and holds no model that can be read ({error}). "
            "Choose another `name`, or remove that folder."
        ) from error
    return config


def write_version(
    model: Path, version: int, files: Mapping[str, bytes], config: ModelConfig, labels: Sequence[str], image: bytes
) -> None:
    """Write a version of a model, and what lies around the versions.

    All is written beside its place first, where the disk may be full. A new model then appears by one rename. For a
    further version the configuration is replaced, which fits the earlier versions as well, and what belongs to it; the
    version itself appears last, so that none is served by a configuration that was not made for it.

    Args:
        model: The model's folder.
        version: Its number, from 1.
        files: What the version's folder holds.
        config: Triton's message.
        labels: Class names; none where they are not known.
        image: The input to warm up with.
    """
    from google.protobuf import text_format

    around = {CONFIG: text_format.MessageToString(config).encode(), f"warmup/{IMAGE}": image}
    if labels:
        around[LABELS] = "".join(f"{name}\n" for name in labels).encode()
    own = {f"{version}/{name}": content for name, content in files.items()}
    draft = model.with_name(f".{model.name}.{os.getpid()}.tmp")
    try:
        for name, content in (around | own).items():
            write_atomically(draft / name, content)
        if not model.exists():
            draft.rename(model)
            return
        (model / "warmup").mkdir(exist_ok=True)
        for name in around:
            (draft / name).replace(model / name)
        (draft / str(version)).rename(model / str(version))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


TritonBackend = Literal["onnxruntime", "tensorrt", "python"]
TritonDevice = Literal["auto", "cpu", "gpu"]

MAX_BATCH_SIZE = 8  # for an artifact that takes any number of images


@dataclass(frozen=True)
class TritonReport:
    """What `to_triton` wrote.

    Attributes:
        path: The model's folder; its name is the model's.
        version: Of the model; the server serves the newest.
        config: Triton's protobuf message, as it lies in ``config.pbtxt``.
    """

    path: Path
    version: int
    config: ModelConfig


@dataclass(frozen=True)
class _Artifact:
    """What has to be known of an artifact, whatever its format.

    Attributes:
        files: What a version's folder holds.
        facts: The artifact's metadata.
        accepts: The images that it takes.
        input: Its name.
        output: Its name.
        batch: The number of images that it is fastest with; 1 if that is not known.
        size: (height, width) of the image to warm up with.
    """

    files: Mapping[str, bytes]
    facts: Mapping[str, Any]
    accepts: Accepts
    input: str
    output: str
    batch: int
    size: tuple[int, int]

    @property
    def spec(self) -> NetworkSpec:
        return NetworkSpec.from_dict(self.facts["network"])

    def input_dims(self, height: int, width: int) -> list[int]:
        """As Triton counts them: a batch that can change is no part of the shape, one that cannot is."""
        batch = [] if self.facts["dynamic_batch"] else [1]
        return [*batch, *([height, width, 3] if self.facts["preprocess"] else [3, height, width])]

    def output_dims(self, height: int, width: int) -> list[int]:
        batch = [] if self.facts["dynamic_batch"] else [1]
        return [*batch, *([] if self.facts["argmax"] else [self.spec.num_classes or -1]), height, width]


def to_triton(
    artifact: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    backend: TritonBackend | None = None,
    max_batch_size: int | None = None,
    preferred_batch_sizes: Sequence[int] | None = None,
    max_queue_delay_us: int = 1000,
    instances: int = 1,
    device: TritonDevice = "auto",
) -> TritonReport:
    """Write an artifact into a Triton model repository, as a new model or as the next version of one.

    The server finds the whole version or nothing of it: it is written beside its place, then renamed.

    Args:
        artifact: An ONNX file of `to_onnx` or `quantize`; or an engine of `to_tensorrt` for TensorRT itself, which the
            server loads if it has the very TensorRT that built it (a version-compatible plan needs the server option
            ``--backend-config=tensorrt,version-compatible=true``).
        repository: The folder of all models; made if it is not there.
        name: Of the model; None: the file's, without suffix.
        backend: What runs it in the server. None: "onnxruntime" for an ONNX file, "tensorrt" for an engine. "python"
            runs an ONNX file in any server whose Python has numpy and onnxruntime.
        max_batch_size: Most images that the server puts together; None: 8, or what the engine takes.
        preferred_batch_sizes: Batches of these sizes are not held back for more; None: the size that the
            engine was built to be best at, and the largest; of an ONNX file none.
        max_queue_delay_us: How long an image waits for others to be batched with, in microseconds.
        instances: How many copies of the model run at the same time, on each device.
        device: "auto": the server's GPUs if it has any, otherwise its CPU. For "cpu" an ONNX file is written as
            `bpkd_sdk.runtime.onnx.for_cpu` changes it, with the same values.

    Raises:
        FileNotFoundError: If there is no such artifact.
        ImportError: If tritonclient is missing, or for an ONNX file onnxruntime.
        ValueError: For an argument out of its range, an artifact that is not one of ours or that Triton cannot run, or
            a name whose earlier versions take or return something else.
    """
    import_optional("tritonclient.grpc", "triton")
    source = Path(artifact)
    backend = _choose_backend(source, backend)
    found = _read_onnx(source, backend, device) if source.suffix == ".onnx" else _read_engine(source)
    model = Path(repository) / _check_name(name or source.stem)
    config = _describe(model.name, backend, found)
    _place(config, instances, device)
    _batch(config, found, max_batch_size, preferred_batch_sizes, max_queue_delay_us)
    _warm_up(config, found)
    version = next_version(model, config)
    write_version(model, version, found.files, config, found.spec.class_names, _image(found))
    return TritonReport(model, version, config)


def _choose_backend(source: Path, backend: TritonBackend | None) -> TritonBackend:
    kinds: dict[str, tuple[TritonBackend, ...]] = {".onnx": ("onnxruntime", "python")}
    kinds |= dict.fromkeys(ENGINE_SUFFIXES, ("tensorrt",))
    if source.suffix not in kinds:
        raise ValueError(
            f"Triton is given an ONNX file (.onnx) or an engine ({', '.join(ENGINE_SUFFIXES)}), but got "
            f"{str(source)!r}. Export a checkpoint with bpkd_sdk.export.to_onnx first."
        )
    if backend is None:
        return kinds[source.suffix][0]
    check_choice("backend", backend, get_args(TritonBackend))
    if backend not in kinds[source.suffix]:
        needed = "an engine of bpkd_sdk.export.to_tensorrt" if backend == "tensorrt" else "the ONNX file"
        raise ValueError(f"Triton's {backend} backend runs no {source.suffix} file such as {source}; pass {needed}.")
    return backend


def _check_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(
            f"Expected `name` to be letters, digits, '_', '-' and '.', because it is part of a URL, but got {name!r}."
        )
    return name


def _read_onnx(path: Path, backend: TritonBackend, device: TritonDevice) -> _Artifact:
    runtime = OnnxRuntime(path, "cpu")
    files = {"model.onnx": runtime.model() if device == "cpu" else path.read_bytes()}
    if backend == "python":
        files["model.py"] = Path(__file__).with_name("triton_model.py").read_bytes()
    (taken,), (returned,) = runtime.session.get_inputs(), runtime.session.get_outputs()
    size = tuple(runtime.metadata["input_size"])
    return _Artifact(files, runtime.metadata, runtime.accepts, taken.name, returned.name, 1, size)


def _read_engine(path: Path) -> _Artifact:
    manifest = load_manifest(path)
    check_plan(path, manifest)
    if manifest.backend != "tensorrt":
        raise ValueError(
            f"{path} was compiled by {manifest.backend}, and Triton's tensorrt backend loads plans of TensorRT only. "
            "Build it with to_tensorrt(..., backend='tensorrt') on the server's GPU, or pass the ONNX file."
        )
    ((taken, shapes),) = manifest.inputs.items()
    (returned,) = manifest.outputs
    if shapes["min"][0] > 1:
        raise ValueError(
            f"{path} takes at least {shapes['min'][0]} images at a time, and Triton passes on single ones. "
            "Build it with batch=(1, ...)."
        )
    batch, *sides = shapes["opt"]
    size = tuple(sides[:2] if manifest.facts["preprocess"] else sides[1:])
    files = {"model.plan": path.read_bytes(), manifest_path("model.plan").name: manifest.to_json().encode()}
    return _Artifact(files, manifest.facts, accepted(manifest), taken, returned, batch, size)


def _describe(name: str, backend: TritonBackend, artifact: _Artifact) -> ModelConfig:
    """Name, backend, input, output, labels and metadata."""
    from tritonclient.grpc import model_config_pb2 as schema

    limits = artifact.accepts.height, artifact.accepts.width
    height, width = (least if least == most else -1 for least, most in limits)
    taken = schema.ModelInput(
        name=artifact.input,
        data_type=schema.TYPE_UINT8 if artifact.facts["preprocess"] else schema.TYPE_FP32,
        dims=artifact.input_dims(height, width),
    )
    returned = schema.ModelOutput(
        name=artifact.output,
        data_type=schema.TYPE_UINT8 if artifact.facts["argmax"] else schema.TYPE_FP32,
        dims=artifact.output_dims(height, width),
        label_filename=LABELS if artifact.spec.class_names else "",
    )
    metadata = schema.ModelParameter(string_value=json.dumps(dict(artifact.facts)))
    return schema.ModelConfig(
        name=name, backend=backend, input=[taken], output=[returned], parameters={METADATA_KEY: metadata}
    )


def _place(config: ModelConfig, instances: int, device: TritonDevice) -> None:
    check_choice("device", device, get_args(TritonDevice))
    if instances < 1:
        raise ValueError(f"Expected `instances` to be at least 1, but got {instances}.")
    if config.backend == "tensorrt" and device == "cpu":
        raise ValueError("An engine runs on GPUs only, but got device='cpu'. Pass the ONNX file.")
    kind = "gpu" if config.backend == "tensorrt" else device
    config.instance_group.add(count=instances, kind=f"KIND_{kind.upper()}")


def _batch(
    config: ModelConfig, artifact: _Artifact, most: int | None, preferred: Sequence[int] | None, delay_us: int
) -> None:
    """The largest batch, and how batches are put together."""
    if not artifact.facts["dynamic_batch"]:
        if (most or 1) != 1 or preferred:
            raise ValueError(
                f"The artifact takes one image at a time, but got max_batch_size={most} and "
                f"preferred_batch_sizes={preferred}. Export it with dynamic_batch=True."
            )
        return
    limit = artifact.accepts.batch[1]
    most = (limit or MAX_BATCH_SIZE) if most is None else most
    if most < 1 or (limit is not None and most > limit):
        allowed = "at least 1" if limit is None else f"1 to {limit}, which the engine takes"
        raise ValueError(f"Expected `max_batch_size` to be {allowed}, but got {most}.")
    config.max_batch_size = most
    if preferred is None:
        # With 1 among them every image would be sent on alone.
        preferred = (min(artifact.batch, most), most) if artifact.batch > 1 else ()
    sizes = sorted({*preferred})
    if any(not 1 <= size <= most for size in sizes):
        raise ValueError(f"Expected `preferred_batch_sizes` to be 1 to {most} (max_batch_size), but got {preferred}.")
    if delay_us < 0:
        raise ValueError(f"Expected `max_queue_delay_us` to be at least 0, but got {delay_us}.")
    if most > 1:
        config.dynamic_batching.max_queue_delay_microseconds = delay_us
        config.dynamic_batching.preferred_batch_size.extend(sizes)


def _warm_up(config: ModelConfig, artifact: _Artifact) -> None:
    """A request of each batch size that the server will often meet; the first one is always slow."""
    from tritonclient.grpc import model_config_pb2 as schema

    (taken,) = config.input
    dims = artifact.input_dims(*artifact.size)
    image = schema.ModelWarmup.Input(data_type=taken.data_type, dims=dims, input_data_file=IMAGE)
    for size in sorted({1, *config.dynamic_batching.preferred_batch_size, config.max_batch_size or 1}):
        config.model_warmup.add(name=f"batch of {size}", batch_size=size, inputs={taken.name: image})


def _image(artifact: _Artifact) -> bytes:
    scene = torch.from_numpy(render(0, "warmup", 0, artifact.size)[0])
    image = scene if artifact.facts["preprocess"] else artifact.spec.normalize(scene.permute(2, 0, 1)[None])
    return image.contiguous().numpy().tobytes()
