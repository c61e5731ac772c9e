import pytest


@pytest.fixture(scope="session")
def compiler():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is made for Linux on x86-64 only")
