"""The demo page in a real browser: mouse, keyboard, phone size, dark mode, camera."""

import io
import json
import os
import re
import shutil
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path

import av
import cv2
import gradio
import httpx
import numpy as np
import pytest
from PIL import Image

from bpkd_sdk.data.shapes import render
from bpkd_sdk.export import to_onnx
from bpkd_sdk.files import SHAPES_TEACHER
from bpkd_sdk.images import read_image
from bpkd_sdk.serve import Predictor
from tests.conftest import ROOT, missing
from tests.serve import colors
from tests.serve.browsing import CHROMIUM, PHONE, launch_browser, open_page, serving

LIGHT_SIZE = (1280, 900)
# The contrast of a text with the nearest background, by WCAG 2.1: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio
CONTRAST = """selector => {
    const channels = color => color.match(/[\\d.]+/g).map(Number)
    const luminance = color => channels(color).slice(0, 3).map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0)
    let element = document.querySelector(selector)
    const text = luminance(getComputedStyle(element).color)
    while (channels(getComputedStyle(element).backgroundColor)[3] === 0) element = element.parentElement
    const background = luminance(getComputedStyle(element).backgroundColor)
    return (Math.max(text, background) + 0.05) / (Math.min(text, background) + 0.05)
}"""
LATENCY = re.compile(r"\d [mµ]s")  # networks this small may take less than a millisecond
ARTIFACTS = Path(os.environ.get("BPKD_ARTIFACTS", ROOT / "tests" / "artifacts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def photo(folder):
    """A photo of 192x256 pixels from the Gradio package, and a label for it."""
    path, label = folder / "photo.jpg", folder / "photo_label.png"
    lion = Path(gradio.__file__).parent / "media_assets" / "images" / "lion.jpg"
    Image.open(lion).crop((0, 24, 256, 216)).save(path, quality=95)
    cv2.imwrite(str(label), Predictor(colors.teacher(), "cpu")(path).mask)
    return path, label


@pytest.fixture(scope="module")
def url(folder, photo):
    for name in ("teacher", "student"):
        to_onnx(getattr(colors, name)(), folder / f"{name}.onnx", input_size=(96, 128), dynamic_size=True)
    examples = folder / "examples"
    examples.mkdir()
    for index in range(3):
        Image.fromarray(render(0, "val", index)[0]).save(examples / f"scene_{index}.png")
    shutil.copy(folder / "teacher.onnx", folder / "twin.onnx")
    (folder / "none.engine").touch()
    students = [part for name in ("student.onnx", "twin.onnx", "none.engine") for part in ("--student", folder / name)]
    with serving("--teacher", folder / "teacher.onnx", *students, "--examples", examples) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        missing("Chromium is not installed: apt-get install chromium")
    with launch_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(url):
    """The page whose pictures are in docs: of the quickstart whose folder BPKD_QUICKSTART names, otherwise `url`."""
    if not (quickstart := os.environ.get("BPKD_QUICKSTART")):
        yield url
        return
    names = "student_bpkd/last.safetensors", "student.onnx", "student.int8.onnx"
    students = [part for name in names for part in ("--student", Path(quickstart, name))]
    with serving("--teacher", SHAPES_TEACHER, *students) as own:
        yield own


def choose(page, photo):
    """Open a photo in place of the first example."""
    picture = page.locator("#overlay img").first
    picture.wait_for()
    example = picture.evaluate("image => image.src")
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_function("old => document.querySelector('#overlay img').src != old", arg=example)


def save_screenshot(page, name, suffix="png"):
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(300)  # animations
    screenshot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    screenshot.convert("RGB").save(ARTIFACTS / f"{name}.{suffix}", quality=85)


def pictures(page, slider):
    """Return the left and the right picture of an image slider."""
    sources = [image.get_attribute("src") for image in page.locator(f"#{slider} img").all()]
    return [np.asarray(Image.open(io.BytesIO(page.request.get(source).body()))) for source in sources]


def download(page, button):
    with page.expect_download() as started:
        page.get_by_role("button", name=button).click()
    return started.value.suggested_filename, Path(started.value.path())


@pytest.mark.parametrize(
    ("name", "size", "dark"), [("light", LIGHT_SIZE, False), ("dark", LIGHT_SIZE, True), ("phone", PHONE, False)]
)
def test_the_page_opens_with_the_first_example(browser, shown, name, size, dark):
    """Also writes the pictures of docs; CONTRIBUTING.md states how."""
    with open_page(browser, shown, size, dark=dark) as page:
        page.locator("#overlay img").first.wait_for()
        page.locator("#headline", has_text=re.compile("faster|slower|as fast")).wait_for()
        assert page.locator("#headline li").count() == 4
        page.locator("#header", has_text="networks compared with").wait_for()
        assert page.get_by_role("combobox", name="Student").input_value() == "student.onnx"
        page.locator("#cost").get_by_text(LATENCY).nth(2).wait_for()  # of all networks
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        page.locator("#caption li").first.wait_for()
        texts = (
            "#caption li",
            "#caption .faint",
            "#headline span",
            "#headline b",
            "#header p",
            "#cost thead th",
            "#cost .sub",
        )
        contrasts = {text: page.evaluate(CONTRAST, text) for text in texts}
        assert min(contrasts.values()) >= 4.5, contrasts
        table = page.locator("#cost .scroll")
        table.evaluate("box => { box.scrollLeft = box.scrollWidth }")  # the last column can be reached
        box, last = table.bounding_box(), page.locator("#cost td:last-child").first.bounding_box()
        assert last["x"] + last["width"] <= box["x"] + box["width"] + 1
        table.evaluate("box => { box.scrollLeft = 0 }")
        save_screenshot(page, f"page-{name}", suffix="webp")
    assert (ARTIFACTS / f"page-{name}.webp").stat().st_size <= 150_000


def test_an_uploaded_photo_is_segmented_and_compared(browser, url, folder, photo):
    predictors = [Predictor(folder / f"{name}.onnx", "cpu") for name in ("teacher", "student")]
    with open_page(browser, url) as page:
        page.locator("#cost", has_text="is of the format TensorRT, which runs on cuda").wait_for()
        choose(page, photo[0])
        left, right = pictures(page, "overlay")
        assert left.shape == right.shape == (960, 1280, 3)
        for index, role in enumerate(("teacher", "student")):
            name, path = download(page, f"{role} mask")
            assert name == f"photo_mask_{role}.png"
            image = Image.open(path)
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), predictors[index](photo[0]).mask)
        name, path = download(page, "student overlay")
        assert (name, Image.open(path).size) == ("photo_overlay_student.png", (256, 192))
        page.locator("#cost").get_by_text(LATENCY).nth(1).wait_for()
        page.locator("#judgement", has_text="is not known: the files contain masks without probabilities").wait_for()
        save_screenshot(page, "overlay")
        for tab in ("Boundaries", "Difference", "Classes"):
            page.get_by_role("tab", name=tab).click()
            save_screenshot(page, tab.lower())
        page.get_by_role("row", name="asphalt").wait_for()
        assert page.get_by_role("row", name="asphalt").get_by_text("100.0%").count() == 0
        page.get_by_role("combobox", name="Student").click()
        page.get_by_role("option", name="twin.onnx").click()
        page.get_by_role("row", name="asphalt").get_by_text("100.0%").wait_for()
        page.get_by_role("button", name="Compare with a label").click()
        page.set_input_files("#label input[type=file]", photo[1])
        page.get_by_role("tab", name="Errors").click()
        scores = page.get_by_role("row", name="teacher.onnx").filter(has_text="100.0%").first
        assert scores.inner_text().split()[1:] == ["100.0%"] * 5
        save_screenshot(page, "errors")


