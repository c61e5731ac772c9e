"""The texts and tables of the demo page as HTML. All texts from outside this package are escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from bpkd_sdk.colors import overlay_colors
from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.progress import format_si
from bpkd_sdk.serve.demo.scene import CachedPrediction
from bpkd_sdk.serve.networks import LATENCY_RUNS, ModelSet, ServedModel
from bpkd_sdk.serve.overlay import BODY_COLOR, EDGE_COLOR, Difference
from bpkd_sdk.sizes import format_size
from bpkd_sdk.spec import Color

BOUNDARY_WIDTH = 3  # width of the boundary in pixels for boundary IoU


def difference_text(difference: Difference) -> str:
    """Format the shares of pixels where two networks differ, with the legend of the difference picture."""
    entries = {
        f"differs near an edge: {difference.edge_share:.1%} of all pixels": EDGE_COLOR,
        f"differs elsewhere (body): {difference.body_share:.1%} of all pixels": BODY_COLOR,
    }
    return f"<p>The networks differ in <b>{difference.share:.1%}</b> of the pixels.</p>" + _legend(entries)


def _legend(entries: Mapping[str, Color]) -> str:
    items = "".join(f"<li>{_swatch(color)}{escape(name)}</li>" for name, color in entries.items())
    return f'<ul class="legend">{items}</ul>'


def _swatch(color: Color) -> str:
    return f'<span class="swatch" style="background:rgb{tuple(color)}"></span>'


class _ClassShare(NamedTuple):
    """Area of one class in one or two masks.

    Attributes:
        class_id: Id of the class.
        areas: Share of the pixels of each mask, 0..1.
        iou: Intersection over union of the class in the two masks, 0..1.
    """

    class_id: int
    areas: tuple[float, ...]
    iou: float


def classes_table(predictions: Mapping[str, CachedPrediction]) -> str:
    """Format the area of each class in the masks of one or two networks, and the IoU of two masks.

    Args:
        predictions: One or two predictions of the same image, by the name of the network.
    """
    first, *others = predictions.values()
    colors = overlay_colors(first.palette)
    rows = "".join(
        f"<tr><th scope=row>{_swatch(colors[row.class_id])}{escape(first.class_names[row.class_id])}</th>"
        + "".join(f"<td>{area:.1%}</td>" for area in row.areas)
        + (f"<td class=bar style='--part:{row.iou:.4f}'>{row.iou:.1%}</td>" if others else "")
        + "</tr>"
        for row in _class_shares([prediction.mask for prediction in predictions.values()])
    )
    headings = [f"Area, {escape(name)}" for name in predictions] + (["Agreement (IoU)"] if others else [])
    return _table(["Class", *headings], rows)


def _class_shares(masks: Sequence[np.ndarray]) -> list[_ClassShare]:
    """Count the classes of one or two masks, uint8 (H, W); the class with the largest area comes first."""
    first, last = masks[0].ravel(), masks[-1].ravel()
    confusion = np.bincount(first.astype(np.int32) * 256 + last, minlength=256 * 256).reshape(256, 256)
    first_area, last_area, intersection = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    present = np.flatnonzero(first_area + last_area)
    present = present[np.argsort(-(first_area + last_area)[present], kind="stable")]
    return [
        _ClassShare(
            int(class_id),
            tuple(area[class_id] / first.size for area in (first_area, last_area)[: len(masks)]),
            float(intersection[class_id] / (first_area[class_id] + last_area[class_id] - intersection[class_id])),
        )
        for class_id in present
    ]


def errors_table(predictions: Mapping[str, CachedPrediction], label: np.ndarray) -> str:
    """Format the scores of networks against the label of this image.

    Args:
        predictions: Predictions of the image, by the name of the network.
        label: Ground-truth class ids, uint8 (H, W), 255 for void.
    """
    rows = ""
    for name, prediction in predictions.items():
        scores = _score(prediction, label)
        values = (scores.miou, scores.boundary_iou, scores.pixel_accuracy, scores.edge_accuracy, scores.body_accuracy)
        cells = "".join("<td>–</td>" if math.isnan(value) else f"<td>{value:.1%}</td>" for value in values)
        rows += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    headings = ["mIoU", f"Boundary IoU ({BOUNDARY_WIDTH} px)", "Pixel accuracy", "Edge accuracy", "Body accuracy"]
    entries = {"wrong class near an edge": EDGE_COLOR, "wrong class elsewhere (body)": BODY_COLOR}
    return _legend(entries) + _table(["Network", *headings], rows)


def _score(prediction: CachedPrediction, label: np.ndarray) -> Metrics:
    counts = MetricCounts(prediction.class_names, boundary_width=BOUNDARY_WIDTH)
    counts.update(prediction.mask[None], label[None])
    return counts.compute()


def caption(predictions: Mapping[str, CachedPrediction], image_size: tuple[int, int], picture_rule: str = "") -> str:
    """Format the legend of the classes present, in the order of their ids, and the size of the image.

    Args:
        predictions: Predictions of the image, by the name of the network.
        image_size: (height, width) of the image.
        picture_rule: Sentence that states how pictures show the image; empty for RGB images.
    """
    first = next(iter(predictions.values()))
    colors = overlay_colors(first.palette)
    counts = sum(np.bincount(prediction.page_mask.ravel(), minlength=256) for prediction in predictions.values())
    present = {first.class_names[class_id]: colors[class_id] for class_id in np.flatnonzero(counts).tolist()}
    rule = f" &middot; {escape(picture_rule)}" if picture_rule else ""
    return f"{_legend(present)}<p class=faint>{format_size(image_size)} pixels (height x width){rule}</p>"


def cost_table(models: ModelSet, image_size: tuple[int, int]) -> str:
    """Format the costs of all networks for an image of this size (height, width), relative to the first network."""
    rows = "".join(_cost_row(model, models.available[0], image_size) for model in models.available)
    rows += "".join(
        f"<tr><th scope=row>{escape(model.name)}</th>"
        f"<td colspan=5 class=problem>Not available: {escape(model.reason)}</td></tr>"
        for model in models.unavailable
    )
    headings = ["Parameters", f"MACs at {format_size(image_size)}", "File size", "Latency", "Device"]
    table = _table(["Network", *headings], rows)
    notes = [f"Ratios are relative to {models.available[0].name}."] if len(models.available) > 1 else []
    notes += ["Sizes are height x width.", *windows_notes(models.available, image_size), _LATENCY_RULE]
    return f"{table}<p class=faint>{escape(' '.join(notes))}</p>" if models.available else table


def windows_notes(models: Sequence[ServedModel], image_size: tuple[int, int]) -> list[str]:
    """Return a sentence for each network that segments an image of this size in several windows."""
    fitted = {model.name: model.fit(image_size) for model in models}
    return [
        f"{name} runs in {len(fit.corners())} windows of {format_size(fit.window)}, all of which count."
        for name, fit in fitted.items()
        if len(fit.corners()) > 1
    ]


_LATENCY_RULE = (
    f"Latency: from the image on the page to its mask, on this server; median of up to {LATENCY_RUNS} runs after one "
    "that is not counted."
)
_COST_UNITS = ("", "", "B", "s")


def _cost_row(model: ServedModel, reference: ServedModel, image_size: tuple[int, int]) -> str:
    costs = _costs(model, image_size)
    references = [None] * len(costs) if reference is model else _costs(reference, image_size)
    cells = "".join(
        f"<td>{format_si(cost, unit)}{_format_ratio(cost, other)}</td>" if cost else "<td>–</td>"
        for cost, other, unit in zip(costs, references, _COST_UNITS, strict=True)
    )
    architecture = model.predictor.runtime.spec.name
    name = escape(model.name) + (f"<span class=sub>{escape(architecture)}</span>" if architecture else "")
    return f"<tr><th scope=row>{name}</th>{cells}<td>{escape(model.device_name)}</td></tr>"


def _costs(model: ServedModel, image_size: tuple[int, int]) -> list[float | None]:
    """Return parameters, MACs, file size in bytes and latency in seconds; None for an unknown value."""
    latency = model.latency.get(image_size)
    return [*model.cost(image_size), model.file_bytes, latency.total / 1000 if latency else None]


def _format_ratio(value: float, reference: float | None) -> str:
    ratio = reference / value if reference else 1.0
    if 0.95 < ratio < 1.05:
        return ""
    return f"<span class=sub>{f'{ratio:.1f}× less' if ratio > 1 else f'{1 / ratio:.1f}× more'}</span>"


def _table(headings: Sequence[str], rows: str) -> str:
    cells = "".join(f"<th scope=col>{heading}</th>" for heading in headings)
    table = f"<table class=figures><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"
    hint = "<p class='faint swipe'>Swipe the table to the left to see all columns.</p>"  # on narrow screens
    return f"{hint}<div class=scroll tabindex=0>{table}</div>"  # focusable, so that the arrow keys scroll it
