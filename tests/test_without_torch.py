"""Everything that needs no torch runs in a process that cannot import it, and the rest states what to install."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import bpkd_sdk
from bpkd_sdk.errors import EXTRAS, explain_missing, import_optional
from bpkd_sdk.export import to_onnx
from tests.serve.cases import NAMES, PALETTE, SIZE, network, scene

SCRIPT = Path(__file__).with_name("without_torch.py")


def test_everything_that_needs_no_torch(tmp_path):
    to_onnx(network(class_names=NAMES, palette=PALETTE), tmp_path / "student.onnx", input_size=SIZE, argmax=False)
    Image.fromarray(scene(*SIZE)).save(tmp_path / "image.png")
    command = [sys.executable, SCRIPT, tmp_path / "student.onnx", tmp_path / "image.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all works without torch\n")


def test_the_error_of_a_missing_package_states_its_extra(monkeypatch):
    for package, extra in EXTRAS.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"needs the package '{package}'.*: pip install 'bpkd-sdk\[{extra}\]'"):
            import_optional(package)
    monkeypatch.delitem(sys.modules, "tritonclient.http", raising=False)  # another test may have imported it
    with pytest.raises(ImportError, match=r"'tritonclient'.*'bpkd-sdk\[other\]'"):
        import_optional("tritonclient.http", "other")


def test_each_extra_that_an_error_names_exists_and_installs_the_package():
    extras = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = importlib.metadata.packages_distributions()
    for package, extra in EXTRAS.items():
        required = {re.split(r"[\[>;]", requirement)[0].lower() for requirement in extras[extra]}
        provided = {name.lower().replace("_", "-") for name in distributions.get(package, [])}
        assert not provided or required & provided or package == "starlette", (package, extra)  # fastapi installs it


def test_a_broken_package_is_not_called_missing():
    broken = ImportError("libcudart.so: cannot open shared object file", name="torch")
    message = str(explain_missing(broken))
    assert "'torch', which could not be imported (libcudart.so: cannot open" in message
    unknown = ModuleNotFoundError("No module named 'other'", name="other")
    assert explain_missing(unknown) is unknown


def test_an_error_in_this_package_is_not_called_missing():
    with pytest.raises(ModuleNotFoundError, match="No module named 'bpkd_sdk.nothing'"):
        import_optional("bpkd_sdk.nothing", "train")
    with pytest.raises(AttributeError, match="module 'bpkd_sdk.export' has no attribute 'to_onyx'"):
        _ = bpkd_sdk.export.to_onyx
