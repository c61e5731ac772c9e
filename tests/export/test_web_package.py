"""The files of onnxruntime-web: fetched once, and checked."""

import shutil

import pytest

from bpkd_sdk.export.web import onnxruntime_web


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def unpacked(runtime_files, folder):
    """Copy the files to where the package of npm has them."""
    shutil.copytree(runtime_files, folder / "dist")
    return folder


def test_an_unpacked_package_fills_the_cache(runtime_files, empty_cache, tmp_path, monkeypatch):
    folder = onnxruntime_web(unpacked(runtime_files, tmp_path / "package"))
    assert folder.is_relative_to(empty_cache)
    assert "MIT License" in (folder / "LICENSE").read_text("utf-8")
    assert list(empty_cache.joinpath("bpkd-sdk").iterdir()) == [folder], "something temporary is left"
    monkeypatch.setenv("PATH", "")
    assert onnxruntime_web() == folder, "a second call needs no npm"


def test_a_file_of_another_version_is_refused(runtime_files, empty_cache, tmp_path):
    package = unpacked(runtime_files, tmp_path / "package")
    with (package / "dist" / "ort.wasm.min.mjs").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"is not onnxruntime-web 1\.30\.0.*\n  ort\.wasm\.min\.mjs\nGet it with"):
        onnxruntime_web(package)
    assert list(empty_cache.joinpath("bpkd-sdk").iterdir()) == []


def test_a_damaged_archive_is_refused(empty_cache, tmp_path):
    (tmp_path / "package.tgz").write_bytes(b"\x1f\x8b and more")
    with pytest.raises(ValueError, match="is not a readable archive of npm"):
        onnxruntime_web(tmp_path / "package.tgz")


def test_without_npm_the_error_names_the_alternative(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"npm is not installed.*npm pack.*onnxruntime_web=PATH.*--onnxruntime-web"):
        onnxruntime_web()
    with pytest.raises(FileNotFoundError, match="no package of onnxruntime-web"):
        onnxruntime_web(tmp_path / "absent.tgz")
