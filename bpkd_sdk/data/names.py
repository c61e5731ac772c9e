"""Names of data sets and paths of folders, which are checked without torch."""

from __future__ import annotations

import sys
from pathlib import Path

from bpkd_sdk.errors import did_you_mean, warn

SHAPES = "shapes"  # the generated scenes
NAMES = (SHAPES, "folder", "camvid", "cityscapes", "ade20k", "pascal_context_59")


def known_names() -> tuple[str, ...]:
    """Return the names of all data sets; `DATASETS` is read only if torch is imported already, and may have more."""
    registry = sys.modules.get("bpkd_sdk.data.registry")
    return NAMES if registry is None else (SHAPES, *registry.DATASETS)


def find_folder(path_or_name: str | Path, root: str | Path | None = None) -> Path | None:
    """Return the folder that the arguments of `open_dataset` state, or None if they name another data set."""
    if root is not None:
        return Path(root) if path_or_name == "folder" else None
    return Path(path_or_name) if path_or_name != SHAPES and Path(path_or_name).is_dir() else None


def check_data(path_or_name: str | Path, root: str | Path | None = None) -> None:
    """Check that the arguments of `open_dataset` state an existing folder, or a data set by its name.

    Raises:
        ValueError: If the name is unknown, or `root` is missing, or it is not used.
        FileNotFoundError: If the folder does not exist.
    """
    name, names = str(path_or_name), known_names()
    if name not in names and Path(name).is_file():
        raise ValueError(f"Expected the folder of a data set, but {name} is a file.")
    if name not in names and root is not None and Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder and needs no `root`, but got root={str(root)!r}. Pass a split by its name: "
            f"open_dataset({name!r}, split={str(root)!r})."
        )
    if name == SHAPES and root is not None:
        raise ValueError(
            f"The scenes of {SHAPES!r} are generated and need no `root`, but got root={str(root)!r}. Pass the name of "
            "the data set that this folder contains as `data`, or leave out `root`."
        )
    folder = find_folder(path_or_name, root)
    is_path = isinstance(path_or_name, Path) or "/" in name or "\\" in name
    if folder is None and root is None and is_path and (name == SHAPES or name not in names):
        raise FileNotFoundError(f"There is no folder {name}.")
    if folder is None and name not in names:
        raise ValueError(
            f"There is no folder {name!r} and no data set of that name.{did_you_mean(name, names)} Named data sets: "
            f"{', '.join(names)}."
        )
    if folder is None and name != SHAPES and root is None:
        raise ValueError(f"The data set {name!r} needs `root`, the folder of its images and labels.")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    if path_or_name == SHAPES and Path(SHAPES).is_dir():
        warn(f"The data are the generated scenes {SHAPES!r}. For the folder of that name, pass ./{SHAPES}.")
