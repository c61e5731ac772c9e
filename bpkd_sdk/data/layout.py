"""Data sets that are not found, or lie otherwise than documented, say so in one way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def find_root(root: str | Path, wanted: Sequence[str], *, nested: Sequence[str] = (), source: str) -> Path:
    """The folder that holds all of `wanted`: `root`, or one of the folders `nested` in it.

    Args:
        root: What the user named.
        wanted: Relative paths of folders and files that must be there.
        nested: Relative paths that archives unpack to.
        source: Sentences that say where to get the data.

    Raises:
        FileNotFoundError: With what is missing, what is there instead, and `source`.
    """
    top = Path(root)
    folders = [top / name for name in nested if (top / name).is_dir()]
    for folder in (top, *folders):
        if all((folder / name).exists() for name in wanted):
            return folder
    found = folders[0] if folders else top
    missing = [name for name in wanted if not (found / name).exists()]
    there = sorted(path.name for path in found.iterdir()) if found.is_dir() else None
    state = "there is no such folder" if there is None else f"it holds {', '.join(there[:8]) or 'nothing'}"
    more = ", ..." if there and len(there) > 8 else ""
    raise FileNotFoundError(f"Expected {' and '.join(missing)} in {found}, but {state}{more}. {source}")
