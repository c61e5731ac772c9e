"""The benchmark of the losses runs, resumes, and compares the values with those of the re-stated originals."""

import json
import re

import pytest

from benchmarks import losses


@pytest.fixture(autouse=True)
def _one_pass(monkeypatch):
    monkeypatch.setattr(losses, "PASSES", 1)
    monkeypatch.setattr(losses.torch.cuda, "is_available", lambda: False)


def test_quick_run(tmp_path):
    losses.main(["--quick", "--output", str(tmp_path), "--classes", "19"])
    setting, *cases = map(json.loads, (tmp_path / "losses-cpu.jsonl").read_text().splitlines())
    assert setting["setting"]["quick"]
    cases = {case["key"]: case for case in cases}
    assert cases.keys() == {case.key for case in losses.all_cases([19])}
    assert all(row["peak_mb"] > 0 for row in cases.values())


def test_table():
    """The growth is relative to that of the logits of both networks, with four bytes per number."""
    done = {case.key: {"ms": 2.0, "peak_mb": 3.0} for case in losses.all_cases(losses.CLASSES)}
    done["original/ifvd/150"]["ms"] = 30.0
    done["method/cwd/150"]["peak_mb"] = 3.0 + 2.5 * 2 * 2 * (150 - 19) * 64 * 128 * 4 / 1e6
    table = losses.table(done)
    assert "| ifvd | 150 | 2.0 | 30.0 | 15.0 | 3 | 3 |" in table
    assert re.search(r"^\| cwd \| 2.0 \| 2.0 \| 3 \| 46 \| 2.5 \|$", table, re.MULTILINE)


def test_a_measured_case_is_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def measure(case, device, *, quick):
        measured.append(case)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {"value": 1.0, "peak_mb": 2.0, "ms": 3.0}

    monkeypatch.setattr(losses, "measure", measure)
    command = ["--quick", "--output", str(tmp_path), "--only", "cwd", "--classes", "19"]
    with pytest.raises(KeyboardInterrupt):
        losses.main(command)
    losses.main(command)
    assert [case.side for case in measured] == ["ours", "original", "method", "method"]


def test_results_of_another_setting_are_not_mixed_in(tmp_path, monkeypatch):
    run = ["--quick", "--output", str(tmp_path), "--only", "cwd", "--classes", "19"]
    losses.main(run)
    monkeypatch.setattr(losses.torch, "__version__", "1.0")
    with pytest.raises(SystemExit, match=r"delete it to measure again:\n  torch: was '.*', is '1.0'"):
        losses.main(run)


def test_a_value_that_differs_from_the_original_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(losses.TERMS, "cwd", (losses.TERMS["cwd"][0], lambda _: losses.originals.skds_pair))
    with pytest.raises(SystemExit, match="cwd at 19 classes: .* is not the original's"):
        losses.run("cpu", [losses.Case(side, "cwd", 19) for side in ("ours", "original")], tmp_path, quick=True)
