"""Writes a network to one ONNX file, with pre- and post-processing inside, if the file agrees with torch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from bpkd_sdk.classes import check_class_count, check_mask_classes, class_order
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.adapt import as_dataset_of
from bpkd_sdk.errors import check_choice, import_optional, warn
from bpkd_sdk.evaluation.profile import count_macs
from bpkd_sdk.export.onnx_cpu import serialize_for_cpu
from bpkd_sdk.export.trace import DeployableNetwork, first_reason, trace
from bpkd_sdk.export.verification import VerificationReport, verify
from bpkd_sdk.files import write_atomically
from bpkd_sdk.models import get_spec, load_model
from bpkd_sdk.models.checkpoint import content_hash
from bpkd_sdk.models.library import size_limit
from bpkd_sdk.models.mask_classification import MaskClassificationNetwork, adapt_network, fix_mask_probabilities
from bpkd_sdk.models.spec import get_provenance
from bpkd_sdk.output import as_output, check_final_activation
from bpkd_sdk.progress import working
from bpkd_sdk.runtime.module import pad_to_multiple
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.runtime.onnx_file import pack_onnx
from bpkd_sdk.sizes import check_size
from bpkd_sdk.spec import NetworkSpec

if TYPE_CHECKING:
    from onnx import ModelProto

Precision = Literal["fp32", "fp16"]

# Least share of pixels that have the same class in ONNX Runtime and torch, by field of `VerificationRun`. Half
# precision moves pixels between two classes whose logits are nearly equal. Some pixels therefore differ in any network,
# nearly all of them at edges, and their share of all pixels depends on the images.
LEAST_AGREEMENT = {"fp32": {"whole": 0.9999, "edge": 0.995}, "fp16": {"edge": 0.95, "body": 0.999}}
_REGIONS = {"whole": "of all pixels", "edge": "of the pixels at edges", "body": "of the pixels in bodies"}

OPSETS = range(18, 24)  # from the oldest that torch's exporter writes without a conversion, to the newest
_SMALLEST_SIDE = 32
_CHECKED_SIDE = 128


@dataclass(frozen=True)
class ExportReport:
    """Result of `to_onnx`.

    Attributes:
        path: The file; ``<name>.UNVERIFIED.onnx`` if it disagrees with torch and `force` keeps it.
        size: Size of the file in bytes.
        verified: Whether the file agrees with torch.
        verification: Agreement with torch in every run.
    """

    path: Path
    size: int
    verified: bool
    verification: VerificationReport

    @property
    def agreement(self) -> float:
        """Share (0..1) of pixels with the same class in ONNX Runtime and torch (fp32), in the worst run."""
        return self.verification.agreement

    @property
    def largest_difference(self) -> float | None:
        """Largest difference between both networks' logits over the largest logit; None if the file returns masks."""
        return self.verification.largest_difference


