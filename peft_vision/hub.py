"""Upload an artifact folder to the Hugging Face Hub, and download one.

Only what `peft_vision.json` lists, that file and the card ever leave the machine: checkpoints,
logs and hidden files of the same folder stay. Only JSON, safetensors and text ever come in.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import tempfile
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from peft_vision.errors import (
    ArtifactError,
    BadSetting,
    DamagedArtifact,
    JobFailed,
    UnknownName,
    UploadFailed,
)

DOWNLOADED = ("*.json", "*.safetensors", "*.md", "*.txt")
"""Nothing that could be unpickled is ever fetched."""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access"


def is_repo_id(name: str) -> bool:
    """Whether `name` looks like `user/repo` or `user/repo@revision`.

    >>> is_repo_id("me/vit-s-0.4@v1"), is_repo_id("vit_small"), is_repo_id("./me/folder")
    (True, False, False)
    """
    return _REPO_ID.fullmatch(name) is not None


def split_repo_id(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """`user/repo@revision` as the id and the revision.

    Args:
        name: with or without a revision.
        revision: given beside the name.

    Raises:
        BadSetting: not a repository id, or two different revisions.

    >>> split_repo_id("me/vit@v1")
    ('me/vit', 'v1')
    """
    repo_id, _, inside = name.partition("@")
    if not is_repo_id(name) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise BadSetting(
            f"{name!r} is not a repository on the Hub. A repository is user/name or "
            "user/name@revision, of letters, digits, '-', '_' and '.', for example me/vit-s-0.4."
        )
    if inside and revision is not None and inside != revision:
        raise BadSetting(
            f"{name!r} names revision {inside!r}, but revision={revision!r} was given."
        )
    return repo_id, inside or revision


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Check an artifact folder, then upload it; the folder is only read.

    Args:
        folder: as written by `save_pretrained`.
        repo_id: `user/repo` or `user/repo@branch`; the repository is created when it is not there.
        token: by default HF_TOKEN, or the login of `hf auth login`.
        private: for a new repository.
        revision: branch, created when it is not there; by default the main one.
        endpoint: by default HF_ENDPOINT.
        commit_message: the first line of the commit.

    Returns:
        The address of the repository.

    Raises:
        BadSetting: not a repository id.
        DamagedArtifact: the folder is incomplete; nothing was sent.
        UploadFailed: the Hub refused or the connection broke; how to go on is in the message.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    repo_id, revision = split_repo_id(repo_id, revision)
    names = complete_files(folder)
    api = HfApi(endpoint=_endpoint(endpoint), token=token)
    again = _command(folder, repo_id, private=private, revision=revision)

    def upload() -> str:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=commit_message or f"Upload {folder.resolve().name} with peft_vision",
        )
        return f"{url}/tree/{revision}" if revision else str(url)

    try:
        with warnings.catch_warnings():
            # huggingface_hub 2.4 hands files to httpx2 the way that httpx2 2.16 deprecates.
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
            return upload()
    except _failures() as error:
        raise UploadFailed(
            f"{_reason(error, repo_id, api.endpoint)} {folder} is intact. To go on: {again}"
        ) from error


class Savable(Protocol):
    """A model that writes itself as an artifact folder."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the folder."""


