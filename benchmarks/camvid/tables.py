"""Tables of the CamVid study, as Markdown, from its records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.camvid.report import EDGE_WIDTHS
from benchmarks.records import markdown_table
from bpkd_sdk import Comparison
from bpkd_sdk.comparison.run import Run
from bpkd_sdk.comparison.statistics import statistic
from bpkd_sdk.data.public import CAMVID_CLASSES
from bpkd_sdk.export.benchmark import BenchmarkReport

Runs = dict[str, dict[str, Any]]


def tables(records: Runs) -> str:
    """Return one section for each part that has records."""
    parts = [key for key, record in records.items() if "settings" in record and "method" not in record]
    sections = ["# CamVid study: tables\n"]
    for part in parts:
        sections += [f"## {part}\n", comparison_of(records, part).to_markdown()]
        if report := records.get(f"{part}/report"):
            sections += report_tables(**report)
    if levels := {key.removeprefix("levels/"): record for key, record in records.items() if key.startswith("levels/")}:
        sections += ["## levels\n", levels_table(levels)]
    if "export" in records:
        sections += ["## export\n", *export_table(records["export"])]
    return "\n".join(sections).rstrip() + "\n"


def comparison_of(records: Runs, part: str) -> Comparison:
    """Return the comparison of a part, from the records of its runs."""
    runs = [Run(**record) for key, record in records.items() if key.startswith(f"{part}/") and "curve" in record]
    return Comparison(**records[part], runs=runs, output_dir=Path())


def report_tables(
    edge_widths: dict[str, list], class_iou: dict[str, list], bootstrap: dict[str, dict]
) -> Iterator[str]:
    headings = [f"{region} {width} px" for width in EDGE_WIDTHS for region in ("edge", "body")]
    rows = []
    for method, seeds in edge_widths.items():
        columns = ([seed[str(width)][row] for seed in seeds] for width in EDGE_WIDTHS for row in (0, 1))
        rows.append([method, *map(mean_and_deviation, columns)])
    yield markdown_table(["method", *headings], rows)
    rows = []
    for method, seeds in class_iou.items():
        means = (statistic(values).mean for values in zip(*seeds, strict=True))
        rows.append([method, *(f"{100 * mean:.1f}" for mean in means)])
    yield markdown_table(["method", *CAMVID_CLASSES], rows)
    rows = []
    for pair, intervals in bootstrap.items():
        cells = (
            f"{100 * d['difference']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f}){'*' * d['beyond_seeds']}"
            for d in intervals.values()
        )
        rows.append([pair, *cells])
    yield markdown_table(["difference", "mIoU", "boundary IoU", "edge", "body"], rows)


def mean_and_deviation(values: list[float]) -> str:
    result = statistic(values)
    return f"{100 * result.mean:.1f}" + (f" ±{100 * result.deviation:.1f}" if result.deviation is not None else "")


def levels_table(levels: Runs) -> str:
    rows = []
    for name, record in levels.items():
        scores = (record[time][score] for time in ("before", "after") for score in ("miou", "body_accuracy"))
        rows.append([name, *(f"{100 * score:.1f}" for score in scores)])
    return markdown_table(["candidate", "mIoU", "body", "mIoU, levels fitted", "body, levels fitted"], rows)


def export_table(record: dict[str, Any]) -> Iterator[str]:
    report = BenchmarkReport.from_json(json.dumps(record["benchmark"]))
    names = list(record["metrics"])
    rows = []
    for name, row in zip(names, report.rows, strict=True):
        size = f"{row.file_size / 1e6:.1f}" if row.file_size else ""
        stages = " + ".join(f"{times.p50:.1f}" for times in row.stages.values())
        scores = [record["metrics"][name][key] for key in ("miou", "boundary_iou", "edge_accuracy", "body_accuracy")]
        rows.append([name, size, f"{row.latency.p50:.0f}", stages, *(f"{100 * score:.2f}" for score in scores)])
    headings = ("MB", "median ms", "pre + inference + post ms", "mIoU", "boundary IoU", "edge", "body")
    yield markdown_table(["artifact", *headings], rows)
    yield f"{report.setting}\n"
    yield from (f"- {name}: {note}" for name, row in zip(names, report.rows, strict=True) for note in row.notes)
    yield from (f"- {warning}" for warning in report.environment.warnings)
