"""The web site: its masks are the predictor's, in a real browser that reaches no other host."""

import base64
import io
import json
import os
import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

import bpkd_sdk
from bpkd_sdk.data import ShapesDataset, photos
from bpkd_sdk.export import quantize, to_onnx, to_web
from bpkd_sdk.export.conversion import plan_steps
from bpkd_sdk.export.onnx import seal_onnx
from bpkd_sdk.export.web import site as site_module
from bpkd_sdk.runtime import fit as fit_module
from bpkd_sdk.runtime.onnx_file import read_onnx
from bpkd_sdk.serve import Predictor
from tests.conftest import ROOT, missing
from tests.networks import tiny
from tests.serve.browsing import CHROMIUM, DESKTOP, PHONE, launch_browser, open_page

ARTIFACTS = Path(os.environ.get("BPKD_ARTIFACTS", ROOT / "tests" / "artifacts"))
PHOTO = Path(photos.__file__).with_name("coffee.jpg")
INJECTION = ("<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Function that returns the address at which a folder is served."""
    servers = []

    def serve(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        missing("Chromium is not installed: apt-get install chromium")
    with launch_browser("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader") as browser:
        yield browser


@pytest.fixture(scope="module")
def networks(tiny_onnx, tmp_path_factory):
    """ONNX files by name: the session's tiny ones, one logit in fp16 with hostile class names, and int8."""
    folder = tmp_path_factory.mktemp("networks")
    one = tiny(1).eval()
    with torch.no_grad():  # half of the pixels get the class
        one[-1].bias -= one(
            torch.from_numpy(np.asarray(Image.open(PHOTO)) / 255).float().permute(2, 0, 1)[None]
        ).median()
    one.spec = bpkd_sdk.NetworkSpec(name=None, num_classes=1, class_names=INJECTION, mean=(0,) * 3, std=(1,) * 3)
    to_onnx(one, folder / "one.onnx", input_size=(48, 64), precision="fp16", argmax=False)
    quantize(tiny_onnx["batch"], folder / "int8.onnx", ShapesDataset("train", length=4), images=4, max_boundary_loss=1)
    return tiny_onnx | {"one": folder / "one.onnx", "int8": folder / "int8.onnx"}


@pytest.fixture(scope="module")
def site(networks, runtime_files, tmp_path_factory):
    """Function that returns the site of a network, and writes it at the first call."""
    folder = tmp_path_factory.mktemp("sites")

    def write(name):
        if not (folder / name).exists():
            to_web(networks[name], folder / name)
        return folder / name

    return write


@contextmanager
def ready_page(browser, address, folder, *args, **options):
    with open_page(browser, address(folder), *args, **options) as page:
        expect(page.locator("#status")).to_contain_text("Ready: ", timeout=60_000)
        yield page


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def segment(page, content, fit=None):
    """Choose an image file on the page, and return the mask that the page saves."""
    if fit is not None:
        page.get_by_label("Other sizes").select_option(fit)
    page.get_by_label("Choose an image").set_input_files({"name": "a", "mimeType": "image/png", "buffer": content})
    expect(page.locator("#status")).to_contain_text("segmented in", timeout=60_000)
    return saved(page, "Save mask")


def saved(page, button):
    with page.expect_download() as started:
        page.get_by_role("button", name=button).click()
    return np.asarray(Image.open(started.value.path()))


@pytest.mark.parametrize("name", ["batch", "bare", "one"])
def test_the_page_computes_the_masks_of_the_predictor(name, networks, site, browser, address):
    photo = Image.open(PHOTO)
    images = [photo.resize(size) for size in [(300, 201), (40, 120), (30, 20)]]
    with ready_page(browser, address, site(name)) as page:
        for fit in ("slide", "resize", "pad"):
            predictor = Predictor(networks[name], "cpu", fit=fit)
            for image in images[:1] if name == "one" else images:
                mask, expected = segment(page, encoded(image), fit), predictor(np.asarray(image)).mask
                assert mask.shape == expected.shape
                assert (mask == expected).mean() > 0.999, (fit, image.size)
                assert len(np.unique(mask)) > 1
    if name == "batch":
        assert (mask == expected).all()


def test_an_int8_file_gives_the_masks_of_predictor(networks, site, browser, address):
    image = Image.open(PHOTO).resize((96, 64))
    expected = Predictor(networks["int8"], "cpu")(image).mask
    with ready_page(browser, address, site("int8")) as page:
        assert (segment(page, encoded(image)) == expected).mean() > 0.999


def test_the_picture_is_the_overlay_of_the_prediction(networks, site, browser, address):
    prediction = Predictor(networks["batch"], "cpu")(PHOTO)
    with ready_page(browser, address, site("batch")) as page:
        assert (
            segment(page, PHOTO.read_bytes()) == prediction.mask
        ).mean() > 0.999  # browsers decode JPEG files themselves
        image = encoded(Image.fromarray(prediction.image))
        assert (segment(page, image) == prediction.mask).all()
        assert (saved(page, "Save picture")[..., :3] == prediction.overlay()).all()
        page.get_by_label("Boundaries").uncheck()
        page.get_by_label("Mask", exact=True).fill("80")
        page.wait_for_timeout(200)  # the picture is drawn in the next frame
        assert (saved(page, "Save picture")[..., :3] == prediction.overlay(alpha=0.8, boundaries=False)).all()
        shares = {id_: f"{share:.1%}".replace("%", " %") for id_, share in class_shares(prediction).items()}
        shown = page.locator("#classes li").all_inner_texts()
        assert {re.sub(r"\s*\n\s*", " ", line) for line in shown if "%" in line} == {
            f"{prediction.class_names[id_]} {share}" for id_, share in shares.items()
        }


def class_shares(prediction):
    ids, counts = np.unique(prediction.mask, return_counts=True)
    return dict(zip(ids.tolist(), (counts / prediction.mask.size).tolist(), strict=True))


def test_a_file_of_any_size_gets_whole_images_up_to_the_limit(
    networks, runtime_files, browser, address, tmp_path, monkeypatch
):
    for module in (fit_module, site_module):
        monkeypatch.setattr(module, "MAX_PIXELS", 120 * 90)
        monkeypatch.setattr(module, "WINDOW_SIDE", 64)
    to_web(networks["any"], tmp_path / "site")
    with ready_page(browser, address, tmp_path / "site") as page:
        for size in [(110, 90), (200, 70)]:
            image = Image.open(PHOTO).resize(size)
            for fit in ("slide", "resize", "pad"):
                expected = Predictor(networks["any"], "cpu", fit=fit)(np.asarray(image)).mask
                assert (segment(page, encoded(image), fit) == expected).mean() > 0.999, (fit, size)


def test_photos_are_upright_and_transparent_parts_are_white(networks, site, browser, address):
    predictor = Predictor(networks["batch"], "cpu")
    photo = Image.open(PHOTO).resize((150, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encoded(photo, "JPEG", quality=95, exif=exif)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 150).astype(np.uint8), (100, 1)))
    transparent = photo.copy()
    transparent.putalpha(alpha)
    with ready_page(browser, address, site("batch")) as page:
        for content in (rotated, encoded(transparent)):
            expected = predictor(content).mask
            mask = segment(page, content)
            assert mask.shape == expected.shape
            assert (mask == expected).mean() > 0.999
        page.get_by_label("Choose an image").set_input_files({"name": "a", "mimeType": "image/png", "buffer": b"text"})
        expect(page.locator("#status")).to_contain_text("cannot read the file as an image")


def test_the_page_works_offline_after_it_is_loaded(networks, site, browser, address):
    with ready_page(browser, address, site("batch")) as page:
        page.context.set_offline(True)
        image = Image.open(PHOTO).resize((96, 64))
        assert (segment(page, encoded(image)) == Predictor(networks["batch"], "cpu")(np.asarray(image)).mask).all()
        page.get_by_role("button", name="Example 2").click()
        expect(page.locator("#status")).to_contain_text("segmented in")


def test_names_of_classes_are_text(site, browser, address):
    with ready_page(browser, address, site("one")) as page:
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        segment(page, PHOTO.read_bytes(), "resize")
        assert {line.split("\n")[0] for line in page.locator("#classes li").all_inner_texts()} == set(INJECTION)
        assert page.locator("#classes img").count() == 0


def test_the_page_fits_the_screen(site, browser, address):
    with ready_page(browser, address, site("batch")) as page:
        page.get_by_role("button", name="Example 1").click()
        expect(page.locator("#status")).to_contain_text("segmented in")
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        for look, (width, height) in {"light": DESKTOP, "dark": DESKTOP, "phone": PHONE}.items():
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme="dark" if look == "dark" else "light")
            page.screenshot(path=ARTIFACTS / f"web-{look}.png", full_page=True)
            assert page.locator("html").evaluate("element => element.scrollWidth <= element.clientWidth"), look


