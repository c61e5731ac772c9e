"""A network as one ONNX file, pre- and post-processing inside, checked against torch before it is kept."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.classes import check_class_count, check_mask_classes, class_order
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.shapes import render
from bpkd_sdk.errors import check_choice, import_optional
from bpkd_sdk.export.verify import VerificationReport, verify
from bpkd_sdk.files import write_atomically
from bpkd_sdk.models import NetworkSpec, get_spec
from bpkd_sdk.models.checkpoint import content_hash
from bpkd_sdk.output import as_output
from bpkd_sdk.runtime.inference import full_size_logits, pad_to_multiple, to_mask
from bpkd_sdk.runtime.onnx import METADATA_KEY, SEAL_KEY, SEAL_LENGTH, OnnxRuntime


@contextmanager
def exact_pooling() -> Iterator[None]:
    """Let `average_over_cells` stand in for torch's adaptive average pooling, also inside `interpolate(mode="area")`.

    For tracing only: the function in `torch.nn.functional` is replaced for the whole process, and put back on leaving.
    """
    original = F.adaptive_avg_pool2d
    F.adaptive_avg_pool2d = average_over_cells
    try:
        yield
    finally:
        F.adaptive_avg_pool2d = original


def average_over_cells(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """What `torch.nn.functional.adaptive_avg_pool2d` computes, by operations that no size is baked into.

    Args:
        input: (..., H, W), floating point; named as in torch, whose callers may pass it by name.
        output_size: (h, w), or one number for both; None keeps that side.

    Returns:
        (..., h, w).

    Example:
        >>> average_over_cells(torch.arange(6.0).view(1, 2, 3), (1, 2))
        tensor([[[2., 3.]]])
    """
    rows, columns = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    if rows == columns == 1:
        return input.mean((-2, -1), keepdim=True)
    if rows is not None:
        input = _averages(input.shape[-2], rows, input) @ input
    if columns is not None:
        input = input @ _averages(input.shape[-1], columns, input).transpose(0, 1)
    return input


def _averages(length: int, cells: int, like: Tensor) -> Tensor:
    """The matrix (cells, length) that averages a line over its cells.

    Cell i is [i length / cells, (i + 1) length / cells), and holds each position it overlaps, as in torch. Multiplied
    out, so that whole numbers decide.
    """
    position = torch.arange(length, device=like.device)
    cell = torch.arange(cells, device=like.device).view(-1, 1)
    inside = ((position + 1) * cells > cell * length) & (position * cells < (cell + 1) * length)
    weights = inside.float()
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


Precision = Literal["fp32", "fp16"]

# Share of pixels whose class must be the same in ONNX Runtime and torch, by the parts of `Agreement`. Half precision
# moves pixels between two classes whose logits are nearly equal, so some differ in any network, and nearly all of them
# lie at edges; what share of all pixels that is depends on the images.
LEAST_AGREEMENT = {"fp32": {"whole": 0.9999, "edge": 0.995}, "fp16": {"edge": 0.95, "body": 0.999}}
_PLACES = {"whole": "of all pixels", "edge": "of the pixels at edges", "body": "of the pixels in bodies"}

OPSETS = range(18, 24)  # what torch's exporter writes without converting down, to the newest it knows
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class ExportReport:
    """What `to_onnx` wrote.

    Attributes:
        path: The file; ``<name>.UNVERIFIED.onnx`` for one that disagrees and was kept by force.
        size: In bytes.
        verified: Whether it agrees with torch.
        verification: How far.
    """

    path: Path
    size: int
    verified: bool
    verification: VerificationReport

    @property
    def agreement(self) -> float:
        """Share of pixels (0..1) with the same class in ONNX Runtime and torch (fp32), in the worst run."""
        return self.verification.agreement

    @property
    def largest_difference(self) -> float | None:
        """Between both networks' logits over the largest logit; None where the file returns masks."""
        return self.verification.largest_difference


