"""INT8 that says what it costs: every layer's damage to edges and bodies is measured, and the worst stay in float32.

Boundaries are where a pixel's two best logits lie closest, so rounding shows there first, and mIoU hardly sees it. The
limit is therefore stated in boundary IoU.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpkd_sdk.classes import check_class_count, class_order, reorder_labels
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.integrity import image_problem
from bpkd_sdk.errors import import_optional
from bpkd_sdk.evaluation.agreement import mask_agreement
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.export.onnx import sealed
from bpkd_sdk.export.qdq import Layer, find_layers, measured_ranges, quantized, with_ranges, without_ends
from bpkd_sdk.files import write_atomically
from bpkd_sdk.progress import track
from bpkd_sdk.runtime.onnx import OnnxRuntime, for_cpu, open_session

# One image in four is held out to judge by; so many of those are enough to rank layers.
HELD_OUT = 4
RANKING_IMAGES = 4

# Against a network's own masks every pixel that moves counts, also where the network was wrong: far stricter.
LIMIT_WITH_LABELS, LIMIT_WITHOUT = 0.01, 0.1


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer, and what it does to the masks when it alone is in int8.

    Attributes:
        name: The module's path in the network, for files of `to_onnx`; of a sum, what it adds.
        kind: The ONNX operator: "Conv", "MatMul", "Gemm" or "Add".
        quantized: Whether it is int8 in the file.
        edge_damage: Share of the pixels in the edge band (7 pixels wide) that change their class; None where the masks
            of the images that it was measured on have no edge.
        body_damage: The same outside the band; None where the band covers all.
    """

    name: str
    kind: str
    quantized: bool
    edge_damage: float | None
    body_damage: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` wrote, and what int8 does to edges.

    Attributes:
        path: The file.
        size: In bytes.
        layers: In the order of computation.
        boundary_loss: Boundary IoU lost on the images held out: against their labels, or where there are none against
            the masks of the file that was quantised.
        boundary_loss_of_all: The same with every layer between the first and the last in int8.
        labelled: Whether there were labels.
        edge_agreement: Share of edge-band pixels with the same class as before, on the images held out; None where the
            masks have no edge.
        body_agreement: The same outside the band; None where the band covers all.
        agreement: The same for all pixels.
        calibration_images: Number of images that the ranges come from.
        held_out_images: Number of images that the rest was measured on.
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
        """The layers by the damage that they do, to edges first."""
        return tuple(sorted(self.layers, key=_damage, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def quantize(
    onnx_path: str | Path,
    path: str | Path,
    calibration_data: SegmentationDataset,
    *,
    images: int = 64,
    max_boundary_loss: float | None = None,
    match_classes: bool = True,
) -> QuantizationReport:
    """Put the convolutions, matrix products and sums of a file of `to_onnx` into int8, as many as the edges bear.

    Activations get the range of all values seen in three quarters of the images, which are taken evenly from the data
    set; the rest judges. (Ranges that cut off rare values did no better, and those of least entropy far worse.) Every
    layer is put into int8 alone and its damage measured. The first and the last with weights stay in float32. If all
    between them together lose more boundary IoU than allowed, the most damaging ones are left out, as few as it takes.

    The time is about that of running four images through the float32 file, for every layer: a minute of one core for
    75 convolutions at 360x480.

    Args:
        onnx_path: Written by `to_onnx` with precision="fp32", preprocess=True and argmax=True; not one that disagrees
            with torch and was kept by force.
        path: Ends in ``.onnx``. The metadata is that of the other file but for what was found of it: precision "int8",
            and under "quantization" what the report says.
        calibration_data: Images like those the network will see, of the size that the file takes. Labels are used if
            there are any; without, the classes need not be the network's.
        images: How many of them, at most.
        max_boundary_loss: Most boundary IoU (0..1) that may be lost. None: 0.01; or 0.1 without labels, where the
            float32 file's own masks stand in, so that every pixel that moves counts.
        match_classes: Hold the file's class names against those of labelled data, and read the labels in the file's
            order; False takes them by position.

    Raises:
        FileNotFoundError: If there is no such ONNX file.
        ImportError: If onnx or onnxruntime is missing.
        ValueError: For an argument out of its range, a file or data that do not fit, or images without edges, by which
            nothing can be judged.
        RuntimeError: If no layer can be quantised within the limit; no file is written then.
    """
    onnx = import_optional("onnx", "export")
    target = Path(path)
    source = _open(Path(onnx_path), target)
    samples = _samples(calibration_data, images, source, match_classes)
    proto = onnx.load(onnx_path)
    layers = find_layers(proto)
    if (weighted := sum(layer.weighted for layer in layers)) < 3:
        raise ValueError(f"{onnx_path} has {weighted} layers; with the first and the last left out, none remains.")
    split = len(samples) - max(1, len(samples) // HELD_OUT)
    ranges = find_ranges(proto, layers, [image for image, _ in samples[:split]])
    judge = _Judge(source, calibration_data, samples[split:])
    alone = {
        layer: judge.layer(layer, quantized(proto, [layer], ranges))
        for layer in track(layers, total=len(layers), description="Measuring layers")
    }
    ranked = sorted(without_ends(layers), key=lambda layer: _damage(alone[layer]), reverse=True)

    @cache
    def boundary_loss(left_out: int) -> float:
        return judge.boundary_loss(judge.masks(quantized(proto, ranked[left_out:], ranges)))

    if max_boundary_loss is None:
        max_boundary_loss = LIMIT_WITH_LABELS if calibration_data.has_labels else LIMIT_WITHOUT
    left_out = _fewest(boundary_loss, len(ranked), max_boundary_loss)
    chosen = set(ranked[left_out:])
    result = quantized(proto, ranked[left_out:], ranges)
    agreement = mask_agreement(judge.masks(result), judge.own_masks)
    found: dict[str, Any] = {
        "boundary_loss": boundary_loss(left_out),
        "boundary_loss_of_all": boundary_loss(0),
        "labelled": calibration_data.has_labels,
        "edge_agreement": agreement.edge,
        "body_agreement": agreement.body,
        "agreement": agreement.whole,
        "calibration_images": split,
        "held_out_images": len(samples) - split,
    }
    described = tuple(dataclasses.replace(alone[layer], quantized=layer in chosen) for layer in layers)
    onnx.checker.check_model(result)
    facts = int8_facts(
        source.metadata,
        quantized=sum(layer.weighted for layer in chosen),
        layers=[dataclasses.asdict(layer) for layer in described],
        data=calibration_data.name,
        max_boundary_loss=max_boundary_loss,
        agreement_before=source.metadata["parity"]["agreement"],
        **found,
    )
    content = sealed(result, facts)
    write_atomically(target, content)
    return QuantizationReport(target, len(content), described, **found)


def find_ranges(proto: Any, layers: Sequence[Layer], images: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute value over all images, uint8 (3, H, W), of every tensor of a graph that may be quantised."""
    tensors = measured_ranges(layers)
    session = _session(with_ranges(proto, tensors))
    name = session.get_inputs()[0].name
    found = [
        session.run(None, {name: _batch(image)})
        for image in track(images, total=len(images), description="Calibrating")
    ]
    return dict(zip(tensors, np.max(np.array(found), axis=0).tolist(), strict=True))


def int8_facts(facts: Mapping[str, Any], **quantization: Any) -> dict[str, Any]:
    """The metadata of a file in int8: that of the float32 file, but not how far that one agreed with torch."""
    kept = {key: value for key, value in facts.items() if key not in ("parity", "verified")}
    return kept | {"precision": "int8", "quantization": quantization}


def _damage(layer: QuantizedLayer) -> tuple[float, float]:
    """What to rank a layer by."""
    return layer.edge_damage or 0.0, layer.body_damage or 0.0


def _open(path: Path, target: Path) -> OnnxRuntime:
    if target.suffix != ".onnx":
        raise ValueError(f"Expected a path that ends in '.onnx', but got {str(target)!r}.")
    source = OnnxRuntime(path, "cpu")
    if not (source.metadata["preprocess"] and source.metadata["argmax"]):
        raise ValueError(
            f"{path} maps no uint8 image to a mask, which is what int8 is judged by; "
            "export the network with preprocess=True and argmax=True."
        )
    if source.metadata["precision"] != "fp32":
        raise ValueError(
            f"{path} is {source.metadata['precision']} already; quantize the float32 file: to_onnx(precision='fp32')."
        )
    if not source.metadata["verified"]:
        raise ValueError(
            f"{path} disagrees with torch and was kept by force; an int8 file of it would hide that. "
            "Quantize a file that to_onnx wrote without force=True."
        )
    return source


def _classes(source: OnnxRuntime) -> int:
    """How many classes its masks tell apart; 0 if that is not known."""
    return source.spec.num_classes and max(source.spec.num_classes, 2)


def _samples(
    data: SegmentationDataset, most: int, source: OnnxRuntime, match_classes: bool
) -> list[tuple[Tensor, Tensor]]:
    """Images (3, H, W) and labels (H, W) in the file's own order of classes, spread evenly over the data set."""
    if most < HELD_OUT or len(data) < HELD_OUT:
        raise ValueError(
            f"Expected at least {HELD_OUT} images, {HELD_OUT - 1} to calibrate with and one to judge by, "
            f"but got images={most} of {data.name}, which has {len(data)}."
        )
    order = None
    if data.has_labels:
        data.check_classes()
        classes = _classes(source) or data.num_classes
        check_class_count(classes, data.num_classes, network_name=str(source.path), data_name=data.name)
        order = class_order(
            source.spec,
            data,
            network_name=str(source.path),
            data_name=data.name,
            match_classes=match_classes,
        )
    indices = np.linspace(0, len(data) - 1, min(most, len(data))).round().astype(int)
    samples = []
    for index in indices.tolist():
        image, label = data[index]
        if problem := image_problem(image):
            raise ValueError(f"{data.sample_name(index)}: {problem}.")
        samples.append((image, reorder_labels(label, order, data.ignore_index)))
    for index, (image, _) in zip(indices, samples, strict=True):
        if not source.accepts.takes_size(*image.shape[1:]):
            raise ValueError(
                f"{source.path} takes images of {source.metadata['input_size']}, but {data.sample_name(int(index))} is "
                f"{list(image.shape[1:])}. Resize the images, or export with input_size={tuple(image.shape[1:])}."
            )
    return samples


def _session(proto: Any) -> Any:
    return open_session(for_cpu(proto, "int8"), torch.device("cpu"))


def _batch(image: Tensor) -> Any:
    """uint8 (3, H, W) -> uint8 (1, H, W, 3)."""
    return image.permute(1, 2, 0)[None].contiguous().numpy()


class _Judge:
    """Compares quantised graphs with the file that they come from, on images that they were not calibrated with."""

    def __init__(
        self, source: OnnxRuntime, data: SegmentationDataset, samples: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self.images = [image for image, _ in samples]
        self.own_masks = self._run(source.session, self.images)
        self.references = [label for _, label in samples] if data.has_labels else self.own_masks
        self.class_names, self.ignore_index = data.class_names, data.ignore_index
        if not data.has_labels:  # then its classes may be others than the network's
            self.class_names, self.ignore_index = tuple(map(str, range(_classes(source) or 256))), -1
        before = self._score(self.own_masks, self.references)
        self.boundary_iou = before.boundary_iou
        if math.isnan(before.edge_accuracy):
            raise ValueError(
                f"The {len(samples)} image(s) of {data.name} that were held out to judge by have no edges, in the "
                f"{'labels' if data.has_labels else 'masks'}. Pass images that show several classes, or more of them."
            )

    def masks(self, proto: Any, most: int | None = None) -> list[Tensor]:
        """The masks (H, W) that a graph makes of the first images."""
        return self._run(_session(proto), self.images[:most])

    def layer(self, layer: Layer, proto: Any) -> QuantizedLayer:
        """What a layer does, by a graph in which it alone is in int8."""
        agreement = mask_agreement(self.masks(proto, RANKING_IMAGES), self.own_masks[:RANKING_IMAGES])
        edge, body = (None if share is None else 1 - share for share in (agreement.edge, agreement.body))
        return QuantizedLayer(layer.name, layer.kind, False, edge, body)

    def boundary_loss(self, masks: Sequence[Tensor]) -> float:
        """Boundary IoU lost against the labels, or against the file's own masks."""
        return self.boundary_iou - self._score(masks, self.references).boundary_iou

    def _run(self, session: Any, images: Sequence[Tensor]) -> list[Tensor]:
        name = session.get_inputs()[0].name
        return [torch.from_numpy(session.run(None, {name: _batch(image)})[0])[0] for image in images]

    def _score(self, masks: Sequence[Tensor], references: Sequence[Tensor]) -> Metrics:
        counts = MetricCounts(self.class_names, ignore_index=self.ignore_index)
        for mask, reference in zip(masks, references, strict=False):
            counts.update(mask[None], reference[None])
        return counts.compute()


def _fewest(boundary_loss: Callable[[int], float], most: int, limit: float) -> int:
    """The smallest number of left-out layers whose loss was measured to be within the limit.

    Bisection takes it that leaving out more never hurts; where it does hurt, the result holds the limit all the same,
    but a smaller number might have done so too.
    """
    if boundary_loss(0) <= limit:
        return 0
    count = bisect_left(range(most), True, key=lambda left_out: boundary_loss(left_out) <= limit)
    if count == most:
        raise RuntimeError(
            f"No layer can be int8 within max_boundary_loss={limit}: all together lose {boundary_loss(0):.4f} boundary "
            f"IoU, the least damaging one alone {boundary_loss(most - 1):.4f}. No file was written. Allow more, "
            "calibrate with more images, or stay with fp16."
        )
    return count
