"""What the page says in words and numbers, as HTML; every text that is not ours is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import torch

from bpkd_sdk.evaluation.metrics import MetricCounts, Metrics
from bpkd_sdk.models.spec import Color
from bpkd_sdk.serve.demo.scene import CachedPrediction, Scene
from bpkd_sdk.serve.networks import DemoModels, Network
from bpkd_sdk.serve.overlay import BODY_COLOR, EDGE_COLOR, Difference
from bpkd_sdk.serve.predictor import Timings

BOUNDARY_WIDTH = 3  # pixels, of boundary IoU

WELCOME = """<div class="welcome"><h2>Choose an image to begin</h2><p>Upload one, take one with the camera, paste one,
or start with an example. It is segmented at once.</p></div>"""


class _Share(NamedTuple):
    """Of one class: its share of each mask, and how far the two masks of it agree (IoU)."""

    class_id: int
    shares: tuple[float, ...]
    agreement: float


def header(title: str, lineup: DemoModels) -> str:
    """The title, and what is on show and on which device."""
    able = [network for network in lineup.networks if network.predictor]
    devices = sorted({device_name(network) for network in able})
    where = f"Runs on {' and '.join(devices)}." if able else "No network could be opened: the reasons are below."
    if able and not torch.cuda.is_available():
        where += " No NVIDIA GPU is in reach."
    return f"<h1>{escape(title)}</h1><p>{escape(where)}</p>"


def difference_text(difference: Difference) -> str:
    """How much two masks disagree, near edges and elsewhere."""
    entries = {
        f"near an edge: {difference.edge_share:.1%}": EDGE_COLOR,
        f"in a body: {difference.body_share:.1%}": BODY_COLOR,
    }
    return f"<p>The networks disagree on <b>{difference.share:.1%}</b> of the pixels.</p>" + _legend(entries)


def _legend(entries: Mapping[str, Color]) -> str:
    spans = "".join(f"<li>{_swatch(color)}{escape(name)}</li>" for name, color in entries.items())
    return f'<ul class="legend">{spans}</ul>'


def _swatch(color: Color) -> str:
    return f'<span class="swatch" style="background:rgb{tuple(color)}"></span>'


def classes_table(scene: Scene, names: Sequence[str]) -> str:
    """For every class present: how much of the image each network gives it, and how far two networks agree on it."""
    seen = [scene.seen[name] for name in names]
    rows = "".join(
        f"<tr><th scope=row>{_swatch(seen[0].palette[row.class_id])}{escape(seen[0].class_names[row.class_id])}</th>"
        + "".join(f"<td>{share:.1%}</td>" for share in row.shares)
        + (f"<td class=bar style='--part:{row.agreement:.4f}'>{row.agreement:.1%}</td>" if len(seen) == 2 else "")
        + "</tr>"
        for row in _shares([one.mask for one in seen])
    )
    heads = [f"Area, {escape(name)}" for name in names] + (["Agreement (IoU)"] if len(seen) == 2 else [])
    return _table(["Class", *heads], rows)


def _shares(masks: Sequence[np.ndarray]) -> list[_Share]:
    """The classes of one or two masks, the largest first."""
    one, other = masks[0].ravel(), masks[-1].ravel()
    pairs = np.bincount(one.astype(np.int32) * 256 + other, minlength=256 * 256).reshape(256, 256)
    of_one, of_other, both = pairs.sum(1), pairs.sum(0), pairs.diagonal()
    present = np.flatnonzero(of_one + of_other)
    present = present[np.argsort(-(of_one + of_other)[present], kind="stable")]
    return [
        _Share(
            int(class_id),
            tuple(area[class_id] / one.size for area in (of_one, of_other)[: len(masks)]),
            float(both[class_id] / (of_one[class_id] + of_other[class_id] - both[class_id])),
        )
        for class_id in present
    ]


def errors_table(scene: Scene, names: Sequence[str]) -> str:
    """The scores of the networks against the label of this one image."""
    assert scene.label is not None  # noqa: S101  (asked for with a label only)
    rows = ""
    for name in names:
        scores = _score(scene.seen[name], scene.label)
        values = (scores.miou, scores.boundary_iou, scores.pixel_accuracy, scores.edge_accuracy, scores.body_accuracy)
        cells = "".join("<td>–</td>" if math.isnan(value) else f"<td>{value:.1%}</td>" for value in values)
        rows += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    heads = ["mIoU", f"Boundary IoU ({BOUNDARY_WIDTH} px)", "Pixels right", "... near edges", "... in bodies"]
    entries = {"wrong near an edge": EDGE_COLOR, "wrong in a body": BODY_COLOR}
    return _legend(entries) + _table(["Network", *heads], rows)


def _score(seen: CachedPrediction, label: np.ndarray) -> Metrics:
    counts = MetricCounts(seen.class_names, boundary_width=BOUNDARY_WIDTH)
    counts.update(torch.tensor(seen.mask[None]), torch.tensor(label[None]))
    return counts.compute()


def caption(scene: Scene, names: Sequence[str]) -> str:
    """Below the pictures: the classes that are in them, and how long each network took."""
    present: dict[str, Color] = {}
    for seen in (scene.seen[name] for name in names):
        for class_id in np.flatnonzero(np.bincount(seen.shown.ravel())).tolist():
            present[seen.class_names[class_id]] = seen.palette[class_id]
    times = " &middot; ".join(_timings(name, scene.seen[name].timings) for name in names)
    return f"{_legend(present)}<p class=faint>{scene.size[1]} x {scene.size[0]} pixels &middot; {times}</p>"


def _timings(name: str, timings: Timings) -> str:
    stages = f"before {timings.pre:.1f}, network {timings.inference:.1f}, after {timings.post:.1f}"
    return f'<span title="{stages}">{escape(name)} {timings.total:.0f} ms</span>'


def cost_table(networks: Sequence[Network], size: tuple[int, int]) -> str:
    """Parameters, MACs, file size and latency of all networks for an image of `size` (height, width)."""
    first = next((network for network in networks if network.predictor), None)
    rows = "".join(_cost_row(network, first, size) for network in networks)
    heads = ["Parameters", f"MACs at {size[1]} x {size[0]}", "File", "Latency", "Runs on"]
    return _table(["Network", *heads], rows)


def _cost_row(network: Network, first: Network | None, size: tuple[int, int]) -> str:
    head = f"<th scope=row>{escape(network.name)}</th>"
    if network.predictor is None:
        return f"<tr>{head}<td colspan=5 class=problem>Not available: {escape(network.problem or '')}</td></tr>"
    own = _figures(network, size)
    base = _figures(first, size) if first and first is not network else [None] * len(own)
    cells = "".join(
        f"<td>{_short(value)}{unit}{_ratio(value, reference)}</td>" if value else "<td>–</td>"
        for value, reference, unit in zip(own, base, _UNITS, strict=True)
    )
    return f"<tr>{head}{cells}<td>{escape(device_name(network))}</td></tr>"


_UNITS = ("", "", "B", "s")


def _short(value: float) -> str:
    """Three digits and a prefix: 2.30 M, 87.2 M, 1.81 G, 12.3 m."""
    exponent = math.floor(math.log10(value) / 3)
    scaled = value / 1000**exponent
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {'nµm kMGT'[exponent + 3].strip()}"


def _figures(network: Network, size: tuple[int, int]) -> list[float | None]:
    latency = network.latency.get(size)
    seconds = latency.total / 1000 if latency else None
    return [*network.cost(size), network.bytes, seconds]


def _ratio(value: float, reference: float | None) -> str:
    times = reference / value if reference else 1.0
    if 0.95 < times < 1.05:
        return ""
    return f"<span class=ratio>{f'{times:.1f}× less' if times > 1 else f'{1 / times:.1f}× more'}</span>"


def device_name(network: Network) -> str:
    """What a network runs on, as a person calls it."""
    assert network.predictor is not None  # noqa: S101
    device = network.predictor.runtime.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _table(heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th scope=col>{text}</th>" for text in heads)
    table = f"<table class=figures><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class=scroll tabindex=0>{table}</div>"  # focusable, so that arrow keys scroll it
