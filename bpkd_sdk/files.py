"""Files on disk: atomic writes, JSON, records that are checked field by field, and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from bpkd_sdk.errors import did_you_mean, format_list, no_network, warn
from bpkd_sdk.hub import CHECKPOINT_FILE, ONNX_FILE, is_model_folder

Record = TypeVar("Record")

CHECKPOINT_SUFFIX = ".safetensors"
OPENMMLAB_SUFFIXES = (".pth", ".pt")
ENGINE_SUFFIXES = (".engine", ".plan")
NETWORK_SUFFIXES = (CHECKPOINT_SUFFIX, *OPENMMLAB_SUFFIXES, ".onnx", *ENGINE_SUFFIXES)
# Name of the network for the scenes "shapes" that this package contains; `bpkd_sdk.data.shapes_teacher` trained it.
SHAPES_TEACHER = "shapes-teacher"
LAST_CHECKPOINT = f"last{CHECKPOINT_SUFFIX}"  # the files in the folder of a run
RUN_FILE = "run.json"
HISTORY_FILE = "history.jsonl"
_LIBRARIES = ("smp/", "torchvision/", "transformers/")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds either the old or the new content, never a part of it.

    The content goes to a temporary file beside `path`, is flushed to disk (fsync), and replaces `path` by a rename.
    Missing parent folders are created.

    Args:
        path: File to write.
        content: Bytes of the whole file.

    Raises:
        OSError: If the file cannot be written; a file that was there before is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which replaces `path` if the ``with`` block ends without an error.

    A reader finds either the old or the new folder, except for the moment between two renames, and never a part of the
    new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{state}") for state in ("tmp", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write plain values as indented JSON in UTF-8, atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path, *, unique_keys: bool = False) -> Any:
    """Read a JSON file in UTF-8, with or without a byte-order mark.

    Args:
        path: File to read.
        unique_keys: Whether a key that an object contains twice is an error; otherwise its last value counts.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not JSON; the message names the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if repeated := [key for key in content if [name for name, _ in pairs].count(key) > 1]:
            raise ValueError(f"{path} contains the key {repeated[0]!r} twice in one object. Keep one of them.")
        return content

    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique if unique_keys else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Save it again as UTF-8.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). It may be cut short or damaged.") from error


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_record(kind: type[Record], content: object, source: str) -> Record:
    """Build a dataclass from plain JSON values, with every field's type checked by pydantic.

    Lists become tuples where the field is a tuple. Fields that the class does not have are ignored, unless the class
    sets ``__pydantic_config__ = {"extra": "forbid"}``.

    Args:
        kind: Dataclass to build; its own ``__post_init__`` runs too.
        content: Plain values, as `read_json` returns them.
        source: File or header that the values come from, for the error message.

    Raises:
        ValueError: If a field is missing or has another type; every field that is wrong is named.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or kind.__name__}: {problem['msg']} (got {problem['input']!r:.80})"
            for problem in error.errors(include_url=False)
        ]
        raise ValueError(f"{source} does not hold a valid {kind.__name__}:\n{format_list(problems)}") from error


def exported_path(source: object) -> Path:
    """Return the path of a file that `to_onnx` or another exporter has written; its content is not checked.

    Raises:
        TypeError: If it is no path, as a network or the result of a training run.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"Expected the path of an exported file, but got a {type(source).__name__}. Export the network first: "
            "to_onnx(network, path, input_size=(height, width))."
        )
    return Path(source)


def is_pretrained_name(source: object) -> TypeGuard[str | Path]:
    """Return whether a source is the name of a network with all weights, or a model folder, for `load_model`.

    An existing file is not a name, so that a folder may be called "torchvision" or "transformers".
    """
    prefixes = ("torchvision/", "transformers/")
    if not isinstance(source, (str, Path)) or Path(source).is_file():
        return False
    return str(source) == SHAPES_TEACHER or is_model_folder(source) or str(source).startswith(prefixes)


