"""Tests of the files of a folder: names, patterns, files that are ignored, missing labels, and division into splits."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import bpkd_sdk
from bpkd_sdk.cli import app
from bpkd_sdk.data import check_dataset, open_dataset
from tests.networks import tiny


def write(path, value=0):
    """Write an image or a label map, by the name of its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8), value, np.uint8) if "label" in str(path) else np.full((8, 8, 3), 100 + value, np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "classes.json").write_text('["ground", "thing"]')
    return tmp_path


def names(data):
    return [(pair.image.name, pair.label and pair.label.name) for pair in data.pairs]


def test_upper_case_suffixes_tiff_labels_and_files_of_other_systems(root):
    write(root / "images/train/a.PNG")
    write(root / "images/train/b.JPG")
    write(root / "images/train/deep/c.Tiff")
    write(root / "labels/train/a.TIF", 1)
    write(root / "labels/train/b.PNG", 1)
    write(root / "labels/train/deep/c.bmp", 1)
    for junk in ("images/train/._a.PNG", "labels/train/._a.png", "images/train/.DS_Store", "images/train/Thumbs.db"):
        (root / junk).write_bytes(b"junk")
    write(root / "images/train/.ipynb_checkpoints/a-checkpoint.png")
    write(root / "images/train/__MACOSX/d.png")
    data = open_dataset(root)
    assert names(data) == [("a.PNG", "a.TIF"), ("b.JPG", "b.PNG"), ("c.Tiff", "c.bmp")]
    assert all(label.unique().tolist() == [1] for _, label in data)
    data.check()


def test_names_match_across_unicode_spellings(root):
    """macOS stores é as two code points, other systems as one."""
    write(root / "images/train/caf\u00e9.png")
    write(root / "labels/train/cafe\u0301.png")
    assert len(open_dataset(root)) == 1


def test_a_pattern_of_names_reads_the_default_folders(root):
    for name in ("aachen/a", "bonn/b"):
        write(root / f"images/train/{name}_leftImg8bit.png")
        write(root / f"labels/train/{name}_gt.png")
    write(root / "images/train/bonn/b_right.png")
    with pytest.warns(UserWarning, match=r"1 images in .* have no name like \{\}_leftImg8bit.png.*\n.*b_right.png"):
        data = open_dataset(root, pattern="{}_leftImg8bit.png:{}_gt.png")
    assert names(data) == [("a_leftImg8bit.png", "a_gt.png"), ("b_leftImg8bit.png", "b_gt.png")]


def test_a_pattern_of_folders_finds_images_and_masks_anywhere(root):
    for split in ("train", "val"):
        for name in ("a", "b"):
            write(root / f"set_{split}/photos/{name}.jpg")
            write(root / f"masks/{split}_{name}.png", 1)
    pattern = "set_{split}/photos/{}.jpg:masks/train_{}.png"
    assert names(open_dataset(root, pattern=pattern)) == [("a.jpg", "train_a.png"), ("b.jpg", "train_b.png")]
    assert [report.split for report in check_dataset(root, pattern=pattern)] == ["train", "val"]


def test_images_and_masks_may_share_a_folder_and_need_no_splits(root):
    for name in "abcdefgh":
        write(root / f"{name}.png", 9)
        write(root / f"{name}_mask.png", 1)
    pattern = "./{}.png:./{}_mask.png"
    with pytest.raises(ValueError, match=r"no \{split\}, so all splits would be the same images.*val_share"):
        open_dataset(root, pattern=pattern)
    train, val = (open_dataset(root, split=s, pattern=pattern, val_share=0.4) for s in ("train", "val"))
    assert sorted(names(train) + names(val)) == [(f"{name}.png", f"{name}_mask.png") for name in "abcdefgh"]


def test_the_longer_name_decides_in_a_shared_folder(root):
    """Every name with _img would also fit the name of labels."""
    for name in "abcd":
        write(root / f"{name}_img.png", 9)
        write(root / f"{name}.png", 1)
    data = [open_dataset(root, split=s, pattern="./{}_img.png:./{}.png", val_share=0.4) for s in ("train", "val")]
    assert sorted(names(data[0]) + names(data[1])) == [(f"{name}_img.png", f"{name}.png") for name in "abcd"]


