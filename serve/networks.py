"""The networks of the service and of the demo: opening, costs, latency, and the order of their classes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from bpkd_sdk.export.benchmark.facts import count_cost
from bpkd_sdk.gpu import gpu_names
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.runtime import MatchedRuntime, Runtime, match_runtime
from bpkd_sdk.runtime.fit import Fit, FittedSize, check_fit, fit_size
from bpkd_sdk.serve.predictor import Predictor, Timings

if TYPE_CHECKING:
    import torch
    from torch import nn

ModelSource: TypeAlias = "str | Path | nn.Module | Runtime | Predictor"

# A latency is the median of up to LATENCY_RUNS runs after a warm-up run. No run starts after LATENCY_SECONDS.
LATENCY_RUNS, LATENCY_SECONDS = 7, 1.5

_GENERIC_STEMS = ("last", "best", "model")  # names that many runs share; the folder identifies the network instead


@dataclass
class ServedModel:
    """A network that was opened.

    Attributes:
        name: Display name, unique in its `ModelSet`.
        predictor: Predictor of the network.
        latency: Median timings for each image size (height, width) measured so far.
    """

    name: str
    predictor: Predictor
    latency: dict[tuple[int, int], Timings] = field(default_factory=dict)
    _costs: dict[tuple[int, int], tuple[int | None, int | None]] = field(default_factory=dict, repr=False)

    @property
    def is_deployable(self) -> bool:
        """Whether the network is an exported file or on a server, and not a checkpoint or module that torch runs."""
        runtime = self.predictor.runtime
        return not (runtime.runtime if isinstance(runtime, MatchedRuntime) else runtime).is_module

    @property
    def device_name(self) -> str:
        """Name of the GPU that runs the network, or of another device, for example CPU."""
        runtime = self.predictor.runtime
        if runtime.name.startswith("triton://"):  # the server chooses the device
            return "Triton server"
        device = runtime.device
        return gpu_names()[device.index or 0] if device.type == "cuda" else device.type.upper()

    @property
    def file_bytes(self) -> int | None:
        """Size of the network's file in bytes; None if the network was not read from a file."""
        path = Path(self.predictor.runtime.name)
        return path.stat().st_size if path.is_file() else None

    def fit(self, image_size: tuple[int, int]) -> FittedSize:
        """Return the windows in which the network segments an image of this size (height, width)."""
        return fit_size(image_size, self.predictor.runtime.accepts, self.predictor.fit)

    def cost(self, image_size: tuple[int, int]) -> tuple[int | None, int | None]:
        """Return the number of parameters, and of MACs for one image of this size; None for an unknown number.

        Args:
            image_size: Height and width of the image in pixels.
        """
        runtime, fitted = self.predictor.runtime, self.fit(image_size)
        divisor = runtime.spec.size_divisor
        height, width = (side + -side % divisor for side in fitted.window)
        if (height, width) not in self._costs:
            self._costs[height, width] = count_cost(runtime, (height, width))
        params, macs = self._costs[height, width]
        return params, macs and macs * len(fitted.corners())

    def measure(self, image: np.ndarray) -> Timings:
        """Return the median times from an image to its mask. Each image size is measured once.

        Args:
            image: Image (H, W, channels) in the format of the network.
        """
        size = (image.shape[0], image.shape[1])
        if size not in self.latency:
            runs: list[Timings] = []
            start = time.perf_counter()
            while not runs or (len(runs) <= LATENCY_RUNS and time.perf_counter() - start < LATENCY_SECONDS):
                runs.append(self.predictor(image).timings)
            warm_runs = runs[1:] or runs
            stages = zip(*((run.pre, run.inference, run.post) for run in warm_runs), strict=True)
            self.latency[size] = Timings(*(statistics.median(stage) for stage in stages))
        return self.latency[size]


