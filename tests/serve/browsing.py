"""`bpkd serve` in a process of its own, and a real browser in front of it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP, PHONE = (1440, 1000), (390, 844)

_QUIET = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip


@contextmanager
def serving(*options: str | Path) -> Iterator[str]:
    """The address of a `bpkd serve` with these options."""
    command = [sys.executable, "-m", "bpkd_sdk.cli", "serve", "--port", "0", "--device", "cpu", *map(str, options)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        told = ""
        while "Stop with" not in told:
            line = server.stdout.readline()
            told += line
            if not line:
                raise RuntimeError(f"bpkd serve has ended:\n{told}")
        yield re.search(r"http://[\w.]+:\d+", told)[0]
    finally:
        server.terminate()
        told, _ = server.communicate(timeout=60)
    assert server.returncode == 0, told
    assert "Stopped." in told


@contextmanager
def browsing() -> Iterator[Browser]:
    """The distribution's Chromium, without a window, with an empty profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, url: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> Iterator[Page]:
    """The page, loaded. In the end: it has asked no other host for anything, and no script of it has failed."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    elsewhere, failures = [], []
    context.on("request", lambda request: is_local(request.url) or elsewhere.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(url)
    page.get_by_role("heading", level=1).wait_for()
    yield page
    context.close()
    assert elsewhere == []
    assert failures == []


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "chrome") or parts.hostname == "127.0.0.1"