def test_the_camera_runs_until_it_is_stopped(site, browser, address):
    with ready_page(browser, address, site("batch")) as page:
        page.get_by_label("Other sizes").select_option("resize")
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#rate")).to_have_text(re.compile(r"[1-9].* frames per second"))
        page.get_by_role("button", name="Stop the camera").click()
        expect(page.locator("#status")).to_have_text("The camera is off.")
        assert saved(page, "Save mask").ndim == 2


CHOOSE_AN_IMAGE_AND_A_RULE = """([content, rule]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(content), (byte) => byte.charCodeAt(0))], "newest.png"));
  Object.assign(document.getElementById("file"), { files: files.files }).dispatchEvent(new Event("change"));
  Object.assign(document.getElementById("fit"), { value: rule }).dispatchEvent(new Event("change"));
}"""


def test_a_rule_that_is_chosen_during_a_run_applies_to_the_newest_image(networks, site, browser, address):
    before, newest = (Image.open(PHOTO).resize(size) for size in ((96, 64), (64, 96)))
    with ready_page(browser, address, site("one")) as page:
        segment(page, encoded(before))
        page.evaluate(CHOOSE_AN_IMAGE_AND_A_RULE, [base64.b64encode(encoded(newest)).decode(), "pad"])
        expect(page.locator("#status")).to_contain_text("64 × 96 pixels, segmented in", timeout=60_000)
        expected = Predictor(networks["one"], "cpu", fit="pad")(np.asarray(newest)).mask
        assert (saved(page, "Save mask") == expected).mean() > 0.999


