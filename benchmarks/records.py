"""Result files of the benchmarks: one record per run as JSON Lines, a Markdown table, and the shared arguments."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bpkd_sdk.errors import format_list, list_differences
from bpkd_sdk.files import write_atomically

RESULTS = Path(__file__).parent / "results"
EMPTY = "–"


class Records:
    """A JSON Lines file of results, which lets a benchmark resume.

    The first line contains the setting, which all runs share, if there is one. Every other line contains one run, with
    a key that is unique in the file.

    Args:
        path: File; `add` creates it.
        setting: Facts that are the same for all runs, such as the machine and the versions.

    Attributes:
        runs: Records of the runs by key.

    Raises:
        SystemExit: If the file exists and has another setting.
    """

    def __init__(self, path: Path, setting: dict[str, Any] | None = None) -> None:
        self.path = path
        self.setting = json.loads(json.dumps(setting or {}))  # tuples become lists, as in the file
        self.runs: dict[str, dict[str, Any]] = {}
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            before = {} if "key" in lines[0] else lines.pop(0)["setting"]
            if changed := list_differences(before, self.setting):
                raise SystemExit(f"{path} has another setting; delete it to measure again:\n{format_list(changed)}")
            self.runs = {line.pop("key"): line for line in lines}

    def add(self, key: str, run: dict[str, Any]) -> None:
        """Add or replace one run, and write the file."""
        self.update({key: run})

    def update(self, runs: dict[str, dict[str, Any]]) -> None:
        """Add or replace runs, and write the file."""
        self.runs |= runs
        lines = [{"setting": self.setting}] if self.setting else []
        lines += [{"key": key} | run for key, run in self.runs.items()]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_table(self, text: str) -> None:
        """Write Markdown beside the file, and print it."""
        write_atomically(self.path.with_suffix(".md"), text.encode())
        print(text)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Iterable[int] = (0,)) -> str:
    """Return a Markdown table.

    Args:
        headings: Headings of the columns.
        rows: Cells of each row.
        text_columns: Indices of the columns that are aligned to the left; all others are aligned to the right.
    """
    rule = "|".join("---" if index in set(text_columns) else "---:" for index in range(len(headings)))
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return an argument parser with the option for the folder of the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the .jsonl and .md files")
    return parser


def add_size(parser: argparse.ArgumentParser, height: int, width: int) -> None:
    """Add the option for the size of the images."""
    parser.add_argument("--size", type=int, nargs=2, default=(height, width), metavar=("HEIGHT", "WIDTH"))
