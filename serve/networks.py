"""The networks that are shown and served: each opened, or with the reason why not; what it costs, how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from bpkd_sdk.export.benchmark.facts import count_cost
from bpkd_sdk.runtime import Runtime, match_runtime
from bpkd_sdk.serve.predictor import Predictor, Timings

Source: TypeAlias = str | Path | nn.Module | Runtime | Predictor

RUNS, SECONDS = 7, 1.5  # a latency is the median of so many runs, or of as many as fit into the time

_NAMELESS = ("last", "best", "model")  # file names that say nothing; their folder's does


@dataclass
class Network:
    """One network on show.

    Attributes:
        name: As it is shown; unique among those that are shown together.
        predictor: None if it could not be opened.
        problem: Why not, in plain words; None if it was.
        latency: Of the image sizes (height, width) measured so far: the medians.
    """

    name: str
    predictor: Predictor | None
    problem: str | None = None
    latency: dict[tuple[int, int], Timings] = field(default_factory=dict)
    _costs: dict[tuple[int, int], tuple[int | None, int | None]] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int | None:
        """Size of its file; None if it is none."""
        path = Path(self.predictor.runtime.name) if self.predictor else None
        return path.stat().st_size if path and path.is_file() else None

    def cost(self, size: tuple[int, int]) -> tuple[int | None, int | None]:
        """Parameters, and MACs for an image of (height, width); None where they cannot be known."""
        if self.predictor is None:
            return None, None
        divisor = self.predictor.runtime.spec.size_divisor
        height, width = (side + -side % divisor for side in size)
        if (height, width) not in self._costs:
            self._costs[height, width] = count_cost(self.predictor.runtime, (height, width))
        return self._costs[height, width]

    def measure(self, image: np.ndarray) -> Timings:
        """The median times from an image, uint8 (H, W, 3), to its mask; measured once for each size."""
        assert self.predictor is not None  # noqa: S101  (only open networks are measured)
        size = (image.shape[0], image.shape[1])
        if size not in self.latency:
            runs: list[Timings] = []
            start = time.perf_counter()
            while not runs or (len(runs) <= RUNS and time.perf_counter() - start < SECONDS):
                runs.append(self.predictor(image).timings)
            counted = runs[1:] or runs  # the first warms up
            stages = zip(*((run.pre, run.inference, run.post) for run in counted), strict=True)
            self.latency[size] = Timings(*(statistics.median(stage) for stage in stages))
        return self.latency[size]


def open_networks(sources: Sequence[Source | Network], device: str | torch.device = "auto") -> list[Network]:
    """Open networks; one that cannot be opened says why instead of stopping the others.

    Args:
        sources: As `Predictor` takes them, predictors, or networks, which stay as they are.
        device: For those that are not open yet.
    """
    networks = []
    for source, name in zip(sources, _names(sources), strict=True):
        if isinstance(source, Network):
            networks.append(source)
            continue
        try:
            predictor = source if isinstance(source, Predictor) else Predictor(source, device)
            networks.append(Network(name, predictor))
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            # The page shows it to whoever looks, and where the file lies is none of their business.
            networks.append(Network(name, None, str(error).replace(_title(source), name)))
    return networks


def match_networks(networks: Sequence[Network], *, others_allowed: bool = False) -> list[Network]:
    """Put the classes of networks in the order of the first open one.

    Args:
        networks: Stay as they are.
        others_allowed: Keep networks of other classes as they are; otherwise each is closed, with the reason.
    """
    first = next((network for network in networks if network.predictor), None)
    if first is None:
        return list(networks)
    return [network if network is first else _matched(network, first, others_allowed) for network in networks]


def _matched(network: Network, first: Network, others_allowed: bool) -> Network:
    own, other = network.predictor, first.predictor
    if own is None or other is None or own.class_names == other.class_names:
        return network
    if own.runtime.spec.class_names and other.runtime.spec.class_names:
        try:
            return Network(network.name, Predictor(match_runtime(own.runtime, other.runtime.spec, first.name)))
        except ValueError:
            pass
    if others_allowed:
        return network
    described = (f"{len(names)} ({', '.join(names[:3])}, ...)" for names in (own.class_names, other.class_names))
    return Network(network.name, None, "Its classes are {}, those of the teacher {}.".format(*described))


def _names(sources: Sequence[Source | Network]) -> list[str]:
    """Short names that tell the networks apart: of a file, or of its folder; else the whole path; else a number."""
    titles = [_title(source) for source in sources]
    paths = [Path(title) for title in titles]
    short = [path.parent.name if path.stem in _NAMELESS and path.parent.name else path.name for path in paths]
    names = [name if short.count(name) == 1 else title for name, title in zip(short, titles, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _title(source: Source | Network) -> str:
    if isinstance(source, Network):
        return source.name
    if isinstance(source, Predictor):
        return source.runtime.name
    if isinstance(source, Runtime):
        return source.name
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


@dataclass(frozen=True)
class DemoModels:
    """The networks on show.

    Attributes:
        networks: All of them, the teacher first; also those that could not be opened.
        teacher: None if there is none, or none that could be opened.
        students: By name, those that could be opened; if there are none, the teacher shows itself.
    """

    networks: tuple[Network, ...]
    teacher: Network | None
    students: dict[str, Network]

    @classmethod
    def open(
        cls, teacher: Source | Network | None, students: Sequence[Source | Network], device: str | torch.device
    ) -> DemoModels:
        """Open the networks.

        Raises:
            ValueError: If none are given.
        """
        sources = [*([] if teacher is None else [teacher]), *students]
        if not sources:
            raise ValueError("Expected a teacher, a student or both, but got neither.")
        networks = open_networks(sources, device)
        first = networks[0] if teacher is not None and networks[0].predictor else None
        networks = match_networks(networks, others_allowed=first is None)
        able = {network.name: network for network in networks[teacher is not None :] if network.predictor}
        if not able and first is not None:
            return cls(tuple(networks), None, {first.name: first})
        return cls(tuple(networks), first, able)

    def pair(self, student: str) -> list[Network]:
        """The networks to show beside each other: teacher and student, or the student alone."""
        return [*([self.teacher] if self.teacher else []), self.students[student]]