def test_labels_without_a_folder_of_the_split_are_missing_labels(root):
    write(root / "images/train/a.png")
    write(root / "labels/a.png")
    with pytest.raises(
        ValueError,
        match=r"1 of 1 images have no label .*labels/train.*(.|\n)*Files in .*labels, for .*\n.*labels/a.png",
    ):
        open_dataset(root)


def test_links_to_folders_are_followed_once(root, tmp_path_factory):
    photos = tmp_path_factory.mktemp("photos")
    write(photos / "images/a.png")
    write(root / "labels/train/deep/a.png")
    (root / "images/train").mkdir(parents=True)
    (root / "images/train/deep").symlink_to(photos / "images")
    (photos / "images/again").symlink_to(photos / "images")
    assert names(open_dataset(root)) == [("a.png", "a.png")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}_img.png", "separated by a colon"),
        ("a.png:{}_gt.png", "separated by a colon"),
        ("{}_img:{}_gt.png", "separated by a colon"),
        ("x/{}/{}.png:{}_gt.png", "Expected folders of the pattern"),
        ("./{}.*:./{}.*", "are the same files"),
        ("{}_left.png:{}_gt.png", r"No image in .*images/train has a name like \{\}_left.png; .*example:\n.*0_img.png"),
        ("{}_img.png:{}_mask.png", r"2 of 2 images have no label .expected .*_mask.png.:\n.*0_img.png(.|\n)*Files in .*, for example:\n.*0_gt.png"),
        ("p/{split}/{}.png:q/{}.png", r"no folder .*p/train\. .*splits found: none(.|\n)*images/: 2 images, such as train/0_img.png(.|\n)*--pattern"),
    ],
)  # fmt: skip
def test_patterns_that_do_not_fit_are_refused_with_what_was_found(root, pattern, message):
    for index in range(2):
        write(root / f"images/train/{index}_img.png")
        write(root / f"labels/train/{index}_gt.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(root, pattern=pattern)


def test_an_unknown_layout_is_described(root, bpkd):
    write(root / "photos/a.jpg")
    write(root / "masks/a.png")
    for call in (open_dataset, check_dataset):
        with pytest.raises(FileNotFoundError, match=r"photos/: 1 images, such as a.jpg(.|\n)*State where.*pattern"):
            call(root)
    code, _, err = bpkd("train", "smp/FPN/resnet18", "--data", root, "--val-share", 0.5)
    assert (code, "masks/: 1 images, such as a.png" in err) == (1, True)


def test_a_mask_in_two_formats_is_refused_and_a_jpeg_preview_is_not(root):
    write(root / "images/train/a.png")
    write(root / "labels/train/a.png")
    write(root / "labels/train/a.jpg")
    assert names(open_dataset(root)) == [("a.png", "a.png")]
    write(root / "labels/train/a.tif")
    with pytest.raises(ValueError, match=r"1 images have several label files.*\n.*a.png and .*a.tif"):
        open_dataset(root)
    (root / "labels/train/a.tif").unlink()
    (root / "labels/train/a.png").unlink()
    with pytest.raises(ValueError, match="compression of JPEG changes class ids"):
        open_dataset(root).check()


def test_images_without_labels_are_refused_or_left_out(root, bpkd):
    for index in range(5):
        write(root / f"images/train/{index}.png")
        write(root / f"images/val/{index}.png")
    for index in (1, 3):
        write(root / f"labels/train/{index}.png", 1)
        write(root / f"labels/val/{index}.png", 0)
    with pytest.raises(ValueError, match=r"3 of 5 images have no label(.|\n)*0.png(.|\n)*--skip-unlabelled"):
        open_dataset(root)
    with pytest.warns(UserWarning, match=r"3 of 5 images in .* have no label and are left out:\n.*0.png"):
        data = open_dataset(root, skip_unlabelled=True)
    assert names(data) == [("1.png", "1.png"), ("3.png", "3.png")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, out, _ = bpkd("data", "check", root, "--skip-unlabelled")
    assert (code, out.count("8x8")) == (0, 4)
    for path in (root / "labels/train").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="would leave out all of them"):
        open_dataset(root, skip_unlabelled=True)


@pytest.fixture
def undivided(root):
    for index in range(40):
        write(root / f"images/train/{index}.png", index)
        write(root / f"labels/train/{index}.png", index % 2)
    return root


def split_names(root, share=0.25, seed=0):
    return [
        {pair.image.stem for pair in open_dataset(root, split=split, val_share=share, val_seed=seed).pairs}
        for split in ("train", "val")
    ]


def test_val_share_divides_by_the_stated_hash(undivided):
    places = {str(index): int(hashlib.sha256(f"7/{index}".encode()).hexdigest(), 16) / 2**256 for index in range(40)}
    train, val = split_names(undivided, 0.25, 7)
    assert val == {name for name, place in places.items() if place < 0.25}
    assert train == places.keys() - val
    assert split_names(undivided, 0.25, 8)[1] != val
    assert val < split_names(undivided, 0.5, 7)[1]


def test_added_images_do_not_move_others_to_another_split(undivided):
    train, val = split_names(undivided)
    for index in range(40, 60):
        write(undivided / f"images/train/{index}.png")
        write(undivided / f"labels/train/{index}.png")
    train_now, val_now = split_names(undivided)
    assert train < train_now
    assert val <= val_now
    assert not train_now & val_now


def test_the_default_layout_without_splits_is_divided(undivided):
    expected = split_names(undivided)
    for part in ("images", "labels"):
        (undivided / part / "train").rename(undivided / "moved")
        (undivided / part).rmdir()
        (undivided / "moved").rename(undivided / part)
    assert split_names(undivided) == expected
    with pytest.raises(FileNotFoundError, match="images contains images without folders of splits; .*--val-share 0.1"):
        open_dataset(undivided)


def test_val_share_is_refused_where_it_means_nothing(undivided):
    with pytest.raises(FileNotFoundError, match=r"splits found: train\. .*val_share=0.1\), or --val-share 0.1"):
        open_dataset(undivided, split="val")
    for share in (0, 1, 10, -0.1, "0.1", True):
        with pytest.raises(ValueError, match="share between 0 and 1"):
            open_dataset(undivided, val_share=share)
    with pytest.raises(ValueError, match=r"selects 0 for validation.* Pass a val_share above 0\.\d+"):
        open_dataset(undivided, val_share=1e-6)
    with pytest.raises(ValueError, match="val_share selects files of a folder, but 'shapes'"):
        open_dataset("shapes", val_share=0.1)
    write(undivided / "images/valid/1.png")
    with pytest.raises(ValueError, match="images/valid exists, and val_share=0.1 would divide"):
        open_dataset(undivided, val_share=0.1)
    with pytest.raises(FileNotFoundError, match="Rename valid to val"):
        open_dataset(undivided, split="val")


def test_the_generated_scenes_stand_for_no_folder(tmp_path, monkeypatch, bpkd):
    with pytest.raises(ValueError, match="are generated and need no `root`"):
        open_dataset("shapes", root=tmp_path)
    code, _, err = bpkd("train", "smp/FPN/resnet18", "--root", tmp_path)
    assert (code, "need no --root, but got" in err) == (1, True), err
    monkeypatch.chdir(tmp_path)
    for source in (Path("shapes"), "./shapes"):
        with pytest.raises(FileNotFoundError, match="There is no folder .*shapes"):
            open_dataset(source)


def test_the_run_records_how_its_images_were_selected(undivided, tmp_path):
    data = tuple(open_dataset(undivided, split=split, val_share=0.25) for split in ("train", "val"))
    run = tmp_path / "run"
    options = {"batch_size": 2, "crop_size": (8, 8), "device": "cpu", "output_dir": run}
    bpkd_sdk.train(tiny(2), data, steps=1, **options)
    facts = json.loads((run / "run.json").read_text())["data"]
    assert facts["train"]["selection"] == {"val_share": 0.25, "val_seed": 0}
    assert set(facts["val"]["selection"]["val_images"]) == split_names(undivided)[1]
    other = tuple(open_dataset(undivided, split=split, val_share=0.25, val_seed=1) for split in ("train", "val"))
    with pytest.raises(ValueError, match="was started with other inputs(.|\n)*fingerprint"):
        bpkd_sdk.train(tiny(2), other, steps=2, resume=True, **options)


def test_data_check_takes_a_path(undivided, bpkd):
    write(undivided / "images/test/a.png")
    write(undivided / "labels/test/a.png", 7)
    code, out, _ = bpkd("data", "check", undivided)
    assert code == 1
    assert "There is no folder" in out
    assert "labels [7] are outside the classes 0..1" in out
    write(undivided / "labels/test/a.png", 1)
    code, out, _ = bpkd("data", "check", undivided, "--val-share", 0.25)
    assert (code, out.count("8x8")) == (0, 6)
    code, _, err = bpkd("data", "check", "my_dat")
    assert (code, "There is no folder 'my_dat'" in err) == (1, True)
    code, _, err = bpkd("data", "check", "camvid")
    assert (code, "needs --root, the folder of its images" in err) == (1, True)


def test_rgb_tiff_masks_without_classes_give_their_colours(root):
    """The advice is a file that only needs the names of the classes."""
    (root / "classes.json").unlink()
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[4:] = (200, 0, 0)
    for index in range(3):
        write(root / f"images/train/{index}.png")
        write(root / f"labels/train/{index}.TIF")
        Image.fromarray(pixels).save(root / f"labels/train/{index}.TIF")
    with pytest.raises(ValueError, match="Write the class of each") as caught:
        open_dataset(root)
    advice = str(caught.value).splitlines()[-1]
    (root / "classes.json").write_text(advice.replace("class 0", "void").replace("class 1", "car"))
    assert set(open_dataset(root)[0][1].flatten().tolist()) == {255, 0}


def test_pages_of_a_tiff_label_are_overviews_or_refused(root):
    write(root / "images/train/a.png")
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8) % 2
    (root / "labels/train").mkdir(parents=True)
    path = root / "labels/train/a.tif"
    Image.fromarray(ids).save(path, save_all=True, append_images=[Image.fromarray(ids[::2, ::2])])
    assert np.array_equal(open_dataset(root)[0][1].numpy(), ids)
    Image.fromarray(ids).save(path, save_all=True, append_images=[Image.fromarray(1 - ids)])
    with pytest.raises(ValueError, match=r"a.tif: contains 2 pages, expected one class id per pixel"):
        open_dataset(root).check()


