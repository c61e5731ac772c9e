"""Fetches onnxruntime-web, which runs networks in a browser, and checks its files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from bpkd_sdk.errors import format_list
from bpkd_sdk.files import file_sha256

ONNXRUNTIME_WEB = "1.30.0"

# SHA-256 of each file of onnxruntime-web that a site needs, in its package's folder dist. The first three run networks
# in WebAssembly, the other three in WebGPU too.
_RUNTIME_FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
_LICENSE = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def onnxruntime_web(package: str | Path | None = None) -> Path:
    """Return a folder with the files of onnxruntime-web that run a network in a browser.

    The folder contains ``ort.wasm.min.mjs`` for WebAssembly (14 MB with the files that it loads),
    ``ort.webgpu.min.mjs`` for WebAssembly and WebGPU (27 MB), and ``LICENSE``. The SHA-256 of every file is checked at
    each call.

    Args:
        package: onnxruntime-web 1.30.0: the archive that ``npm pack onnxruntime-web@1.30.0`` writes, or its unpacked
            folder, such as ``node_modules/onnxruntime-web``. None: npm fetches the archive. In all cases the files are
            kept in the user's cache, ``~/.cache/bpkd-sdk`` (below ``XDG_CACHE_HOME`` if it is set), and used from
            there in later calls.

    Raises:
        FileNotFoundError: If `package` does not exist.
        RuntimeError: If the files are not in the cache and npm is missing or fails.
        ValueError: If a file is missing in `package` or differs from that of onnxruntime-web 1.30.0.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bpkd-sdk"
    folder = cache / f"onnxruntime-web-{ONNXRUNTIME_WEB}"
    if package is not None and not Path(package).exists():
        raise FileNotFoundError(f"There is no package of onnxruntime-web at {package}.")
    if package is None and not _list_altered(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        source = Path(package) if package is not None else _fetch_archive(Path(temporary))
        files = Path(temporary) / "files"
        files.mkdir()
        (files / "LICENSE").write_text(_LICENSE, "utf-8")
        if source.is_dir():
            for name in _RUNTIME_FILES:
                if (source / "dist" / name).is_file():
                    shutil.copyfile(source / "dist" / name, files / name)
        else:
            _unpack(source, files)
        if altered := _list_altered(files):
            raise ValueError(
                f"{source} is not onnxruntime-web {ONNXRUNTIME_WEB}: it lacks these files, or has others of these "
                f"names:\n{format_list(altered)}\nGet it with: npm pack onnxruntime-web@{ONNXRUNTIME_WEB}"
            )
        if _list_altered(folder):  # otherwise another process may read the files of the folder
            shutil.rmtree(folder, ignore_errors=True)
            files.rename(folder)
    return folder


def _list_altered(folder: Path) -> list[str]:
    """Return the names of the files of onnxruntime-web that are missing in a folder or have another content."""
    return [
        name
        for name, digest in _RUNTIME_FILES.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != digest
    ]


def _fetch_archive(folder: Path) -> Path:
    """Let npm fetch the archive of onnxruntime-web into a folder, and return its path."""
    npm = shutil.which("npm")
    advice = (
        f"Where npm works, `npm pack onnxruntime-web@{ONNXRUNTIME_WEB}` writes an archive. Pass its path as "
        "onnxruntime_web=PATH, or to the command as --onnxruntime-web PATH."
    )
    if npm is None:
        raise RuntimeError(f"A web site needs onnxruntime-web, which npm fetches, and npm is not installed. {advice}")
    command = [npm, "pack", f"onnxruntime-web@{ONNXRUNTIME_WEB}", "--ignore-scripts", "--loglevel=error"]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=1000"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)  # noqa: S603  (constants alone)
    if result.returncode != 0:
        raise RuntimeError(f"npm could not fetch onnxruntime-web {ONNXRUNTIME_WEB}:\n{result.stderr.strip()}\n{advice}")
    return folder / f"onnxruntime-web-{ONNXRUNTIME_WEB}.tgz"


def _unpack(archive: Path, folder: Path) -> None:
    """Write those files of an archive of npm that a site needs into a folder."""
    try:
        with tarfile.open(archive) as members:
            for member in members:
                path = Path(member.name)
                if member.isfile() and path.parent == Path("package/dist") and path.name in _RUNTIME_FILES:
                    content = members.extractfile(member)
                    assert content is not None  # noqa: S101  (a regular file has content)
                    with (folder / path.name).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"{archive} is not a readable archive of npm ({error}). Get it with: npm pack "
            f"onnxruntime-web@{ONNXRUNTIME_WEB}"
        ) from error
