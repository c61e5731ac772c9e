"""The programs of docs/deploy.md run as they stand there, and return the masks of `Predictor`.

The files have the names that the programs use. The student exists twice: in the folder "any" it accepts images of any
size, and in "fixed" of 96x128 pixels. The photo is stored lying, with its orientation in EXIF.
"""

import base64
import functools
import hashlib
import http.server
import io
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch import nn

import bpkd_sdk
from bpkd_sdk.export import to_onnx, to_triton
from bpkd_sdk.export.web import onnxruntime_web
from tests.conftest import ROOT, missing
from tests.programs import read_programs
from tests.serve.browsing import CHROMIUM, launch_browser, open_page
from tests.serve.cases import NAMES, PALETTE, network, served

PAGE = ROOT / "docs" / "deploy.md"
PROGRAMS = read_programs(PAGE)
SIZES = ("any", "fixed")
CLOSE = 0.98  # share of pixels with the same class if another library resizes the image; the network is noisy

# A package of the npm registry that contains the files of an official release of ONNX Runtime: headers, and the library
# for Linux. Microsoft's own packages of PyPI and npm have no headers.
HEADERS = "com.github.asus4.onnxruntime@0.4.9"
HEADERS_SHA512 = "BkzxduSZ9IkeDP6Q8lz2TFU2ie7hSSvS7ZIfzMooExoq0CNzJnuuGaUJ7IsojBgqO4ouD1jXah8OYyJbCN29Fg=="


def program(title, language):
    [code] = [code for name, code in PROGRAMS[title] if name == language]
    return code


def run_python(code, folder):
    """Run a program in a process of its own, and check that it has imported nothing of this package."""
    check = "import sys; assert not {'bpkd_sdk', 'torch', 'cv2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_ids(path):
    return np.asarray(Image.open(path))


def masks_of_the_predictor(folder):
    return bpkd_sdk.Predictor(folder / "student.onnx", "cpu", fit="resize")(folder / "photo.jpg").mask


def assert_same(mask, folder):
    expected = masks_of_the_predictor(folder)
    assert mask.shape == expected.shape
    assert len(np.unique(expected)) == len(NAMES)
    if folder.name == "any":
        np.testing.assert_array_equal(mask, expected)
    else:
        assert (mask == expected).mean() > CLOSE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    model = network(class_names=NAMES, palette=PALETTE)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for size in SIZES:
        (folder / size).mkdir()
        to_onnx(model, folder / size / "student.onnx", input_size=(96, 128), dynamic_size=size == "any")
        with Image.open(ROOT / "bpkd_sdk" / "data" / "photos" / "chelsea.jpg") as photo:
            photo.crop((60, 20, 263, 170)).save(folder / size / "photo.jpg", quality=95, exif=exif)
        (folder / size / "network.json").write_text(json.dumps(model.spec.to_dict()))
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_python_has_ten_lines_and_needs_onnxruntime_alone(files, size):
    run_python(program("Python", "python"), files / size)
    assert_same(read_ids(files / size / "mask.png"), files / size)
    assert len(list(filter(None, program("Python", "python").splitlines()))) <= 10


def test_python_puts_transparent_parts_over_white(files, tmp_path):
    shutil.copy(files / "any" / "student.onnx", tmp_path)
    with Image.open(files / "any" / "photo.jpg") as photo:
        photo.putalpha(Image.linear_gradient("L").resize(photo.size).point(lambda value: 255 * (value > 100)))
        photo.save(tmp_path / "photo.jpg", "PNG")
    run_python(program("Python", "python"), tmp_path)
    np.testing.assert_array_equal(read_ids(tmp_path / "mask.png"), masks_of_the_predictor(tmp_path))


def test_the_readme_contains_the_program():
    readme = (ROOT / "README.md").read_text()
    deploy = readme[readme.index("\n## Deploy\n") :]
    assert re.search(r"```python\n(.*?)```", deploy, re.DOTALL)[1] == program("Python", "python")


def test_names_and_colors_are_read_from_the_file(files, tmp_path):
    shutil.copy(files / "any" / "student.onnx", tmp_path)
    ids = np.arange(20, dtype=np.uint8).reshape(4, 5) % len(NAMES)
    Image.fromarray(ids).save(tmp_path / "mask.png")
    printed = run_python(program("Class names and colours", "python"), tmp_path)
    assert printed.strip() == str(dict(enumerate(NAMES)))
    colored = Image.open(tmp_path / "colors.png")
    np.testing.assert_array_equal(np.asarray(colored), ids)
    np.testing.assert_array_equal(np.asarray(colored.convert("RGB")), np.array(PALETTE)[ids])
    assert json.loads((tmp_path / "network.json").read_text())["palette"] == [list(color) for color in PALETTE]