def test_gif_masks_are_read_by_their_palette(root):
    """Some public data sets have masks in this format."""
    (root / "classes.json").write_text('{"class_names": ["ground", "car"], "palette": [[0, 0, 0], [255, 255, 255]]}')
    for index in range(2):
        write(root / f"images/train/{index}.jpg")
        (root / "labels/train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(root / f"labels/train/{index}_mask.gif")
    with pytest.warns(UserWarning, match="contain only 0 and 255"):
        data = open_dataset(root, pattern="{}.jpg:{}_mask.gif")
    assert np.array_equal(data[1][1].numpy(), np.eye(8))


def test_masks_of_cvat_are_read_by_their_labelmap(root):
    (root / "classes.json").unlink()
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "car:200,0,0::", "void:9,9,9::"]
    (root / "labelmap.txt").write_text("\n".join(lines) + "\n")
    write(root / "JPEGImages/a.jpg")
    (root / "SegmentationClass").mkdir()
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3
    mask = Image.fromarray(ids, "P")
    mask.putpalette([0, 0, 0, 200, 0, 0, 9, 9, 9])
    mask.save(root / "SegmentationClass/a.png")
    write(root / "JPEGImages/b.jpg")
    mask.convert("RGB").save(root / "SegmentationClass/b.png")
    pattern = "JPEGImages/{}.jpg:SegmentationClass/{}.png"
    data = [open_dataset(root, split=s, pattern=pattern, val_share=0.8, val_seed=1) for s in ("train", "val")]
    for part in data:
        assert part.class_names == ("background", "car")
        assert part.palette == ((0, 0, 0), (200, 0, 0))
        assert np.array_equal(part[0][1].numpy(), np.where(ids == 2, 255, ids))
    (root / "labelmap.txt").write_text("background:0,0,0::\ncar:0,0,0::\n")
    with pytest.raises(ValueError, match=r"a colour of its own, such as car:200,0,0::, but got 'car:0,0,0::'"):
        open_dataset(root, pattern=pattern, val_share=0.8, val_seed=1)


def test_all_commands_that_open_data_select_files_alike():
    commands = typer.main.get_command(app).commands
    names = ("quickstart", "train", "distill", "compare", "evaluate", "export", "benchmark")
    opening = [commands[name] for name in names]
    for command in (*opening, *commands["data"].commands.values()):
        names = {parameter.name for parameter in command.params}
        assert {"pattern", "val_share", "val_seed", "skip_unlabelled"} <= names, command.name
