"""The losses' benchmark runs, and finds the values of the re-stated originals."""

import json

import pytest

from benchmarks import losses


@pytest.fixture(autouse=True)
def _one_pass(monkeypatch):
    monkeypatch.setattr(losses, "PASSES", 1)
    monkeypatch.setattr(losses.torch.cuda, "is_available", lambda: False)


def test_quick_run(tmp_path):
    losses.main(["--quick", "--output", str(tmp_path / "losses.json")])
    report = json.loads((tmp_path / "losses.json").read_text())
    assert {row["term"] for row in report["terms"]} == set(losses.TERMS)
    assert {row["method"] for row in report["methods"]} == set(losses.METHODS)
    assert {row["classes"] for row in report["terms"]} == {19, 150}
    assert all(row["ours"]["peak_mb"] > 0 for row in report["terms"])


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setitem(losses.TERMS, "cwd", (losses.TERMS["cwd"][0], lambda _: losses.skds_pair))
    with pytest.raises(SystemExit, match="cwd at 19 classes: .* is not the original's"):
        losses.compare("cwd", 19, "cpu", quick=True)
