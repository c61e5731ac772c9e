"""Writes an INT8 file: measures how much each layer harms edges and bodies, and leaves the worst layers in float32.

This file chooses the layers, `bpkd_sdk.export.calibration` measures ranges and damage, and `bpkd_sdk.export.qdq` writes
INT8 into the graph. Boundaries are where a pixel's two largest logits are closest, so rounding changes classes there
first, and mIoU hardly shows it. The limit is therefore a loss of boundary IoU.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpkd_sdk.data.adapt import as_dataset_of
from bpkd_sdk.errors import import_optional
from bpkd_sdk.evaluation.agreement import MaskAgreement
from bpkd_sdk.export.calibration import HELD_OUT, HeldOutImages, measure_ranges, read_samples
from bpkd_sdk.export.onnx import seal_onnx
from bpkd_sdk.export.qdq import Layer, find_layers, inner_layers, insert_qdq
from bpkd_sdk.files import exported_path, write_atomically
from bpkd_sdk.progress import track, working
from bpkd_sdk.runtime.fit import Fit, check_fit
from bpkd_sdk.runtime.onnx import OnnxRuntime
from bpkd_sdk.runtime.onnx_file import read_onnx

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

# Without labels every pixel that changes counts, also where the float32 network was wrong, which is far stricter.
LIMIT_WITH_LABELS, LIMIT_WITHOUT_LABELS = 0.01, 0.1


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer, and the pixels that change if this layer alone is in int8.

    Attributes:
        name: Path of the module in the network, for files of `to_onnx`; for a sum the names of its addends.
        kind: ONNX operator: "Conv", "MatMul", "Gemm" or "Add".
        quantized: Whether the layer is int8 in the file.
        edge_damage: Share (0..1) of the pixels in the edge band (7 pixels wide) that change their class; None if the
            masks of the images that it was measured on have no edge.
        body_damage: Share (0..1) of the pixels outside the band that change their class; None if the band covers all.
    """

    name: str
    kind: str
    quantized: bool
    edge_damage: float | None
    body_damage: float | None

    @property
    def damage(self) -> tuple[float, float]:
        """Damage to edges, then to bodies; layers are ranked by this pair."""
        return self.edge_damage or 0.0, self.body_damage or 0.0


