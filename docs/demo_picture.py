"""Take the screenshot of the demo for the README: `bpkd serve` with the networks of the quickstart, in a browser.

Run it in the folder of the repository:

    make quickstart
    PYTHONPATH=. python docs/demo_picture.py quickstart docs/demo.webp
"""

import io
import sys
from pathlib import Path

from PIL import Image

from tests.serve.browsing import launch_browser, open_page, serving


def main(quickstart: Path, path: Path) -> None:
    """Open the page, choose an example, wait for the latencies, and write a screenshot."""
    networks = ["--teacher", quickstart / "teacher/last.safetensors"]
    networks += ["--student", quickstart / "student_bpkd/last.safetensors", "--student", quickstart / "student.onnx"]
    with serving(*networks) as url, launch_browser() as browser, open_page(browser, url, (1280, 900)) as page:
        page.get_by_role("button", name="Example 3", exact=True).click()
        page.locator("#cost").get_by_text("ms").nth(1).wait_for()
        page.wait_for_timeout(1000)
        screenshot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    screenshot.convert("RGB").save(path, quality=88, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
