"""Segments files into a folder of masks with a manifest; a second call continues where the first was interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import bpkd_sdk
from bpkd_sdk.errors import format_list, list_differences
from bpkd_sdk.files import file_sha256, write_atomically, write_json
from bpkd_sdk.images import read_pixels
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.progress import ProgressReport
from bpkd_sdk.runtime.fit import largest_batch
from bpkd_sdk.serve.input_files import InputFile
from bpkd_sdk.serve.predictor import Prediction, Predictor
from bpkd_sdk.serve.video import annotate_video, read_video

MANIFEST = "manifest.jsonl"
CLASSES = "classes.json"

_JPEG_QUALITY = 92
_READERS = 4  # threads that read images while the network runs
_READ_AHEAD = 8  # images that are read and wait for the network
_PNG_END = b"IEND\xaeB`\x82"  # last chunk of a PNG file
_FRAME = re.compile(r"\d{6,}\.png")  # name of the mask of a frame
_EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError)


@dataclass
class SegmentedFiles:
    """The result of `segment_files`.

    Attributes:
        done: Names of the files that were segmented.
        skipped: Names of the files that an earlier call had segmented.
        failed: Reason for each file that could not be segmented, by name.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def segment_files(
    predictor: Predictor,
    files: Sequence[InputFile],
    path: str | Path,
    *,
    overlay: bool = False,
    batch_size: int | None = None,
) -> SegmentedFiles:
    """Segment files, and write their masks, a manifest and the names of the classes to a folder.

    The folder contains for each image ``<name>.png``, a palette PNG whose values are class ids, and for each video a
    folder ``<name>`` with one such file per frame; with `overlay` also ``overlays/<name>.jpg`` or ``.mp4``. `CLASSES`
    contains the names and colours of the classes, as `open_dataset` reads them. `MANIFEST` has one JSON object per
    line: first the network, then one line per file with its size, its share of each class, or the error.

    A file that cannot be segmented is recorded, and the others are segmented. A file that the manifest lists, that has
    not changed since, and whose results exist is skipped, so that the same call continues after an interruption.

    Args:
        predictor: Predictor of the network.
        files: Files of `find_files`. Those in the output folder are left out.
        path: Output folder.
        overlay: Whether to write the overlays too.
        batch_size: Largest number of images of one size that are segmented together; None: as many as
            `bpkd_sdk.runtime.fit.largest_batch` allows.

    Raises:
        ValueError: If files are in the output folder before its first use, a result would replace one of the files, or
            the folder has masks of another network, or of the same with another `fit`.
        KeyboardInterrupt: If interrupted; the message states how many files are done.
    """
    folder = Path(path)
    inside = folder.resolve()
    outside = [file for file in files if not file.path.resolve().is_relative_to(inside)]
    if len(outside) < len(files) and not (folder / MANIFEST).is_file():
        raise ValueError(f"{len(files) - len(outside)} of the files are in {folder}. Choose another output folder.")
    files = outside  # those that are left out are results of an earlier call
    _check_outputs(files, folder)
    manifest = _Manifest(folder / MANIFEST, _setting(predictor))
    if strangers := manifest.find_others(files):
        raise ValueError(
            f"{folder} has masks of files with these names at another place. Choose another output folder:\n"
            f"{format_list(strangers)}"
        )
    result = SegmentedFiles()
    waiting = []
    for file in files:
        is_done = manifest.has(file) and all(_is_whole(folder / name) for name in _outputs(file, overlay))
        result.skipped.append(file.key) if is_done else waiting.append(file)
    classes = {"class_names": predictor.class_names, "palette": predictor.palette}
    write_json(folder / CLASSES, classes)
    try:
        with ProgressReport("Segmenting", len(waiting)) as report:
            for record in _segment(predictor, waiting, folder, overlay, batch_size, report):
                manifest.add(record)
                if "error" in record:
                    result.failed[record["file"]] = record["error"]
                else:
                    result.done.append(record["file"])
                report.advance()
    except KeyboardInterrupt as interrupt:
        done = len(result.skipped) + len(result.done)
        raise KeyboardInterrupt(f"{done} of {len(files)} files are segmented. The same call continues") from interrupt
    manifest.sort()
    return result


def _check_outputs(files: Sequence[InputFile], folder: Path) -> None:
    """Raise ValueError if a result would replace one of the files, or a file that `segment_files` has not written."""
    sources = {file.path.resolve() for file in files}
    results = [folder / name for file in files for name in _outputs(file, True)]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder for the masks, but {folder} is a file. Choose another output folder.")
    is_new = not (folder / MANIFEST).is_file()
    if replaced := [result for result in results if result.resolve() in sources or (is_new and result.exists())]:
        raise ValueError(
            f"{len(replaced)} files that are no results of `bpkd predict` would be replaced. Choose another output "
            f"folder:\n{format_list(replaced)}"
        )


