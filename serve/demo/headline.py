"""The texts above the results, as HTML: title, what a student costs and keeps, and whether the image is familiar.

All texts from outside this package are escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from bpkd_sdk.progress import format_si
from bpkd_sdk.serve.demo import tables
from bpkd_sdk.serve.demo.confidence import Judgement
from bpkd_sdk.serve.demo.scene import Scene
from bpkd_sdk.serve.networks import ModelSet, ServedModel

_MAX_NAMES = 12  # names of classes in the description of the page
_EQUAL = 1.05  # ratio of two costs that is not called more or less


_WELCOME = '<div class="welcome"><h2>{}</h2><p>{}</p></div>'
LOADING = _WELCOME.format("The first example is being segmented", "Its masks appear here.")


def welcome(has_examples: bool) -> str:
    """Format what to do, for the place of the results while there is no image."""
    examples = "select an example. " if has_examples else "paste one from the clipboard. "
    advice = "" if has_examples else " To offer examples, start the server with <code>--examples FOLDER</code>."
    return _WELCOME.format(
        "Choose an image to begin",
        f"Upload an image, take one with the camera, or {examples}Its masks appear here.{advice}",
    )


def title(models: ModelSet) -> str:
    """Return the title of the page: the networks that it shows."""
    if not models.available:
        return "No network could be opened"
    names = [student.name for student in models.students]
    students = names[0] if len(names) == 1 else f"{len(names)} networks"
    return f"{students} compared with {models.teacher.name}" if models.teacher else students


def header(title: str, models: ModelSet) -> str:
    """Format the title, the classes of the networks, and the devices that run them."""
    devices = sorted({model.device_name for model in models.available})
    if not devices:
        status = "The table below contains the reasons."
    else:
        status = f"{_describe_classes(models.available[0])} Device: {', '.join(devices)}."
    return f"<h1>{escape(title)}</h1><p>{escape(status)}</p>"


def _describe_classes(model: ServedModel) -> str:
    names = model.predictor.class_names
    if names == tuple(map(str, range(len(names)))):  # the network does not name its classes
        return f"Each pixel gets one of {len(names)} classes."
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"Each pixel gets one of {len(names)} classes: {', '.join(names[:_MAX_NAMES])}{rest}."


class _Figure(NamedTuple):
    """One card of the headline.

    Attributes:
        name: Quantity, above the number.
        value: Number with its unit; a dash if it is unknown.
        text: Text below the number.
    """

    name: str
    value: str
    text: str = ""


_MACS, _LATENCY = "MACs for this image", "Latency on this server"


def headline(models: ModelSet, student: str, scene: Scene | None, *, is_measured: bool = False) -> str:
    """Format what a student costs and keeps, relative to the teacher; without a teacher, what it costs.

    Args:
        models: Networks of the demo.
        student: Name of the student.
        scene: Image on the page with the predictions of both; None before the first image.
        is_measured: Whether the latency of the networks was measured, so that a missing one could not be.
    """
    if scene is None:
        return ""
    network, teacher = models.student(student), models.teacher
    if teacher is None:
        figures = [_macs_figure(network, None, scene.size), _latency_figure(network, None, scene.size, is_measured)]
        if network.file_bytes:
            figures.append(_Figure("Size of the file", format_si(network.file_bytes, "B")))
        note = "There is no teacher to compare with, so this page states costs only."
    else:
        agreement = scene.agreement(teacher.name, student)
        whole, edge = _format_share(agreement.whole), _format_share(agreement.edge)
        note = f"{student} compared with {teacher.name}, measured on the image below."
        figures = [
            _macs_figure(network, teacher, scene.size),
            _latency_figure(network, teacher, scene.size, is_measured),
            _Figure("Same class as the teacher", whole, "of all pixels of this image"),
            _Figure("Same class near edges", edge, "of the pixels near the teacher\u2019s edges"),
        ]
    items = "".join(
        f"<li><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(text)}</span></li>"
        for name, value, text in figures
    )
    notes = [note, *tables.windows_notes([model for model in (network, teacher) if model], scene.size)]
    return f'<ul class="headline">{items}</ul><p class=faint>{escape(" ".join(notes))}</p>'


def _macs_figure(student: ServedModel, teacher: ServedModel | None, size: tuple[int, int]) -> _Figure:
    costs = {model.name: model.cost(size)[1] for model in (student, teacher) if model}
    if unknown := [name for name, macs in costs.items() if not macs]:
        return _Figure(_MACS, "–", f"unknown for {' and '.join(unknown)}")
    own, *reference = (macs for macs in costs.values() if macs)
    return _compared(_MACS, own, reference, "", ("fewer", "more", "as many"))


def _latency_figure(
    student: ServedModel, teacher: ServedModel | None, size: tuple[int, int], is_measured: bool
) -> _Figure:
    networks = [model for model in (student, teacher) if model]
    if missing := [model.name for model in networks if size not in model.latency]:
        if not is_measured:
            return _Figure(_LATENCY, "…", "being measured")
        return _Figure(_LATENCY, "–", f"could not be measured for {' and '.join(missing)}")
    own, *reference = (model.latency[size].total / 1000 for model in networks)
    return _compared(_LATENCY, own, reference, "s", ("faster", "slower", "as fast"))


def _compared(name: str, own: float, reference: Sequence[float], unit: str, words: tuple[str, str, str]) -> _Figure:
    """Return the card of a cost and, if there is one, its ratio to that of the teacher."""
    if not reference:
        return _Figure(name, format_si(own, unit))
    ratio = reference[0] / own
    text = f"{format_si(own, unit)} instead of {format_si(reference[0], unit)}"
    if 1 / _EQUAL < ratio < _EQUAL:
        return _Figure(name, words[2], text)
    return _Figure(name, f"{ratio:.1f}× {words[0]}" if ratio > 1 else f"{1 / ratio:.1f}× {words[1]}", text)


def _format_share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def judgement_text(judgement: Judgement | str) -> str:
    """Format the result of `ExampleCheck.judge`: a warning, or a faint sentence."""
    if isinstance(judgement, str):
        return f"<p class=faint>Whether this image is like the training data is not known: {escape(judgement)}.</p>"
    facts = (
        f"{judgement.network} is {judgement.confidence:.0%} confident on average, and {judgement.lowest:.0%} to "
        f"{judgement.highest:.0%} on the {judgement.examples} examples."
    )
    if judgement.is_unlike:
        return (
            '<div class="unlike" role="status"><b>This image seems to be unlike the examples.</b> '
            f"{escape(facts)} Check these masks with care.</div>"
        )
    return f"<p class=faint>{escape(facts)} A network can be confident and wrong.</p>"
