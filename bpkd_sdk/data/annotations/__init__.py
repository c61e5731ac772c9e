"""Readers of annotations: COCO, LabelMe and CVAT."""

from __future__ import annotations

from pathlib import Path

from bpkd_sdk.data.annotations.coco import read_coco
from bpkd_sdk.data.annotations.cvat import read_cvat
from bpkd_sdk.data.annotations.labelme import read_labelme
from bpkd_sdk.data.annotations.model import AnnotatedImage, Annotations
from bpkd_sdk.data.classes_file import CLASSES_FILE
from bpkd_sdk.data.pairs import list_files
from bpkd_sdk.errors import format_list
from bpkd_sdk.files import read_json

__all__ = ["FORMATS", "AnnotatedImage", "Annotations", "read_annotations"]

FORMATS = (
    "a COCO file (.json), a file of CVAT for images 1.1 (.xml), a folder of LabelMe files (.json), or a folder of "
    "images and masks (images/<split> and labels/<split>, or other folders by --pattern)"
)


def read_annotations(source: Path) -> Annotations:
    """Read annotations; their format is determined from the content.

    Args:
        source: COCO file, CVAT file, LabelMe file or folder of LabelMe files.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the format is not known, or the annotations cannot be used.
    """
    if source.is_dir():
        files = [file for file in list_files(source, (".json", ".xml")) if file.name != CLASSES_FILE]
        first = read_json(files[0]) if files and files[0].suffix.lower() == ".json" else None
        if isinstance(first, dict) and "shapes" in first:
            return read_labelme(source)
        found = f"it contains:\n{format_list(files, limit=5)}" if files else "it contains neither."
        raise ValueError(f"Expected {FORMATS}, but got the folder {source}; {found}")
    if not source.is_file():
        raise FileNotFoundError(f"There is no file or folder {source}.")
    if source.suffix.lower() == ".xml":
        return read_cvat(source)
    content = read_json(source)
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
        return read_coco(content, source)
    if isinstance(content, dict) and "shapes" in content:
        raise ValueError(f"{source} is one file of LabelMe. Pass its folder, {source.parent}.")
    keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
    raise ValueError(f"Expected {FORMATS}, but {source} contains: {keys}.")
