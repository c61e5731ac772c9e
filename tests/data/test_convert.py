"""Tests of the conversion of annotations and of coloured masks into a folder of id masks."""

import base64
import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from bpkd_sdk.data import convert_annotations, open_dataset
from bpkd_sdk.data.annotations import writing

HEIGHT, WIDTH = 20, 30


def photo(path, size=(HEIGHT, WIDTH), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(path.name))
    Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(path, **options)


def box(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def filled(left, top, right, bottom, value=1):
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[top:bottom, left:right] = value
    return label


def instance(image, category, segmentation, **others):
    return {"id": 0, "image_id": image, "category_id": category, "segmentation": segmentation, **others}


def coco_file(folder, annotations, names=("a.jpg",), categories=("car", "person"), **size):
    """Write photos and a COCO file; images have the ids 10, 11, ..., categories 5, 6, ..."""
    size = {"height": HEIGHT, "width": WIDTH} | size
    for name in names:
        photo(folder / "photos" / name)
    content = {
        "images": [{"id": 10 + index, "file_name": name, **size} for index, name in enumerate(names)],
        "categories": [{"id": 5 + index, "name": name} for index, name in enumerate(categories)],
        "annotations": [annotation | {"id": index} for index, annotation in enumerate(annotations)],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


@pytest.fixture
def run(tmp_path):
    """Function that converts a source with the photos of `coco_file`, and returns the first label and the report."""

    def convert_it(source, **options):
        options = {"images": tmp_path / "photos"} | options
        report = convert_annotations(source, tmp_path / "out", **options)
        data = open_dataset(tmp_path / "out", split=options.get("split", "train"))
        data.check()
        return data[0][1].numpy(), report, data

    return convert_it


def test_coco_polygons_and_run_lengths_of_an_object_are_united(tmp_path, run):
    ring = filled(2, 2, 10, 10) - filled(4, 4, 8, 8)
    counts = coco.encode(np.asfortranarray(ring))
    plain = np.flatnonzero(np.diff(np.concatenate([[0], ring.flatten("F"), [2]])))
    plain = np.diff(np.concatenate([[0], plain])).tolist()
    annotations = [
        instance(10, 6, [box(0, 0, 3, 2), box(20, 10, 30, 20)]),
        instance(11, 5, {"size": [HEIGHT, WIDTH], "counts": counts["counts"].decode()}),
        instance(12, 5, {"size": [HEIGHT, WIDTH], "counts": plain}),
    ]
    source = coco_file(tmp_path, annotations, ["a.jpg", "sub/b.png", "c.JPG"])
    label, report, data = run(source)
    assert data.class_names == ("background", "car", "person")
    assert np.array_equal(label, filled(0, 0, 3, 2, 2) + filled(20, 10, 30, 20, 2))
    assert [pair.image.relative_to(tmp_path / "out/images/train").as_posix() for pair in data.pairs] == [
        "a.jpg", "c.JPG", "sub/b.png",
    ]  # fmt: skip
    for index in (1, 2):
        assert np.array_equal(data[index][1].numpy(), ring)
        assert (data[index][1][5, 5], data[index][1][3, 3]) == (0, 1)
    assert report.class_images == {"background": 3, "car": 2, "person": 1, "void": 0}
    assert report.class_pixels["car"] == 2 * ring.sum()
    assert report.class_pixels["person"] == 3 * 2 + 10 * 10


def test_coco_draws_smaller_instances_on_top_and_crowds_below_as_void(tmp_path, run):
    annotations = [
        instance(10, 6, [box(4, 4, 8, 8)]),
        instance(10, 5, [box(0, 0, 20, 10)]),
        instance(10, 6, [box(0, 0, 30, 20)], iscrowd=1),
        instance(10, 6, [box(10, 4, 12, 6)]),
        instance(10, 5, [box(10, 4, 12, 6)]),
    ]
    label, _, _ = run(coco_file(tmp_path, annotations))
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[:10, :20] = 1
    expected[4:8, 4:8] = 2
    expected[4:6, 10:12] = 1  # of equal areas, the later one
    assert np.array_equal(label, expected)


def test_images_without_shapes_are_background_and_counted(tmp_path, run):
    label, report, _ = run(coco_file(tmp_path, [instance(11, 5, [box(0, 0, 3, 3)])], ["a.jpg", "b.jpg"]))
    assert label.max() == 0
    assert report.background_only == 1


def test_class_map_unites_categories_and_orders_classes(tmp_path, run):
    annotations = [
        instance(10, 5, [box(0, 0, 3, 3)]), instance(10, 6, [box(5, 0, 8, 3)]), instance(10, 7, [box(10, 0, 13, 3)]),
    ]  # fmt: skip
    source = coco_file(tmp_path, annotations, categories=("car", "truck", "sky"))
    with pytest.raises(ValueError, match=r"no class for these categories.*\n  truck\n  sky"):
        run(source, class_map={"vehicle": "car"})
    with pytest.raises(ValueError, match="puts 'car' into two classes"):
        run(source, class_map={"a": ["car"], "b": ["car", "truck", "sky"]})
    label, _, data = run(
        source, class_map={"vehicle": ["car", "truck"], "ground": [], "void": "sky"}, background="ground"
    )
    assert data.class_names == ("vehicle", "ground")
    expected = np.ones((HEIGHT, WIDTH))
    expected[:3, :3] = expected[:3, 5:8] = 0
    expected[:3, 10:13] = 255
    assert np.array_equal(label, expected)


def test_a_second_split_uses_the_classes_of_the_first(tmp_path, run):
    run(coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])], categories=("car", "person")))
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])], categories=("person",))
    label, _, _ = run(source, split="val")
    assert label.max() == 2
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])], categories=("dog",))
    with pytest.raises(
        ValueError, match=r"has the classes background, car, person; the annotations have background, dog"
    ):
        run(source, split="test")


