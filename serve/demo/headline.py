"""The texts above the results, as HTML: title, what a student costs and keeps, and whether the image is familiar.

All texts from outside this package are escaped.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from bpkd_sdk.serve.demo.confidence import Judgement
from bpkd_sdk.serve.demo.scene import Scene
from bpkd_sdk.serve.demo.tables import format_si
from bpkd_sdk.serve.networks import ModelSet, ServedModel

_MAX_NAMES = 12  # names of classes in the description of the page
_EQUAL = 1.05  # ratio of two latencies that is not called faster or slower


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
    """One number of the headline.

    Attributes:
        value: Number with its unit; a dash if it is unknown.
        text: Text below the number.
    """

    value: str
    text: str


_MEASURING = _Figure("…", "latency: being measured")


def headline(models: ModelSet, student: str, scene: Scene | None) -> str:
    """Format what a student costs and keeps, relative to the teacher; without a teacher, what it costs.

    Args:
        models: Networks of the demo.
        student: Name of the student.
        scene: Image on the page with the predictions of both; None before the first image.
    """
    if scene is None:
        return ""
    network, teacher = models.student(student), models.teacher
    if teacher is None:
        figures = _cost_figures(network, scene.size)
        note = "There is no teacher to compare with, so this page states costs only."
    else:
        agreement = scene.agreement(teacher.name, student)
        note = f"{student} compared with {teacher.name}, measured on the image below."
        figures = [
            _macs_figure(network, teacher, scene.size),
            _latency_figure(network, teacher, scene.size),
            _Figure(_format_share(agreement.whole), "of the pixels as the teacher, in this image"),
            _Figure(_format_share(agreement.edge), "of the pixels near the teacher\u2019s edges"),
        ]
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(text)}</span></li>" for value, text in figures)
    return f'<ul class="headline">{items}</ul><p class=faint>{escape(note)}</p>'


def _macs_figure(student: ServedModel, teacher: ServedModel, size: tuple[int, int]) -> _Figure:
    own, reference = (model.cost(size)[1] for model in (student, teacher))
    if not own or not reference:
        unknown = " and ".join(model.name for model, macs in ((student, own), (teacher, reference)) if not macs)
        return _Figure("–", f"MACs: unknown for {unknown}")
    return _Figure(*_ratio(reference / own, "fewer MACs", "more MACs", "as many MACs"))


def _latency_figure(student: ServedModel, teacher: ServedModel, size: tuple[int, int]) -> _Figure:
    if size not in student.latency or size not in teacher.latency:
        return _MEASURING
    own, reference = (model.latency[size].total / 1000 for model in (student, teacher))
    value, text = _ratio(reference / own, "faster", "slower", "as fast")
    return _Figure(value, f"{text} on this server: {format_si(own)}s instead of {format_si(reference)}s")


def _ratio(ratio: float, more: str, less: str, same: str) -> tuple[str, str]:
    if 1 / _EQUAL < ratio < _EQUAL:
        return "1×", same
    return (f"{ratio:.1f}×", more) if ratio > 1 else (f"{1 / ratio:.1f}×", less)


def _cost_figures(network: ServedModel, size: tuple[int, int]) -> list[_Figure]:
    macs, latency, file_bytes = network.cost(size)[1], network.latency.get(size), network.file_bytes
    figures = [
        _Figure(format_si(macs), "MACs for this image") if macs else _Figure("–", "MACs: unknown for this file"),
        _Figure(f"{format_si(latency.total / 1000)}s", "for this image on this server") if latency else _MEASURING,
    ]
    return [*figures, _Figure(f"{format_si(file_bytes)}B", "size of the file")] if file_bytes else figures


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
