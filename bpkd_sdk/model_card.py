"""The model card (README.md) of a model folder: what a network is, how to run it, its scores, origin and limits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpkd_sdk.evaluation import EvaluationProtocol
from bpkd_sdk.evaluation.profile import Profile
from bpkd_sdk.spec import Color, NetworkSpec

_HUB_NAME = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)")
_PUBLIC_DATA = ("camvid", "cityscapes", "ade20k", "pascal_context_59")
_WEIGHTS = {"weights": "{}", "loaded": "{}", "backbone_weights": "encoder of {}"}  # part, by key of provenance

# Settings of a run in `TrainingConfig`, by their name in the card.
_SETTINGS = {
    "images per step": "batch_size",
    "optimiser": "optimizer",
    "learning rate": "learning_rate",
    "weight decay": "weight_decay",
    "losses on the labels": "losses",
    "labels": "labels",
    "weights of the encoder at the start": "backbone_weights",
    "seed": "seed",
}

# Attributes of methods that the card states elsewhere, or that users do not choose.
_NOT_ARGUMENTS = ("name", "num_classes", "ignore_index", "needs_features")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a network, and what they were measured on.

    Attributes:
        metrics: Result of `Metrics.to_dict`.
        data: Name of the data set; None if it is not known.
        protocol: How images became masks; None if it is not known.
        is_measured_here: Whether the scores were measured for the card, and not in the training run.
    """

    metrics: Mapping[str, Any]
    data: str | None
    protocol: EvaluationProtocol | None
    is_measured_here: bool


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a model card states.

    Attributes:
        name: Title of the card.
        repository: Repository ``user/name`` on the Hub; None for a folder that is not uploaded.
        license: Identifier of the licence.
        spec: Facts of the network.
        class_name: Class of a network that `load_model` needs an instance of; None otherwise.
        provenance: Origin of the weights, see `get_provenance`, without local paths.
        metadata: Metadata of the ONNX file.
        agreement: Smallest share (0..1) of pixels with the same class in ONNX Runtime and torch.
        cost: Parameters and operations.
        names: Name of each class id in masks.
        palette: Colour of each class id in masks.
        scores: Scores, or None.
        pictures: Paths in the folder of each example's "image" and "overlay".
    """

    name: str
    repository: str | None
    license: str
    spec: NetworkSpec
    class_name: str | None
    provenance: Mapping[str, Any]
    metadata: Mapping[str, Any]
    agreement: float
    cost: Profile
    names: Sequence[str]
    palette: Sequence[Color]
    scores: Scores | None
    pictures: Sequence[Mapping[str, str]]


def render_card(facts: CardFacts) -> str:
    """Return the text of the model card, Markdown with a block of metadata for the Hub."""
    import jinja2

    environment = jinja2.Environment(  # Markdown, in which HTML escapes would be visible; `_code` escapes names
        autoescape=False,  # noqa: S701
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "score": _format_score}
    template = environment.from_string((Path(__file__).parent / "model_card.md.jinja").read_text(encoding="utf-8"))
    metrics = facts.scores.metrics if facts.scores else None
    sources = list(_list_sources(facts.provenance, "this network"))
    return template.render(
        metadata=_metadata(facts, sources),
        name=facts.name,
        repository=facts.repository,
        address=f"hf://{facts.repository}" if facts.repository else facts.name,
        license=facts.license,
        summary=_summary(facts),
        pictures=facts.pictures,
        is_rgb8=facts.spec.pixels.is_rgb8,
        channels=facts.spec.in_channels,
        pixels=facts.spec.pixels,
        class_name=facts.class_name,
        metrics=metrics,
        measured=_describe_measurement(facts.scores) if facts.scores else "",
        scores=_list_scores(metrics) if metrics else [],
        classes=_list_classes(facts, metrics),
        cost=facts.cost,
        training=_list_settings(facts.provenance),
        sources=sources,
        limitations=_list_limitations(facts),
        is_bpkd=_method_name(facts.provenance) == "BPKD",
        **{key: facts.metadata[key] for key in ("input_size", "dynamic_size", "input_dtype")},
    )


def _metadata(facts: CardFacts, sources: Sequence[Mapping[str, Any]]) -> str:
    """Return the metadata of the Hub as YAML: licence, tags, base models, scores, and pictures for the widget."""
    from huggingface_hub import EvalResult, ModelCardData

    trained_on = str(facts.provenance.get("data", "")).partition("/")[0]
    base_models = [
        match[1]
        for source in sources
        if source["part"] in ("this network", "encoder of this network")
        and (match := _HUB_NAME.fullmatch(source["name"]))
    ]
    results = []
    # A score against a teacher's masks is not one of the data set.
    if facts.scores is not None and facts.scores.data is not None and not _is_scored_by_teacher(facts):
        metrics, data = facts.scores.metrics, facts.scores.data
        kinds = {"miou": "mean_iou", "boundary_iou": "boundary_iou", "pixel_accuracy": "accuracy"}
        results = [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=data.partition("/")[0],
                dataset_name=data,
                metric_type=kind,
                metric_name=_SCORES[key],
                metric_value=metrics[key],
            )
            for key, kind in kinds.items()
            if metrics.get(key) is not None
        ]
    card_data = ModelCardData(
        license=facts.license,
        library_name="bpkd-sdk",
        pipeline_tag="image-segmentation",
        tags=[
            "semantic-segmentation",
            "onnx",
            *(["knowledge-distillation"] if _is_distilled(facts.provenance) else []),
            *(["bpkd"] if _method_name(facts.provenance) == "BPKD" else []),
        ],
        datasets=[trained_on] if trained_on in _PUBLIC_DATA else None,
        base_model=base_models or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
        widget=[
            {"src": picture["image"], "example_title": f"Example {number}"}
            for number, picture in enumerate(facts.pictures, start=1)
        ]
        or None,
    )
    return str(card_data.to_yaml())


def _is_distilled(provenance: Mapping[str, Any]) -> bool:
    return "teacher" in (provenance.get("origin") or {})


def _is_scored_by_teacher(facts: CardFacts) -> bool:
    """Return whether the labels of the scores are the teacher's masks."""
    scores, config = facts.scores, facts.provenance.get("config") or {}
    return scores is not None and not scores.is_measured_here and config.get("labels", "dataset") != "dataset"