def test_panoptic_segments_are_read_from_their_pngs(tmp_path, run):
    photo(tmp_path / "photos/a.jpg")
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    ids[:10], ids[10:, :5] = 300, 70000
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    (tmp_path / "panoptic").mkdir()
    Image.fromarray(pixels).save(tmp_path / "panoptic/a.png")
    segments = [{"id": 300, "category_id": 1, "iscrowd": 0}, {"id": 70000, "category_id": 4, "iscrowd": 1}]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "road"}, {"id": 4, "name": "person"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    label, report, data = run(tmp_path / "panoptic.json")
    assert data.class_names == ("road", "person")
    assert np.array_equal(label, np.where(ids == 300, 0, np.where(ids == 70000, 1, 255)))
    assert report.format == "COCO panoptic segments"
    del content["annotations"][0]["segments_info"][0]
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"segments that are not in segments_info: \[300\]"):
        run(tmp_path / "panoptic.json", split="val")


def labelme_file(folder, shapes, name="a.jpg", **others):
    content = {"shapes": shapes, "imagePath": name, "imageHeight": HEIGHT, "imageWidth": WIDTH, "imageData": None}
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.split("\\")[-1].removesuffix(".jpg")
    (folder / f"{stem}.json").write_text(json.dumps(content | others))


def shape(label, points, kind="polygon", **others):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **others}