@dataclass(frozen=True)
class UnavailableModel:
    """A network that could not be opened, or that cannot be compared with the teacher.

    Attributes:
        name: Display name, unique in its `ModelSet`.
        reason: Reason as a full sentence. It contains no path, because the demo shows it to its visitors.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ModelSet:
    """Networks for the service or the demo.

    Attributes:
        teacher: Teacher; None if none was specified, or if it is unavailable.
        students: Students that were opened, in the order in which they were specified.
        unavailable: Networks that cannot be used, with the reasons.
    """

    teacher: ServedModel | None
    students: tuple[ServedModel, ...]
    unavailable: tuple[UnavailableModel, ...] = ()

    @property
    def available(self) -> tuple[ServedModel, ...]:
        """All networks that were opened, the teacher first."""
        return (*([] if self.teacher is None else [self.teacher]), *self.students)

    @property
    def pixels(self) -> PixelFormat:
        """Format of the images that the networks take, which is that of the first; 8-bit RGB without a network."""
        return next((model.predictor.pixels for model in self.available), PixelFormat())

    def student(self, name: str) -> ServedModel:
        """Return the student with this name.

        Raises:
            KeyError: If no student has this name.
        """
        return {student.name: student for student in self.students}[name]

    def pair(self, student: str) -> tuple[ServedModel, ...]:
        """Return the networks to show side by side: the teacher, if there is one, and the student with this name."""
        return (*([] if self.teacher is None else [self.teacher]), self.student(student))


def open_models(
    students: Sequence[ModelSource],
    *,
    teacher: ModelSource | None = None,
    device: str | torch.device = "auto",
    fit: Fit = "slide",
) -> ModelSet:
    """Open networks. A network that cannot be opened is recorded with the reason; the others are opened anyway.

    Args:
        students: Sources of the students, each as `Predictor` takes it, or a `Predictor`.
        teacher: Source of the teacher, or None.
        device: Device for all networks except those that are specified as a `Predictor`.
        fit: Rule for images of a size that a network does not accept, as for `Predictor`, for the same networks.

    Raises:
        ValueError: If neither a teacher nor a student is specified.
    """
    sources = [*students, *([] if teacher is None else [teacher])]
    if not sources:
        raise ValueError("Expected a teacher, a student or both, but got neither.")
    check_fit(fit)
    models = [_open(source, name, device, fit) for source, name in zip(sources, _unique_names(sources), strict=True)]
    opened_teacher = models[-1] if teacher is not None and isinstance(models[-1], ServedModel) else None
    return ModelSet(
        opened_teacher,
        tuple(model for model in models[: len(students)] if isinstance(model, ServedModel)),
        tuple(model for model in models if isinstance(model, UnavailableModel)),
    )


def check_models(models: object) -> None:
    """Raise TypeError unless an argument is a set of opened networks."""
    if not isinstance(models, ModelSet):
        raise TypeError(
            f"Expected `models` to be the result of bpkd_sdk.serve.open_models(students, teacher=...), but got "
            f"{type(models).__name__}."
        )


def _open(source: ModelSource, name: str, device: str | torch.device, fit: Fit) -> ServedModel | UnavailableModel:
    try:
        return ServedModel(name, source if isinstance(source, Predictor) else Predictor(source, device, fit=fit))
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        # Visitors of the demo see the reason, so it must not contain the path of the file.
        return UnavailableModel(name, str(error).replace(_title(source), name))


def reorder_models(models: ModelSet) -> ModelSet:
    """Reorder the classes of all students like those of the teacher, or like those of the first student without one.

    A student whose classes differ from the teacher's becomes unavailable. Without a teacher it is kept as it is. A
    student that takes other images than the first network becomes unavailable, since all of them get one image.
    """
    reference = next(iter(models.available), None)
    if reference is None:
        return models
    students, mismatched = [], []
    for student in models.students:
        pixels, expected_pixels = student.predictor.pixels, models.pixels
        if (pixels.channels, pixels.value_range) != (expected_pixels.channels, expected_pixels.value_range):
            reason = f"This network takes images of {pixels}, but {reference.name} takes {expected_pixels}."
            mismatched.append(UnavailableModel(student.name, reason))
            continue
        predictor = _match_predictor(student.predictor, reference)
        if predictor is student.predictor or (predictor is None and models.teacher is None):
            students.append(student)
        elif predictor is not None:
            students.append(ServedModel(student.name, predictor))
        else:
            classes, expected = (
                f"{len(names)} classes ({', '.join(names[:3])}, ...)"
                for names in (student.predictor.class_names, reference.predictor.class_names)
            )
            reason = f"This network has {classes}, but the teacher has {expected}."
            mismatched.append(UnavailableModel(student.name, reason))
    return ModelSet(models.teacher, tuple(students), (*models.unavailable, *mismatched))


def _match_predictor(predictor: Predictor, reference: ServedModel) -> Predictor | None:
    """Return a predictor with the class order of the reference; None if the classes differ."""
    if predictor.class_names == reference.predictor.class_names:
        return predictor
    spec, reference_spec = predictor.runtime.spec, reference.predictor.runtime.spec
    if not spec.class_names or not reference_spec.class_names:
        return None
    try:
        return Predictor(match_runtime(predictor.runtime, reference_spec, reference.name), fit=predictor.fit)
    except ValueError:
        return None


def _unique_names(sources: Sequence[ModelSource]) -> list[str]:
    """Return short unique names: of the file or its folder, else the whole path, else with a number."""
    titles = [_title(source) for source in sources]
    paths = [Path(title) for title in titles]
    short = [path.parent.name if path.stem in _GENERIC_STEMS and path.parent.name else path.name for path in paths]
    names = [name if short.count(name) == 1 else title for name, title in zip(short, titles, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _title(source: ModelSource) -> str:
    if isinstance(source, Predictor):
        return source.runtime.name
    if isinstance(source, Runtime):
        return source.name
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__
