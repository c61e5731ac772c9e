"""Where a folder has its images and labels: by default ``images/<split>`` and ``labels/<split>``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bpkd_sdk.data.pairs import IMAGE_SUFFIXES, SAME_NAMES, list_files, parse_names
from bpkd_sdk.errors import format_list

VAL_ADVICE = "open_dataset(..., val_share=0.1), or --val-share 0.1, holds out a tenth of the training images"

VAL_NAMES = ("val", "valid", "validation", "dev")


@dataclass(frozen=True)
class Layout:
    """The folders of images and labels, and the names of their files.

    Attributes:
        images: Path of the folder of the images in the root, with ``{split}`` for the split.
        labels: Path of the folder of the label files in the root; None for data without labels.
        names: File names of an image and its label, as `match_files` accepts them.
    """

    images: str
    labels: str | None
    names: str

    @property
    def has_splits(self) -> bool:
        """Whether images or labels of different splits are in different folders."""
        return "{split}" in self.images + (self.labels or "")

    def images_of(self, root: Path, split: str) -> Path:
        """Return the folder of the images of a split."""
        return root / self.images.replace("{split}", split)

    def labels_of(self, root: Path, split: str) -> Path | None:
        """Return the folder of the label files of a split; None for data without labels."""
        return None if self.labels is None else root / self.labels.replace("{split}", split)

    def splits(self, root: Path) -> list[str]:
        """Return the names of the splits that have a folder of images."""
        before, *after = map(re.escape, (root / self.images).as_posix().split("{split}"))
        if not after:
            return []
        path = before + "(?P<split>[^/.][^/]*)" + "(?P=split)".join(after)
        folders = [path for path in root.glob(self.images.replace("{split}", "*")) if path.is_dir()]
        return sorted(match["split"] for folder in folders if (match := re.fullmatch(path, folder.as_posix())))

    def label_folders(self, root: Path) -> set[Path]:
        """Return the folders of the label files of all splits."""
        splits = self.splits(root) or [""]
        return set() if self.labels is None else {root / self.labels.replace("{split}", split) for split in splits}


def find_layout(root: Path, pattern: str | None, divided: bool) -> Layout:
    """Return the layout of a folder: the pattern's, or that of ``images`` and ``labels``."""
    sides = (pattern or SAME_NAMES).split(":")
    folders, names = zip(*(side.rpartition("/")[::2] for side in sides), strict=True)
    try:
        parse_names(":".join(names))
    except ValueError as error:
        raise ValueError(f"The pattern {pattern!r} cannot be used. {error}") from None
    if wrong := [folder for folder in folders if "{" in folder.replace("{split}", "") or "*" in folder]:
        raise ValueError(
            f"Expected folders of the pattern {pattern!r} to contain no {{}} and no *, only {{split}}, but got "
            f"{wrong[0]!r}. Sub-folders of a folder are searched without being stated."
        )
    is_flat = divided and not (root / "images" / "train").is_dir()
    ending = "" if is_flat and not _has_split_folders(root / "images") else "/{split}"
    images, labels = (folder or default + ending for folder, default in zip(folders, ("images", "labels"), strict=True))
    if (images, names[0]) == (labels, names[1]):
        raise ValueError(
            f"Images and labels of the pattern {pattern!r} are the same files. State how their names differ."
        )
    has_labels = bool(folders[1]) or (root / "labels").is_dir()
    return Layout(images, labels if has_labels else None, ":".join(names))


def _has_split_folders(images: Path) -> bool:
    return any((images / name).is_dir() for name in ("train", *VAL_NAMES, "test"))


def folder_splits(root: Path, pattern: str | None = None) -> list[str]:
    """Return the names of the splits in a folder: those with a folder of images, by default in ``root/images``."""
    return find_layout(root, pattern, divided=False).splits(root)


def describe_missing(root: Path, layout: Layout, split: str) -> str:
    """Return an error message for a split without a folder of images, with what the folder contains."""
    splits = layout.splits(root)
    message = (
        f"There is no folder {layout.images_of(root, split)}. Expected {layout.images_of(root, '<split>')} with the "
        f"images; splits found: {', '.join(splits) or 'none'}."
    )
    if split == "val" and (others := [name for name in splits if name in VAL_NAMES]):
        return f"{message} Rename {others[0]} to val, in the folders of images and of labels."
    if splits:
        return message + (f" {VAL_ADVICE}." if split == "val" else "")
    if layout.images == "images/{split}" and any(
        path.suffix.lower() in IMAGE_SUFFIXES for path in root.glob("images/*")
    ):
        return f"{message} {root / 'images'} contains images without folders of splits; {VAL_ADVICE}."
    entries = []
    for path in sorted(path for path in root.iterdir() if not path.name.startswith(".")):
        files = list_files(path, IMAGE_SUFFIXES) if path.is_dir() else []
        entries.append(f"{path.name}/: {len(files)} images" if path.is_dir() else path.name)
        if files:
            entries[-1] += f", such as {files[0].relative_to(path)}"
    return (
        f"{message}\n{root} contains:\n{format_list(entries or ['nothing'])}\nState where images and labels are with "
        'pattern (--pattern), for example "photos/{split}/{}.jpg:masks/{split}/{}_mask.png"; without folders of '
        f"splits, leave out {{split}} and divide the images: {VAL_ADVICE}."
    )