def test_labelme_shapes_are_drawn_in_the_order_of_the_file(tmp_path):
    photo(tmp_path / "raw/a.jpg")
    bits = io.BytesIO()
    Image.fromarray(np.array([[1, 0], [1, 1]], bool)).save(bits, "PNG")
    labelme_file(tmp_path / "raw", [
        shape("dog", [[0, 0], [12, 0], [12, 12], [0, 12]]),
        shape("cat", [[10, 8], [2, 2]], "rectangle"),
        shape("_background_", [[4, 4], [6, 4], [6, 6], [4, 6]], None),
        shape("cat", [[20, 10], [24, 10]], "circle"),
        shape("__ignore__", [[26, 0], [30, 0], [30, 2], [26, 2]], "oriented_rectangle"),
        shape("dog", [[15, 1], [16, 2]], "mask", mask=base64.b64encode(bits.getvalue()).decode()),
    ])  # fmt: skip
    convert_annotations(tmp_path / "raw", tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    assert data.class_names == ("background", "cat", "dog")
    expected = filled(0, 0, 12, 12, 2)
    expected[2:8, 2:10] = 1
    expected[4:6, 4:6] = 0
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    distance = np.hypot(x - 20, y - 10)
    expected[distance < 4] = 1
    expected[0:2, 26:30] = 255
    expected[[1, 2, 2], [15, 15, 16]] = 2
    label = data[0][1].numpy()
    far = abs(distance - 4) > 0.5  # the circle is a polygon, so pixels at its border may differ
    assert np.array_equal(label[far], expected[far])
    assert 0.9 < (label[10:, 15:] == 1).sum() / (np.pi * 16 / 2) < 1.1


def test_labelme_finds_images_by_stale_and_foreign_paths(tmp_path, run):
    photo(tmp_path / "photos/deep/a.jpg")
    labelme_file(tmp_path / "json", [shape("dog", [[0, 0], [2, 0], [2, 2], [0, 2]])], "..\\photos\\deep\\a.jpg")
    label, _, _ = run(tmp_path / "json")
    assert np.array_equal(label, filled(0, 0, 2, 2))


def test_shapes_without_an_area_are_refused_by_name(tmp_path, run):
    photo(tmp_path / "photos/a.jpg")
    labelme_file(tmp_path / "json", [shape("dog", [[0, 0], [2, 0]], "line"), shape("cat", [[1, 1]], "point")])
    with pytest.raises(
        ValueError, match=r"2 shapes are of a kind without an area(.|\n)*shape 1, 'dog', is a line(.|\n)*is a point"
    ):
        run(tmp_path / "json")
    cvat_file(tmp_path, '<points label="dog" points="1,1"/><cuboid label="cat"/>')
    with pytest.raises(ValueError, match=r"2 shapes in (.|\n)*a.jpg: points 'dog'\n.*a.jpg: cuboid 'cat'"):
        run(tmp_path / "annotations.xml")
    source = coco_file(tmp_path, [instance(10, 5, [], bbox=[0, 0, 3, 3])])
    with pytest.raises(ValueError, match=r"1 of 1 annotations .* no segmentation, only a box"):
        run(source)


def cvat_file(folder, shapes, size=(HEIGHT, WIDTH)):
    photo(folder / "photos/a.jpg")
    labels = "".join(
        f"<label><name>{name}</name><color>{color}</color></label>"
        for name, color in (("dog", "#ff0000"), ("cat", "#00ff00"))
    )
    (folder / "annotations.xml").write_text(
        f"<?xml version='1.0'?><annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
        f"<image id='0' name='a.jpg' width='{size[1]}' height='{size[0]}'>{shapes}</image></annotations>"
    )


def test_cvat_shapes_are_drawn_by_z_order(tmp_path, run):
    cvat_file(tmp_path, """
        <tag label="dog"/>
        <polygon label="dog" points="2.0,2.0;6.0,2.0;6.0,6.0;2.0,6.0" z_order="1"/>
        <box label="cat" xtl="0" ytl="0" xbr="10" ybr="10" z_order="0"/>
        <box label="dog" xtl="14" ytl="2" xbr="24" ybr="4" rotation="90"/>
        <mask label="cat" rle="1, 2, 3" left="27" top="18" width="3" height="2"/>
        <ellipse label="dog" cx="10" cy="15" rx="6" ry="3"/>
    """)  # fmt: skip
    label, _, data = run(tmp_path / "annotations.xml")
    assert data.class_names == ("background", "dog", "cat")
    assert data.palette == ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    expected = filled(0, 0, 10, 10, 2)
    expected[2:6, 2:6] = 1
    expected[0:8, 18:20] = 1  # the box from (14, 2) to (24, 4), turned around (19, 3)
    expected[18, 28:30] = 2
    assert np.array_equal(label[:12], expected[:12])
    assert np.array_equal(label[18:, 27:], expected[18:, 27:])
    assert 0.85 < (label[12:, 4:17] == 1).sum() / (np.pi * 18) < 1.15


def test_masks_of_all_kinds_become_ids(tmp_path, run):
    """RGB TIFF with names of another layout, palette PNG, and values of classes.json."""
    colors = np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0)], np.uint8)
    ids = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3
    root = tmp_path / "rgb"
    photo(root / "p/a_left.JPG")
    (root / "m").mkdir()
    Image.fromarray(colors[ids]).save(root / "m/a_gt.TIF")
    names = {"#000000": "void", "#c80000": "car", "#00c800": "dog"}
    (root / "classes.json").write_text(json.dumps({"ids": names}))
    photo(root / "p/b_left.JPG")
    Image.fromarray(colors[2 - ids]).save(root / "m/b_gt.TIF")
    for split in ("train", "val"):
        convert_annotations(
            root, tmp_path / "out", split=split, pattern="p/{}_left.jpg:m/{}_gt.tif", val_share=0.5, val_seed=1
        )
    assert json.loads((tmp_path / "out/classes.json").read_text()) == {
        "class_names": ["car", "dog"], "palette": [[200, 0, 0], [0, 200, 0]],
    }  # fmt: skip
    written = {}
    for path in (tmp_path / "out/labels").rglob("*.png"):
        written[path.stem] = np.asarray(Image.open(path))
    expected = np.array([255, 0, 1])
    assert np.array_equal(written["a_left"], expected[ids])
    assert np.array_equal(written["b_left"], expected[2 - ids])