def to_onnx(
    source: nn.Module | str | Path,
    path: str | Path,
    *,
    input_size: tuple[int, int],
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    precision: Precision = "fp32",
    preprocess: bool = True,
    argmax: bool = True,
    opset: int = 18,
    verify_on: Any = None,
    match_classes: bool = True,
    force: bool = False,
) -> ExportReport:
    """Export a network to one ONNX file, `verify` it, and keep the file only if it agrees with torch.

    In every run at least 99.99 % of the pixels must have the same class as in torch, and 99.5 % of the pixels within
    the edge band of torch's mask (7 pixels wide). With precision "fp16", 95 % of the pixels within the band and 99.9 %
    of those outside must have the same class.

    The file resizes logits to the input size and then computes the classes. Its metadata contains the network's facts
    (classes, palette, normalisation, size, cost, versions, agreement), so that the file can be used alone, and
    `model.provenance`, plain JSON values about its training, if the network has that attribute. Its last bytes are a
    hash of all bytes before them, by which `bpkd_sdk` detects changes.

    Args:
        source: Network to export, which is not changed, or a checkpoint of one.
        path: File to write; it ends in ``.onnx``.
        input_size: (height, width) of the images; with `dynamic_size`, of the images to trace with.
        dynamic_batch: Whether the file accepts any number of images; otherwise one.
        dynamic_size: Whether the file accepts images of any size; it then computes padding, pooling and resizing for
            each size.
        precision: "fp32", or "fp16" inside the network with float32 around it.
        preprocess: Whether the file accepts images (N, H, W, channels) and normalises them: uint8 for the range 0 to
            255, as of RGB images, and float32 with the original values for any other range, since ONNX Runtime and
            TensorRT compute little in uint16. Otherwise it accepts normalised float32 (N, channels, H, W).
        argmax: Whether the file returns uint8 masks (N, H, W); otherwise it returns float32 logits (N, C, H, W).
        opset: ONNX operator set; 18 is the newest whose Resize older CUDA builds of ONNX Runtime support.
        verify_on: Images to verify with in addition to the embedded photographs, for example validation images, of any
            size: a file of one size gets windows of other images. A data set of any library (see `as_dataset`), whose
            classes are the network's if it does not state them.
        match_classes: Whether the network's class names are compared with those of `verify_on`; False takes classes by
            position.
        force: Whether a file that disagrees with torch is kept, as ``<name>.UNVERIFIED.onnx``, with a warning.

    Raises:
        ImportError: If onnx, onnxscript, onnxslim or onnxruntime is missing.
        ValueError: If an argument is out of range, the network has more than 256 classes or can be exported for one
            size only, or its classes differ from those of `verify_on`.
        RuntimeError: If torch cannot export the network, or ONNX Runtime and torch disagree; no file is written then.
    """
    input_size = check_size("input_size", input_size)
    for package in ("onnx", "onnxscript", "onnxslim", "onnxruntime"):
        import_optional(package, "export")
    model = adapt_network(source) if isinstance(source, nn.Module) else load_model(source)
    target, spec = Path(path), get_spec(model)
    _check_arguments(target, input_size, precision, opset, spec.size_divisor)
    if dynamic_size:
        _check_any_size(model)
    network = copy.deepcopy(model).cpu().float().eval()
    logits = _check_logits(network, input_size, spec.size_divisor, argmax)
    if verify_on is not None:
        verify_on = as_dataset_of(verify_on, spec.class_names)
    _check_classes(spec, spec.num_classes if logits is None else logits.shape[1], verify_on, match_classes)
    metadata = {
        "network": spec.to_dict(),
        "input_size": list(input_size),
        "dynamic_batch": dynamic_batch,
        "dynamic_size": dynamic_size,
        "precision": precision,
        "preprocess": preprocess,
        "input_dtype": "uint8" if preprocess and spec.pixels.is_uint8 else "float32",
        "argmax": argmax,
        "cost": {
            "params": sum(parameter.numel() for parameter in network.parameters()),
            "macs": count_macs(network, input_size, spec.size_divisor),
        },
        "training": get_provenance(model),
        "weights_sha256": content_hash(network.state_dict()),
        "versions": {package: version(package) for package in ("torch", "onnx", "bpkd-sdk")},
    }
    fix_mask_probabilities(network)
    network = network.half() if precision == "fp16" else network
    deployable = DeployableNetwork(network, spec, preprocess=preprocess, argmax=argmax, dynamic_size=dynamic_size)
    with working("Converting the network to ONNX"):
        traced = trace(deployable, input_size, dynamic_batch=dynamic_batch, opset=opset)
        model_bytes, cpu_bytes = _serialize(traced)
    with working("Comparing the ONNX file with torch"):
        draft = pack_onnx(model_bytes, model_bytes, metadata)  # verified as written, without the model for a CPU
        report = _verify_draft(draft, model, verify_on, match_classes)
    disagreements = _find_disagreements(report, precision)
    if disagreements:
        target = _unverified_path(target, disagreements, force)
    content = pack_onnx(model_bytes, cpu_bytes, metadata | {"verified": not disagreements, "parity": report.to_dict()})
    write_atomically(target, content)
    return ExportReport(target, len(content), not disagreements, report)