class _Deployable(nn.Module):
    """A network from image to mask, as it goes into the file."""

    def __init__(self, network: nn.Module, spec: NetworkSpec, preprocess: bool, argmax: bool, any_size: bool) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.preprocess = preprocess
        self.argmax = argmax
        self.logits = _any_size_logits if any_size else full_size_logits

    def forward(self, images: Tensor) -> Tensor:
        # Cast before transposing: TensorRT's parser takes no operator but Cast on uint8.
        inputs = self.spec.normalize(images.float().permute(0, 3, 1, 2)) if self.preprocess else images
        logits = self.logits(self.network, inputs, self.spec.size_divisor)
        return to_mask(logits).to(torch.uint8) if self.argmax else logits


def _any_size_logits(model: nn.Module, inputs: Tensor, divisor: int) -> Tensor:
    """`full_size_logits` without a decision on the size, which would tie torch.export to the sizes it traced."""
    height, width = inputs.shape[2:]
    # Written as a multiple, so that torch.export knows that the strides below divide it.
    full = [(side + divisor - 1) // divisor * divisor for side in (height, width)]
    below, beside = full[0] - height, full[1] - width
    if divisor > 1:
        inputs = F.pad(inputs, (0, beside, 0, below))
    precision = next((parameter.dtype for parameter in model.parameters()), inputs.dtype)
    logits = as_output(model(inputs.to(precision))).logits.float()
    logits = F.interpolate(logits, full, mode="bilinear", align_corners=False)
    return F.pad(logits, (0, -beside, 0, -below)) if divisor > 1 else logits


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int],
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    precision: Precision = "fp32",
    preprocess: bool = True,
    argmax: bool = True,
    opset: int = 18,
    verify_on: SegmentationDataset | None = None,
    match_classes: bool = True,
    force: bool = False,
) -> ExportReport:
    """Export a network to one ONNX file, `verify` it, and keep it only if it agrees with torch.

    In every run at least 99.99 % of the pixels must have the same class, and 99.5 % of those within the edge band of
    torch's mask (7 pixels wide); with precision "fp16" 95 % of those within the band and 99.9 % of those outside.

    Logits are resized to the input size and only then turned into classes. The file carries the network's facts
    (classes, palette, normalisation, size, versions, agreement) in its metadata, so that it can be used alone; and
    `model.provenance`, plain JSON values about its training, where the network has that attribute. Its last bytes are
    a hash of all before, by which `bpkd_sdk` finds out whether the file was altered.

    Args:
        model: A network; it is not changed.
        path: Ends in ``.onnx``.
        input_size: (H, W) of the images; with `dynamic_size` the size to trace with.
        dynamic_batch: Take any number of images; otherwise one.
        dynamic_size: Take images of any size. Padding, pooling and resizing are then computed inside the file.
        precision: "fp32", or "fp16" inside the network with float32 around it.
        preprocess: Take uint8 RGB images (N, H, W, 3) and normalise inside; otherwise normalised float32 (N, 3, H, W).
        argmax: Return uint8 masks (N, H, W); otherwise float32 logits (N, C, H, W).
        opset: ONNX operator set; 18 is the newest whose Resize older CUDA builds of ONNX Runtime know.
        verify_on: More images to verify with than the embedded photographs, of sizes that the file takes; such as those
            that the network will see.
        match_classes: Hold the network's class names against those of `verify_on`; False takes them by position.
        force: Keep a file that disagrees, as ``<name>.UNVERIFIED.onnx``, and warn.

    Raises:
        ImportError: If onnx, onnxscript, onnxslim or onnxruntime is missing.
        ValueError: For an argument out of its range, more than 256 classes, or classes that are not those of
            `verify_on`.
        RuntimeError: If torch cannot export the network, or ONNX Runtime and torch disagree; no file is left then.
    """
    for package in ("onnx", "onnxscript", "onnxslim", "onnxruntime"):
        import_optional(package, "export")
    target, spec = Path(path), get_spec(model)
    _check(target, input_size, precision, opset, spec.size_divisor)
    network = copy.deepcopy(model).cpu().float().eval()
    classes = _count_classes(network, input_size, spec.size_divisor) or spec.num_classes
    check_mask_classes(classes)
    if verify_on is not None:
        name = verify_on.name
        check_class_count(classes, verify_on.num_classes, network_name="The network", data_name=name)
        class_order(spec, verify_on, network_name="The network", data_name=name, match_classes=match_classes)
    facts = {
        "network": spec.to_dict(),
        "input_size": list(input_size),
        "dynamic_batch": dynamic_batch,
        "dynamic_size": dynamic_size,
        "precision": precision,
        "preprocess": preprocess,
        "argmax": argmax,
        "training": getattr(model, "provenance", {}),
        "weights_sha256": content_hash(network.state_dict()),
        "versions": {package: version(package) for package in ("torch", "onnx", "bpkd-sdk")},
    }
    exported = _Deployable(network, spec, preprocess, argmax, dynamic_size)
    if precision == "fp16":
        exported.network.half()
    proto = _slim(_trace(exported, input_size, _axes(dynamic_batch, dynamic_size, preprocess), opset))
    report = _verify(sealed(proto, facts), model, verify_on, match_classes)
    disagreements = _disagreements(report, precision)
    if disagreements:
        target = _marked(target, disagreements, force)
    content = sealed(proto, facts | {"verified": not disagreements, "parity": report.to_dict()})
    write_atomically(target, content)
    return ExportReport(target, len(content), not disagreements, report)