def test_options_without_a_meaning_are_refused(tmp_path):
    photo(tmp_path / "in/images/train/a.png")
    with pytest.raises(ValueError, match="skip_missing .* has no meaning"):
        convert_annotations(tmp_path / "in", tmp_path / "out", skip_missing=True)
    with pytest.raises(ValueError, match="no labels to convert|classes of .* are not known"):
        convert_annotations(tmp_path / "in", tmp_path / "out")


def test_the_format_of_images_is_kept(tmp_path, run):
    root = tmp_path / "four"
    facts = {"channels": 4, "value_range": [0, 4095], "bands": [2, 1, 0]}
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 4096, (4, HEIGHT, WIDTH), np.uint16)
    np.save(root / "images/train/a.npy", pixels)
    Image.fromarray(filled(0, 0, 3, 3, 7)).save(root / "labels/train/a.png")
    (root / "classes.json").write_text(json.dumps({"ids": {"0": "ground", "7": "tree"}} | facts))
    label, _, data = run(root, images=None)
    assert np.array_equal(label, filled(0, 0, 3, 3))
    assert data[0][0].numpy().tolist() == pixels.tolist()
    assert json.loads((tmp_path / "out/classes.json").read_text()).items() >= facts.items()
    cvat_file(tmp_path, "")
    with pytest.raises(ValueError, match="do not fit their annotations"):
        run(
            tmp_path / "annotations.xml",
            split="val",
            class_map={"ground": [], "tree": ["dog", "cat"]},
            background="ground",
        )


def test_sizes_and_exif_orientation_are_held_against_the_image(tmp_path, run):
    source = coco_file(tmp_path, [], height=HEIGHT + 1)
    with pytest.raises(ValueError, match=r"a.jpg is \(20, 30\), its annotation is for \(height, width\) \(21, 30\)"):
        run(source)
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "photos/a.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"a.jpg is \(30, 20\), .*\(20, 30\); EXIF data turn the image"):
        run(source)
    photo(tmp_path / "photos/a.jpg", (WIDTH, HEIGHT), exif=exif)  # stored turned, annotated upright
    label, _, _ = run(source)
    assert np.array_equal(label, filled(0, 0, 3, 3))
    assert not (tmp_path / "out/labels/train/._a.png").exists()


def test_missing_and_unlabelled_images_are_refused_or_left_out(tmp_path, run):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])], ["a.jpg", "b.jpg"])
    (tmp_path / "photos/b.jpg").unlink()
    photo(tmp_path / "photos/c.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 annotated images are not in .*\n  b.jpg(.|\n)*--skip-missing"):
        run(source)
    with pytest.raises(ValueError, match=r"1 of 2 images in .* have no annotation:\n.*c.jpg\n.*--skip-unlabelled"):
        run(source, skip_missing=True)
    with (
        pytest.warns(UserWarning, match=r"1 annotations without an image are left out:\n  b.jpg"),
        pytest.warns(UserWarning, match=r"1 images without an annotation are left out:\n.*c.jpg"),
    ):
        _, report, data = run(source, skip_missing=True, skip_unlabelled=True)
    assert (report.images, len(data)) == (1, 1)
    with pytest.raises(FileNotFoundError, match=r"none does not exist.*--images"):
        run(source, images=tmp_path / "none")