def seal_onnx(model: ModelProto, metadata: Mapping[str, Any]) -> bytes:
    """Return the content of an ONNX file: a model, whose metadata is replaced, and its faster model for a CPU."""
    return pack_onnx(*_serialize(model), metadata)


def _serialize(model: ModelProto) -> tuple[bytes, bytes]:
    """Return the bytes of a model, whose metadata is removed, and of its faster model for a CPU."""
    del model.metadata_props[:]
    return model.SerializeToString(), serialize_for_cpu(model)


def _check_arguments(target: Path, input_size: tuple[int, int], precision: str, opset: int, divisor: int) -> None:
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


def _check_any_size(model: nn.Module) -> None:
    """Raise ValueError for a network that can be exported for images of one size only."""
    if reason := size_limit(model):
        network = model.network if isinstance(model, MaskClassificationNetwork) else model
        raise ValueError(
            f"{type(network).__name__} cannot be exported for images of any size: {reason}. Export it with "
            "dynamic_size=False; the file then segments images of other sizes in windows. Or distil it into a student "
            "that accepts any size, and export that."
        )


@torch.no_grad()
def _check_logits(network: nn.Module, input_size: tuple[int, int], divisor: int, argmax: bool) -> Tensor | None:
    """Run a network on a black image; return None if it fails, because tracing then reports the reason.

    The image is small if the network accepts that: neither its classes nor its last activation depend on the size.

    Raises:
        ValueError: If it ends with a sigmoid, or with a softmax and the file returns logits.
    """
    for height, width in ([min(side, _CHECKED_SIDE) for side in input_size], input_size):
        image = pad_to_multiple(torch.zeros(1, get_spec(network).in_channels, height, width), divisor)
        try:
            logits = as_output(network(image)).logits
            break
        except Exception:  # noqa: S112  (the network's own code may raise anything)
            continue
    else:
        return None
    check_final_activation("The network", network, image, logits, allow_softmax=argmax)
    return logits


def _check_classes(spec: NetworkSpec, classes: int, data: SegmentationDataset | None, match_classes: bool) -> None:
    """Raise ValueError if a mask cannot hold the network's classes, or if they differ from those of the data."""
    check_mask_classes(classes)
    if data is not None:
        check_class_count(classes, data.num_classes, network_name="The network", data_name=data.name)
        class_order(spec, data, network_name="The network", data_name=data.name, match_classes=match_classes)


def _verify_draft(
    content: bytes, model: nn.Module, data: SegmentationDataset | None, match_classes: bool
) -> VerificationReport:
    """Compare the content of a file with torch, before the file is kept."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.onnx"
        draft.write_bytes(content)
        try:
            return verify(OnnxRuntime(draft, "cpu", as_written=True), model, data=data, match_classes=match_classes)
        except Exception as error:  # the network's own code may raise anything at a size it was not made for
            raise RuntimeError(
                f"The export could not be compared with torch: {first_reason(error)}. If the size is the reason, pass "
                "a larger `input_size`, or dynamic_size=False. No file was written."
            ) from error


def _find_disagreements(report: VerificationReport, precision: Precision) -> list[str]:
    """Describe each share of pixels that is smaller than required, run by run."""
    return [
        f"on {run.batch_size} image(s) of {run.size} {share:.4%} {_REGIONS[region]} have the same class, "
        f"{least:.2%} are required"
        for run in report.runs
        for region, least in LEAST_AGREEMENT[precision].items()
        if (share := getattr(run, region)) is not None and share < least
    ]


def _unverified_path(target: Path, disagreements: Sequence[str], force: bool) -> Path:
    """Warn, and return the path for a file that disagrees with torch; raise RuntimeError without `force`."""
    unverified = target.with_suffix(".UNVERIFIED.onnx")
    problem = f"The exported network disagrees with torch: {'; '.join(disagreements)}."
    if not force:
        raise RuntimeError(f"{problem} No file was written; force=True keeps it as {unverified.name}.")
    warn(f"{problem} It was kept as {unverified}.")
    return unverified
