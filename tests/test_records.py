"""Result files of the benchmarks: they resume, keep settings apart, and contain every figure of the tables."""

import json

import pytest

from benchmarks import (
    boundary,
    export_table,
    export_time,
    inference,
    loader,
    losses,
    quickstart,
    quickstart_students,
    serve_load,
    term_sizes,
    train_step,
    validation,
)
from benchmarks.camvid.tables import tables
from benchmarks.records import RESULTS, Records, markdown_table


def test_records_resume(tmp_path):
    path, setting = tmp_path / "new" / "m.jsonl", {"size": (64, 96), "torch": "2.14"}
    records = Records(path, setting)
    assert records.runs == {}
    records.add("a", {"ms": 1.5})
    records.update({"b": {"ms": 2.0}, "a": {"ms": 1.0}})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"setting": {"size": [64, 96], "torch": "2.14"}},
        {"key": "a", "ms": 1.0},
        {"key": "b", "ms": 2.0},
    ]
    assert Records(path, setting).runs == {"a": {"ms": 1.0}, "b": {"ms": 2.0}}
    for other in (setting | {"torch": "2.15"}, None):
        with pytest.raises(SystemExit, match=r"m.jsonl has another setting; delete it to measure again:\n  "):
            Records(path, other)


def test_records_without_a_setting(tmp_path):
    Records(tmp_path / "m.jsonl").add("a", {"ms": 1.5})
    assert Records(tmp_path / "m.jsonl").runs == {"a": {"ms": 1.5}}
    with pytest.raises(SystemExit, match="torch: was None, is '2.14'"):
        Records(tmp_path / "m.jsonl", {"torch": "2.14"})


def test_markdown_table():
    assert (
        markdown_table(("name", "ms"), [("a", "1"), ("b", "2")]) == "| name | ms |\n|---|---:|\n| a | 1 |\n| b | 2 |\n"
    )


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("boundary", boundary.table),
        ("camvid", tables),
        ("export-table", export_table.table),
        ("export-time", export_time.table),
        ("h200/boundary", boundary.table),
        ("h200/losses-cuda", losses.table),
        ("inference-cpu", inference.table),
        ("loader", loader.table),
        ("losses-cpu", losses.table),
        ("quickstart", quickstart.table),
        ("quickstart-students", quickstart_students.table),
        ("serve-load", serve_load.table),
        ("term-sizes", term_sizes.table),
        ("train-step", train_step.table),
        ("validation", validation.table),
    ],
)
def test_a_committed_table_follows_from_its_records(name, table):
    path = RESULTS / f"{name}.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    lines = [line for line in table(Records(path, first.get("setting")).runs).splitlines() if line.startswith("|")]
    committed = path.with_suffix(".md").read_text().splitlines()
    assert lines == [line for line in committed if line.startswith("|")]
