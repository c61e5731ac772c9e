"""The files that the demo generates for its visitors, and their removal."""

from pathlib import Path

import pytest

from bpkd_sdk.serve.demo import uploads
from tests.serve.cases import scene


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


def test_old_files_are_removed_with_their_folders(folder):
    first, second = (Path(uploads.write_picture(scene(32, 32))) for _ in range(2))
    assert first != second
    uploads.remove_old_files(60)
    assert first.is_file()
    uploads.remove_old_files()
    assert list(folder.iterdir()) == []


def test_a_new_file_removes_old_files(folder, monkeypatch):
    old = Path(uploads.write_picture(scene(32, 32)))
    monkeypatch.setattr(uploads, "RETENTION_SECONDS", 0)
    uploads.write_picture(scene(32, 32))
    assert not old.exists()


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_an_unfinished_file_is_removed(folder, how):
    def job():
        with uploads.new_file("all.zip") as path:
            path.write_text("half")
            yield
            raise OSError("no space")

    work = job()
    next(work)
    if how == "stopped":
        work.close()
    else:
        with pytest.raises(OSError, match="no space"):
            next(work)
    assert list(folder.iterdir()) == []
