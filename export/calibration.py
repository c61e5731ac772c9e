"""Images for `quantize`: most calibrate the ranges of activations; the held-out ones measure the damage of int8."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bpkd_sdk.classes import Order, check_class_count, class_order, reorder_labels
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.data.checks import checked_image
from bpkd_sdk.evaluation.agreement import MaskAgreement, mask_agreement
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.export.onnx_cpu import serialize_for_cpu
from bpkd_sdk.export.qdq import SWITCH, Layer, range_tensors, split_at_layers, with_range_outputs, with_switches
from bpkd_sdk.pixels import check_pixels
from bpkd_sdk.progress import track
from bpkd_sdk.runtime.fit import Fit, fit_images, fit_size
from bpkd_sdk.runtime.onnx import OnnxRuntime, open_session
from bpkd_sdk.sizes import format_size, resize_label

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

# One of HELD_OUT images measures the loss and does not calibrate. The first RANKING_IMAGES of these rank the layers.
HELD_OUT = 4
RANKING_IMAGES = 4
# Sessions that measure the layers. With more of them, less is computed for each layer, and more weights are loaded.
SESSIONS = 4
_GOLDEN_RATIO = 0.618034  # multiples of it, without their whole part, are spread evenly

Sample = tuple[Tensor, Tensor]


def read_samples(
    data: SegmentationDataset, most: int, runtime: OnnxRuntime, fit: Fit, match_classes: bool
) -> list[list[Sample]]:
    """Read images that are spread evenly over a data set, as the file gets them.

    Returns:
        For each image, one sample: the image (C, h, w) of a size that the file accepts, and its label (h, w) in the
        file's order of classes, without the padding. If the file gets windows of the images, each image gives as many
        as make `most` samples together, at least one.
    """
    if most < HELD_OUT or len(data) < HELD_OUT:
        raise ValueError(
            f"Expected at least {HELD_OUT} images, {HELD_OUT - 1} to calibrate with and one to measure the loss on, "
            f"but got images={most} of {data.name}, which has {len(data)}."
        )
    check_pixels(runtime.spec.pixels, data.pixels, network_name=str(runtime.path), data_name=data.name)
    order = None
    if data.has_labels:
        data.check_classes()
        name, classes = str(runtime.path), _mask_classes(runtime) or data.num_classes
        check_class_count(classes, data.num_classes, network_name=name, data_name=data.name)
        order = class_order(runtime.spec, data, network_name=name, data_name=data.name, match_classes=match_classes)
    indices = np.linspace(0, len(data) - 1, min(most, len(data))).round().astype(int).tolist()
    return [
        _fitted_samples(data, index, order, runtime, fit, most // len(indices), number)
        for number, index in enumerate(indices)
    ]


def _fitted_samples(
    data: SegmentationDataset,
    index: int,
    order: Order | None,
    runtime: OnnxRuntime,
    fit: Fit,
    most: int,
    number: int,
) -> list[Sample]:
    """Read one image, and return the parts of it that the file gets; at most `most` windows, spread evenly.

    Args:
        data: Data set.
        index: Index of the image.
        order: Result of `class_order`.
        runtime: The file.
        fit: Rule for images of a size that the file does not accept.
        most: Largest number of windows.
        number: Number of the images that were read before; it moves the windows.
    """
    image, label = data[index]
    image = checked_image(data, index, image)
    if label.shape != image.shape[1:]:
        raise ValueError(
            f"{data.sample_name(index)}: the image is {format_size(image.shape[1:])} and the label "
            f"{format_size(label.shape)} (height x width). Both must have the same size."
        )
    fitted = fit_size((image.shape[1], image.shape[2]), runtime.accepts, fit)
    image = fit_images(image[None], fitted, runtime.spec)[0]
    label = resize_label(reorder_labels(label, order, data.ignore_index), fitted.inner)
    (height, width), corners = fitted.window, fitted.corners()
    count = min(most, len(corners))
    first = int(number * _GOLDEN_RATIO % 1 * len(corners))
    samples = []
    for part in range(count):
        top, left = corners[(first + part * len(corners) // count) % len(corners)]
        rows, columns = slice(top, top + height), slice(left, left + width)
        samples.append((image[:, rows, columns], label[rows, columns]))
    return samples


def measure_ranges(model: ModelProto, layers: Sequence[Layer], images: Sequence[Tensor]) -> dict[str, float]:
    """Measure the largest absolute value of each of `range_tensors(layers)` over images (channels, H, W)."""
    tensors = range_tensors(layers)
    session = _open(with_range_outputs(model, tensors))
    name = session.get_inputs()[0].name
    ranges = [
        session.run(None, {name: _to_batch(image)})
        for image in track(images, total=len(images), description="Calibrating")
    ]
    return dict(zip(tensors, np.max(np.array(ranges), axis=0).tolist(), strict=True))


class HeldOutImages:
    """Images that were not used for calibration, on which quantised models are compared with the float32 file.

    Args:
        runtime: The float32 file.
        data: Data set that the images are from.
        samples: Images (channels, H, W) and labels (h, w), which are smaller where an image is padded.
    """

    def __init__(self, runtime: OnnxRuntime, data: SegmentationDataset, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._input = runtime.session.get_inputs()[0].name
        self.float_masks = self._run(runtime.session, self._batches(len(samples)))
        self.references = [label for _, label in samples] if data.has_labels else self.float_masks
        self.class_names, self.ignore_index = data.class_names, data.ignore_index
        if not data.has_labels:  # then the data's classes may differ from the network's
            self.class_names, self.ignore_index = tuple(map(str, range(_mask_classes(runtime) or 256))), -1
        scores = self._score(self.float_masks)
        self.boundary_iou = scores.boundary_iou
        if math.isnan(scores.edge_accuracy):
            raise ValueError(
                f"The {len(samples)} image(s) of {data.name} that were held out to measure the loss have no edges, in "
                f"the {'labels' if data.has_labels else 'masks'}. Pass images that show several classes, or more of "
                "them."
            )

    def segment(self, model: ModelProto) -> list[Tensor]:
        """Return the masks (h, w) of a model."""
        return self._run(_open(model), self._batches(len(self.samples)))

    def agreement(self, masks: Sequence[Tensor]) -> MaskAgreement:
        """Compare masks of `segment` with the float32 masks."""
        return mask_agreement(masks, self.float_masks)

    def boundary_loss(self, masks: Sequence[Tensor]) -> float:
        """Return the boundary IoU that masks of `segment` lose, against the labels, or the float32 masks without."""
        return self.boundary_iou - self._score(masks).boundary_iou

    def layer_agreements(
        self, model: ModelProto, layers: Sequence[Layer], ranges: Mapping[str, float]
    ) -> Iterator[MaskAgreement]:
        """Compare the masks of a model in which one layer is in int8 with the float32 masks, for each of the layers.

        Few sessions, in which a layer can be switched, replace a session for each layer. Each session begins at its own
        layers, from the tensors that the float32 model computes before them. `RANKING_IMAGES` images are segmented.

        Args:
            model: Model in float32.
            layers: Layers of the model, in the order of computation.
            ranges: Result of `measure_ranges`.
        """
        from onnx.shape_inference import infer_shapes
        from onnx.utils import Extractor

        extractor = Extractor(infer_shapes(model))
        (image,), (mask,) = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
        parts = list(split_at_layers(model, layers, SESSIONS))
        names = sorted({name for needed, _ in parts for name in needed} - {image})
        before = _open(extractor.extract_model([image], names))
        batches = self._batches(RANKING_IMAGES)
        values = [dict(zip(names, before.run(names, batch), strict=True)) | batch for batch in batches]
        for needed, part in parts:
            session = _open(with_switches(extractor.extract_model(needed, [mask]), part, ranges))
            for index in range(len(part)):
                switched = [{name: value[name] for name in needed} | {SWITCH: np.array(index)} for value in values]
                yield mask_agreement(self._run(session, switched), self.float_masks[: len(switched)])

    def _batches(self, most: int) -> list[dict[str, Any]]:
        """Return the inputs of the float32 file for the first `most` images, by the name of the input."""
        return [{self._input: _to_batch(image)} for image, _ in self.samples[:most]]

    def _run(self, session: InferenceSession, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Return the masks (h, w) of the first images, from the inputs of a session for each of them."""
        masks = [torch.from_numpy(session.run(None, values)[0])[0] for values in inputs]
        labels = [label for _, label in self.samples[: len(masks)]]
        return [mask[: label.shape[0], : label.shape[1]] for mask, label in zip(masks, labels, strict=True)]

    def _score(self, masks: Sequence[Tensor]) -> Metrics:
        counts = MetricCounts(self.class_names, ignore_index=self.ignore_index)
        for mask, reference in zip(masks, self.references, strict=True):
            counts.update(mask[None], reference[None])
        return counts.compute()


def _open(model: ModelProto) -> InferenceSession:
    """Open a session of the faster model for a CPU."""
    return open_session(serialize_for_cpu(model), torch.device("cpu"))


def _mask_classes(runtime: OnnxRuntime) -> int:
    """Return the number of classes in a runtime's masks; 0 if it is not known."""
    return runtime.spec.num_classes and max(runtime.spec.num_classes, 2)


def _to_batch(image: Tensor) -> Any:
    """Turn an image (channels, H, W) into a batch, array (1, H, W, channels)."""
    return image.permute(1, 2, 0)[None].contiguous().numpy()