def test_four_channels_and_logits(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)).eval()
    facts = {"in_channels": 4, "value_range": (0, 4095), "mean": (0.5,) * 4, "std": (0.3,) * 4}
    model.spec = bpkd_sdk.NetworkSpec(None, 3, **facts)
    to_onnx(model, tmp_path / "satellite.onnx", input_size=(48, 64), argmax=False)
    bands = np.random.default_rng(0).integers(0, 4096, (48, 64, 4), dtype=np.uint16)
    np.save(tmp_path / "satellite.npy", bands)
    run_python(program("Other images, and logits", "python"), tmp_path)
    expected = bpkd_sdk.Predictor(tmp_path / "satellite.onnx", "cpu")(bands).mask
    assert len(np.unique(expected)) == 3
    np.testing.assert_array_equal(np.load(tmp_path / "mask.npy"), expected)


@pytest.fixture(scope="module")
def onnxruntime_for_cpp():
    """Folder with `include` and `lib` of ONNX Runtime, in the cache of the user; npm fetches it once (150 MB)."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"{HEADERS} has no library of ONNX Runtime for {sys.platform} on {platform.machine()}")
    for name in ("npm", "cmake", "g++"):
        if shutil.which(name) is None:
            missing(f"{name} is not installed")
    folder = Path.home() / ".cache" / "bpkd-sdk" / HEADERS
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.with_name(f"{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        fetch_onnxruntime(draft)
        draft.rename(folder)
    return folder


def fetch_onnxruntime(folder):
    for part in ("include", "lib"):
        (folder / part).mkdir(parents=True)
    subprocess.run(["npm", "pack", "--silent", "--ignore-scripts", HEADERS], cwd=folder, check=True)
    [archive] = folder.glob("*.tgz")
    assert base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == HEADERS_SHA512
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if path.match("ios-arm64/onnxruntime.framework/Headers/*.h"):
                (folder / "include" / path.name).write_bytes(members.extractfile(member).read())
            elif path.match("Plugins/Linux/x64/libonnxruntime.so"):
                (folder / "lib" / "libonnxruntime.so.1").write_bytes(members.extractfile(member).read())
    (folder / "lib" / "libonnxruntime.so").symlink_to("libonnxruntime.so.1")
    archive.unlink()


def test_cpp(files, tmp_path, onnxruntime_for_cpp):
    (tmp_path / "segment.cpp").write_text(program("C++", "cpp"))
    (tmp_path / "CMakeLists.txt").write_text(program("C++", "cmake"))
    (tmp_path / "onnxruntime").symlink_to(onnxruntime_for_cpp)
    shutil.copy(files / "any" / "student.onnx", tmp_path)
    with Image.open(files / "any" / "photo.jpg") as photo:
        ImageOps.exif_transpose(photo).save(tmp_path / "photo.ppm")
    subprocess.run(["bash", "-ec", program("C++", "bash")], cwd=tmp_path, check=True)
    assert_same(read_ids(tmp_path / "mask.pgm"), files / "any")

    command = [tmp_path / "build" / "segment", files / "fixed" / "student.onnx", tmp_path / "photo.ppm", tmp_path / "m"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"Got: 203 Expected: 96", done.stderr)
    (tmp_path / "photo.ppm").write_bytes(b"P6\n128 96\n255\n" + bytes(1000))
    assert "cut short" in subprocess.run(command, capture_output=True, text=True).stderr
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def site(files):
    """URL of a server of static files."""
    for size in SIZES:
        (files / size / "index.html").write_text(program("JavaScript in a browser", "html"))
        (files / size / "onnxruntime-web").symlink_to(onnxruntime_web())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_javascript(files, site):
    if CHROMIUM is None:
        missing("Chromium is not installed: apt-get install chromium")
    with launch_browser() as browser:
        for size in SIZES:
            with open_page(browser, f"{site}/{size}/") as page:
                page.locator("input:enabled").wait_for()
                page.set_input_files("input", files / size / "photo.jpg")
                page.wait_for_function("document.querySelector('canvas').height == 203")
                png = page.evaluate("document.querySelector('canvas').toDataURL().split(',')[1]")
            colors = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
            is_class = (colors[:, :, None] == np.array(PALETTE)).all(-1)
            assert is_class.any(-1).all()
            assert_same(is_class.argmax(-1), files / size)


def test_curl(files, tmp_path):
    shutil.copy(files / "any" / "photo.jpg", tmp_path)
    predictor = bpkd_sdk.Predictor(files / "any" / "student.onnx", "cpu")
    with served(predictor) as server:
        command = program("Any language, over HTTP", "bash").replace(
            "http://127.0.0.1:7860", str(server.client.base_url)
        )
        subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    np.testing.assert_array_equal(read_ids(tmp_path / "mask.png"), predictor(tmp_path / "photo.jpg").mask)


def test_triton(files, triton):
    for size in SIZES:
        to_triton(files / size / "student.onnx", triton.repository, name=f"student_{size}", backend="python")
        triton.load(f"student_{size}")
        code = program("Triton Inference Server", "python").replace('"student"', f'"student_{size}"')
        run_python(code.replace("localhost:8000", f"localhost:{triton.http_port}"), files / size)
        assert_same(read_ids(files / size / "mask.png"), files / size)
