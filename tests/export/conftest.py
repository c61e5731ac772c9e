import shutil

import pytest

from bpkd_sdk.export.web import onnxruntime_web
from tests.conftest import missing


@pytest.fixture(scope="session")
def compiler():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is made for Linux on x86-64 only")


@pytest.fixture(scope="session")
def runtime_files():
    """The folder of onnxruntime-web, fetched by npm once per user."""
    if shutil.which("npm") is None:
        missing("npm is not installed")
    return onnxruntime_web()
