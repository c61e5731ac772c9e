"""The picture of the demo in the README: `bpkd serve` on the quickstart's networks, in a real browser.

make quickstart
PYTHONPATH=. python docs/demo_picture.py quickstart docs/demo.webp
"""

import io
import sys
from pathlib import Path

from PIL import Image

from tests.serve.browsing import browsing, serving, visiting


def main(quickstart: Path, target: Path) -> None:
    """Open the page, choose an example, wait for the latencies, keep what is to be seen."""
    networks = ["--teacher", quickstart / "teacher/last.safetensors"]
    networks += ["--student", quickstart / "student_bpkd/last.safetensors", "--student", quickstart / "student.onnx"]
    with serving(*networks) as url, browsing() as browser, visiting(browser, url, (1280, 900)) as page:
        page.get_by_role("button", name="Example 3", exact=True).click()
        page.locator("#cost").get_by_text("ms").nth(1).wait_for()
        page.wait_for_timeout(1000)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").save(target, quality=88, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
