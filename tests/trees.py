"""Miniature copies of the paper's data sets in their official layouts, written with their official tools."""

import contextlib
import io
import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from bpkd_sdk.data import convert_pascal_context
from bpkd_sdk.data.public import PASCAL_CATEGORIES


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(generator, size):
    return generator.integers(0, 256, (*size, 3), np.uint8)


def blocks(generator, ids, size, cells=(4, 8)):
    """Return a label of rectangles, each with one of the ids."""
    label = generator.choice(np.array(list(ids), np.uint8), cells)
    return np.kron(label, np.ones((size[0] // cells[0], size[1] // cells[1]), np.uint8))


def cityscapes(root, *, images=2, size=(64, 128), encodings=("ids",)):
    """Write polygons in JSON, and the label files that the official scripts draw from them in each encoding."""
    from cityscapesscripts.helpers.labels import labels
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    generator = np.random.default_rng(0)
    names = [label.name for label in labels]
    height, width = size
    for split, city in (("train", "aachen"), ("val", "munster")):
        for i in range(images):
            stem = f"{city}_{i:06d}_000019"
            save(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", picture(generator, size))
            folder = root / f"gtFine/{split}/{city}"
            folder.mkdir(parents=True, exist_ok=True)
            boxes = [
                {"label": str(generator.choice(names)), "polygon": [[x, y], [x + 15, y], [x + 15, y + 15], [x, y + 15]]}
                for x in range(0, width, 16)
                for y in range(0, height, 16)
            ]
            polygons = folder / f"{stem}_gtFine_polygons.json"
            polygons.write_text(json.dumps({"imgHeight": height, "imgWidth": width, "objects": boxes}))
            for encoding in encodings:
                kind = {"ids": "labelIds", "trainIds": "labelTrainIds"}[encoding]
                with contextlib.redirect_stdout(io.StringIO()):
                    json2labelImg(str(polygons), str(folder / f"{stem}_gtFine_{kind}.png"), encoding)
    return root


def ade20k(root, *, images=2, size=(64, 96)):
    """Write images, and labels with the ids 0 (other objects) to 150."""
    generator = np.random.default_rng(1)
    for folder, word in (("training", "train"), ("validation", "val")):
        for i in range(images):
            stem = f"ADE_{word}_{i + 1:08d}"
            save(root / f"ADEChallengeData2016/images/{folder}/{stem}.jpg", picture(generator, size))
            label = blocks(generator, range(151), size)
            label[0, 0] = 0
            save(root / f"ADEChallengeData2016/annotations/{folder}/{stem}.png", label)
    return root


def pascal_release(root, *, images=2, size=(64, 96)):
    """Write images of VOC 2010, and a release file with overlapping run-length masks; the test image has none."""
    generator = np.random.default_rng(2)
    top = root / "VOCdevkit/VOC2010"
    records, masks = [], []
    for i, phase in enumerate([*["train"] * images, *["val"] * images, "test"]):
        name = f"2008_{i:06d}.jpg"
        save(top / "JPEGImages" / name, picture(generator, size))
        record = {"file_name": name, "image_id": 2008000000 + i, "phase": phase, "height": size[0], "width": size[1]}
        records.append(record)
        categories = generator.choice(list(PASCAL_CATEGORIES.values()), 6) if phase != "test" else ()
        masks += [mask_record(record, int(category), rectangle(generator, size)) for category in categories]
    generator.shuffle(masks)
    release = {"info": {}, "images": records, "annos_segmentation": masks}
    (top / "trainval_merged.json").write_text(json.dumps(release))
    return root


def rectangle(generator, size):
    covered = np.zeros(size, np.uint8)
    top, left = generator.integers(0, size[0] // 2), generator.integers(0, size[1] // 2)
    covered[top : top + size[0] // 2, left : left + size[1] // 2] = 1
    return covered


def mask_record(image, category, covered):
    runs = coco.encode(np.asfortranarray(covered))
    segmentation = {"size": runs["size"], "counts": runs["counts"].decode()}
    return {"image_id": image["image_id"], "category_id": category, "segmentation": segmentation}


def pascal_context(root, **options):
    convert_pascal_context(pascal_release(root, **options))
    return root


def assert_zero_is_void(data):
    """Assert that label 0 in the files is void, and that the other labels are the classes, counted from 1."""
    for pair, (_, label) in zip(data.pairs, data, strict=True):
        raw = np.asarray(Image.open(pair.label)).astype(int)
        assert (label.numpy() == np.where(raw == 0, 255, raw - 1)).all()
        assert 0 in raw