def _method_name(provenance: Mapping[str, Any]) -> str | None:
    name = (provenance.get("method") or {}).get("class")
    return None if name is None else str(name).removesuffix("Loss")


def _summary(facts: CardFacts) -> str:
    network = f"{_code(facts.spec.name)} network" if facts.spec.name else "network"
    text = f"A semantic segmentation {network} with {len(facts.names)} classes"
    origin = facts.provenance.get("origin") or {}
    data = facts.provenance.get("data")
    if _is_distilled(facts.provenance):
        teacher = origin["teacher"].get("network") or "a network"
        method = _method_name(facts.provenance)
        text += f", distilled{f' by {_code(method)}' if method else ''} from the teacher {_code(teacher)}"
    elif origin:
        text += ", trained on labels"
    on = f" on the data set {_code(data)}" if data and origin else ""
    return f"{text}{on}, with bpkd-sdk."


_SCORES = {
    "miou": "mean IoU",
    "macc": "mean accuracy of the classes",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "mean boundary IoU",
    "boundary_f1": "boundary F1",
    "edge_accuracy": "pixel accuracy near edges",
    "body_accuracy": "pixel accuracy elsewhere",
}


def _list_scores(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "value": metrics[key]} for key, name in _SCORES.items() if key in metrics]


def _list_classes(facts: CardFacts, metrics: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return name, colour and scores of each class; scores are found by name, since data can have another order."""
    scores = metrics or {}
    rows = {
        name: (iou, boundary)
        for name, iou, boundary in zip(
            *(scores.get(key, ()) for key in ("class_names", "per_class_iou", "per_class_boundary_iou")), strict=True
        )
    }
    return [
        {
            "name": name,
            "color": "#{:02x}{:02x}{:02x}".format(*color),
            "iou": rows.get(name, (None, None))[0],
            "boundary_iou": rows.get(name, (None, None))[1],
        }
        for name, color in zip(facts.names, facts.palette, strict=True)
    ]


def _describe_measurement(scores: Scores) -> str:
    metrics = scores.metrics
    data = _code(scores.data) if scores.data else "data whose name is not known"
    by = "bpkd_sdk.evaluate with model.safetensors" if scores.is_measured_here else "the training run"
    protocol = f", {_describe_protocol(scores.protocol)}" if scores.protocol else ""
    width = metrics["boundary_width"]
    distance = f"{width:g} pixels" if width >= 1 else f"{width:.2%} of the diagonal"
    return (
        f"Measured by {by} on {metrics['images']} images of {data}{protocol}. Boundary scores allow a distance of "
        f"{distance}; edges are bands of {metrics['edge_width']} pixels."
    )


def _describe_protocol(protocol: EvaluationProtocol) -> str:
    """Describe how images became masks, as a part of a sentence."""
    if protocol.crop_size is None:
        text = "whole images"
    else:
        size = "{}x{}".format(*protocol.crop_size)
        text = {
            "slide": f"windows of {size}",
            "resize": f"images resized to {size}",
            "pad": f"images shrunk and padded to {size}",
        }[protocol.fit]
    if protocol.base_size is not None:
        text += ", fitted into {}x{} first".format(*protocol.base_size)
    if protocol.scales != (1.0,):
        text += f", averaged over the scales {', '.join(f'{scale:g}' for scale in protocol.scales)}"
    return text + (" and mirror images" if protocol.flip else "")


def _list_settings(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of the training run by name, as far as they are known."""
    config = provenance.get("config") or {}
    method = dict(provenance.get("method") or {})
    crop = provenance.get("crop_size")
    rows = {
        "data": provenance.get("data"),
        "method": method.pop("class", None),
        "arguments of the method": ", ".join(
            f"{key}={value}" for key, value in method.items() if key not in _NOT_ARGUMENTS
        ),
        "crop": f"{crop[0]}x{crop[1]}" if crop else None,
        "steps": f"{provenance.get('step')} of {config['steps']}" if "steps" in config else None,
    } | {name: config.get(key) for name, key in _SETTINGS.items()}
    return {name: _format_value(value) for name, value in rows.items() if value not in (None, "", [])}


def _format_value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _list_sources(facts: Mapping[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """Yield the pretrained weights that a network, its teacher and their own teachers started with."""
    for key, label in _WEIGHTS.items():
        if isinstance(weights := facts.get(key), Mapping):
            name = weights.get("source") or weights.get("file") or "of unknown origin"
            yield {
                "part": label.format(part),
                "name": name,
                "revision": weights.get("revision"),
                "license": weights.get("license"),
            }
    for role, origin in (facts.get("origin") or {}).items():
        if isinstance(origin, Mapping):
            yield from _list_sources(origin, part if role == "student" else f"the teacher of {part}")


def _list_limitations(facts: CardFacts) -> list[str]:
    """Return what a user must know before relying on the network."""
    size = "{}x{}".format(*facts.metadata["input_size"])
    limits = []
    if facts.scores is None:
        limits.append("Its accuracy is not known: no scores were measured for this card.")
    elif _is_scored_by_teacher(facts):
        limits.append("The scores compare it with its teacher's masks, and not with labels.")
    elif facts.scores.is_measured_here:
        limits.append("The scores hold for images like those of the data set above; others were not tested.")
    else:
        limits.append(
            "The scores are those of the validation in training, which may have been used to choose settings. Images "
            "of other data were not tested."
        )
    limits.append("Every pixel gets one of the classes above, also where an image shows something else.")
    if not facts.metadata["dynamic_size"]:
        limits.append(
            f"model.onnx takes images of {size}. bpkd-sdk splits larger images into windows; others must resize them."
        )
    if not facts.spec.class_names:
        limits.append("The names of the classes are not known; the table above shows their numbers.")
    share = "all" if facts.agreement == 1 else f"at least {math.floor(facts.agreement * 1e4) / 1e4:.2%} of the"
    limits.append(
        f"model.onnx and model.safetensors gave the same class to {share} pixels of the images that the export was "
        "checked with."
    )
    return limits


def _code(text: object) -> str:
    """Format text of a file as code for Markdown tables, in which it can contain no markup."""
    plain = " ".join(str(text).replace("`", "'").replace("|", "\\|").split())
    return f"`{plain}`" if plain else ""


def _format_score(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def read_scores(provenance: Mapping[str, Any]) -> Scores | None:
    """Return the scores that a training run stored with its weights; None without any."""
    metrics = provenance.get("metrics")
    if not isinstance(metrics, Mapping):
        return None
    protocol = provenance.get("protocol")
    return Scores(
        metrics=metrics,
        data=provenance.get("validation_data"),
        protocol=EvaluationProtocol(**protocol) if isinstance(protocol, Mapping) else None,
        is_measured_here=False,
    )
