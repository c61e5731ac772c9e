"""Who is compared with whom: one teacher, if there is one, and the students to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bpkd_sdk.serve.networks import Network, Source, match_networks, open_networks


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
        networks = match_networks(networks, others_allowed=first is None)
        able = {network.name: network for network in networks[teacher is not None :] if network.predictor}
        if not able and first is not None:
            return cls(tuple(networks), None, {first.name: first})
        return cls(tuple(networks), first, able)

    def pair(self, student: str) -> list[Network]:
        """The networks to show beside each other: teacher and student, or the student alone."""
        return [*([self.teacher] if self.teacher else []), self.students[student]]
