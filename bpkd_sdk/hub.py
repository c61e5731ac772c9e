"""Model folders, local ones and those on the Hugging Face Hub: ``hf://user/name[@revision]``.

A model folder has a checkpoint, an ONNX file and a model card; `bpkd_sdk.save_pretrained` writes it. Only the file that
is needed is downloaded, and nothing in a repository is executed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpkd_sdk.errors import import_optional

CHECKPOINT_FILE, ONNX_FILE, CARD_FILE = "model.safetensors", "model.onnx", "README.md"

CONNECTION_SECONDS = 5.0  # time allowed for an answer of the Hub before its client works offline
_OFFLINE_SECONDS = 60.0  # time until the Hub is tried again
_failures: dict[str, tuple[float, str]] = {}  # for each address of a Hub, when it could not be reached, and why

# A path of "hf://user/name" has one slash less.
_ADDRESS = re.compile(r"(?:hf:/{1,2})?(?P<repository>[^/@:\s]+/[^/@:\s]+)(?:@(?P<revision>\S+))?")


def is_on_hub(source: object) -> bool:
    """Return whether a source is the address of a repository on the Hub."""
    return str(source).startswith("hf:/") if isinstance(source, (str, Path)) else False


def is_model_folder(source: object) -> bool:
    """Return whether a source is a repository on the Hub, or a local folder with a checkpoint or an ONNX file."""
    if not isinstance(source, (str, Path)):
        return False
    return is_on_hub(source) or any(Path(source, file).is_file() for file in (CHECKPOINT_FILE, ONNX_FILE))


def parse_address(address: str | Path) -> tuple[str, str | None]:
    """Return the repository ``user/name`` and the revision of an address ``[hf://]user/name[@revision]``.

    Raises:
        ValueError: If the address has another form.
    """
    match = _ADDRESS.fullmatch(str(address))
    if match is None:
        raise ValueError(
            f"Expected the address of a repository like 'hf://user/name' or 'hf://user/name@revision', but got "
            f"{str(address)!r}."
        )
    return match["repository"], match["revision"]


def find_file(folder: str | Path, file: str) -> Path:
    """Return the path of a file in a model folder; a file on the Hub is downloaded unless the cache contains it.

    Raises:
        FileNotFoundError: If the folder does not contain the file.
        RuntimeError: If the repository cannot be reached or read; the message states what to do.
    """
    if not is_on_hub(folder):
        path = Path(folder, file)
        if not path.is_file():
            raise FileNotFoundError(f"There is no {file} in {folder}.")
        return path
    import_optional("huggingface_hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = parse_address(folder)
    with explained_errors(f"{file} of hf://{repository}"):
        try:
            return Path(hf_hub_download(repository, file, revision=revision, library_name="bpkd-sdk"))
        except LocalEntryNotFoundError:  # neither in the cache nor to be reached
            raise
        except EntryNotFoundError as error:
            raise FileNotFoundError(
                f"The repository hf://{repository} has no {file}. Only repositories with the files of "
                "bpkd_sdk.save_pretrained can be opened; files of other libraries and pickles are not loaded."
            ) from error


def read_origin(folder: str | Path, path: Path) -> dict[str, Any]:
    """Return the origin of a file of a model folder: its source, and its revision and licence if they are known.

    Args:
        folder: The model folder.
        path: Path of the file, as `find_file` returned it.
    """
    if is_on_hub(folder):
        repository, _ = parse_address(folder)
        source, revision = f"hf://{repository}", path.parent.name  # the cache has a folder for each commit
        license_ = read_license(repository, revision)
    else:
        source, revision, license_ = str(folder), None, read_license(str(folder), None)
    facts = {"source": source, "revision": revision, "license": license_}
    return {key: value for key, value in facts.items() if value}


def read_license(source: str, revision: str | None, *, local_files_only: bool = False) -> str | None:
    """Return the licence in the model card (README.md) of a folder or repository; None if it is not known."""
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        if Path(source).is_dir():
            card = Path(source, CARD_FILE)
        else:
            with without_retries():
                card = Path(hf_hub_download(source, CARD_FILE, revision=revision, local_files_only=local_files_only))
        return getattr(ModelCard.load(card).data, "license", None)
    except Exception:  # the hub's client raises many kinds of errors, and a card is not needed
        return None


def check_login(repository: str) -> None:
    """Raise RuntimeError unless the Hub can be reached and accepts the token of this machine.

    Args:
        repository: Repository ``user/name`` that will be written, for the error message.
    """
    from huggingface_hub import HfApi

    with explained_errors(f"hf://{repository}"):
        HfApi(library_name="bpkd-sdk").whoami()


def upload(folder: Path, address: str, *, private: bool) -> str:
    """Upload a folder in one commit to a repository, which is created if it does not exist; return the commit's URL.

    Args:
        folder: Folder to upload; files that only the repository has stay there.
        address: ``user/name``, or ``user/name@branch`` for another branch than main, which is created too.
        private: Whether a new repository is private.

    Raises:
        ValueError: If the repository exists and is public, but `private` is True.
        RuntimeError: If the Hub refuses the upload or cannot be reached; the message states what to do.
    """
    from huggingface_hub import HfApi

    repository, branch = parse_address(address)
    api = HfApi(library_name="bpkd-sdk")
    with explained_errors(f"hf://{repository}"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ValueError(
                f"The repository hf://{repository} exists and is public, but got private=True. Make it private in its "
                "settings on the Hub, or choose another name."
            )
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message="Upload the model folder of bpkd-sdk",
        )
    return str(commit.commit_url)


@contextmanager
def without_retries() -> Iterator[str | None]:
    """Let the Hub's client work offline, with its cache, within a ``with`` block if the Hub does not answer in seconds.

    Otherwise the client would try for minutes and print every attempt. The block gets the reason; None if the Hub
    answers.
    """
    from huggingface_hub import constants

    before, reason = constants.HF_HUB_OFFLINE, _why_unreachable()
    constants.HF_HUB_OFFLINE = reason is not None
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def _why_unreachable() -> str | None:
    """Return the reason why the Hub cannot be reached; None if it answers."""
    from huggingface_hub import constants, get_session

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 forbids it"
    if address in _failures and time.monotonic() - _failures[address][0] < _OFFLINE_SECONDS:
        return _failures[address][1]
    try:
        get_session().head(address, timeout=CONNECTION_SECONDS)
    except Exception as error:  # the client's HTTP library differs between its versions
        reason = f"{address} cannot be reached ({type(error).__name__}: {error})"
        _failures[address] = time.monotonic(), reason
        return reason
    return None


@contextmanager
def explained_errors(what: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one RuntimeError of one line that states what to do.

    Args:
        what: File or repository that is read or written, for the message.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The client's HTTP library differs between its versions.
    http_error: Any = HfHubHTTPError.__bases__[0]
    log_in = "Log in once with `hf auth login`, or set HF_TOKEN to a token"
    try:
        with without_retries():
            yield
    except LocalTokenNotFoundError as error:
        raise RuntimeError(f"{what}: this machine has no token for the Hub. {log_in} that may write.") from error
    except LocalEntryNotFoundError as error:
        raise RuntimeError(
            f"{what} is not in the cache {constants.HF_HUB_CACHE}, and the Hub cannot be reached. Connect to the "
            "internet once (without HF_HUB_OFFLINE=1), or copy that folder from a machine that has it."
        ) from error
    except GatedRepoError as error:
        raise RuntimeError(f"{what}: access must be granted on the page of the repository. Then: {log_in}.") from error
    except RevisionNotFoundError as error:
        raise RuntimeError(f"{what}: the repository has no such revision. Pass a branch, a tag or a commit.") from error
    except RepositoryNotFoundError as error:
        raise RuntimeError(
            f"{what}: there is no such repository, or it is private. Check the name. {log_in} that may read it."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise RuntimeError(f"{what}: the Hub denies access ({status}). {log_in} that may write there.") from error
        raise RuntimeError(f"{what}: the Hub answers {str(error).splitlines()[0]}") from error
    except (OfflineModeIsEnabled, http_error) as error:
        raise RuntimeError(
            f"{what}: the Hub cannot be reached ({type(error).__name__}). Connect to the internet, without "
            "HF_HUB_OFFLINE=1."
        ) from error