@torch.no_grad()
def _count_classes(network: nn.Module, input_size: tuple[int, int], divisor: int) -> int:
    """Run a network to count its classes; 0 if it fails, which tracing then explains."""
    try:
        return as_output(network(pad_to_multiple(torch.zeros(1, 3, *input_size), divisor))).logits.shape[1]
    except Exception:  # the network's own code may raise anything
        return 0


def _check(target: Path, input_size: tuple[int, int], precision: str, opset: int, divisor: int) -> None:
    if target.suffix != ".onnx":
        raise ValueError(f"Expected a path that ends in '.onnx', but got {str(target)!r}.")
    check_choice("precision", precision, get_args(Precision))
    if opset not in OPSETS:
        raise ValueError(
            f"Expected `opset` to be {OPSETS[0]} to {OPSETS[-1]}, which torch's exporter writes, but got {opset}."
        )
    smallest = max(_SMALLEST_SIDE, divisor)
    if min(input_size) < smallest:
        raise ValueError(
            f"Expected `input_size` to be (height, width) of at least {smallest} pixels, but got {input_size}."
        )


def _axes(dynamic_batch: bool, dynamic_size: bool, preprocess: bool) -> dict[int, str]:
    """Names of the input's axes that may change."""
    height = 1 if preprocess else 2
    return ({0: "batch"} if dynamic_batch else {}) | ({height: "height", height + 1: "width"} if dynamic_size else {})


