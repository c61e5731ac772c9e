"""Files that the page makes for its visitors, and how they go again."""

from pathlib import Path

import pytest

from bpkd_sdk.serve.demo import uploads
from tests.serve.cases import scene


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


def test_what_is_old_goes_with_its_folder(folder):
    first, second = (Path(uploads.write_picture(scene(32, 32))) for _ in range(2))
    assert first != second
    uploads.remove_old_files(60)
    assert first.is_file()
    uploads.remove_old_files()
    assert list(folder.iterdir()) == []


def test_making_a_new_one_removes_the_old(folder, monkeypatch):
    old = Path(uploads.write_picture(scene(32, 32)))
    monkeypatch.setattr(uploads, "RETENTION_SECONDS", 0)
    uploads.write_picture(scene(32, 32))
    assert not old.exists()


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_what_is_not_finished_leaves_nothing(folder, how):
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
