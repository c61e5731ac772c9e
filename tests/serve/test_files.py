"""Files that the page makes for its visitors, and how they go again."""

from pathlib import Path

import pytest

from bpkd_sdk.serve.demo import files
from tests.serve.cases import scene


@pytest.fixture(autouse=True)
def uploads(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


def test_what_is_old_goes_with_its_folder(uploads):
    first, second = (Path(files.write_picture(scene(32, 32))) for _ in range(2))
    assert first != second
    files.remove_old(60)
    assert first.is_file()
    files.remove_old()
    assert list(uploads.iterdir()) == []


def test_making_a_new_one_removes_the_old(uploads, monkeypatch):
    old = Path(files.write_picture(scene(32, 32)))
    monkeypatch.setattr(files, "SECONDS", 0)
    files.write_picture(scene(32, 32))
    assert not old.exists()


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_what_is_not_finished_leaves_nothing(uploads, how):
    def job():
        with files.new_file("all.zip") as path:
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
    assert list(uploads.iterdir()) == []