def push_model(model: Savable, repo_id: str, **settings: Any) -> str:
    """Save a model and upload it.

    Args:
        model: an AdaptedModel or a CompressedModel.
        repo_id: `user/repo` or `user/repo@branch`.
        settings: as for `push_folder`: token, private, revision, endpoint, commit_message.

    Returns:
        The address of the repository.

    Raises:
        BadSetting: not a repository id.
        UploadFailed: as in `push_folder`; the saved folder is kept, and named in the message.
    """
    name, _ = split_repo_id(repo_id, settings.get("revision"))
    place = Path(tempfile.mkdtemp(prefix="peft-vision-"))
    folder, keep = place / name.partition("/")[2], False
    try:
        model.save_pretrained(folder)
        return push_folder(folder, repo_id, **settings)
    except UploadFailed:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def download(
    repo_id: str,
    revision: str | None = None,
    endpoint: str | None = None,
    *,
    token: str | None = None,
) -> Path:
    """Fetch an artifact into the Hub's cache; files that are there already are not fetched again.

    Args:
        repo_id: `user/repo` or `user/repo@revision`.
        revision: branch, tag or commit; by default the main branch.
        endpoint: by default HF_ENDPOINT.
        token: by default HF_TOKEN, or the login of `hf auth login`.

    Returns:
        The folder in the cache. Nothing in it is checked yet but that it is an artifact.

    Raises:
        BadSetting: not a repository id.
        UnknownName: no such repository or revision, or it is private.
        ArtifactError: the repository holds no artifact.
        JobFailed: the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    from peft_vision.artifact import RECORD

    repo_id, revision = split_repo_id(repo_id, revision)
    address = _endpoint(endpoint)
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            endpoint=address,
            token=token,
            allow_patterns=list(DOWNLOADED),
        )
    except _failures() as error:
        kind = UnknownName if _status(error) in {401, 403, 404} else JobFailed
        raise kind(
            f"Could not download {repo_id}{f'@{revision}' if revision else ''}. "
            f"{_reason(error, repo_id, address, write=False)}"
        ) from error
    if not (Path(folder) / RECORD).is_file():
        raise ArtifactError(
            f"{repo_id} has no {RECORD}, so it is not a model saved by peft_vision. A plain model "
            f"is loaded with create_model, for example create_model('transformers/{repo_id}')."
        )
    return Path(folder)


def complete_files(folder: Path) -> list[str]:
    """Names of the files that make up the artifact in `folder`, after checking each of them.

    Raises:
        DamagedArtifact: it is not an artifact folder, or a file is missing, truncated or altered.
    """
    from peft_vision.artifact import CARD, RECORD, read_record

    listed = list(read_record(folder).get("files") or ())
    strange = [name for name in listed if not any(fnmatch(name, kind) for kind in DOWNLOADED)]
    if strange or not listed:
        found = f"lists {strange[0]}" if strange else "lists no files"
        raise DamagedArtifact(
            f"{folder / RECORD} {found}; an artifact is made of {', '.join(DOWNLOADED)}. Nothing "
            "was sent. Save the model again."
        )
    card = [CARD] if (folder / CARD).is_file() else []
    return list(dict.fromkeys((RECORD, *listed, *card)))


def _endpoint(given: str | None) -> str:
    """The Hub's address: the argument, else HF_ENDPOINT as it is now, else the public one."""
    from huggingface_hub import constants

    return (given or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _command(folder: Path, repo_id: str, *, private: bool, revision: str | None) -> str:
    words = ["peft-vision", "push", str(folder), repo_id]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision is not None else []
    return shlex.join(words)


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises: HTTP errors, transport errors, and its own wrappers around both."""
    from huggingface_hub import errors

    return (errors.HfHubHTTPError, *errors.HfHubHTTPError.__bases__, RuntimeError, ValueError)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _status(error: BaseException) -> int | None:
    """The HTTP status at the bottom of it, if the Hub answered at all."""
    from huggingface_hub.errors import HfHubHTTPError

    answered = [link for link in _chain(error) if isinstance(link, HfHubHTTPError)]
    return answered[0].response.status_code if answered else None


def _reason(error: BaseException, repo_id: str, endpoint: str, *, write: bool = True) -> str:
    """One sentence: what happened and what would have worked."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    links = _chain(error)
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        return "HF_HUB_OFFLINE is set, so nothing was asked of the Hub. Unset it to go online."
    if any(isinstance(link, RevisionNotFoundError) for link in links):
        return f"{repo_id} at {endpoint} has no such revision (404)."
    status = _status(error)
    if status is not None:
        return _answered(status, _said(links), repo_id, endpoint, write=write)
    if any(isinstance(link, PermissionError) for link in links):
        return f"{endpoint} refused the token for {repo_id}. {_LOGIN}."
    said = _said(links)
    advice = "HF_ENDPOINT if it is set"
    if "xet-" in said:
        advice = "if this Hub has no Xet storage, set HF_HUB_DISABLE_XET=1"
    return f"The connection to {endpoint} failed ({said}). Check the network, and {advice}."


def _answered(status: int, said: str, repo_id: str, endpoint: str, *, write: bool) -> str:
    owner = repo_id.partition("/")[0]
    if status == 401:
        return (
            f"{endpoint} does not accept the token for {repo_id} (401)."
            if write
            else f"{repo_id} is not at {endpoint}, or it is private and the login is missing (401)."
        ) + f" {_LOGIN}."
    if status == 403:
        return (
            f"The token may not write to {repo_id} (403). Use one with write access to {owner}, or "
            "a name of your own."
            if write
            else f"{repo_id} is gated or closed to this token (403). Ask for access on its page."
        )
    if status == 404:
        return f"There is no {repo_id} at {endpoint} (404). Check the name."
    if status >= 500:
        return f"{endpoint} is in trouble ({status}). Wait a little."
    return f"{endpoint} refused ({status}: {said})."


def _said(links: list[BaseException]) -> str:
    """What the Hub said, else what the system said, after the client's own words if it has any."""
    from huggingface_hub.errors import HfHubHTTPError

    answered = [link for link in links if isinstance(link, HfHubHTTPError)]
    answers = [" ".join((link.server_message or "").split()) for link in answered]
    spoken = [text for link in reversed(links) if (text := _one_line(link))]
    inner = next((answer for answer in answers if answer), spoken[0] if spoken else "no reason")
    outer = _one_line(links[0]) if type(links[0]) in {RuntimeError, ValueError} else ""
    return f"{outer}: {inner}" if outer and inner not in outer else outer or inner


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
