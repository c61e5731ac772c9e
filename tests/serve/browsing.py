"""Helpers that start `bpkd serve` in a separate process, and open its page in a real browser."""

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
    """Start `bpkd serve` with these options, yield its URL, and stop it."""
    command = [sys.executable, "-m", "bpkd_sdk.cli", "serve", "--port", "0", "--device", "cpu", *map(str, options)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = ""
        while "Stop with" not in output:
            line = server.stdout.readline()
            output += line
            if not line:
                raise RuntimeError(f"bpkd serve has ended:\n{output}")
        yield re.search(r"http://[\w.]+:\d+", output)[0]
    finally:
        server.terminate()
        output, _ = server.communicate(timeout=60)
    assert server.returncode == 0, output
    assert "Stopped." in output


@contextmanager
def launch_browser(*flags: str) -> Iterator[Browser]:
    """Start the Chromium of the operating system in headless mode, with an empty profile and these further flags."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*_QUIET, *flags])
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> Iterator[Page]:
    """Load and yield the page. At the end, check that it sent no request to another host and that no script failed."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    external_requests, script_errors = [], []
    context.on("request", lambda request: is_local(request.url) or external_requests.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: script_errors.append(str(error)))
    page.goto(url)
    page.get_by_role("heading", level=1).wait_for()
    yield page
    context.close()
    assert external_requests == []
    assert script_errors == []


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "chrome") or parts.hostname == "127.0.0.1"
