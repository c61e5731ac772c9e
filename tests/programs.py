"""The programs that a page contains."""

import re
from pathlib import Path

_SECTION = re.compile(r"^##+ (?:\d+\. )?(.*?)\n(.*?)(?=^##+ |\Z)", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read_programs(page: Path) -> dict[str, list[tuple[str, str]]]:
    """Return (language, code) of every program, by the heading of its section."""
    sections = {title: _PROGRAM.findall(text) for title, text in _SECTION.findall(page.read_text())}
    return {title: programs for title, programs in sections.items() if programs}
