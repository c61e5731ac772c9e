"""Search for the image files of annotations, and comparison of their sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from bpkd_sdk.data.annotations.model import AnnotatedImage
from bpkd_sdk.data.pairs import IMAGE_SUFFIXES, list_files
from bpkd_sdk.errors import format_list, warn
from bpkd_sdk.images import image_size, read_pixels
from bpkd_sdk.pixels import PixelFormat
from bpkd_sdk.progress import track


def locate_images(
    annotated: Sequence[AnnotatedImage], folder: Path, *, skip_unlabelled: bool, skip_missing: bool
) -> dict[Path, AnnotatedImage]:
    """Find the image file of each annotation.

    A file fits if its path in the folder is the end of the stated path, or the stated path is the end of its path.

    Args:
        annotated: Annotated images.
        folder: Folder of the images.
        skip_unlabelled: Whether images without an annotation are left out instead of refused.
        skip_missing: Whether annotations without an image are left out instead of refused.

    Raises:
        FileNotFoundError: If the folder is missing or empty, or if images are missing.
        ValueError: If an annotation fits several images, or several annotations one image, or if images have no
            annotation.
    """
    files = list_files(folder, IMAGE_SUFFIXES)
    if not files:
        reason = "contains no image" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"The folder {folder} {reason}. Pass the folder of the images: images=... (--images).")
    by_name = defaultdict(list)
    for file in files:
        by_name[_parts(file.name)[-1]].append(file)
    located: dict[Path, AnnotatedImage] = {}
    missing, problems = [], []
    for image in annotated:
        parts = _parts(image.name)
        fitting = [file for file in by_name[parts[-1]] if _fits(parts, _parts(file.relative_to(folder).as_posix()))]
        if len(fitting) > 1:
            problems.append(f"{image.name} fits {' and '.join(map(str, fitting))}")
        elif not fitting:
            missing.append(image.name)
        elif fitting[0] in located:
            problems.append(f"{image.name} and {located[fitting[0]].name} are both annotations of {fitting[0]}")
        else:
            located[fitting[0]] = image
    if problems:
        raise ValueError(f"Annotations and images do not match one to one:\n{format_list(problems)}")
    if missing and (not skip_missing or not located):
        raise FileNotFoundError(
            f"{len(missing)} of {len(annotated)} annotated images are not in {folder}:\n{format_list(missing)}\n"
            f"It contains, for example:\n{format_list(files, limit=3)}\nPass the folder of the images (--images)"
            + (", or skip_missing=True (--skip-missing) to leave these annotations out." if located else ".")
        )
    unlabelled = [file for file in files if file not in located]
    if unlabelled and not skip_unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(files)} images in {folder} have no annotation:\n{format_list(unlabelled)}\n"
            "Pass skip_unlabelled=True (--skip-unlabelled) to leave them out."
        )
    for what, left_out in (("annotations without an image", missing), ("images without an annotation", unlabelled)):
        if left_out:
            warn(f"{len(left_out)} {what} are left out:\n{format_list(left_out, limit=5)}")
    return dict(sorted(located.items()))


def check_sizes(located: dict[Path, AnnotatedImage], pixels: PixelFormat) -> dict[Path, tuple[int, int]]:
    """Return the upright (height, width) of each image; raise ValueError if annotations state other sizes.

    Args:
        located: Annotation of each image.
        pixels: Format of the images.
    """
    sizes, problems = {}, []
    for path, image in track(located.items(), total=len(located), description="Reading image sizes"):
        try:
            has_header = pixels.is_rgb8 and path.suffix.lower() != ".npy"
            size = sizes[path] = image_size(path) if has_header else read_pixels(path, pixels).shape[:2]
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if image.size not in (None, size):
            turned = (
                "; EXIF data turn the image, which is read upright. Store it upright, and annotate it again"
                if image.size == size[::-1]
                else ""
            )
            problems.append(f"{path} is {size}, its annotation is for (height, width) {image.size}{turned}")
    if problems:
        raise ValueError(f"{len(problems)} images do not fit their annotations:\n{format_list(problems)}")
    return sizes


def _parts(path: str) -> tuple[str, ...]:
    """Return the folders and the name of a path, with the suffix in lower case."""
    normal = PurePosixPath(normalize("NFC", path))
    return tuple(part for part in normal.with_suffix(normal.suffix.lower()).parts if part not in ("/", "..", "."))


def _fits(stated: tuple[str, ...], found: tuple[str, ...]) -> bool:
    shorter = min(len(stated), len(found))
    return stated[-shorter:] == found[-shorter:]