def is_run_folder(source: object) -> bool:
    """Return whether a source is the folder of a training run."""
    if not isinstance(source, (str, Path)) or not Path(source).is_dir() or is_model_folder(source):
        return False
    return any(Path(source, file).is_file() for file in (LAST_CHECKPOINT, RUN_FILE))


def check_no_run(folder: str | Path) -> None:
    """Raise FileExistsError if a folder contains the records of a run."""
    file = Path(folder, HISTORY_FILE)
    if file.is_file() and file.stat().st_size:
        raise FileExistsError(f"{folder} contains a run already. Pass resume=True to resume it, or another output_dir.")


def find_network(source: Any, *, names: bool = False) -> Any:
    """Return the file of a network: for the folder of a run its last checkpoint, for other sources the source itself.

    A warning states how far a run is that is not finished. Modules and runtimes are returned.

    Args:
        source: Path of a file or folder, address, or name of a network.
        names: Whether the source may also be a name without a library, such as "pspnet_r18", which is not looked up.

    Raises:
        TypeError: If the source cannot be a network, as the result of a training run.
        FileNotFoundError: If a path does not exist, or a folder contains no network.
    """
    if source is not None and not isinstance(source, (str, Path)) and not callable(source):
        raise no_network(source, "a path, a URL, the name of a network, a torch module or a runtime")
    text = str(source)
    if not isinstance(source, (str, Path)) or "://" in text or is_model_folder(source) or Path(source).is_file():
        return source
    is_bare = isinstance(source, str) and Path(text).name == text and not Path(text).suffix
    if is_run_folder(source) and not (names and is_bare):
        file = Path(source) / LAST_CHECKPOINT
        if not file.is_file():
            raise FileNotFoundError(
                f"{source} is the folder of a run that has not written a checkpoint ({LAST_CHECKPOINT}) yet."
            )
        _warn_if_unfinished(file)
        return file
    if text == SHAPES_TEACHER or text.startswith(_LIBRARIES) or (names and is_bare):
        return source
    if Path(source).is_dir():
        raise FileNotFoundError(
            f"The folder {source} contains no network: neither {LAST_CHECKPOINT} of a run, nor {CHECKPOINT_FILE} or "
            f"{ONNX_FILE} of a model folder."
        )
    what = "ONNX file at" if text.lower().endswith(".onnx") else "file or folder"
    raise FileNotFoundError(f"There is no {what} {source}.{_similar_file(Path(source))}")


def _similar_file(path: Path) -> str:
    """Return " Did you mean ...?" for a network with a similar name, or the parent folder that is missing."""
    missing = next((parent for parent in reversed(path.parents) if not parent.is_dir()), path)
    if missing != path:
        return f" There is no folder {missing}."
    suffix = path.suffix.lower()
    suffixes = (suffix,) if suffix in NETWORK_SUFFIXES else NETWORK_SUFFIXES
    return did_you_mean(
        path.name,
        (
            entry.name
            for entry in path.parent.iterdir()
            if entry.suffix.lower() in suffixes or is_run_folder(entry) or is_model_folder(entry)
        ),
    )


def read_facts(file: str | Path) -> dict[str, Any]:
    """Read the facts in a checkpoint of this package without its library, as plain JSON values; empty without any.

    The keys are "network" and "training", among others.
    """
    try:
        with Path(file).open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        return dict(json.loads(header["__metadata__"]["bpkd"]))
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return {}  # whoever reads the weights states the problem


def _warn_if_unfinished(file: Path) -> None:
    """Warn if the checkpoint of a run is not of the last step."""
    try:
        training = read_facts(file)["training"]
        step, steps = training["step"], training["config"]["steps"]
    except (KeyError, TypeError):
        return
    if step < steps:
        warn(f"The run in {file.parent} is at step {step} of {steps}. The network is its last checkpoint.")
