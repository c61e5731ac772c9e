"""Tests that the code on the pages of the methods runs, and that each method has a page."""

import re
from pathlib import Path

import pytest

from bpkd_sdk.losses import METHODS

PAGES = Path(__file__).parents[2] / "docs" / "methods"


def test_every_method_has_a_page_with_its_picture():
    for name in METHODS.keys() - {"bpkd_paper"}:
        page = (PAGES / f"{name}.md").read_text()
        assert f"]({name}.png)" in page
        assert (PAGES / f"{name}.png").stat().st_size < 150_000
        assert f"({name}.md)" in (PAGES / "README.md").read_text()


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # noqa: S102