def _is_whole(path: Path) -> bool:
    """Return whether a result exists, and is not a PNG file that was cut short."""
    if not path.is_file():
        return path.is_dir()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_PNG_END)))
        return size > 0 and (path.suffix != ".png" or file.read() == _PNG_END)


def _outputs(file: InputFile, overlay: bool) -> tuple[Path, ...]:
    return (file.mask, file.overlay) if overlay else (file.mask,)


def _setting(predictor: Predictor) -> dict[str, Any]:
    """Return the facts that all masks of a folder share."""
    runtime = predictor.runtime
    is_file = Path(runtime.name).is_file()
    return {
        "network": Path(runtime.name).name if is_file else runtime.name,
        "sha256": file_sha256(runtime.name) if is_file else _hash_weights(runtime),
        "classes": list(predictor.class_names),
        "fit": predictor.fit,
    }


def _hash_weights(runtime: Any) -> str | None:
    """Return the SHA-256 of the weights of a module, or of a model on a server if it states one."""
    if runtime.is_module:
        from bpkd_sdk.models.checkpoint import content_hash

        return content_hash(runtime.module.state_dict())
    weights: str | None = runtime.metadata.get("weights_sha256")
    return weights


class _Manifest:
    """The file that lists what a folder of masks contains.

    Args:
        path: File; it is read if it exists.
        setting: Facts that all masks of the folder share.

    Raises:
        ValueError: If the file has another setting, or is not a manifest.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.setting = {"bpkd_sdk": bpkd_sdk.__version__} | setting
        if path.is_file():
            before, *lines = _read_lines(path)
            if changed := list_differences({**before, "bpkd_sdk": self.setting["bpkd_sdk"]}, self.setting):
                raise ValueError(
                    f"{path.parent} has masks of another network or setting. Choose another output folder, or delete "
                    f"this one:\n{format_list(changed)}"
                )
            self.records = {line["file"]: line for line in lines}
        self.sort()

    def has(self, file: InputFile) -> bool:
        """Return whether the manifest lists a file, without an error and in its present state."""
        record = self.records.get(file.key, {"error": "not listed"})
        return "error" not in record and file.state().items() <= record.items()

    def find_others(self, files: Sequence[InputFile]) -> list[Path]:
        """Return the paths of those files in whose place the folder has masks of another file."""
        names = [Path(key) for key in self.records]
        folders = {folder for name in names for folder in name.parents}
        sources = {
            InputFile(name, name).mask: record["source"]
            for name, record in zip(names, self.records.values(), strict=True)
            if "error" not in record
        }
        return [
            file.path
            for file in files
            if (file.is_video and file.mask in folders) or sources.get(file.mask, file.source) != file.source
        ]

    def add(self, record: dict[str, Any]) -> None:
        """Append the record of one file."""
        self.records[record["file"]] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sort(self) -> None:
        """Write the whole file, with the last record of each file, by name."""
        lines = [self.setting, *(self.records[name] for name in sorted(self.records))]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a manifest; a last line that an interruption has cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last is empty unless it was cut short
    try:
        content = [json.loads(line) for line in lines]
        if content and "network" in content[0] and all("file" in line for line in content[1:]):
            return content
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} is not a manifest of `bpkd predict`, or is damaged. Choose another output folder.")


def _segment(
    predictor: Predictor,
    files: Sequence[InputFile],
    folder: Path,
    overlay: bool,
    batch_size: int | None,
    report: ProgressReport,
) -> Iterator[dict[str, Any]]:
    """Segment files, write their results, and yield the record of each file for the manifest."""

    def limit(image: _ReadImage) -> int:
        height, width = image.pixels.shape[:2]
        return batch_size or largest_batch(predictor.runtime.accepts, (height, width))

    batch: list[_ReadImage] = []
    for file, reading in _read_ahead([file for file in files if not file.is_video], predictor.pixels):
        try:
            image = reading.result()
        except _EXPECTED_ERRORS as error:
            yield _failure(file, error)
            continue
        if batch and (image.pixels.shape != batch[0].pixels.shape or len(batch) >= limit(batch[0])):
            yield from _segment_images(predictor, batch, folder, overlay)
            batch = []
        batch.append(image)
    if batch:
        yield from _segment_images(predictor, batch, folder, overlay)
    for file in files:
        if file.is_video:
            try:
                yield _segment_video(predictor, file, folder, overlay, report)
            except _EXPECTED_ERRORS as error:
                yield _failure(file, error)


@dataclass(frozen=True)
class _ReadImage:
    """An image (H, W, channels) with its file, and the file's state before it was read."""

    file: InputFile
    state: dict[str, int]
    pixels: np.ndarray


