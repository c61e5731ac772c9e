"""`bpkd predict` and `segment_files`: folders, patterns and videos become masks, failures are listed, calls continue."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import bpkd_sdk
from bpkd_sdk import progress
from bpkd_sdk.serve import Predictor, find_files, read_video, segment_files
from tests.serve.cases import NAMES, network, scene
from tests.serve.test_video import write_video


@pytest.fixture
def photos(tmp_path):
    """A folder of images of several formats, sizes and sub-folders, with files that are no images."""
    folder = tmp_path / "photos"
    (folder / "drive").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.JPG", "drive/c.png", "drive/d.webp")):
        size = (48, 64) if index < 3 else (70, 50)
        Image.fromarray(np.ascontiguousarray(scene(*size, index))).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_bytes(b"of macOS")
    return folder


def read_manifest(folder):
    setting, *lines = (json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines())
    return setting, {line["file"]: line for line in lines}


def read_mask(path):
    return np.array(Image.open(path))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_each_mask_equals_the_prediction_for_its_image(student, photos, tmp_path, batch_size):
    result = segment_files(student, find_files([photos]), tmp_path / "masks", batch_size=batch_size)
    assert sorted(result.done) == ["a.png", "b.JPG", "drive/c.png", "drive/d.webp"]
    assert (result.skipped, result.failed) == ([], {})
    setting, lines = read_manifest(tmp_path / "masks")
    assert setting["classes"] == list(NAMES)
    for name in result.done:
        expected = student(photos / name).mask
        mask = Image.open((tmp_path / "masks" / name).with_suffix(".png"))
        np.testing.assert_array_equal(np.array(mask), expected)
        assert mask.getpalette()[: 3 * len(NAMES)] == [channel for color in student.palette for channel in color]
        shares = np.bincount(expected.ravel(), minlength=len(NAMES)) / expected.size
        assert list(lines[name]["shares"].values()) == pytest.approx(shares, abs=1e-6)
        assert (lines[name]["height"], lines[name]["width"]) == expected.shape


def test_the_masks_are_labels_of_a_data_set(student, photos, tmp_path):
    segment_files(student, find_files([photos]), tmp_path / "masks")
    masks = tmp_path / "masks"
    (tmp_path / "data/images").mkdir(parents=True)
    photos.rename(tmp_path / "data/images/train")
    (tmp_path / "data/labels").mkdir()
    masks.rename(tmp_path / "data/labels/train")
    (tmp_path / "data/labels/train/classes.json").rename(tmp_path / "data/classes.json")
    data = bpkd_sdk.open_dataset("folder", root=tmp_path / "data", split="train")
    assert (len(data), tuple(data.class_names), tuple(map(tuple, data.palette))) == (4, NAMES, student.palette)


def test_overlays_are_drawn_on_request(student, photos, tmp_path):
    segment_files(student, find_files([photos / "drive"]), tmp_path / "masks", overlay=True)
    drawn = np.asarray(Image.open(tmp_path / "masks/overlays/c.jpg")).astype(int)
    assert np.abs(drawn - student(photos / "drive/c.png").overlay()).mean() < 10  # JPEG loses a little


def test_a_video_becomes_a_mask_for_each_frame_and_a_video_of_overlays(student, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", [scene(48, 64, index) for index in range(3)], [0, 40, 80])
    result = segment_files(student, find_files([clip]), tmp_path / "masks", overlay=True)
    assert result.done == ["clip.mp4"]
    masks = sorted((tmp_path / "masks/clip").iterdir())
    assert [path.name for path in masks] == ["000000.png", "000001.png", "000002.png"]
    for path, frame in zip(masks, read_video(clip), strict=True):
        np.testing.assert_array_equal(read_mask(path), student(frame).mask)
    assert len(list(read_video(tmp_path / "masks/overlays/clip.mp4"))) == 3
    assert read_manifest(tmp_path / "masks")[1]["clip.mp4"]["frames"] == 3


def test_a_frame_of_odd_sides_is_segmented_as_it_is(student, tmp_path):
    clip = write_video(tmp_path / "clip.mkv", [scene(33, 47)] * 2, [0, 40], "ffv1", "bgr0")
    segment_files(student, find_files([clip]), tmp_path / "masks", overlay=True)
    np.testing.assert_array_equal(read_mask(tmp_path / "masks/clip/000001.png"), student(scene(33, 47)).mask)
    assert next(read_video(tmp_path / "masks/overlays/clip.mp4")).shape == (34, 48, 3)


def test_failures_are_listed_and_tried_again_by_the_next_call(student, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    result = segment_files(student, find_files([photos]), tmp_path / "masks")
    assert (len(result.done), list(result.failed)) == (4, ["broken.png"])
    assert "broken.png" in result.failed["broken.png"]
    assert read_manifest(tmp_path / "masks")[1]["broken.png"]["error"] == result.failed["broken.png"]
    Image.fromarray(scene(48, 64)).save(photos / "broken.png")
    again = segment_files(student, find_files([photos]), tmp_path / "masks")
    assert (again.done, len(again.skipped), again.failed) == (["broken.png"], 4, {})
    assert "error" not in read_manifest(tmp_path / "masks")[1]["broken.png"]


def test_only_the_images_that_the_network_fails_on_fail(student, photos, tmp_path, monkeypatch):
    bad = np.asarray(Image.open(photos / "a.png"))
    segment = Predictor._predict

    def fail(self, images, *arguments):
        if any(np.array_equal(image, bad) for image in images):
            raise RuntimeError("out of memory")
        return segment(self, images, *arguments)

    monkeypatch.setattr(Predictor, "_predict", fail)
    result = segment_files(student, find_files([photos]), tmp_path / "masks")
    assert result.failed == {"a.png": "out of memory"}
    assert len(result.done) == 3


def test_a_call_continues_after_an_interruption(student, photos, tmp_path, monkeypatch):
    segment, count = Predictor._predict, iter(range(9))

    def interrupt(self, images, *arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return segment(self, images, *arguments)

    monkeypatch.setattr(Predictor, "_predict", interrupt)
    with pytest.raises(KeyboardInterrupt, match="2 of 4 files are segmented"):
        segment_files(student, find_files([photos]), tmp_path / "masks", batch_size=1)
    manifest = tmp_path / "masks/manifest.jsonl"
    manifest.write_text(manifest.read_text() + '{"file": "drive/c.p')  # the process was killed while it wrote
    result = segment_files(student, find_files([photos]), tmp_path / "masks", batch_size=1)
    assert (result.skipped, len(result.done)) == (["a.png", "b.JPG"], 2)
    assert len(read_manifest(tmp_path / "masks")[1]) == 4


def test_a_changed_image_a_deleted_mask_and_a_missing_overlay_are_segmented_again(student, photos, tmp_path):
    files = find_files([photos])
    segment_files(student, files, tmp_path / "masks")
    (tmp_path / "masks/a.png").unlink()
    Image.fromarray(scene(48, 64, 9)).save(photos / "drive/c.png")
    result = segment_files(student, files, tmp_path / "masks")
    assert result.done == ["a.png", "drive/c.png"]
    np.testing.assert_array_equal(read_mask(tmp_path / "masks/drive/c.png"), student(scene(48, 64, 9)).mask)
    assert len(segment_files(student, files, tmp_path / "masks", overlay=True).done) == 4


def test_masks_of_another_network_are_not_mixed(student, files, photos, tmp_path):
    segment_files(student, find_files([photos]), tmp_path / "masks")
    with pytest.raises(ValueError, match=r"has masks of another network or setting.*\n.*network: was"):
        segment_files(Predictor(files / "masks.onnx", "cpu"), find_files([photos]), tmp_path / "masks")
    (tmp_path / "masks/manifest.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"manifest\.jsonl is not a manifest"):
        segment_files(student, find_files([photos]), tmp_path / "masks")


def test_a_result_never_replaces_an_input(student, photos, tmp_path):
    content = (photos / "a.png").read_bytes()
    with pytest.raises(ValueError, match=r"1 of the files are in .*photos\. Choose another output folder"):
        segment_files(student, find_files([photos / "a.png"]), photos)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").symlink_to(photos / "a.png")
    with pytest.raises(ValueError, match=r"1 files that are no results .* would be replaced"):
        segment_files(student, find_files([photos / "a.png"]), tmp_path / "out")
    assert (photos / "a.png").read_bytes() == content


def test_results_below_the_input_folder_are_not_inputs_of_the_next_call(student, photos):
    segment_files(student, find_files([photos]), photos / "masks")
    result = segment_files(student, find_files([photos]), photos / "masks")
    assert (len(result.done), len(result.skipped)) == (0, 4)


def test_sources_are_files_folders_and_patterns(photos, tmp_path, monkeypatch):
    def names(*sources):
        return [file.key for file in find_files(sources)]

    assert names(photos) == ["a.png", "b.JPG", "drive/c.png", "drive/d.webp"]
    assert names(photos / "a.png", photos / "drive") == ["a.png", "c.png", "d.webp"]
    assert names(photos, photos / "a.png") == names(photos)  # a file that is found twice is segmented once
    assert names(f"{photos}/**/*.png") == ["a.png", "drive/c.png"]
    monkeypatch.chdir(photos)
    assert names("dr*/*") == ["drive/c.png", "drive/d.webp"]
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*driv\. Did you mean 'drive'"):
        names("driv")
    with pytest.raises(FileNotFoundError, match="contains no image and no video"):
        names("*.gif")
    with pytest.raises(ValueError, match="got an empty text"):
        names("")
    Image.fromarray(scene(48, 64)).save("a.jpg")
    with pytest.raises(ValueError, match=r"same file.*\n.*a\.(png|jpg) and .*a\.(png|jpg)"):
        names(".")


def test_a_video_does_not_replace_the_masks_of_its_frames(tmp_path):
    (tmp_path / "clip").mkdir()
    for name in ("clip.mp4", "clip/000000.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"same file or folder.*\n.*clip\.mp4 and .*clip/000000\.jpg"):
        find_files([tmp_path])


def test_a_folder_with_other_files_is_not_replaced_by_the_masks_of_a_video(student, photos, tmp_path):
    segment_files(student, find_files([photos]), tmp_path / "masks")
    clip = write_video(tmp_path / "clip.mp4", [scene(48, 64)], [0])
    (tmp_path / "masks/clip").mkdir()
    (tmp_path / "masks/clip/precious.txt").write_text("kept")
    result = segment_files(student, find_files([clip]), tmp_path / "masks")
    assert "other files" in result.failed["clip.mp4"]
    assert (tmp_path / "masks/clip/precious.txt").read_text() == "kept"


def test_masks_of_other_files_with_the_same_names_are_not_replaced(student, photos, tmp_path):
    segment_files(student, find_files([photos]), tmp_path / "masks")
    before = (tmp_path / "masks/a.png").read_bytes()
    (tmp_path / "others").mkdir()
    Image.fromarray(scene(48, 64, 7)).save(tmp_path / "others/a.jpg")
    with pytest.raises(ValueError, match=r"has masks of files with these names at another place.*\n.*others/a\.jpg"):
        segment_files(student, find_files([tmp_path / "others"]), tmp_path / "masks")
    assert (tmp_path / "masks/a.png").read_bytes() == before
    clip = write_video(tmp_path / "drive.mp4", [scene(48, 64)], [0])
    with pytest.raises(ValueError, match=r"files with these names.*\n.*drive\.mp4"):
        segment_files(student, find_files([clip]), tmp_path / "masks")


def test_files_that_were_there_before_are_not_replaced(student, photos, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.png").write_bytes(b"drawn by hand")
    with pytest.raises(ValueError, match=r"1 files that are no results.*\n.*labels/a\.png"):
        segment_files(student, find_files([photos]), tmp_path / "labels")
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        segment_files(student, find_files([photos]), photos / "notes.txt")


def test_masks_that_were_cut_short_are_made_again(student, photos, tmp_path):
    segment_files(student, find_files([photos]), tmp_path / "masks")
    for name, length in (("a.png", 0), ("drive/c.png", 60)):
        (tmp_path / "masks" / name).write_bytes((tmp_path / "masks" / name).read_bytes()[:length])
    assert segment_files(student, find_files([photos]), tmp_path / "masks").done == ["a.png", "drive/c.png"]


def test_masks_of_a_network_with_other_weights_are_not_continued(photos, tmp_path):
    segment_files(Predictor(network(), "cpu"), find_files([photos]), tmp_path / "masks")
    other = network()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"another network or setting.*\n.*sha256: was"):
        segment_files(Predictor(other, "cpu"), find_files([photos]), tmp_path / "masks")


def test_the_command(bpkd, files, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    code, out, err = bpkd("predict", files / "masks.onnx", photos, "--output", tmp_path / "masks", "--overlay")
    assert code == 1
    assert "4 files segmented, 1 failed" in out
    assert re.search(r"Failed: broken\.png: .*none of them", err)
    assert (
        len(list((tmp_path / "masks").rglob("*.png"))) == len(list((tmp_path / "masks/overlays").rglob("*.jpg"))) == 4
    )
    (photos / "broken.png").unlink()
    code, out, _ = bpkd("predict", files / "masks.onnx", photos, "--output", tmp_path / "masks")
    assert code == 0
    assert "0 files segmented, 4 were done before" in out


def test_the_command_names_a_path_that_does_not_exist(bpkd, files, tmp_path):
    code, _, err = bpkd("predict", files / "masks.onnx", tmp_path / "fotos", "--output", tmp_path / "masks")
    assert code == 1
    assert "There is no file or folder" in err
    assert not (tmp_path / "masks").exists()


def test_redirected_output_gets_lines_of_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    printed = []
    monkeypatch.setattr(progress, "print_line", printed.append)
    assert list(progress.track("ab", total=2, description="Reading [/x]")) == ["a", "b"]
    assert printed == ["Reading [/x]: 1 of 2", "Reading [/x]: 2 of 2"]