def test_a_change_of_opacity_redraws_the_overlay(browser, url, photo):
    with open_page(browser, url) as page:
        choose(page, photo[0])
        before = pictures(page, "overlay")
        source = page.locator("#overlay img").first.get_attribute("src")
        page.get_by_role("slider", name="Opacity").fill("0")
        page.wait_for_function("old => document.querySelector('#overlay img').src != old", arg=source)
        after = pictures(page, "overlay")
        assert not np.array_equal(before[0], after[0])
        lines = (after[0] == 255).all(2)
        shown = cv2.resize(read_image(photo[0]), None, fx=5, fy=5, interpolation=cv2.INTER_CUBIC)
        np.testing.assert_array_equal(after[0][~lines], shown[~lines])


def test_the_divider_moves_with_the_mouse_and_the_keyboard(browser, url, photo):
    def divider():
        handle = page.locator("#overlay [data-testid=slider]").bounding_box()
        frame = page.locator("#overlay img").first.bounding_box()
        return handle["x"] + handle["width"] / 2, frame["x"], frame["width"], handle["y"] + handle["height"] / 2

    with open_page(browser, url) as page:
        choose(page, photo[0])
        at, left, width, height = divider()
        assert at == pytest.approx(left + width / 2, abs=30)
        page.mouse.move(at, height)
        page.mouse.down()
        page.mouse.move(left + width / 4, height, steps=5)
        page.mouse.up()
        assert divider()[0] == pytest.approx(left + width / 4, abs=30)
        page.get_by_role("slider", name="Divider").focus()
        page.keyboard.press("End")
        page.wait_for_timeout(500)
        assert divider()[0] == pytest.approx(left + width, abs=30)