@dataclass(frozen=True)
class QuantizationReport:
    """Result of `quantize`.

    Attributes:
        path: The file.
        size: Size of the file in bytes.
        layers: All layers, in the order of computation.
        boundary_loss: Boundary IoU (0..1) lost on the held-out images: against their labels, or without labels against
            the masks of the float32 file.
        boundary_loss_of_all: Boundary IoU lost with every layer between the first and the last in int8.
        labelled: Whether the images have labels.
        edge_agreement: Share (0..1) of the pixels in the edge band with the same class as in float32, on the held-out
            images; None if the masks have no edge.
        body_agreement: Share of the pixels outside the band with the same class; None if the band covers all.
        agreement: Share of all pixels with the same class.
        calibration_images: Number of images that the ranges were measured on.
        held_out_images: Number of images that all other figures were measured on.
    """

    path: Path
    size: int
    layers: tuple[QuantizedLayer, ...]
    boundary_loss: float
    boundary_loss_of_all: float
    labelled: bool
    edge_agreement: float | None
    body_agreement: float | None
    agreement: float
    calibration_images: int
    held_out_images: int

    @property
    def worst(self) -> tuple[QuantizedLayer, ...]:
        """The layers by their damage, the most damaging first; damage to edges counts first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.damage, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def quantize(
    source: str | Path,
    path: str | Path,
    calibration_data: Any,
    *,
    images: int = 64,
    max_boundary_loss: float | None = None,
    fit: Fit = "slide",
    match_classes: bool = True,
) -> QuantizationReport:
    """Put as many convolutions, matrix products and sums of an ONNX file into int8 as a limit on boundary loss allows.

    Three quarters of the images, taken evenly from the data set, are used for calibration: the range of an activation
    is the range of all its values in them. (Ranges that cut off rare values gave no better results, and ranges of least
    entropy far worse ones.) The other images are held out to measure the loss. Each layer's damage is measured with
    that layer alone in int8. The first and the last layer with weights stay in float32. If all layers between them
    together lose more boundary IoU than allowed, the most damaging ones stay in float32 too, as few as possible.

    For each layer, four images pass through the rest of the network from the layer's quarter on, about five eighths of
    it on average.

    Args:
        source: ONNX file of `to_onnx` with precision="fp32", preprocess=True and argmax=True, that agrees with torch.
        path: File to write; it ends in ``.onnx``. Its metadata is that of `source`, without the agreement with torch,
            with precision "int8", and with the report under "quantization".
        calibration_data: Images of any size like those that the network will segment, in a data set of any library (see
            `as_dataset`); its classes are the file's if it does not state them. Labels are used if there are any;
            without labels, the classes may differ from the network's.
        images: Largest number of images to use. With windows of larger images, each image gives a window, at another
            place in each image; of fewer images, more windows are used.
        max_boundary_loss: Largest loss of boundary IoU (0..1). None: 0.01 with labels; 0.1 without labels, because
            every pixel that changes counts against the float32 file's own masks.
        fit: "slide", "resize" or "pad": rule for images of a size that the file does not accept, the same as when the
            network will be used; see `bpkd_sdk.runtime.fit`.
        match_classes: Whether the file's class names are compared with those of labelled data, and labels are put in
            the file's order; False takes classes by position.

    Raises:
        FileNotFoundError: If the ONNX file does not exist.
        ImportError: If onnx or onnxruntime is missing.
        ValueError: If an argument is out of range, the file or the data are not suitable, or the held-out images have
            no edges, so that the loss cannot be measured.
        RuntimeError: If no layer can be int8 within the limit; no file is written then.
    """
    onnx = import_optional("onnx", "export")
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(f"Expected a path that ends in '.onnx', but got {str(target)!r}.")
    check_fit(fit)
    if max_boundary_loss is not None and not max_boundary_loss <= 1:
        raise ValueError(f"Expected `max_boundary_loss` to be at most 1, but got {max_boundary_loss}.")
    source = exported_path(source)
    runtime = _open_float_file(source)
    calibration_data = as_dataset_of(calibration_data, runtime.spec.class_names)
    samples = read_samples(calibration_data, images, runtime, fit, match_classes)
    calibration_images = len(samples) - max(1, len(samples) // HELD_OUT)
    calibrating, measuring = list(chain(*samples[:calibration_images])), list(chain(*samples[calibration_images:]))
    if max_boundary_loss is None:
        max_boundary_loss = LIMIT_WITH_LABELS if calibration_data.has_labels else LIMIT_WITHOUT_LABELS
    model = onnx.load_from_string(read_onnx(source)[0])
    layers = find_layers(model)
    if (weighted := sum(layer.weighted for layer in layers)) < 3:
        raise ValueError(
            f"{source} has {weighted} layers with weights; the first and the last stay in float32, so none remains."
        )
    ranges = measure_ranges(model, layers, [image for image, _ in calibrating])
    with working("Segmenting the held-out images in float32"):
        held_out = HeldOutImages(runtime, calibration_data, measuring)
    agreements = track(
        held_out.layer_agreements(model, layers, ranges), total=len(layers), description="Measuring layers"
    )
    alone = {layer: _measure_layer(layer, agreement) for layer, agreement in zip(layers, agreements, strict=True)}
    ranked = sorted(inner_layers(layers), key=lambda layer: alone[layer].damage, reverse=True)

    @cache
    def masks(left_out: int) -> list[Tensor]:
        return held_out.segment(insert_qdq(model, ranked[left_out:], ranges))

    def boundary_loss(left_out: int) -> float:
        return held_out.boundary_loss(masks(left_out))

    with working("Choosing the layers for int8"):
        left_out = _fewest_left_out(boundary_loss, len(ranked), max_boundary_loss)
        chosen = set(ranked[left_out:])
        quantized = insert_qdq(model, ranked[left_out:], ranges)
        agreement = held_out.agreement(masks(left_out))
    summary: dict[str, Any] = {
        "boundary_loss": boundary_loss(left_out),
        "boundary_loss_of_all": boundary_loss(0),
        "labelled": calibration_data.has_labels,
        "edge_agreement": agreement.edge,
        "body_agreement": agreement.body,
        "agreement": agreement.whole,
        "calibration_images": calibration_images,
        "held_out_images": len(samples) - calibration_images,
    }
    measured = tuple(dataclasses.replace(alone[layer], quantized=layer in chosen) for layer in layers)
    metadata = int8_metadata(
        runtime.metadata,
        quantized=sum(layer.weighted for layer in chosen),
        layers=[dataclasses.asdict(layer) for layer in measured],
        data=calibration_data.name,
        fit=fit,
        max_boundary_loss=max_boundary_loss,
        agreement_before=runtime.metadata["parity"]["agreement"],
        **summary,
    )
    return QuantizationReport(target, write_int8(quantized, target, metadata), measured, **summary)


def write_int8(model: ModelProto, path: Path, metadata: Mapping[str, Any]) -> int:
    """Check a model with Q/DQ pairs, write it to a sealed ONNX file, and return the file's size in bytes."""
    import onnx

    onnx.checker.check_model(model)
    content = seal_onnx(model, metadata)
    write_atomically(path, content)
    return len(content)