@pytest.mark.slow  # an adapter in software
def test_webgpu_runs_the_network_or_webassembly_replaces_it(networks, site, browser, address):
    image = Image.open(PHOTO).resize((96, 64))
    with ready_page(browser, address, site("batch")) as page:
        expect(page.locator("#status")).to_contain_text("WebAssembly")  # because the adapter is no real GPU
        page.context.route("**/ort.webgpu.min.mjs", lambda route: route.abort())
        page.get_by_label("Runs in").select_option("webgpu")
        expect(page.locator("#status")).to_contain_text("WebGPU cannot run this network")
        expect(page.locator("#status")).to_contain_text("Ready: WebAssembly", timeout=60_000)
        page.context.unroute_all()
        page.get_by_label("Runs in").select_option("webgpu")
        expect(page.locator("#status")).to_have_text("Ready: WebGPU.", timeout=60_000)
        expected = Predictor(networks["batch"], "cpu")(np.asarray(image)).mask
        assert (segment(page, encoded(image)) == expected).mean() > 0.999


def test_a_page_that_is_opened_as_a_file_says_what_to_do(site, browser):
    page = browser.new_page()
    page.goto((site("batch") / "index.html").as_uri())
    expect(page.get_by_role("alert")).to_contain_text("python -m http.server")
    page.close()


def test_the_command_writes_and_replaces_a_site(bpkd, networks, site, tmp_path):
    folder = tmp_path / "site"
    code, out, err = bpkd("export", networks["one"], folder, "--web", "--fit", "pad", "--example", PHOTO)
    assert code == 0, err
    assert f"--directory {folder}" in out
    assert [path.name for path in (folder / "examples").iterdir()] == ["1.jpg"]
    assert config(folder)["fit"] == "pad"
    code, _, err = bpkd("export", networks["batch"], folder, "--web")
    assert code == 0, err
    assert (folder / "model.onnx").read_bytes() == networks["batch"].read_bytes()
    assert (folder / "onnxruntime-web" / "LICENSE").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["site"], "something temporary is left"
    code, _, err = bpkd("export", networks["batch"], folder, "--web", "--input-size", "64x96")
    assert code == 1
    assert "--input-size is not used by the export steps" in err
    steps = plan_steps("m.safetensors", str(folder), "int8", web=True)
    assert steps == ["to_onnx", "quantize", "to_web"]


def config(folder):
    page = (folder / "index.html").read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="config">(.*?)</script>', page)[1])


def test_other_files_are_not_replaced(networks, runtime_files, tmp_path):
    to_web(networks["batch"], tmp_path / "site")
    (tmp_path / "site" / "CNAME").write_text("example.com")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("my page")
    for folder, name in (("site", "CNAME"), ("folder", "index.html")):
        with pytest.raises(ValueError, match=f"would be deleted:\n  {name}\nChoose an empty folder"):
            to_web(networks["batch"], tmp_path / folder)
    assert (tmp_path / "folder" / "index.html").read_text() == "my page"


def test_what_the_browser_cannot_run_is_refused(networks, tmp_path):
    _, metadata = read_onnx(networks["batch"])
    metadata["network"] |= {"in_channels": 4, "mean": (0.5,) * 4, "std": (0.2,) * 4}
    (tmp_path / "bands.onnx").write_bytes(seal_onnx(onnx.load(networks["batch"]), metadata))
    with pytest.raises(ValueError, match=r"takes images of .*browsers read 8-bit RGB images only"):
        to_web(tmp_path / "bands.onnx", tmp_path / "site")
    with pytest.raises(ValueError, match=r"Expected an ONNX file .*bpkd export m.safetensors m.onnx --input-size"):
        to_web("m.safetensors", tmp_path / "site")
    with pytest.raises(ValueError, match=r"Expected `fit` to be one of"):
        to_web(networks["batch"], tmp_path / "site", fit="crop")
    assert not (tmp_path / "site").exists()