def _read(file: InputFile, pixels: PixelFormat) -> _ReadImage:
    return _ReadImage(file, file.state(), read_pixels(file.path, pixels))


def _read_ahead(files: Sequence[InputFile], pixels: PixelFormat) -> Iterator[tuple[InputFile, Future[_ReadImage]]]:
    """Yield files in their order, each with its image, which threads read while earlier images are segmented."""
    waiting: deque[tuple[InputFile, Future[_ReadImage]]] = deque()
    with ThreadPoolExecutor(_READERS) as threads:
        for file in files:
            waiting.append((file, threads.submit(_read, file, pixels)))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft()
        yield from waiting


def _segment_images(
    predictor: Predictor, images: Sequence[_ReadImage], folder: Path, overlay: bool
) -> Iterator[dict[str, Any]]:
    """Segment images of one size together; if that fails, one by one, so that only those that cause it fail."""
    try:
        predictions = predictor([image.pixels for image in images])
    except _EXPECTED_ERRORS as error:
        if len(images) == 1:
            yield _failure(images[0].file, error)
            return
        for image in images:
            yield from _segment_images(predictor, [image], folder, overlay)
        return
    for image, prediction in zip(images, predictions, strict=True):
        try:
            yield _write_image(image, prediction, folder, overlay)
        except _EXPECTED_ERRORS as error:
            yield _failure(image.file, error)


def _write_image(image: _ReadImage, prediction: Prediction, folder: Path, overlay: bool) -> dict[str, Any]:
    write_atomically(folder / image.file.mask, prediction.mask_png())
    if overlay:
        picture = cv2.cvtColor(prediction.overlay(), cv2.COLOR_RGB2BGR)
        _, content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        write_atomically(folder / image.file.overlay, content.tobytes())
    areas, size = _count_classes(prediction), prediction.mask.shape
    return _record(image.file, image.state, size, areas, prediction.class_names)


def _segment_video(
    predictor: Predictor, file: InputFile, folder: Path, overlay: bool, report: ProgressReport
) -> dict[str, Any]:
    """Segment a video, and write a folder with the mask of each frame, and with `overlay` the video with overlays."""
    if not predictor.pixels.is_rgb8:
        raise ValueError(f"a video has three channels of 8 bits, but the network takes images of {predictor.pixels}.")
    state, masks = file.state(), folder / file.mask
    if masks.exists() and not all(_FRAME.fullmatch(entry.name) for entry in masks.iterdir()):
        raise ValueError(f"{masks} exists and has other files than the masks of a video. Rename it.")
    unfinished = masks.with_name(f".{masks.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    areas = np.zeros(len(predictor.class_names), np.int64)
    size: tuple[int, ...] = ()
    frames = 0

    def segment(image: np.ndarray) -> Prediction:
        nonlocal frames, areas, size
        prediction = predictor(image)
        (unfinished / f"{frames:06d}.png").write_bytes(prediction.mask_png())
        areas += _count_classes(prediction)
        size = prediction.mask.shape
        frames += 1
        report.describe(f"{file.name}: {frames} frames")
        return prediction

    try:
        if overlay:
            (folder / file.overlay).parent.mkdir(parents=True, exist_ok=True)
            for _ in annotate_video(file.path, folder / file.overlay, lambda image: segment(image).overlay()):
                pass
        else:
            for image in read_video(file.path):
                segment(image)
        shutil.rmtree(masks, ignore_errors=True)
        unfinished.replace(masks)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        report.describe("Segmenting")
    return _record(file, state, size, areas, predictor.class_names) | {"frames": frames}


def _count_classes(prediction: Prediction) -> np.ndarray:
    """Return the number of pixels of each class, int64 (C,)."""
    return np.bincount(prediction.mask.ravel(), minlength=len(prediction.class_names))


def _record(
    file: InputFile, state: dict[str, int], size: Sequence[int], areas: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return the line of the manifest for a file that was segmented."""
    shares = dict(zip(class_names, (areas / areas.sum()).round(6).tolist(), strict=True))
    return {"file": file.key, "source": file.source, **state, "height": size[0], "width": size[1], "shares": shares}


def _failure(file: InputFile, error: Exception) -> dict[str, Any]:
    return {"file": file.key, "error": str(error) or type(error).__name__}