def int8_metadata(metadata: Mapping[str, Any], **quantization: Any) -> dict[str, Any]:
    """Return the metadata of an int8 file: that of the float32 file, without its agreement with torch."""
    kept = {key: value for key, value in metadata.items() if key not in ("parity", "verified")}
    return kept | {"precision": "int8", "quantization": quantization}


def _open_float_file(path: Path) -> OnnxRuntime:
    """Open an ONNX file on the CPU; raise ValueError unless it is a verified float32 file from image to mask."""
    runtime = OnnxRuntime(path, "cpu")
    metadata = runtime.metadata
    if not (metadata["preprocess"] and metadata["argmax"]):
        raise ValueError(
            f"{path} does not map images to masks, by which the loss of int8 is measured; "
            "export the network with preprocess=True and argmax=True."
        )
    if metadata["precision"] != "fp32":
        raise ValueError(
            f"{path} is {metadata['precision']} already; quantize the float32 file: to_onnx(precision='fp32')."
        )
    if not metadata["verified"]:
        raise ValueError(
            f"{path} disagrees with torch and was kept by force; an int8 file of it would hide that. "
            "Quantize a file that to_onnx wrote without force=True."
        )
    return runtime


def _measure_layer(layer: Layer, agreement: MaskAgreement) -> QuantizedLayer:
    """Describe a layer by the agreement of a model in which this layer alone is in int8."""
    edge, body = (None if share is None else 1 - share for share in (agreement.edge, agreement.body))
    return QuantizedLayer(layer.name, layer.kind, False, edge, body)


def _fewest_left_out(boundary_loss: Callable[[int], float], most: int, limit: float) -> int:
    """Return the smallest number of layers left out of int8 whose loss is within the limit, found by bisection.

    Assumes that the loss falls with the number of layers left out. If it does not, the result is within the limit too,
    but a smaller number may exist.

    Args:
        boundary_loss: Loss of boundary IoU by the number of most damaging layers left out.
        most: Number of layers that may be left out.
        limit: Largest loss allowed.

    Raises:
        RuntimeError: If the loss is above the limit even with one layer in int8.
    """
    if boundary_loss(0) <= limit:
        return 0
    count = bisect_left(range(most), True, key=lambda left_out: boundary_loss(left_out) <= limit)
    if count == most:
        raise RuntimeError(
            f"No layer can be int8 within max_boundary_loss={limit}: all layers together lose {boundary_loss(0):.4f} "
            f"boundary IoU, the least damaging layer alone {boundary_loss(most - 1):.4f}. No file was written. Allow a "
            "larger loss, calibrate with more images, or use fp16."
        )
    return count
