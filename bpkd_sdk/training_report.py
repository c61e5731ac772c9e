"""Writes a training report as one HTML file with a table, training curves, and the masks of all networks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from bpkd_sdk.colors import overlay_colors
from bpkd_sdk.data import SegmentationDataset
from bpkd_sdk.files import write_atomically
from bpkd_sdk.runtime.inference import to_mask
from bpkd_sdk.runtime.module import whole_logits
from bpkd_sdk.serve.overlay import BODY_COLOR, EDGE_COLOR, draw_difference, draw_overlay, picture_png
from bpkd_sdk.sizes import resize_label

MAX_IMAGES = 4
IMAGE_HEIGHT = 256  # pixels; smaller images are enlarged to about this height to make boundaries visible


def write_report(
    path: str | Path,
    networks: Mapping[str, nn.Module],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    val: SegmentationDataset,
    results: Mapping[str, Any],
) -> Path:
    """Write a self-contained HTML page. It shows the first `MAX_IMAGES` validation images, without a selection.

    Args:
        path: Path of the HTML file. The images and masks are also written as ``scenes.png`` in the same folder.
        networks: Networks whose masks are shown, by name. The last is the teacher; the one before it is the student
            that is compared with the teacher.
        histories: Records of the training runs, by name, see `TrainingResult.history`.
        val: Validation data.
        results: Dictionary with the ``rows`` of the table, the ``agreement`` (0..1) of the exported file with torch,
            and the name of the ``data``.

    Returns:
        Path of the HTML file.
    """
    path = Path(path)
    columns = ["image and label", *networks, "difference"]
    rows = [_draw_row(list(networks.values()), val, index) for index in range(min(MAX_IMAGES, len(val)))]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (Path(__file__).parent / "training_report.html.jinja").read_text("utf-8")
    )
    page = template.render(
        columns=columns,
        images=[{"pictures": [_data_uri(picture) for picture in pictures], "note": note} for pictures, note in rows],
        legend=[
            {"name": name, "color": f"rgb{tuple(color)}"}
            for name, color in (
                *zip(val.class_names, overlay_colors(val.palette), strict=True),
                ("teacher and student differ near an edge", EDGE_COLOR),
                ("teacher and student differ elsewhere (body)", BODY_COLOR),
            )
        ],
        losses=_svg(_draw_losses(histories)),
        scores=_svg(_draw_scores(histories)),
        **results,
    )
    write_atomically(path, page.encode())
    grid = np.vstack([_draw_headings(columns, rows[0][0][0].shape[1]), *(np.hstack(pictures) for pictures, _ in rows)])
    write_atomically(path.with_name("scenes.png"), picture_png(grid))
    return path


def _draw_row(networks: Sequence[nn.Module], val: SegmentationDataset, index: int) -> tuple[list[np.ndarray], str]:
    """Draw the pictures of one validation image, one per column, and format a note with the shares of differences."""
    image, label = val[index]
    factor = max(1, round(IMAGE_HEIGHT / image.shape[1]))
    size = factor * image.shape[1], factor * image.shape[2]
    masks = [_predict(network, image, size) for network in networks]
    truth = _enlarge_mask(label, size)
    picture = val.pixels.picture(image.permute(1, 2, 0).numpy())
    picture = np.asarray(cv2.resize(picture, size[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)
    overlays = [
        draw_overlay(picture, mask, val.palette, alpha=0.45, ignore_index=val.ignore_index) for mask in (truth, *masks)
    ]
    band = 2 * 3 * factor + 1
    difference, share = draw_difference(
        picture, masks[-1], masks[-2], label=truth, edge_width=band, ignore_index=val.ignore_index
    )
    note = f"differing pixels: {share.edge_share:.1%} near edges, {share.body_share:.1%} elsewhere"
    return [*overlays, difference], note


@torch.inference_mode()
def _predict(network: nn.Module, image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return the mask in the size of the picture, whose logits are resized before the classes are chosen."""
    logits = F.interpolate(whole_logits(network, image[None]), size, mode="bilinear")
    return np.asarray(to_mask(logits)[0].cpu().numpy())


def _enlarge_mask(mask: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(resize_label(mask, size).numpy())


def _draw_headings(columns: list[str], width: int) -> np.ndarray:
    strip = Image.new("RGB", (width * len(columns), width // 8), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(width // 14)
    for i, text in enumerate(columns):
        draw.text((i * width + width // 40, width // 16), text, fill="black", font=font, anchor="lm")
    return np.asarray(strip)


def _draw_losses(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    figure, axes = _figure()
    for name, history in histories.items():
        records = [record for record in history if "terms" in record]
        for term in records[-1]["terms"]:
            label = name if term == "ce" else f"{name}: {term}"
            axes.plot(
                [record["step"] for record in records],
                [record["terms"][term] for record in records],
                label=label,
                linestyle="-" if term == "ce" else ":",
            )
    axes.set(
        xlabel="step",
        ylabel="loss term, weighted",
        yscale="log",
        title="Cross-entropy (solid) and distillation (dotted)",
    )
    axes.legend(fontsize=8)
    return figure


def _draw_scores(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    figure, axes = _figure()
    for i, (name, history) in enumerate(histories.items()):
        records = [record for record in history if "metrics" in record]
        for score, style in {"miou": "-", "boundary_iou": ":"}.items():
            axes.plot(
                [record["step"] for record in records],
                [record["metrics"][score] for record in records],
                label=name if score == "miou" else None,
                color=f"C{i}",
                linestyle=style,
                marker="o",
                markersize=3,
            )
    axes.set(xlabel="step", ylim=(0, 1), title="mIoU (solid) and boundary IoU (dotted), validation")
    axes.legend(fontsize=8)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def _data_uri(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(picture_png(picture)).decode()
