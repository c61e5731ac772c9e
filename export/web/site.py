"""Writes a static web site that segments images and camera frames in the browser.

The site needs no program on its server and no other host: one page, the ONNX file, and the files of onnxruntime-web.
The page runs `engine.js` in a worker, which repeats the rule `fit` of `bpkd_sdk.runtime.fit` in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import bpkd_sdk
from bpkd_sdk.classes import names_and_colors
from bpkd_sdk.colors import overlay_colors
from bpkd_sdk.errors import format_list, import_optional
from bpkd_sdk.export.web.package import onnxruntime_web as fetch_onnxruntime_web
from bpkd_sdk.files import exported_path, file_sha256, replaced_folder
from bpkd_sdk.images import ImageSource, read_image
from bpkd_sdk.runtime.fit import MAX_PIXELS, WINDOW_SIDE, Fit, check_fit
from bpkd_sdk.runtime.onnx_file import read_onnx
from bpkd_sdk.spec import NetworkSpec

_PAGE, _NETWORK, _RUNTIME, _EXAMPLES = "index.html", "model.onnx", "onnxruntime-web", "examples"
_GENERATOR = '<meta name="generator" content="bpkd-sdk'
_FOLDER, _PACKAGE = Path(__file__).parent, Path(bpkd_sdk.__file__).parent


@dataclass(frozen=True)
class WebReport:
    """Result of `to_web`.

    Attributes:
        path: The page, ``index.html`` in the folder of the site.
        size: Size of all files of the site in bytes.
    """

    path: Path
    size: int

    @property
    def serve_command(self) -> str:
        """Shell command that serves the site at http://localhost:8000, to this machine."""
        return shlex.join(["python", "-m", "http.server", "--bind", "localhost", "--directory", str(self.path.parent)])


def to_web(
    source: str | Path,
    path: str | Path,
    *,
    fit: Fit = "slide",
    examples: Sequence[ImageSource] | None = None,
    onnxruntime_web: str | Path | None = None,
) -> WebReport:
    """Write a folder that any web server can serve: a page that segments images and camera frames in the browser.

    The page runs the ONNX file in WebAssembly, or in WebGPU where the browser has it and can run the network. It shows
    mask, boundaries, classes and time per frame, and it contacts no other host. Its masks are those of `Predictor` with
    the same `fit`, except for the browser's own decoding of JPEG files and of images with more than 8 bits per channel.

    Args:
        source: ONNX file of `to_onnx` or `quantize` for 8-bit RGB images.
        path: Folder to write: ``index.html``, ``model.onnx``, ``examples`` and ``onnxruntime-web``, 41 MB besides the
            ONNX file. A site that this function wrote before is replaced.
        fit: Rule for images that the file does not accept, with which the page starts; see `bpkd_sdk.runtime.fit`.
        examples: Images that the page offers; they are written as JPEG files without metadata. None: three embedded
            photographs.
        onnxruntime_web: Package of onnxruntime-web; None: npm fetches it. See `bpkd_sdk.export.web.onnxruntime_web`.

    Raises:
        FileNotFoundError: If the source, an example or the package does not exist.
        ValueError: If the source is not an ONNX file of bpkd-sdk for 8-bit RGB images, an example is not an image, the
            package is another one, or the folder contains other files.
        RuntimeError: If npm is needed and missing, or fails.
    """
    check_fit(fit)
    source, target = exported_path(source), Path(path)
    config = _describe(source, fit)
    _check_target(target)
    if examples is None:
        examples = sorted((_PACKAGE / "data" / "photos").glob("*.jpg"))
    images = [read_image(example) for example in examples]
    runtime = fetch_onnxruntime_web(onnxruntime_web)
    with replaced_folder(target) as site:
        shutil.copytree(runtime, site / _RUNTIME)
        shutil.copyfile(source, site / _NETWORK)
        (site / _EXAMPLES).mkdir()
        for index, image in enumerate(images, 1):
            name = f"{_EXAMPLES}/{index}.jpg"
            Image.fromarray(image).save(site / name, quality=95, subsampling=0)
            config["examples"].append(name)
        (site / _PAGE).write_text(_render(config), "utf-8")
    return WebReport(target / _PAGE, sum(file.stat().st_size for file in target.rglob("*") if file.is_file()))


def _describe(source: Path, fit: Fit) -> dict[str, Any]:
    """Return the facts of an ONNX file that the page needs, as plain JSON values."""
    if source.suffix.lower() != ".onnx":
        raise ValueError(
            f"Expected an ONNX file for the web site, but got {source}. Write one first: bpkd export {source} "
            f"{source.with_suffix('.onnx').name} --input-size HEIGHTxWIDTH"
        )
    _, metadata = read_onnx(source)
    spec = NetworkSpec.from_dict(metadata["network"])
    if not spec.pixels.is_rgb8:
        raise ValueError(
            f"{source} takes images of {spec.pixels}, and browsers read 8-bit RGB images only. Use `bpkd serve`, which "
            "reads all images."
        )
    names, palette = names_and_colors(spec)
    sha256 = file_sha256(source)
    return {
        "name": source.name,
        "network": spec.name,
        "file": f"{_NETWORK}?sha256={sha256[:16]}",  # a browser then never runs an old file from its cache
        "bytes": source.stat().st_size,
        "precision": metadata["precision"],
        "size": None if metadata.get("dynamic_size", False) else metadata["input_size"],
        "preprocess": metadata["preprocess"],
        "argmax": metadata["argmax"],
        "mean": spec.mean,
        "std": spec.std,
        "padding": spec.mean_pixel,
        "classes": [{"name": name, "color": color} for name, color in zip(names, overlay_colors(palette), strict=True)],
        "fit": fit,
        "maxPixels": MAX_PIXELS,
        "windowSide": WINDOW_SIDE,
        "runtime": f"{_RUNTIME}/",
        "examples": [],
    }


def _check_target(target: Path) -> None:
    """Raise ValueError unless a folder is absent, empty, or contains only what `to_web` wrote."""
    if not target.exists():
        return
    if target.resolve() == Path.cwd():
        raise ValueError(
            f"The web site cannot replace the current folder ({target}). Name a folder in it, such as site."
        )
    if not target.is_dir():
        raise ValueError(f"Expected a folder for the web site, but {target} is a file. Choose another path.")
    names = {file.name for file in target.iterdir()}
    others = sorted(names - {_PAGE, _NETWORK, _RUNTIME, _EXAMPLES})
    page = target / _PAGE
    if others or (names and not (page.is_file() and _GENERATOR in page.read_text("utf-8", errors="replace"))):
        raise ValueError(
            f"{target} contains files that are not of a web site of bpkd-sdk, and would be deleted:\n"
            f"{format_list(others or sorted(names))}\nChoose an empty folder."
        )


def _render(config: dict[str, Any]) -> str:
    """Return the page: a file that contains its style, its scripts and the facts of the network."""
    jinja2 = import_optional("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((_FOLDER / "page.html.jinja").read_text("utf-8"))
    style, script, engine = ((_FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js", "engine.js"))
    icon = (_PACKAGE / "serve" / "demo" / "favicon.svg").read_bytes()
    return str(
        template.render(
            generator=f"bpkd-sdk {bpkd_sdk.__version__}",
            config=config,
            style=style,
            script=script,
            engine=engine,
            style_hash=_source_hash(style),
            script_hash=_source_hash(script),
            icon=base64.b64encode(icon).decode(),
        )
    )


def _source_hash(text: str) -> str:
    """Return the source expression by which a Content-Security-Policy allows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