def test_all_controls_can_be_reached_with_the_keyboard(browser, url):
    with open_page(browser, url) as page:
        page.get_by_role("button", name="Example 1").wait_for()
        names = []
        for _ in range(25):
            page.keyboard.press("Tab")
            names.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText"))
            if names[-1] == "Example 3":
                break
        expected = ["Student", "slider for Opacity", "slider for Boundary width", "slider for Divider", "Image"]
        expected += ["Many images", "Video", "upload", "camera", "clipboard", "Example 1", "Example 2", "Example 3"]
        positions = [next((i for i, name in enumerate(names) if word in name), -1) for word in expected]
        assert -1 not in positions, names
        assert positions == sorted(positions), names
        page.keyboard.press("Enter")
        page.locator("#overlay img").first.wait_for()
        page.get_by_role("slider", name="Opacity").focus()
        source = page.locator("#overlay img").first.get_attribute("src")
        page.keyboard.press("ArrowRight")
        page.wait_for_function("old => document.querySelector('#overlay img').src != old", arg=source)


def test_the_page_fits_a_phone_and_has_a_dark_mode(browser, url, photo):
    with open_page(browser, url, PHONE, dark=True) as page:
        choose(page, photo[0])
        page.locator("#cost").get_by_text(LATENCY).nth(1).wait_for()
        for tab in ("Image", "Many images", "Video"):
            page.get_by_role("tab", name=tab, exact=True).click()
            assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
        page.get_by_role("tab", name="Image", exact=True).click()
        assert page.locator("#overlay img").first.bounding_box()["width"] > 0.8 * PHONE[0]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 64
        save_screenshot(page, "phone_dark")


def test_a_file_that_is_not_an_image_is_rejected_with_a_message(browser, url, photo, folder):
    (folder / "text.png").write_text("not an image")
    with open_page(browser, url) as page:
        page.set_input_files("#photo input[type=file]", folder / "text.png")
        toast = page.get_by_test_id("toast-body")
        toast.wait_for()
        assert "Expected a file of the formats JPEG, PNG" in toast.inner_text()
        assert "Traceback" not in toast.inner_text()
        assert str(folder) not in toast.inner_text()
        choose(page, photo[0])


def test_a_webcam_picture_is_segmented(browser, url):
    """The pictures of Chromium's fake webcam are green."""
    with open_page(browser, url) as page:
        page.get_by_role("button", name="camera").click()
        page.get_by_text("Click to Access Webcam").click()
        page.wait_for_function("document.querySelector('#photo video')?.videoWidth > 0")
        page.get_by_role("button", name="capture photo").click()
        page.locator("#overlay img").first.wait_for()
        left, right = pictures(page, "overlay")
        assert left[..., 1].mean() > left[..., 0].mean() + 50
        assert left.shape == right.shape
        save_screenshot(page, "webcam")


def test_stopping_the_server_with_an_open_page_leaves_no_files(browser, url, folder, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with ExitStack() as server:
        own = server.enter_context(serving("--student", folder / "student.onnx"))
        heartbeat = httpx.stream("GET", f"{own}/gradio_api/heartbeat/a", timeout=60)
        with open_page(browser, own) as page, heartbeat as answer:
            page.get_by_text("start the server with --examples FOLDER").wait_for()  # it has no example
            page.set_input_files("#photo input[type=file]", photo[0])
            page.locator("#overlay img").first.wait_for()
            assert answer.status_code == 200
            assert list(tmp_path.glob("bpkd-examples-*"))
            start = time.monotonic()
            server.close()
            assert time.monotonic() - start < 10
            answer.read()  # raises if the stream was not closed
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith("bpkd-")] == []


def test_many_images_and_a_video_are_segmented(browser, url, photo, folder):
    source = folder / "clip.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(5):
            image = np.roll(render(0, "val", 0, (64, 96))[0], index, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image))))
        container.mux(stream.encode())
    (folder / "text.png").write_text("not an image")
    with open_page(browser, url) as page:
        page.get_by_role("tab", name="Many images").click()
        page.set_input_files("#images input[type=file]", [photo[0], folder / "text.png"])
        page.get_by_role("button", name="Segment all").click()
        page.get_by_text("text.png was skipped").wait_for()
        with page.expect_download() as started:
            page.locator("#archive a").first.click()
        save_screenshot(page, "many")
        with zipfile.ZipFile(started.value.path()) as archive:
            assert sorted(archive.namelist()) == ["classes.json", "masks/photo.png", "overlays/photo.png"]
            mask = np.asarray(Image.open(archive.open("masks/photo.png")))
            assert json.loads(archive.read("classes.json"))["class_names"] == list(colors.COLORS)
        np.testing.assert_array_equal(mask, Predictor(folder / "student.onnx", "cpu")(photo[0]).mask)
        page.get_by_role("tab", name="Video").click()
        page.set_input_files("#video input[type=file]", source)
        page.get_by_role("button", name="Segment the video").click()
        page.locator("#annotated video").wait_for()
        played = page.evaluate(
            """async () => {
                const video = document.querySelector('#annotated video');
                await video.play();
                await new Promise(done => video.onended = done);
                return [video.videoWidth, video.videoHeight, video.currentTime];
            }"""
        )
        assert played == [96, 64, pytest.approx(0.5, abs=0.1)]
        save_screenshot(page, "video")
