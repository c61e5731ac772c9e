"""Who is compared with whom: one teacher, if there is one, and the students to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bpkd_sdk.runtime import match_runtime
from bpkd_sdk.serve.networks import Network, Source, open_networks
from bpkd_sdk.serve.predictor import Predictor


@dataclass(frozen=True)
class Lineup:
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
    ) -> Lineup:
        """Open the networks.

        Raises:
            ValueError: If none are given.
        """
        sources = [*([] if teacher is None else [teacher]), *students]
        if not sources:
            raise ValueError("Expected a teacher, a student or both, but got neither.")
        networks = open_networks(sources, device)
        first = networks[0] if teacher is not None and networks[0].predictor else None
        if first is not None:
            networks = [first, *(_comparable(network, first) for network in networks[1:])]
        able = {network.name: network for network in networks[teacher is not None :] if network.predictor}
        if not able and first is not None:
            return cls(tuple(networks), None, {first.name: first})
        return cls(tuple(networks), first, able)

    def pair(self, student: str) -> list[Network]:
        """The networks to show beside each other: teacher and student, or the student alone."""
        return [*([self.teacher] if self.teacher else []), self.students[student]]


def _comparable(student: Network, teacher: Network) -> Network:
    """Return the student with its classes in the teacher's order; closed, with the reason, if they are others."""
    assert teacher.predictor is not None  # noqa: S101  (only asked of an open one)
    if student.predictor is None or student.predictor.class_names == teacher.predictor.class_names:
        return student
    own, other = student.predictor, teacher.predictor
    if own.runtime.spec.class_names and other.runtime.spec.class_names:
        try:
            matched = match_runtime(own.runtime, other.runtime.spec, teacher.name)
        except ValueError:
            pass
        else:
            return Network(student.name, Predictor(matched))
    described = (f"{len(names)} ({', '.join(names[:3])}, ...)" for names in (own.class_names, other.class_names))
    return Network(student.name, None, "Its classes are {}, those of the teacher {}.".format(*described))
