"""`paired_bootstrap` against the public metrics, and against draws that are scored one by one."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bpkd_sdk.comparison import paired_bootstrap, statistics
from bpkd_sdk.comparison.run import write_image_counts
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.evaluation import evaluate
from tests.networks import tiny

DATA = ShapesDataset("val", length=6, size=(40, 48))
NAMES = ("miou", "boundary_iou", "edge_accuracy", "body_accuracy")


@pytest.fixture(scope="module")
def networks():
    return {
        method: [tiny(9, seed=seed).eval() for seed in seeds] for method, seeds in {"a": (0, 1), "b": (2, 3)}.items()
    }


@pytest.fixture(scope="module")
def runs(networks, tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("counts"), {}
    for method, seeds in networks.items():
        paths[method] = [folder / f"{method}{seed}.safetensors" for seed in range(len(seeds))]
        for path, network in zip(paths[method], seeds, strict=True):
            write_image_counts(path, network, DATA, evaluate(network, DATA))
    return paths


def test_the_difference_is_that_of_the_mean_scores(networks, runs):
    found = paired_bootstrap(runs, [("a", "b")])["a", "b"]
    mean = {
        method: {name: np.mean([getattr(evaluate(network, DATA), name) for network in seeds]) for name in NAMES}
        for method, seeds in networks.items()
    }
    for name in NAMES:
        assert found[name].difference == pytest.approx(mean["a"][name] - mean["b"][name], abs=1e-12)
        assert found[name].low < found[name].difference < found[name].high


class Drawn(ShapesDataset):
    """The scenes of `DATA`, each repeated as often as it was drawn."""

    def __init__(self, draw):
        super().__init__("val", length=len(DATA), size=(40, 48))
        self.indices = np.repeat(np.arange(len(DATA)), draw)

    def __getitem__(self, index):
        return super().__getitem__(int(self.indices[index]))


def test_the_interval_is_of_scores_over_drawn_images(networks, runs, monkeypatch):
    monkeypatch.setattr(statistics, "BOOTSTRAP_DRAWS", 8)
    draws = np.random.default_rng(0).multinomial(len(DATA), np.full(len(DATA), 1 / len(DATA)), size=8)
    one, other = networks["a"][0], networks["b"][0]
    found = paired_bootstrap({method: paths[:1] for method, paths in runs.items()}, [("a", "b")])["a", "b"]
    scores = [(evaluate(one, Drawn(draw)), evaluate(other, Drawn(draw))) for draw in draws]
    for name in NAMES:
        differences = [getattr(a, name) - getattr(b, name) for a, b in scores]
        assert (found[name].low, found[name].high) == pytest.approx(np.quantile(differences, (0.025, 0.975)), abs=1e-12)


def test_runs_on_other_images_are_refused(runs, tmp_path):
    counts = {"region": torch.ones(5, 3, 9), "boundary": torch.ones(5, 3, 9), "band": torch.ones(5, 2, 2)}
    save_file(counts, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match=r"the same images, but got runs on \[5, 6\]"):
        paired_bootstrap(runs | {"few": [tmp_path / "few.safetensors"]}, [("a", "few")])