def _trace(model: _Deployable, size: tuple[int, int], axes: dict[int, str], opset: int) -> Any:
    """The network as an ONNX model, or RuntimeError with torch's reason."""
    scenes = np.stack([render(0, "trace", index, size)[0] for index in range(2 if 0 in axes else 1)])
    images = torch.from_numpy(scenes)
    if not model.preprocess:
        images = model.spec.normalize(images.permute(0, 3, 1, 2))
    try:
        with exact_pooling(), _no_garbage_collection(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                model,
                (images,),
                dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),),
                # Sizes that must be equal for the network to run at all need no proof that they always are.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(axes,),
                input_names=["images"],
                output_names=["masks" if model.argmax else "logits"],
                verbose=False,
            )
    except Exception as error:  # the network's own code may raise anything while it is traced
        advice = " Try dynamic_size=False." if len(axes) > 1 else ""
        raise RuntimeError(
            f"torch cannot export {model.spec.name or type(model.network).__name__} at input_size={size}: "
            f"{_reason(error)}.{advice} No file was written."
        ) from error
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program.")
    return exported.model_proto


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes a million objects that live to its end; to search them for garbage is a fifth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _reason(error: BaseException) -> str:
    """The first paragraph of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().split(chr(10) * 2)[0]}".rstrip(".")


def _slim(proto: Any) -> Any:
    """Without the nodes that compute what is known, or nothing."""
    import onnx
    import onnxslim

    slimmed = onnxslim.slim(_without_idle_resizes(proto))
    onnx.checker.check_model(slimmed)
    return slimmed


def _without_idle_resizes(proto: Any) -> Any:
    """Without the resizes to the size that there is already, which ONNX Runtime and onnxslim would keep."""
    graph = proto.graph
    shapes = {value.name: value.type.tensor_type.shape for value in graph.value_info}
    outputs = {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        node.input[:] = [renamed.get(tensor, tensor) for tensor in node.input]
        if node.op_type == "Resize" and node.output[0] not in outputs and _keeps_shape(node, shapes):
            renamed[node.output[0]] = node.input[0]
            graph.node.remove(node)
    return proto


def _keeps_shape(node: Any, shapes: Mapping[str, Any]) -> bool:
    """Whether input and output have the same size, in numbers or in the names of dynamic sizes."""
    if not shapes.keys() >= {node.input[0], node.output[0]}:
        return False
    before, after = (
        [size.dim_value or size.dim_param for size in shapes[tensor].dim] for tensor in (node.input[0], node.output[0])
    )
    return before == after and all(before)


def sealed(proto: Any, facts: Mapping[str, Any]) -> bytes:
    """The content of a file: a graph, its facts in the metadata, and at the end the hash that `check_seal` looks for.

    An entry written behind a message is read as one of its entries, so the hash can cover all that stands before it.
    """
    import onnx

    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(facts)})
    seal = onnx.ModelProto()
    onnx.helper.set_model_props(seal, {SEAL_KEY: "0" * SEAL_LENGTH})
    content: bytes = proto.SerializeToString() + seal.SerializeToString()[:-SEAL_LENGTH]
    return content + hashlib.sha256(content).hexdigest().encode()


def _verify(
    content: bytes, model: nn.Module, data: SegmentationDataset | None, match_classes: bool
) -> VerificationReport:
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.onnx"
        draft.write_bytes(content)
        try:
            return verify(OnnxRuntime(draft, "cpu", as_written=True), model, data=data, match_classes=match_classes)
        except Exception as error:  # the network's own code may raise anything at a size it was not made for
            raise RuntimeError(
                f"The export could not be compared with torch: {_reason(error)}. If it is the size, pass a larger "
                "`input_size`, or dynamic_size=False. No file was written."
            ) from error


def _disagreements(report: VerificationReport, precision: Precision) -> list[str]:
    """What falls short of what is required, run by run."""
    return [
        f"on {run.batch} image(s) of {run.size} {share:.4%} {_PLACES[part]} have the same class, "
        f"{least:.2%} are required"
        for run in report.runs
        for part, least in LEAST_AGREEMENT[precision].items()
        if (share := getattr(run, part)) is not None and share < least
    ]


def _marked(target: Path, disagreements: Sequence[str], force: bool) -> Path:
    """The name of a file that disagrees, with a warning; RuntimeError without `force`."""
    marked = target.with_suffix(".UNVERIFIED.onnx")
    problem = f"The exported network disagrees with torch: {'; '.join(disagreements)}."
    if not force:
        raise RuntimeError(f"{problem} No file was written; force=True keeps it as {marked.name}.")
    warnings.warn(f"{problem} It was kept as {marked}.", stacklevel=3)
    return marked
