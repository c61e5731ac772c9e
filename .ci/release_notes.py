"""Print the section of the changelog for a tag, after a check that tag, package and changelog have one version."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag: str, version: str, changelog: str) -> str:
    """Return the text of the section of a version, without its heading.

    Raises:
        SystemExit: If the tag is not that of the version, or the changelog has no section of it with a date.
    """
    if tag != f"v{version}":
        raise SystemExit(f"Expected the tag v{version}, the version of the package, but got {tag}.")
    section = re.search(
        rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if section is None:
        raise SystemExit(
            f"CHANGELOG.md has no line '## [{version}] - YYYY-MM-DD'. Write the date of the release there."
        )
    return section[2].strip()


if __name__ == "__main__":
    (tag,) = sys.argv[1:]
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "bpkd_sdk/__init__.py").read_text(), re.MULTILINE)
    if version is None:
        raise SystemExit("bpkd_sdk/__init__.py has no line '__version__ = ...'.")
    print(release_notes(tag, version[1], (ROOT / "CHANGELOG.md").read_text()))
