"""Reader of COCO: instances as polygons or run lengths, and panoptic segments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bpkd_sdk.data.annotations.model import AnnotatedImage, Annotations, Regions, polygon_runs, reading
from bpkd_sdk.data.classes_file import VOID
from bpkd_sdk.errors import format_list, import_optional

Record = Mapping[str, Any]


def read_coco(content: Record, source: Path) -> Annotations:
    """Read the instances or panoptic segments of a COCO file.

    Instances have no drawing order in COCO. Larger ones are drawn first, so that smaller ones stay visible on top of
    them; of equal areas, the later one in the file is on top. Crowd regions (``iscrowd``) are void, below all
    instances. The parts of an instance are united; a hole needs run lengths. In panoptic files, segments do not
    overlap, crowds have their category, and pixels without a segment are void. Their PNG files are in the folder that
    has the name of the JSON file.

    Args:
        content: Content of the JSON file.
        source: Path of the JSON file.

    Raises:
        ValueError: If entries are missing or contradict each other, or instances have a box but no area.
    """
    with reading(source, "COCO"):
        names = {category["id"]: str(category["name"]).strip() for category in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        annotations = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        is_panoptic = any("segments_info" in annotation for annotation in content["annotations"])
        for kind, found in (("categories", names), ("images", images)):
            if len(found) < len(content[kind]):
                raise ValueError(f"{source} gives several {kind} the same id.")
        if unknown := [f"image_id {image_id}" for image_id in annotations if image_id not in images]:
            raise ValueError(f'{source} has annotations of images that are not in "images":\n{format_list(unknown)}')
        if is_panoptic:
            folder = source.with_suffix("")
            regions = {key: partial(_panoptic_regions, annotations[key], names, folder) for key in images}
        else:
            _check_instances(content["annotations"], names, source)
            regions = {key: partial(_instance_regions, annotations[key], names) for key in images}
        return Annotations(
            "COCO panoptic segments" if is_panoptic else "COCO instances",
            tuple(dict.fromkeys(names[key] for key in sorted(names))),
            tuple(
                AnnotatedImage(str(image["file_name"]).replace("\\", "/"), _size(image), regions[key])
                for key, image in images.items()
            ),
            is_complete=is_panoptic,
        )


def _size(image: Record) -> tuple[int, int] | None:
    return (int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None


def _check_instances(annotations: Sequence[Record], names: Mapping[Any, str], source: Path) -> None:
    """Raise ValueError if instances have an unknown category, or no segmentation; they are listed."""
    if unknown := [
        f"annotation {a.get('id')}: {a['category_id']}" for a in annotations if a["category_id"] not in names
    ]:
        raise ValueError(f"{source} has annotations of categories that it does not list:\n{format_list(unknown)}")
    if boxes := [
        f"annotation {a.get('id')} of image {a['image_id']}" for a in annotations if not a.get("segmentation")
    ]:
        raise ValueError(
            f"{len(boxes)} of {len(annotations)} annotations in {source} have no segmentation, only a box, which does "
            f"not state the pixels of an object. Remove them, or annotate polygons:\n{format_list(boxes)}"
        )


def _instance_regions(annotations: Sequence[Record], names: Mapping[Any, str], height: int, width: int) -> Regions:
    """Yield the masks of the instances of an image: crowds as void, then the others, larger ones first."""
    coco = import_optional("pycocotools.mask")
    instances = [(annotation, _instance_runs(annotation, height, width)) for annotation in annotations]
    instances.sort(key=lambda instance: (not instance[0].get("iscrowd"), -int(coco.area(instance[1]))))
    for annotation, runs in instances:
        name = VOID if annotation.get("iscrowd") else names[annotation["category_id"]]
        yield name, np.asarray(coco.decode(runs), bool)


def _instance_runs(annotation: Record, height: int, width: int) -> Record:
    """Return the compressed run lengths of an instance; raise ValueError if they or its polygons do not fit."""
    segmentation = annotation["segmentation"]
    place = f"annotation {annotation.get('id')}"
    with reading(place, "COCO"):
        if isinstance(segmentation, list):
            is_flat = all(isinstance(value, (int, float)) for value in segmentation)
            try:
                return polygon_runs([segmentation] if is_flat else segmentation, height, width)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        size, counts = list(segmentation["size"]), segmentation["counts"]
        if size != [height, width]:
            raise ValueError(f"{place} has run lengths for (height, width) {size}, the image is {[height, width]}")
        if isinstance(counts, str):
            return {"size": size, "counts": counts.encode()}
        if sum(counts) != height * width:
            raise ValueError(f"{place} has run lengths of {sum(counts)} pixels, the image has {height * width}")
        runs: Record = import_optional("pycocotools.mask").frPyObjects(segmentation, height, width)
        return runs


def _panoptic_regions(
    annotations: Sequence[Record], names: Mapping[Any, str], folder: Path, height: int, width: int
) -> Regions:
    """Yield the masks of the segments of an image. The id of a pixel's segment is red + 256 green + 65536 blue."""
    for annotation in annotations:
        path = folder / annotation["file_name"]
        if not path.is_file():
            raise ValueError(f"there is no file {path} with the segments. Put the PNG files into the folder {folder}")
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int32)
        ids = pixels @ np.array([1, 256, 65536])
        if ids.shape != (height, width):
            raise ValueError(f"{path} is {ids.shape}, the image is {(height, width)}")
        segments = {segment["id"]: names[segment["category_id"]] for segment in annotation["segments_info"]}
        if unknown := set(np.unique(ids).tolist()) - segments.keys() - {0}:
            raise ValueError(f"{path} has segments that are not in segments_info: {sorted(unknown)[:10]}")
        yield from ((name, ids == segment) for segment, name in segments.items())
