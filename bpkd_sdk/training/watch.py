"""Loss terms that do not do what they are there for: one drowns the labels, or has nothing to say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

DROWNING = 100  # a term this many times the cross-entropy leaves the labels nothing to say
SILENT = 50  # steps at exactly 0, after which it is no chance


class LoudTermWarning(UserWarning):
    """A distillation term is two orders of magnitude above the cross-entropy."""


class SilentTermWarning(UserWarning):
    """A term is exactly 0 and stays so."""


class TermWatch:
    """Reads the records of a run and warns of what its user should look into.

    Args:
        features: Paths of the student's and the teacher's feature map, or None where there is none.
    """

    def __init__(self, features: tuple[str | None, str | None]) -> None:
        self.features = features
        self.silent_since: dict[str, int] = {}
        self.reported: set[tuple[str, type[UserWarning]]] = set()

    def look(self, record: Mapping[str, Any], first_step: int) -> None:
        """Look at the record of the steps after `first_step`."""
        reference = record["terms"]["ce"]
        for name, value in record["terms"].items():
            if reference > 0 and value > DROWNING * reference:
                self._warn_once(
                    name,
                    f"At step {record['step']} the term {name!r} is {value:.3g}, {value / reference:.0f} times the "
                    f"cross-entropy ({reference:.3g}). It drowns the labels: lower its weight.",
                    LoudTermWarning,
                )
            if value != 0:
                self.silent_since.pop(name, None)
            elif record["step"] - self.silent_since.setdefault(name, first_step) >= SILENT:
                self._report_silence(name, record["step"])

    def _report_silence(self, name: str, step: int) -> None:
        checks = ["whether the labels are all void (the data set's ignore_index)"]
        if name != "ce":
            checks += [
                "whether classes meet in the crops at the logits' size, if the term looks at edges (crop_size, scale)",
                "whether the teacher is another network than the student, and trained",
            ]
        if None not in self.features:
            checks.append(
                f"the feature maps, if the term compares them: {self.features[0]!r} of the student and "
                f"{self.features[1]!r} of the teacher (`bpkd inspect` lists others)"
            )
        self._warn_once(
            name,
            f"The term {name!r} has been exactly 0 for {step - self.silent_since[name]} steps, so it teaches nothing. "
            f"Check {'; '.join(checks)}.",
            SilentTermWarning,
        )

    def _warn_once(self, name: str, message: str, category: type[UserWarning]) -> None:
        if (name, category) not in self.reported:
            self.reported.add((name, category))
            warnings.warn(message, category, stacklevel=4)
