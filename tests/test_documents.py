"""What the documents say of measurements is what the committed files say."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def table_lines(path):
    return {line for line in path.read_text().splitlines() if line.startswith("| ") and not line.startswith("| ---")}


def test_the_tables_of_the_study_are_the_measured_ones():
    measured = set().union(*(table_lines(path) for path in (ROOT / "benchmarks/results/camvid").rglob("*.md")))
    shown = table_lines(ROOT / "docs/results.md")
    assert len(shown) > 30
    assert shown <= measured, shown - measured