def test_names_that_fit_several_images_are_refused(tmp_path, run):
    source = coco_file(tmp_path, [], ["x/a.jpg", "y/a.jpg"])
    content = json.loads(source.read_text())
    content["images"] = [{"id": 1, "file_name": "a.jpg"}]
    source.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a.jpg fits .*x/a.jpg and .*y/a.jpg"):
        run(source, skip_unlabelled=True)
    content["images"] = [{"id": 1, "file_name": "z/a.jpg"}]
    source.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match="1 of 1 annotated images are not in"):
        run(source)


def test_shapes_that_cover_no_pixel_are_named(tmp_path, run):
    annotations = [instance(10, 5, [[1, 1, 4, 4]]), instance(10, 6, [box(0, 0, 3, 3)])]
    with pytest.warns(UserWarning, match=r"1 shapes cover no pixel, .*\n  a.jpg: car"):
        label, _, _ = run(coco_file(tmp_path, annotations))
    assert np.array_equal(label, filled(0, 0, 3, 3, 2))


def test_a_data_set_is_not_written_among_its_source_images(tmp_path):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])])
    with pytest.raises(ValueError, match="outside of the folder of the images"):
        convert_annotations(source, tmp_path / "photos/out", images=tmp_path / "photos")


def test_images_in_their_place_stay_there(tmp_path, run):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])])
    place = tmp_path / "out/images/train"
    place.parent.mkdir(parents=True)
    (tmp_path / "photos").rename(place)
    label, _, _ = run(source, images=place)
    assert np.array_equal(label, filled(0, 0, 3, 3))


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([0, 0, 0.5, 0, 0.5, 0.5], r"shares of its size, expected pixels"),
        ([0, 0, 300, 0, 300, 300], r"goes from \(0, 0\) to \(300, 300\) in an image of 30 x 20, far outside"),
        ([0, 0, float("nan"), 0, 3, 3], "not finite"),
        ([0, 0, 3, 0, 3, 3, 1], "7 coordinates"),
    ],
)
def test_polygons_that_cannot_be_drawn_are_listed_and_nothing_remains(tmp_path, run, polygon, message):
    good = instance(10, 5, [box(0, 0, 3, 3)])
    source = coco_file(
        tmp_path, [good, instance(11, 5, [polygon]), instance(12, 6, [polygon])], ["a.jpg", "b.jpg", "c.jpg"]
    )
    with pytest.raises(ValueError, match=rf"2 of 3 labels cannot be made:\n  b.jpg: annotation 1: .*{message}"):
        run(source)
    assert not list((tmp_path / "out").rglob("*.png"))
    source = coco_file(tmp_path, [good], ["a.jpg", "b.jpg", "c.jpg"])
    assert run(source)[1].images == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(image_id=99), "images that are not in .*\n.*image_id 99"),
        (lambda c: c["annotations"][0].update(category_id=99), r"categories that it does not list:\n.*annotation 0: 99"),
        (lambda c: c["annotations"][0].pop("category_id"), "not an annotation in the format of COCO: it lacks 'category_id'"),
        (lambda c: c["images"].append(c["images"][0]), "several images the same id"),
        (lambda c: c["images"].append(c["images"][0] | {"id": 11}), "are both annotations of"),
        (lambda c: c["annotations"][0].update(segmentation={"size": [5, 5], "counts": [25]}), r"run lengths for .height, width. \[5, 5\]"),
        (lambda c: c["annotations"][0].update(segmentation={"size": [HEIGHT, WIDTH], "counts": [25]}), "run lengths of 25 pixels"),
        (lambda c: c.update(categories=[{"id": 5, "name": "car"}, {"id": 6, "name": "Car"}]), "only in upper and lower case"),
        (lambda c: c.update(categories=[{"id": 5, "name": "background"}]), "at least 2 classes"),
        (lambda c: c.pop("categories"), "Expected a COCO file .*contains: images, annotations"),
    ],
)  # fmt: skip
def test_coco_files_that_contradict_themselves_are_refused(tmp_path, run, change, message):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])])
    content = json.loads(source.read_text())
    change(content)
    source.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        run(source)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.png"))


