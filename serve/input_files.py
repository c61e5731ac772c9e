"""Finds the images and videos to segment, in files, folders and glob patterns, and names their results."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpkd_sdk.data.pairs import IMAGE_SUFFIXES, list_files
from bpkd_sdk.errors import did_you_mean, format_list

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
OVERLAYS = "overlays"  # folder of the overlays in the output folder


@dataclass(frozen=True)
class InputFile:
    """A file to segment.

    Attributes:
        path: Path of the file.
        name: Path relative to the folder that was given; for a single file its name.
    """

    path: Path
    name: Path

    @property
    def key(self) -> str:
        """Name in the manifest, which is the same on all systems."""
        return self.name.as_posix()

    @property
    def source(self) -> str:
        """Identity of the path: the first digits of its SHA-256, because manifests may be published."""
        return hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]

    @property
    def is_video(self) -> bool:
        """Whether the file is a video, by its suffix."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def mask(self) -> Path:
        """Path of the mask file in the output folder; for a video, the folder of the masks of its frames."""
        return self.name.with_suffix("" if self.is_video else ".png")

    @property
    def overlay(self) -> Path:
        """Path of the overlay in the output folder."""
        return Path(OVERLAYS, self.name.with_suffix(".mp4" if self.is_video else ".jpg"))

    def state(self) -> dict[str, int]:
        """Return size and time of change of the file, by which a later call recognises it."""
        status = self.path.stat()
        return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def find_files(sources: Sequence[str | Path]) -> list[InputFile]:
    """Find the images and videos of files, folders and glob patterns.

    Folders are searched with their sub-folders. Hidden files and files with other suffixes are left out, unless they
    are given by their own path.

    Args:
        sources: Paths of files and folders, and patterns such as ``"drive/**/*.jpg"``.

    Raises:
        FileNotFoundError: If a source does not exist, or contains no image and no video.
        ValueError: If two files have masks of the same name, or a mask lies in the folder of a video's masks.
    """
    found: dict[Path, InputFile] = {}
    for source in sources:
        files = list(_files_of(source))
        if not files:
            suffixes = ", ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
            raise FileNotFoundError(f"{source} contains no image and no video ({suffixes}).")
        for file in files:
            found.setdefault(file.path.resolve(), file)
    _check_masks(list(found.values()))
    return list(found.values())


def _check_masks(files: Sequence[InputFile]) -> None:
    """Raise ValueError if two files have the same mask, or a mask lies in the folder of a video's masks."""
    first: dict[str, InputFile] = {}
    clashes = []
    for file in files:
        other = first.setdefault(str(file.mask).casefold(), file)
        if other is not file:
            clashes.append(f"{other.path} and {file.path}")
    for file in files:
        others = (first.get(str(folder).casefold()) for folder in file.mask.parents)
        clashes += [f"{other.path} and {file.path}" for other in others if other is not None]
    if clashes:
        raise ValueError(
            f"{len(clashes)} masks would have the same file or folder. Segment these files with different output "
            f"folders:\n{format_list(clashes)}"
        )


def _files_of(source: str | Path) -> Iterator[InputFile]:
    path, suffixes = Path(source), (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    if not str(source).strip():
        raise ValueError("Expected a file, folder or pattern, but got an empty text. Is a shell variable unset?")
    if path.is_file():
        yield InputFile(path, Path(path.name))
    elif path.is_dir():
        yield from (InputFile(file, file.relative_to(path)) for file in list_files(path, suffixes))
    elif glob.has_magic(str(source)):
        fixed = Path(*_leading_parts(path))
        for match in sorted(map(Path, glob.glob(str(source), recursive=True))):
            if match.is_file() and match.suffix.lower() in suffixes and not match.name.startswith("."):
                yield InputFile(match, match.relative_to(fixed))
    else:
        beside = list(path.parent.iterdir()) if path.parent.is_dir() else []
        names = [entry.name for entry in beside if entry.is_dir() or entry.suffix.lower() in suffixes]
        raise FileNotFoundError(f"There is no file or folder {source}.{did_you_mean(path.name, names)}")


def _leading_parts(pattern: Path) -> Iterator[str]:
    """Yield the parts of a pattern before the first one with a wildcard."""
    for part in pattern.parts:
        if glob.has_magic(part):
            return
        yield part
