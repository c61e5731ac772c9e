"""The wheel: its content, and what runs after `pip install bpkd-sdk` alone, in an environment without torch."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from bpkd_sdk.export import to_onnx
from tests.serve.cases import NAMES, PALETTE, SIZE, network, scene

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
NOT_PACKAGED = {"bpkd_sdk/serve/compose.yaml"}


def copy_sources(folder):
    """Copy what a build needs: files of an earlier build, or of a run, are not part of it."""
    for name in ("bpkd_sdk", "export", "serve"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "docs/licences.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the sources, or the one that BPKD_WHEEL names: the release tests the file that it publishes."""
    if given := os.environ.get("BPKD_WHEEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, copy_sources(folder / "copy")], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """Python of a new environment that has the wheel, and only what the wheel itself depends on."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    subprocess.run(
        [*PIP, "--python", python, "install", "--no-compile", "-c", ROOT / "constraints.txt", wheel], check=True
    )
    return python


def test_the_wheel_has_all_modules_and_data_files_and_those_of_both_linked_folders(wheel):
    walk = os.walk(ROOT / "bpkd_sdk", followlinks=True)
    files = {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in walk
        for name in names
        if not folder.endswith("__pycache__")
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files - NOT_PACKAGED
    assert {name.split("/")[1] for name in packed if name.count("/") > 1} >= {"export", "serve"}


def test_two_builds_of_the_same_sources_are_equal(wheel, tmp_path):
    """Times, owners and permissions of the files do not matter, so that everyone can repeat a release."""
    subprocess.run([*PIP, "install", "--no-compile", "--target", tmp_path / "backend", "hatchling"], check=True)
    built = []
    for name, umask in (("first", 0o022), ("second", 0o077)):
        sources = copy_sources(tmp_path / name)
        for path in sources.rglob("*.py"):
            path.chmod(0o666 & ~umask)
            os.utime(path, (1.5e9 + umask, 1.5e9 + umask))
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "backend")}
        command = [sys.executable, "-m", "hatchling", "build", "-d", sources / "dist"]
        subprocess.run(command, check=True, cwd=sources, env=environment, umask=umask, capture_output=True)
        built.append({path.name: path.read_bytes() for path in (sources / "dist").iterdir()})
    assert built[0] == built[1]
    assert {Path(name).suffix for name in built[0]} == {".whl", ".gz"}
    assert built[0][wheel.name] == wheel.read_bytes()


def test_a_plain_installation_has_no_torch(clean_python):
    code = "import importlib.metadata as m; print(*(d.name.lower() for d in m.distributions()))"
    names = {
        *subprocess.run([clean_python, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    }
    assert not names & {"torch", "torchvision", "onnx", "timm", "gradio", "transformers"}
    assert {"bpkd-sdk", "onnxruntime", "numpy"} <= names


def test_a_plain_installation_runs_exported_files_and_states_what_the_rest_needs(clean_python, tmp_path):
    to_onnx(network(class_names=NAMES, palette=PALETTE), tmp_path / "student.onnx", input_size=SIZE, argmax=False)
    Image.fromarray(scene(*SIZE)).save(tmp_path / "image.png")
    code = """
import pathlib, sys
tests, folder = map(pathlib.Path, sys.argv[1:])
sys.path.append(str(tests))
import without_torch as checks
from bpkd_sdk.images import read_image
file, picture = folder / "student.onnx", folder / "image.png"
_, prediction = checks.check_predictor(file, read_image(picture))
checks.check_mask_files(file, picture, prediction, folder)
checks.check_reports(file, folder)
checks.check_commands(file)
"""
    command = [clean_python, "-P", "-c", code, ROOT / "tests", tmp_path]
    environment = {"COLUMNS": "200", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    bpkd = subprocess.run([clean_python.with_name("bpkd"), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert "predict" in bpkd.stdout
