"""The check whether an image is like the examples: networks are less confident on images unlike their training data."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from bpkd_sdk.data.pairs import Pair
from bpkd_sdk.images import read_pixels
from bpkd_sdk.serve.demo.scene import Scene, mean_confidence
from bpkd_sdk.serve.networks import ModelSet, ServedModel
from bpkd_sdk.serve.predictor import Predictor

MIN_EXAMPLES = 4  # with fewer, one in four images that are like the examples would get a warning
_SECONDS = 10  # no further example is segmented after this time


class Judgement(NamedTuple):
    """Result of the check of one image.

    Attributes:
        network: Name of the network whose confidence was compared.
        confidence: Confidence on the image as `mean_confidence` computes it, 0..1.
        lowest: Lowest confidence on an example, 0..1.
        highest: Highest confidence on an example, 0..1.
        examples: Number of the examples.
    """

    network: str
    confidence: float
    lowest: float
    highest: float
    examples: int

    @property
    def is_unlike(self) -> bool:
        """Whether the network is less confident than on every example.

        This is so for one in N + 1 images that are like N examples, and for many images that are unlike them.
        """
        return self.confidence < self.lowest


class ExampleCheck:
    """Comparison of the confidence on an image with the confidence on the examples, which is computed once.

    Args:
        models: Networks of the demo.
        examples: Example images, which are taken to be like the training data.
    """

    def __init__(self, models: ModelSet, examples: Sequence[Pair]) -> None:
        self.models, self.examples = models, examples
        self._expected: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def judge(self, scene: Scene, student: str) -> Judgement | str:
        """Compare the confidence on a scene with that on the examples, or return the reason why it is not possible.

        The teacher judges if it returns probabilities, otherwise the student, otherwise any other network.
        """
        shown = [*self.models.pair(student), *self.models.students]
        judge = next((model for model in shown if model.predictor.has_probabilities), None)
        if judge is None:
            return "the files contain masks without probabilities. Add a checkpoint, or export with --no-argmax"
        if len(self.examples) < MIN_EXAMPLES:
            return f"it takes at least {MIN_EXAMPLES} examples to compare with"
        expected = self._expected_confidences(judge)
        if len(expected) < MIN_EXAMPLES:
            return "the examples take too long to segment on this machine"
        confidence = scene.with_predictions([judge]).predictions[judge.name].confidence
        assert confidence is not None  # noqa: S101  (the network has probabilities)
        return Judgement(judge.name, confidence, min(expected), max(expected), len(expected))

    def _expected_confidences(self, model: ServedModel) -> list[float]:
        with self._lock:
            if model.name not in self._expected:
                end = time.monotonic() + _SECONDS
                confidences: list[float] = []
                for pair in self.examples:
                    confidences.append(_example_confidence(model.predictor, pair))
                    if time.monotonic() > end:
                        break
                self._expected[model.name] = confidences
            return self._expected[model.name]


def _example_confidence(predictor: Predictor, pair: Pair) -> float:
    confidence = mean_confidence(predictor(read_pixels(pair.image, predictor.pixels), confidence=True))
    assert confidence is not None  # noqa: S101  (requested with the image)
    return confidence