def test_an_interrupted_conversion_continues(tmp_path, run, monkeypatch):
    names = [f"{index}.jpg" for index in range(4)]
    source = coco_file(tmp_path, [instance(10 + i, 5, [box(0, 0, 3 + i, 3)]) for i in range(4)], names)
    written = []

    def write(path, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        original(path, content)

    original = writing.write_atomically
    monkeypatch.setattr(writing, "write_atomically", write)
    with pytest.raises(KeyboardInterrupt, match="2 of 4 labels are written; repeat the command"):
        run(source)
    with pytest.raises(ValueError, match="2 of 4 images have no label"):
        open_dataset(tmp_path / "out")
    assert not (tmp_path / "out/classes.json").exists()
    monkeypatch.setattr(writing, "write_atomically", original)
    before = [path.stat().st_mtime_ns for path in written]
    _, report, data = run(source)
    assert [path.stat().st_mtime_ns for path in written] == before
    assert report.class_pixels["car"] == 3 * (3 + 4 + 5 + 6)
    assert [int(label.sum()) for _, label in data] == [9, 12, 15, 18]
    record = json.loads((tmp_path / "out/conversion-train.json").read_text())
    assert record["class_pixels"] == report.class_pixels


def test_other_files_are_never_overwritten(tmp_path, run):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])])
    other = tmp_path / "out/labels/train/b.png"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"contains 1 files that no conversion recorded:\n.*b.png"):
        run(source)
    other.unlink()
    photo(tmp_path / "out/images/train/a.jpg", (5, 5))
    with pytest.raises(FileExistsError, match=r"1 images exist with another content:\n.*a.jpg"):
        run(source)
    (tmp_path / "out/images/train/a.jpg").unlink()
    run(source)
    source = coco_file(tmp_path, [instance(10, 6, [box(0, 0, 3, 3)])])
    with pytest.raises(
        FileExistsError, match=r"describes another conversion:\n.*sha256.*\n(.|\n)*delete it and .*labels/train"
    ):
        run(source)


def test_one_file_does_not_become_two_splits(tmp_path, run):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])])
    run(source)
    with pytest.raises(FileExistsError, match=r"conversion-train.json records .* same annotations.*--val-share"):
        run(source, split="val")


def test_images_are_links_or_copies(tmp_path, run, monkeypatch):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 3, 3)])])
    run(source)
    assert (tmp_path / "out/images/train/a.jpg").samefile(tmp_path / "photos/a.jpg")

    def refuse(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    source = coco_file(tmp_path, [instance(10, 6, [box(0, 0, 3, 3)])])
    run(source, split="val")
    copy = tmp_path / "out/images/val/a.jpg"
    assert not copy.samefile(tmp_path / "photos/a.jpg")
    assert copy.read_bytes() == (tmp_path / "photos/a.jpg").read_bytes()


def test_the_command_reports_counts_and_its_result_is_valid(tmp_path, bpkd):
    source = coco_file(tmp_path, [instance(10, 5, [box(0, 0, 15, 20)])], ["a.jpg", "b.jpg"])
    (tmp_path / "map.json").write_text('{"vehicle": ["car"], "void": ["person"]}')
    code, out, err = bpkd(
        "data",
        "convert",
        source,
        tmp_path / "out",
        "--images",
        tmp_path / "photos",
        "--class-map",
        tmp_path / "map.json",
    )
    assert code == 0, err
    assert "75.00%" in out
    assert "25.00%" in out
    assert "1 of 2 images have no annotated pixel" in out
    code, out, _ = bpkd("data", "check", tmp_path / "out", "--val-share", 0.5, "--val-seed", 3)
    assert code == 0, out
    code, _, err = bpkd("data", "convert", source)
    assert (code, "pass the folder to write as well" in err) == (1, True)
    code, _, err = bpkd("data", "convert", source, tmp_path / "out2", "--pattern", "{}.png:{}.png")
    assert (code, "pattern selects files of a folder" in err) == (1, True)
    (tmp_path / "map.json").write_text('{"vehicle": "car", "vehicle": "person"}')
    command = ("data", "convert", source, tmp_path / "out2", "--images", tmp_path / "photos")
    code, _, err = bpkd(*command, "--class-map", tmp_path / "map.json")
    assert (code, "'vehicle'" in err) == (1, True)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "<annotations><track/></annotations>", "CVAT for images 1.1.*also if it is a video"),
        ("a.xml", "<annotations><image", "is not XML"),
        ("a.json", '{"shapes": []}', "one file of LabelMe. Pass its folder"),
        ("a.json", "[1]", "contains: list"),
        ("a.json", "{", "is not JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        convert_annotations(tmp_path / name, tmp_path / "out")
